"""The backend as the dispatch sees it, and the operator through its public functions."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import types

import pytest
import torch

import nsc_kernels as nk
from nsc_kernels import verified_hardware
from nsc_kernels.backends import triton as backend
from nsc_kernels.contract import Call

CALL = Call(torch.device("cpu"), torch.float32, 100, 64, 64, (0, 8, 16))
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="about the interpreter")


def _python(code: str, **environment: str) -> str:
    base = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=base | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_triton_is_not_imported_before_it_is_asked_and_says_why_it_is_off():
    code = "import sys, nsc_kernels; print('triton' in sys.modules, nsc_kernels.available_backends()['triton'])"
    found = _python(code)
    assert found.startswith("False ")
    assert torch.cuda.is_available() or found == "False no CUDA device"


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert backend.unavailable() == "triton is not installed"


def test_an_old_triton_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.5.1"))
    assert backend.unavailable() == "triton 3.5.1 is installed, 3.6 or newer is needed"


@interpreted
def test_the_interpreter_is_refused_for_bfloat16_unless_corrected(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    call = CALL._replace(dtype=torch.bfloat16)
    assert backend.rejects(call) is None
    monkeypatch.setattr(InterpreterBuilder, "corrected_bfloat16", False)
    assert "bfloat16" in backend.rejects(call)


@interpreted
def test_what_it_does_not_compute_it_rejects_in_words():
    assert backend.rejects(CALL) is None
    assert "float64" in backend.rejects(CALL._replace(dtype=torch.float64))
    assert "600" in backend.rejects(CALL._replace(offsets=(0, 600)))


def test_an_explicit_choice_that_cannot_be_served_raises(device):
    bank = nk.AdapterBank.from_factors([torch.randn(2, 8).double()], [torch.randn(8, 2).double()], device=device)
    z = torch.randn(3, 8, dtype=torch.float64, device=device)
    with nk.use_backend("triton"), pytest.raises(RuntimeError, match="float64"):
        nk.merged_lora(z, bank, torch.ones(1, dtype=torch.float64, device=device))


@pytest.mark.parametrize("T", [3, 300])
def test_the_public_functions_train_through_it(T, device):
    """Values and gradients of a loss on all three results, with the formula's own configuration."""
    torch.manual_seed(0)
    bank = nk.AdapterBank.from_factors(
        [torch.randn(r, 48) for r in (4, 2, 6)], [torch.randn(40, r) for r in (4, 2, 6)], device=device
    )
    leaves = [torch.randn(T, 48), torch.rand(3), torch.randn(T, 40)]
    results = {}
    for name in ("triton", "reference"):
        z, lam, base = (t.to(device).requires_grad_() for t in leaves)
        with nk.use_backend(name):
            y, quad, sqnorm = nk.merged_lora_nsc(z, bank, lam, base)
            loss = y.square().mean() + nk.null_space_ratio(quad, sqnorm).mean()
            loss.backward()
        results[name] = (y, quad, sqnorm, z.grad, lam.grad, base.grad)
    for ours, theirs in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_precision_of_float32_follows_torch(device):
    from nsc_kernels.triton.configs import mode_of

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert mode_of(torch.float32, 64) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert mode_of(torch.float32, 64) == "tf32x3"
        assert mode_of(torch.float32, 512) == "ieee"
        assert mode_of(torch.bfloat16, 64) == "half"
        bank = nk.AdapterBank.from_factors([torch.randn(4, 24)], [torch.randn(40, 4)], device=device)
        z, lam = torch.randn(5, 24, device=device), torch.ones(1, device=device)
        with nk.use_backend("triton"):
            y = nk.merged_lora(z, bank, lam)
        torch.testing.assert_close(y, z @ bank.A.t() @ bank.Bt, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def clear_ledger():
    verified_hardware.entries.cache_clear()
    yield
    verified_hardware.entries.cache_clear()


def test_the_ledger_counts_only_for_the_source_it_names(tmp_path, monkeypatch, clear_ledger):
    path = tmp_path / "verified.json"
    path.write_text(
        f'[{{"arch": "sm_90", "source": "{verified_hardware.triton_source()}"}}, {{"arch": "sm_80", "source": "0"}}]'
    )
    monkeypatch.setattr(verified_hardware, "VERIFIED", path)
    assert verified_hardware.verified("sm_90") is not None
    assert verified_hardware.verified("sm_80") is None
    assert verified_hardware.verified("sm_100") is None


def test_what_is_hashed_imports_nothing_of_the_project_that_is_not():
    """Else the move of a file that decides nothing would edit one that is hashed, and withdraw entries."""
    hashed = set(verified_hardware.SOURCES.values())
    for path in hashed:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                imported = [path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")]
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                imported = [name for name in names if name.partition(".")[0] == "nsc_kernels"]
            else:
                continue
            assert hashed.issuperset(imported), f"{path.name} imports {imported}"


def test_the_automatic_choice_waits_for_the_ledger(tmp_path, monkeypatch, clear_ledger):
    from nsc_kernels.triton import configs

    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    monkeypatch.setattr(configs, "machine", lambda device: configs.Machine("some GPU", 90, 132, 227 << 10))
    call = CALL._replace(device=torch.device("cuda", 0))
    path = tmp_path / "verified.json"
    monkeypatch.setattr(verified_hardware, "VERIFIED", path)
    assert "sm_90" in backend.unproven(call)
    path.write_text(f'[{{"arch": "sm_90", "source": "{verified_hardware.triton_source()}"}}]')
    verified_hardware.entries.cache_clear()
    assert backend.unproven(call) is None


def test_what_the_package_ships_as_proof_is_well_formed():
    for entry in verified_hardware.entries():
        # As bench/hardware/report.py writes them.
        assert set(entry) == {"backend", "arch", "device", "source", "torch", "triton", "cases"}
        assert entry["backend"] in verified_hardware.BACKENDS
        assert entry["arch"].startswith("sm_")
        assert len(entry["source"]) == 64
        assert entry["cases"] > 0


@pytest.mark.parametrize("grad", [False, True])
def test_the_module_adds_its_adapters_in_place(device, monkeypatch, grad):
    """Into what its own linear returned, and never into what a hook may have kept."""
    from nsc_kernels.triton import launch

    bank = nk.AdapterBank.from_factors([torch.randn(4, 24)], [torch.randn(40, 4)], device=device)
    layer = nk.MergedLoRALinear(torch.nn.Linear(24, 40).to(device), bank, [0.5])
    z = torch.randn(5, 24, device=device, requires_grad=grad)
    reused = []
    output = launch.output_over

    def spy(base, shape, like, reuse_base):
        found = output(base, shape, like, reuse_base)
        reused.append(found is base)
        return found

    monkeypatch.setattr(launch, "output_over", spy)
    with nk.use_backend("triton"):
        y = layer(z)
        if grad:
            y.sum().backward()
        assert reused == [True] * (1 + grad)
        kept = []
        layer.linear.register_forward_hook(lambda module, args, result: kept.append(result))
        again = layer(z)
    assert not reused[-1]
    torch.testing.assert_close(again, y)
    torch.testing.assert_close(kept[0], torch.nn.functional.linear(z, layer.linear.weight, layer.linear.bias))
