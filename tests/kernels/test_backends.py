"""The choice of a backend: explicit choices work or raise, automatic ones explain themselves."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import pytest
import torch
from test_operator import require

import nsc_kernels as nk
from nsc_kernels import dispatch
from nsc_kernels.contract import Call


def call(**changes: object) -> Call:
    values = {"device": torch.device("cpu"), "dtype": torch.float32, "T": 4, "d_in": 8, "d_out": 8, "offsets": (0, 2)}
    return Call(**{**values, **changes})  # type: ignore[arg-type]


def test_every_backend_is_on_or_says_why() -> None:
    available = nk.available_backends()
    assert set(available) == {"reference", "cpu", "triton", "cuda"}
    assert available["reference"] is True
    assert torch.cuda.is_available() or available["cuda"] is not True
    assert all(reason is True or (isinstance(reason, str) and len(reason) > 5) for reason in available.values())


def test_automatic_choice_prefers_the_native_kernels() -> None:
    require("cpu")
    assert dispatch.select("auto", call()).__name__.endswith("backends.cpu")
    assert dispatch.select("auto", call(device=torch.device("meta"))).__name__.endswith("backends.reference")


def test_an_explicit_choice_raises_where_it_cannot_serve() -> None:
    require("cpu")
    with pytest.raises(RuntimeError, match="'cpu' was asked for and cannot serve this call: .*CPU tensors"):
        dispatch.select("cpu", call(device=torch.device("meta")))
    name = next((n for n, reason in nk.available_backends().items() if reason is not True), None)
    if name is None:
        pytest.skip("every backend is available here")
    with nk.use_backend(name), pytest.raises(RuntimeError, match=f"'{name}' was asked for"):
        bank = nk.AdapterBank.from_factors([torch.ones(1, 4)], [torch.ones(3, 1)])
        nk.merged_lora(torch.ones(2, 4), bank, torch.ones(1))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="use_backend: expected one of auto, .*found 'fast'"):
        nk.use_backend("fast")


def test_choices_nest_and_are_restored_after_an_error() -> None:
    assert dispatch.chosen() == "auto"
    with nk.use_backend("reference"):
        with nk.use_backend("auto"):
            assert dispatch.chosen() == "auto"
        assert dispatch.chosen() == "reference"
    with pytest.raises(KeyError), nk.use_backend("reference"):
        raise KeyError
    assert dispatch.chosen() == "auto"


def test_blocks_of_several_threads_that_overlap_leave_no_choice_behind() -> None:
    first, second = nk.use_backend("reference"), nk.use_backend("cpu")
    before = dispatch.chosen()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.chosen() == "cpu"
    second.__exit__(None, None, None)
    assert dispatch.chosen() == before


def test_a_choice_decorates_functions_that_call_themselves() -> None:
    @nk.use_backend("reference")
    def choices(depth: int) -> list[str]:
        return [dispatch.chosen(), *(choices(depth - 1) if depth else []), dispatch.chosen()]

    assert choices(2) == ["reference"] * 6
    assert dispatch.chosen() == "auto"


def test_what_runs_after_its_call_is_not_decorated() -> None:
    async def coroutine() -> None: ...

    def generator() -> Iterator[None]:
        yield

    async def both() -> AsyncIterator[None]:
        yield

    for function in (coroutine, generator, both):
        with pytest.raises(TypeError, match=f"functions that end where they return, and .*{function.__name__} goes on"):
            nk.use_backend("reference")(function)


def test_what_was_passed_over_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    require("cpu")
    cpu, _ = dispatch.load("cpu")
    monkeypatch.setattr(cpu, "rejects", lambda call: "it is a test")
    dispatch.select.cache_clear()
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="nsc_kernels"):
        for T in range(3):
            assert dispatch.select("auto", call(T=T)).__name__.endswith("reference")
    dispatch.select.cache_clear()
    messages = [record.message for record in caplog.records]
    assert messages == ["cpu torch.float32: backend 'cpu' passed over: it is a test"]


def test_missing_cpu_kernels_are_said_aloud_once() -> None:
    code = """if True:
        import warnings, torch, nsc_kernels as nk
        from nsc_kernels import native
        native.load = lambda name: "libnsc_cpu was not built"
        bank = nk.AdapterBank.from_factors([torch.ones(1, 4)], [torch.ones(3, 1)])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for T in (2, 3):
                nk.merged_lora(torch.ones(T, 4), bank, torch.ones(1))
        print([str(one.message) for one in said])
    """
    (said,) = ast.literal_eval(python(code, NSC_BACKEND="auto").stdout)
    assert said.startswith("nsc_kernels has no CPU kernels here (libnsc_cpu was not built), so that PyTorch")
    assert python(code, NSC_BACKEND="reference").stdout == "[]\n"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_the_environment_chooses() -> None:
    code = "from nsc_kernels.dispatch import chosen; print(chosen())"
    assert python(code, NSC_BACKEND="reference").stdout == "reference\n"
    assert "NSC_BACKEND: expected one of auto" in python(code, NSC_BACKEND="nonsense").stderr


def test_importing_loads_nothing_that_is_not_needed() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import nsc_kernels
added = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(added & {"triton", "transformers", "peft", "sklearn", "matplotlib", "safetensors", "nsc_merge"}))
"""
    assert python(code).stdout == "[]\n"


def test_works_without_the_native_library() -> None:
    code = """
import pathlib, torch, nsc_kernels as nk
from nsc_kernels import native
native.LIBRARY_DIR = pathlib.Path("/nowhere")
print(nk.available_backends()["cpu"])
bank = nk.AdapterBank.from_factors([torch.ones(1, 4)], [torch.ones(3, 1)])
print(nk.merged_lora(torch.ones(1, 4), bank, torch.ones(1)).tolist())
"""
    result = python(code)
    assert "was not built" in result.stdout
    assert "[[4.0, 4.0, 4.0]]" in result.stdout.replace("3.9999998", "4.0").replace("4.000000", "4.0")
