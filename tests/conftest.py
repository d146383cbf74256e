"""Settings that every test shares."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is first imported, which torch may do for any test, whether its kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# A process that a test starts imports the packages from where this one does, whichever are installed: another build of
# the kernels differs in the last bit.
_found = [spec.origin for name in ("nsc_kernels", "nsc_merge") if (spec := importlib.util.find_spec(name))]
_places = dict.fromkeys(str(Path(origin).parents[1]) for origin in _found if origin)
os.environ["PYTHONPATH"] = os.pathsep.join([*_places, *filter(None, [os.environ.get("PYTHONPATH")])])


# Of few tests, some of which take a minute: begun first, they leave no core idle at the end.
_LONG = ("test_packaging.py", "triton", "cuda", "quality", "bench", "merge/processes")
# Files that measure what is trained or compiled once per session, which two workers would each do anew.
_TOGETHER = {
    f"{folder}/test_{folder}_{name}.py": f"{folder}/{shared}"
    for folder, shared, names in (
        ("cuda", "emulator", ("kernel", "backend")),
        ("quality", "vision", ("vit", "rows", "report")),
        ("quality", "language", ("language", "pictures", "texts")),
    )
    for name in names
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the files to the order, and into the groups, in which ``make test`` hands them out."""
    here = Path(__file__).parent
    files = {item: item.path.relative_to(here).as_posix() for item in items}

    def place(item: pytest.Item) -> tuple[int, str]:
        begun = next((at for at, name in enumerate(_LONG) if files[item].startswith(name)), len(_LONG))
        return begun, _TOGETHER.get(files[item], "")

    items.sort(key=place)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_TOGETHER.get(files[item], files[item])))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
