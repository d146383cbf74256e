"""Settings that every test shares."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What was shown on this machine decides nothing here.
os.environ["NSC_VERIFIED"] = str(Path(__file__).with_name("no_ledger.json"))

import jinja2
import pytest
import torch

# The libraries keep half a million objects, which Python would look through every few hundred new ones.
gc.set_threshold(50_000, 20, 20)
# PEFT writes a card with every adapter, from one template, which is compiled anew each time.
jinja2.Environment.compile = functools.lru_cache(jinja2.Environment.compile)  # type: ignore[method-assign]
# A seed for devices that are not there is noted with the calls that led to it: milliseconds, in each test.
for _device in (torch.cuda, torch.xpu, torch.mtia):
    if not _device.is_available():
        _device.manual_seed_all = lambda seed: None  # type: ignore[assignment]

if not torch.cuda.is_available():
    # Triton decides when it is first imported, which torch may do for any test, whether its kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Models are small here, and there is a worker for each core: more threads only get in each other's way.
_threads = torch.get_num_threads()
torch.set_num_threads(1)

# A process that a test starts imports the packages from where this one does, whichever are installed: another build of
# the kernels differs in the last bit.
_found = [spec.origin for name in ("nsc_kernels", "nsc_merge") if (spec := importlib.util.find_spec(name))]
_places = dict.fromkeys(str(Path(origin).parents[1]) for origin in _found if origin)
# And begin as this one did: see there.
_places[str(Path(__file__).with_name("children"))] = None
os.environ["PYTHONPATH"] = os.pathsep.join([*_places, *filter(None, [os.environ.get("PYTHONPATH")])])


# Of few tests, some of which take a minute: begun first, they leave no core idle at the end.
_LONG = ("test_packaging.py", "test_guides.py", "triton_kernels", "cuda", "quality", "bench", "merge/processes")
# Files that measure what is trained or compiled once per session, which two workers would each do anew.
_TOGETHER = {
    f"tests/{folder}/test_{folder}_{name}.py": f"{folder}, {shared}"
    for folder, shared, names in (
        ("cuda", "emulator", ("kernel", "backend")),
        ("quality", "vision", ("vit", "rows", "report")),
        ("quality", "language", ("language", "pictures", "texts")),
    )
    for name in names
}
# Those that start processes of one that has imported the libraries (tests/merge/forked.py).
_FORKED = ("test_kinds_of_bases", "test_launch", "test_methods_on_ranks", "test_ranks")
_TOGETHER |= {f"tests/merge/processes/{name}.py": "forked" for name in _FORKED}
_TOGETHER["tests/merge/models/test_sharded_weights.py"] = "forked"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the files to the order in which ``make test`` hands them out."""
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        file = item.path.relative_to(here).as_posix()
        return next((at for at, name in enumerate(_LONG) if file.startswith(name)), len(_LONG))

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of ``--dist loadfile``: files that stand together in :data:`_TOGETHER` go to one worker, in the order above."""
    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # which hands out last what has few tests and takes long
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return _TOGETHER.get(file, file)

    return Together(config, log)


@pytest.fixture(scope="module", autouse=True)
def _threads_of_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """The CPU's kernels share out even what is small."""
    several = request.path.is_relative_to(Path(__file__).with_name("kernels"))
    torch.set_num_threads(_threads if several else 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
