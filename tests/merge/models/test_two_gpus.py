"""Every method on models that lie on two GPUs, by a stand-in for them (tests/two_gpus)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from small_device import END

HERE = Path(__file__).resolve()
TESTS, ROOT = HERE.parents[2], HERE.parents[3]
SOURCE = TESTS / "two_gpus" / "two_gpus.cpp"
COMPILER = os.environ.get("CXX", "c++")
HEADERS = sysconfig.get_paths()["include"]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="libraries have other names elsewhere"),
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch knows devices of that name"),
    pytest.mark.skipif(torch.__version__ < (2, 13), reason="written against the interfaces of torch 2.13"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no compiler {COMPILER}"),
    pytest.mark.skipif(not Path(HEADERS, "Python.h").is_file(), reason="no headers of Python"),
]


@pytest.fixture(scope="module")
def library() -> Path:
    """The folder of the stand-in's library, which is compiled once for each of its sources and torch."""
    digest = hashlib.sha256(f"{torch.__version__} {sys.version} {SOURCE.read_text()}".encode()).hexdigest()[:16]
    file = ROOT / "build" / "two_gpus" / digest / "two_gpus_library.so"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        made = file.with_suffix(f".{os.getpid()}")
        includes = [flag for path in include_paths() for flag in ("-isystem", path)]
        libraries = ["-L", f"{Path(torch.__file__).parent / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"]
        flags = ["-shared", "-fPIC", "-std=c++20", "-O0", *includes, "-I", HEADERS]
        done = subprocess.run([COMPILER, *flags, SOURCE, "-o", made, *libraries], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        made.rename(file)
    return file.parent


def run(library: Path, code: str) -> subprocess.CompletedProcess[str]:
    places = [library, TESTS / "two_gpus", TESTS / "merge", TESTS, TESTS / "children", ROOT / "python", ROOT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code + END]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def test_every_method_is_what_it_is_on_a_cpu(library: Path) -> None:
    """In one process, as it takes seconds to begin one; "beside": some blocks in the host's memory or on disk."""
    done = run(library, "import two_gpus, merges; merges.main('two', 'llama'); merges.main('beside', 'llava')")
    assert done.returncode == 0, (done.stdout[-500:], done.stderr[-3000:])
    for placement in ("two", "beside"):
        assert sum(line.startswith(f"{placement} ") for line in done.stdout.splitlines()) > 30


MEETINGS = """
import two_gpus, torch
here, there, host = torch.ones(2, 3, device="cuda"), torch.ones(2, 3, device="cuda:1"), torch.ones(2, 3)
assert (here.device.index, (here + 1).device, there.sum().device) == (0, here.device, there.device)
assert here.add_(host[0, 0]).cpu().equal(2 * host) and here[torch.tensor([1])].shape == (1, 3)
assert there.copy_(here).cpu().equal(2 * host) and here.t().data_ptr() == here.data_ptr()
grown = torch.empty(0, device="cuda")
assert torch.add(here, here, out=grown) is grown and grown.cpu().equal(4 * host)
own = torch.Generator("cuda:1").manual_seed(1)
assert torch.randn(2, device="cuda:1", generator=own).device == there.device
for meet in (
    lambda: here + there,
    lambda: here @ host.t(),
    lambda: torch.cat([here, host]),
    lambda: torch.nn.functional.embedding(torch.tensor([0]), here),
    lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
):
    try:
        meet()
    except RuntimeError as error:
        assert "device" in str(error) or "generator" in str(error), error
    else:
        raise AssertionError
print("refused")
"""


def test_the_stand_in_lets_meet_what_meets_on_gpus(library: Path) -> None:
    done = run(library, MEETINGS)
    assert done.stdout == "refused\n", done.stderr[-3000:]


ON_A_GPU = """
import two_gpus, torch, nsc_merge
from dataclasses import replace
from nsc_merge.methods import METHODS

def drawn(*devices):
    source = torch.Generator().manual_seed(0)
    return {
        task: {path: tuple(
            torch.randn(shape, generator=source, device="cpu").to(device) for shape in ((4, 32), (16, 4))
        ) + (scaling,) for path in "pq"} | {"zero": torch.zeros(3, 5, device=device)}
        for task, device, scaling in zip("abc", devices, (2.0, 1.0, 0.5))
    }

torch.set_default_device("cuda")
there = torch.device("cuda", 0)
for name in [method.name for method in METHODS.values() if method.updates is not None and not method.needs]:
    wanted = dict(nsc_merge.merge_factors(drawn("cpu", "cpu", "cpu"), name))
    for path, found in nsc_merge.merge_factors(drawn("cuda", "cuda", "cuda"), name):
        found = found.delta()
        assert found.device == there, (name, path, found.device)
        torch.testing.assert_close(found.cpu(), wanted[path].delta(), rtol=1e-4, atol=1e-5)

host = {task: {path: nsc_merge.Factor(*one) for path, one in held.items() if path != "zero"}
        for task, held in drawn("cpu", "cpu", "cpu").items()}
moved = {task: {path: replace(one, A=one.A.to(device), B=one.B.to(device)) for path, one in held.items()}
         for (task, held), device in zip(host.items(), ("cuda:1", "cuda", "cpu"))}
model = torch.nn.ModuleDict({path: torch.nn.Linear(32, 16, device="cuda") for path in "pq"})
for name in ("task_arithmetic", "ties", "svd", "robustmerge"):
    found, wanted = (
        nsc_merge.merge(model, {task: nsc_merge.Adapter(task, own) for task, own in held.items()}, method=name)
        for held in (moved, host)
    )
    assert found.delta("p").equal(wanted.delta("p")), name

for devices in (("cuda", "cpu", "cuda"), ("cuda", "cuda", "cuda:1")):
    try:
        nsc_merge.merge_factors(drawn(*devices), "ties")
    except ValueError as error:
        assert "expected an update on cuda:0 as 'a' has, found one on" in str(error), error
    else:
        raise AssertionError
print("right")
"""


def test_factors_on_a_gpu_are_merged_there_and_adapters_wherever_they_are(library: Path) -> None:
    done = run(library, ON_A_GPU)
    assert done.stdout == "right\n", done.stderr[-3000:]
