"""Builds for Hugging Face ``kernels``, loaded without it: where no package is, beside it and beside each other."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import nsc_kernels as nk
import operator_cases as oc
from hub_builds import CASE, copied, loaded, outcome
from nsc_kernels.integrations.hf_kernels import build_layout, write
from nsc_kernels.integrations.hf_kernels.layout import VARIANT

# A process in which the repository's packages cannot be imported.
ALONE = """
import importlib.util, json, sys
from pathlib import Path

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nsc_kernels", "nsc_merge"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refused())
variant, given, found = map(Path, sys.argv[1:])
name = json.loads((variant / "metadata.json").read_bytes())["id"]
import torch
with_torch = set(sys.modules)
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
sys.modules[name] = kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
imported = {module.split(".")[0] for module in set(sys.modules) - with_torch} - {name}
assert imported <= set(sys.stdlib_module_names) | {"torch", "triton"}, imported
assert kernel.available_backends()["reference"] is True

import os
from safetensors.torch import load_file, save_file
t = load_file(given)
offsets = t.pop("offsets").tolist()

def outcome(call, dtype):
    at = {key: value.to(dtype) for key, value in t.items()}
    z, lam, base = (at[n].requires_grad_() for n in ("z", "lam", "base"))
    out = call(z, kernel.AdapterBank(at["A"], at["Bt"], offsets), lam, base)
    grads = torch.autograd.grad(out, (z, lam, base), (at["dy"], at["dquad"], at["dsqnorm"]))
    return dict(zip(("y", "quad", "sqnorm", "dz", "dlam", "dbase"), (*out, *grads)))

results = {"eager": outcome(kernel.merged_lora_nsc, torch.float64)}
compiled = torch.compile(kernel.merged_lora_nsc, fullgraph=True, backend="eager")
results["compiled"] = outcome(compiled, torch.float64)
if kernel.available_backends()["triton"] is True and os.environ.get("TRITON_INTERPRET") == "1":
    with kernel.use_backend("triton"):
        results["triton"] = outcome(kernel.merged_lora_nsc, torch.float32)
assert "nsc_kernels" not in sys.modules and not hasattr(torch.ops.nsc, "merged_lora")
flat = {f"{how}.{n}": v.detach().clone().contiguous() for how, out in results.items() for n, v in out.items()}
save_file(flat, found)
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hub") / "out", build_layout())


@pytest.fixture(scope="module")
def build(out: Path) -> ModuleType:
    return loaded(out)


@pytest.fixture(scope="module")
def alone(out: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a build computes by itself, and what the installed package's reference does."""
    torch.manual_seed(0)
    i = oc.make_inputs(CASE, torch.float64)
    assert i.base is not None
    folder = tmp_path_factory.mktemp("alone")
    given = {"A": i.bank.A, "Bt": i.bank.Bt, "offsets": torch.tensor(i.bank.offsets), "z": i.z, "lam": i.lam}
    given |= {"base": i.base, "dy": i.dy, "dquad": i.dquad, "dsqnorm": i.dsqnorm}
    save_file(given, folder / "given")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, str(out / VARIANT), str(folder / "given"), str(folder / "found")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    with nk.use_backend("reference"):
        return load_file(folder / "found"), outcome(nk, i, i.bank)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_alone_it_computes_what_the_installed_one_does(how: str, alone: Any) -> None:
    """On a CPU by the reference; the C++ library is not in a build. In float64, to its rounding: how a product is added
    up may depend on the process, by the number of threads and where its operands lie.
    """
    found, expected = alone
    for name in oc.OUTPUTS:
        scale = float(expected[name].abs().max())
        assert found[f"{how}.{name}"].dtype == torch.float64
        assert torch.allclose(found[f"{how}.{name}"], expected[name], rtol=0, atol=1e-13 * scale), name


def test_alone_its_triton_kernels_run(alone: Any) -> None:
    """In Triton's interpreter, float32."""
    pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("on a machine with a GPU, tests/triton_kernels runs the same files on it")
    found, expected = alone
    for name in oc.OUTPUTS:
        ours = found[f"triton.{name}"]
        assert ours.dtype == torch.float32
        scale = float(expected[name].abs().max())
        assert torch.allclose(ours.double(), expected[name], rtol=1e-5, atol=2e-6 * scale), name


def test_versions_stand_side_by_side(out: Path, build: ModuleType, tmp_path: Path) -> None:
    """Two contents, two namespaces; one content at two places is one."""
    package = copied(tmp_path)
    with (package / "_version.py").open("a") as file:
        file.write("# another\n")
    other = loaded(write(tmp_path / "other", build_layout(package)))
    assert len({other.__name__, build.__name__, "nsc_kernels"}) == 3
    i = oc.make_inputs(CASE, torch.float64)
    results = []
    for one in (nk, build, other):
        with one.use_backend("reference"):
            results.append(outcome(one, i, one.AdapterBank(*i.bank.packed)))
    for name in oc.OUTPUTS:
        assert torch.equal(results[0][name], results[1][name])
        assert torch.equal(results[0][name], results[2][name])
    for call in (
        lambda: other.merged_lora(i.z, i.bank, i.lam),
        lambda: other.MergedLoRALinear(torch.nn.Linear(i.bank.d_in, i.bank.d_out), i.bank, i.lam),
    ):
        with pytest.raises(TypeError, match=r"found AdapterBank of nsc_kernels\.bank, another copy .*\*bank\.packed"):
            call()
    again = loaded(write(tmp_path / "again", build_layout()))
    assert again.AdapterBank is build.AdapterBank


def test_opcheck_and_the_folder_for_older_releases(out: Path, build: ModuleType) -> None:
    i = oc.make_inputs(CASE, torch.float32)
    A, Bt, offsets = i.bank.packed
    op = getattr(torch.ops, build.__name__).merged_lora.default
    z, lam = i.z.requires_grad_(), i.lam.requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (z, A, Bt, list(offsets), lam, i.base, True, True), test_utils=checks)
    older = runpy.run_path(str(out / VARIANT / "nsc_kernels" / "__init__.py"))
    assert older["merged_lora"] is build.merged_lora
    assert set(older["__all__"]) == {*nk.__all__, "layers"}


def test_a_build_reads_and_writes_no_files(build: ModuleType, tmp_path: Path) -> None:
    bank = build.AdapterBank.from_factors([torch.randn(2, 8)], [torch.randn(6, 2)])
    with pytest.raises(NotImplementedError, match=r"bank.state_dict\(\)"):
        bank.save(tmp_path / "bank")
    with pytest.raises(NotImplementedError, match=r"AdapterBank\(A, Bt, offsets\)"):
        build.AdapterBank.load(tmp_path / "bank")
