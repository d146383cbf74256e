"""Layers of a build for Hugging Face ``kernels``, under other classes: by hand, and by ``kernels`` itself."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nsc_kernels as nk
import operator_cases as oc
from hub_builds import CASE, loaded, outcome
from nsc_kernels.integrations.hf_kernels import build_layout, layer_mapping, source_layout, write
from nsc_kernels.integrations.hf_kernels.layout import SOURCE, VARIANT

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hub") / "out", build_layout())


@pytest.fixture(scope="module")
def build(out: Path) -> ModuleType:
    return loaded(out)


class Packed(nn.Module):
    """A bank as somebody else would write one, not whitened."""

    def __init__(self, ranks: tuple[int, ...], d_in: int, d_out: int) -> None:
        super().__init__()
        R = sum(ranks)
        self.A = nn.Parameter(torch.randn(R, d_in, dtype=torch.float64), requires_grad=False)
        self.register_buffer("Bt", torch.randn(R, d_out, dtype=torch.float64))
        self.offsets = [0, *torch.tensor(ranks).cumsum(0).tolist()]


class Plain(nn.Module):
    """A layer as somebody else would write one."""

    def __init__(self, ranks: tuple[int, ...] = (2, 3), d_in: int = 12, d_out: int = 10, stats: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out).double().requires_grad_(False)
        self.bank = Packed(ranks, d_in, d_out)
        self.lam = nn.Parameter(torch.rand(len(ranks), dtype=torch.float64))
        self.stats = stats

    def forward(self, z: Tensor) -> Any:
        u = z @ self.bank.A.t()
        parts = [slice(a, b) for a, b in zip(self.bank.offsets[:-1], self.bank.offsets[1:], strict=True)]
        y = self.linear(z) + sum(c * u[..., p] @ self.bank.Bt[p] for c, p in zip(self.lam, parts, strict=True))
        if not self.stats:
            return y
        return y, torch.stack([u[..., p].square().sum(-1) for p in parts], -1), z.square().sum(-1)


def total(found: Any) -> Tensor:
    return sum(t.square().sum() for t in (found if isinstance(found, tuple) else (found,)))  # type: ignore[return-value]


def close(found: Any, expected: Any) -> bool:
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    return all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in pairs)


@pytest.mark.parametrize("stats", [False, True])
def test_a_layer_s_forward_fits_under_another_class(stats: bool, build: ModuleType) -> None:
    plain = Plain(stats=stats)
    layer = build.layers.MergedLoRALinearNSC if stats else build.layers.MergedLoRALinear
    z = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    assert close(layer.forward(plain, z), plain(z))
    assert (layer.has_backward, layer.can_torch_compile) == (True, True)  # kernels asks by these names
    own = build.AdapterBank(plain.bank.A, plain.bank.Bt, plain.bank.offsets)
    assert build.layers.own_bank(own) is own
    found, expected = (
        torch.autograd.grad(total(out), (z, plain.lam)) for out in (layer.forward(plain, z), plain(z))
    )
    assert close(found, expected)


def test_what_is_written_into_a_bank_or_replaced_is_seen(build: ModuleType) -> None:
    plain, forward = Plain(), build.layers.MergedLoRALinear.forward
    z = torch.randn(4, 12, dtype=torch.float64)
    with torch.no_grad():
        compiled = torch.compile(forward, backend="eager", fullgraph=True)
        assert close(compiled(plain, z), plain(z))
        forward(plain, z)
        kept = build.layers._KEPT[plain.bank]
        assert close(forward(plain, z), plain(z))
        assert build.layers._KEPT[plain.bank] is kept
        plain.bank.A.mul_(2)
        assert close(forward(plain, z), plain(z))
        assert build.layers._KEPT[plain.bank] is kept
        plain.bank.A.data = torch.randn(5, 12, dtype=torch.float64)
        assert close(forward(plain, z), plain(z))
        plain.bank.offsets = [0, 4, 5]
        assert close(forward(plain, z), plain(z))
        plain.bank.Bt = torch.randn(10, 5, dtype=torch.float64).t()
        assert close(forward(plain, z), plain(z))
        square = Plain(ranks=(6, 6), d_out=12)
        forward(square, z)
        square.bank.Bt = square.bank.Bt.t()  # of the same memory
        assert close(forward(square, z), square(z))
        plain.float()
        assert forward(plain, z.float()).dtype is torch.float32
    assert "_KEPT" not in vars(copy.deepcopy(plain.bank))
    count = len(build.layers._KEPT)
    del plain, square
    gc.collect()
    assert len(build.layers._KEPT) == count - 2


def test_banks_that_do_not_fit_are_refused(build: ModuleType) -> None:
    plain, forward = Plain(), build.layers.MergedLoRALinear.forward
    z = torch.randn(4, 12, dtype=torch.float64)
    plain.bank.A.requires_grad_()
    with pytest.raises(RuntimeError, match=r"bank.A requires a gradient.*requires_grad_\(False\)"):
        forward(plain, z)
    with torch.no_grad():  # as it is evaluated while it is trained
        assert close(forward(plain, z), plain(z))
    plain.bank.A.requires_grad_(False)
    plain.bank.Bt.requires_grad_()
    with pytest.raises(RuntimeError, match="bank.Bt requires a gradient"):
        forward(plain, z)
    with pytest.raises(TypeError, match="found SimpleNamespace, which is no nn.Module"):
        build.layers.own_bank(SimpleNamespace(A=plain.bank.A, Bt=plain.bank.Bt.detach(), offsets=(0, 5)))
    plain.bank = nn.Linear(3, 3)
    with pytest.raises(TypeError, match="bank must be a module with A, Bt and offsets, found Linear, without A and Bt"):
        forward(plain, z)


# By kernels itself.


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("kernels.layer")  # tests/kernels is a package of the other's name
    import kernels as module

    yield module
    for name in ("kernel_layer_name", "kernel_condition"):
        for changed in (nk.MergedLoRALinear, Plain):
            if name in vars(changed):
                delattr(changed, name)


def test_get_local_kernel(kernels: Any, out: Path) -> None:
    kernel = kernels.get_local_kernel(out)
    i = oc.make_inputs(CASE, torch.float32)
    found = outcome(kernel, i, kernel.AdapterBank(*i.bank.packed))
    with nk.use_backend("reference"):
        expected = outcome(nk, i, i.bank)
    assert all(torch.equal(found[name], expected[name]) for name in oc.OUTPUTS)
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    metadata = Metadata.read_from_file(out / VARIANT / "metadata.json")
    assert metadata.id == kernel.__name__
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, out / VARIANT))


@pytest.mark.parametrize("compiled", [False, True])
def test_kernelize_merged_layers(compiled: bool, kernels: Any, out: Path) -> None:
    model = nn.Sequential(
        *(nk.MergedLoRALinear(nn.Linear(48, 48), oc.make_bank(oc.Case("hub", d_out=48), torch.float32), [0.3, 0.6])
          for _ in range(2)),
    )  # fmt: skip
    model[0].lam = nn.Parameter(model[0].lam)
    z = torch.randn(3, 5, 48, requires_grad=True)
    inputs = (z, model[0].lam)
    with nk.use_backend("reference"):
        expected = model(z)
        gradients = torch.autograd.grad(expected.square().sum(), inputs)
    kernels.replace_kernel_forward_from_hub(nk.MergedLoRALinear, "MergedLoRALinear")
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping(layer_mapping(out)):
        kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    name = kernels.get_local_kernel(out).__name__
    assert {layer.forward.__func__.__module__ for layer in model} == {f"{name}.layers"}
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    # The installed package's choice is not the build's.
    with nk.use_backend("cpu"):
        found = run(z)
        assert torch.equal(found, expected)
        for one, other in zip(torch.autograd.grad(found.square().sum(), inputs), gradients, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("stats", [False, True])
def test_kernelize_a_plain_class(stats: bool, kernels: Any, out: Path) -> None:
    name = "MergedLoRALinearNSC" if stats else "MergedLoRALinear"
    kernels.use_kernel_forward_from_hub(name)(Plain)
    plain = Plain(stats=stats)
    kernelized = copy.deepcopy(plain)
    with kernels.use_kernel_mapping(layer_mapping(out)):
        kernels.kernelize(kernelized, mode=kernels.Mode.TRAINING, use_fallback=False)
    assert kernelized.forward.__func__ is not Plain.forward
    z = torch.randn(4, 12, dtype=torch.float64)
    total(plain(z)).backward()
    total(kernelized(z)).backward()
    assert close(kernelized(z), plain(z))
    assert close(kernelized.lam.grad, plain.lam.grad)


def test_a_mapping_of_no_build_is_refused(kernels: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder: expected build/torch-universal/metadata.json in .*writes it"):
        layer_mapping(tmp_path)


def test_sources_for_kernel_builder(kernels: Any, tmp_path: Path) -> None:
    """As its noarch setup copies them: with an _ops.py of its own, and metadata with the same name."""
    from kernels._rust import Build

    folder = write(tmp_path / "source", source_layout())
    assert [str(backend) for backend in Build.open(folder).general.backends] == ["cpu", "cuda", "metal", "rocm", "xpu"]
    name = "_nsc_kernels_cpu_0a1b2c3"
    variant = folder / SOURCE
    ops = f"import torch\nops = torch.ops.{name}\ndef add_op_namespace_prefix(op):\n    return '{name}::' + op\n"
    (variant / "_ops.py").write_text(ops)
    about = {"name": "nsc-kernels", "id": name, "version": 0, "license": "mit", "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps({**about, "backend": {"type": "cpu"}}))
    (folder / "build").mkdir()
    variant.rename(folder / "build" / "torch-cpu")
    kernel = kernels.get_local_kernel(folder)
    assert name == importlib.import_module(f"{kernel.__name__}.ops").NAMESPACE
    i = oc.make_inputs(CASE, torch.float64)
    compiled = torch.compile(kernel.merged_lora, fullgraph=True, backend="eager")
    found = compiled(i.z, kernel.AdapterBank(*i.bank.packed), i.lam, i.base)
    assert torch.allclose(found, nk.merged_lora(i.z, i.bank, i.lam, i.base))


def test_the_example(kernels: Any, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    example = ROOT / "examples" / "integrations" / "hf_kernels.py"
    if not example.exists():
        pytest.skip("needs the source tree")
    monkeypatch.setattr(sys, "argv", [str(example), str(out)])
    runpy.run_path(str(example), run_name="__main__")
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("_nsc_kernels_universal_")
    assert [line.rpartition(" ")[0] for line in rest] == ["outputs differ by", "gradients differ by"]
    assert all(float(line.rpartition(" ")[2]) < 1e-6 for line in rest)
