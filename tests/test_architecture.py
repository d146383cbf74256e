"""Who may import whom, no circle of files, and files that are read in one sitting: docs/architecture.md, held to.

Every import counts, those inside functions and under ``TYPE_CHECKING`` too.
"""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

ROOT = Path(__file__).parents[1]
LINES, FILES = 350, 12

# A part may import those in its row, itself, and nothing else of the package. Rows build on those above them.
MERGE: dict[str, set[str]] = {"utils": set(), "processes": set()}
MERGE["adapters"] = {"utils"}
MERGE["models"] = {"utils", "processes", "adapters"}
MERGE["calibration"] = {"utils", "processes", "models"}
MERGE["results"] = {"utils", "processes", "adapters", "models"}
MERGE["descent"] = {"utils", "processes", "adapters", "models", "calibration"}
MERGE["methods"] = {*MERGE["descent"], "results", "descent"}
MERGE["api"] = {"processes", "adapters", "models", "calibration", "results", "methods"}
MERGE["factors"] = {"utils", "adapters", "methods"}
MERGE["recipes"] = {*MERGE["api"], "utils", "api"}
MERGE["evaluation"] = {*MERGE["recipes"], "recipes"}
MERGE["analysis"] = MERGE["demo"] = {*MERGE["api"], "utils", "api", "evaluation"}
MERGE["commands"] = {*MERGE["evaluation"], "evaluation", "analysis", "demo", "integrations"}
MERGE["__init__"] = {"adapters", "models", "calibration", "results", "api", "factors", "recipes"}
MERGE["integrations"] = {"__init__", "utils", "adapters", "models", "calibration", "results", "methods"}
MERGE["__main__"] = {"commands"}

METHODS: dict[str, set[str]] = {"method": set(), "task_outputs": set(), "shared_options": set(), "scale_tuning": set()}
METHODS["likelihoods"] = set()
METHODS["full_rank"] = set()
METHODS["gradient_free"] = {"method", "full_rank"}
METHODS["task_vectors"] = {"method", "gradient_free", "task_outputs", "likelihoods", "shared_options"}
METHODS["low_rank"] = METHODS["closed_form"] = {*METHODS["task_vectors"], "task_vectors"}
METHODS["gradient"] = {*METHODS["task_vectors"], "closed_form"}
METHODS["registry"] = {"method", "task_vectors", "low_rank", "closed_form", "gradient"}
METHODS["__init__"] = {"method", "registry"}
METHODS["listing"] = {"registry"}

# The operator's floors: a part may import all that is on a floor below its own.
FLOORS = (
    ("_version", "bank_file", "contract", "reference", "ratio", "native", "counters", "devices", "modes", "printing"),
    ("bank", "dispatch", "verified_hardware", "entries"),
    ("ops", "triton"),
    ("backends", "autograd"),
    ("functional", "info", "flops", "decompositions"),
    ("module", "integrations"),
    ("__init__",),
    ("bench",),
    ("verify",),
)
KERNELS = {name: {*sum(FLOORS[:number], ())} for number, floor in enumerate(FLOORS) for name in floor}

# The benchmark of a whole step of a merge runs one: it stands above both packages, and nothing imports it.
MERGE_STEP = "nsc_kernels.bench.step"

PACKAGES = {
    "nsc_merge": (ROOT / "python" / "nsc_merge", MERGE),
    "nsc_merge.methods": (ROOT / "python" / "nsc_merge" / "methods", METHODS),
    "nsc_kernels": (ROOT / "nsc_kernels", KERNELS),
}
FOLDERS = {"nsc_merge": ROOT / "python" / "nsc_merge", "nsc_kernels": ROOT / "nsc_kernels", "bench": ROOT / "bench"}


def files() -> dict[str, Path]:
    """Every module by its dotted name; a package by that of its ``__init__``."""
    found = {}
    for name, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the project that a file imports."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            levels = package.split(".")
            start = [*levels[: len(levels) - node.level + 1]] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            # A name of a package is a file of it, or comes from its __init__.
            found |= {name if (name := f"{source}.{alias.name}") in known else source for alias in node.names}
    return {name for name in found if name in known and name != module}


KNOWN = files()


@cache
def imports() -> dict[str, set[str]]:
    """What each module imports; read once, where it is asked and not in every worker."""
    return {module: imported(module, path, KNOWN) for module, path in KNOWN.items()}


def part(module: str, package: str) -> str | None:
    """The part of a package that a module belongs to, None outside of it."""
    if module == package:
        return "__init__"
    return module.removeprefix(f"{package}.").split(".")[0] if module.startswith(f"{package}.") else None


@pytest.mark.parametrize("package", PACKAGES)
def test_parts_import_only_those_below_them(package: str) -> None:
    table = PACKAGES[package][1]
    wrong = []
    for module, targets in imports().items():
        own = part(module, package)
        if own is None:
            continue
        assert own in table, f"{module}: {own} has no row in the table of {package}; docs/architecture.md says where"
        for target in targets:
            other = part(target, package)
            if other not in (None, own) and other not in table[own]:
                wrong.append(f"{module} imports {target}: {own} may import {sorted(table[own]) or 'nothing'}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_tables_run_one_way(package: str) -> None:
    list(TopologicalSorter(PACKAGES[package][1]).static_order())


def test_nothing_below_imports_what_is_above() -> None:
    above = {"nsc_kernels": ("nsc_merge", "bench"), "nsc_merge": ("bench", "nsc_kernels.bench")}
    wrong = [
        f"{module} imports {target}"
        for module, targets in imports().items()
        for target in targets
        if target.startswith(above.get(module.split(".")[0], ())) and not module.startswith(MERGE_STEP)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_files() -> None:
    try:
        list(TopologicalSorter(imports()).static_order())
    except CycleError as error:
        pytest.fail(f"these import each other in a circle: {' <- '.join(error.args[1])}")


def test_files_are_short_and_packages_small() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in KNOWN.values()}
    long = {str(path): count for path, count in lengths.items() if count > LINES}
    assert not long, f"more than {LINES} lines: {long}"
    merge = [path.parent for path in KNOWN.values() if path.is_relative_to(FOLDERS["nsc_merge"])]
    full = {folder.name: count for folder in merge if (count := merge.count(folder)) > FILES}
    assert not full, f"more than {FILES} files: {full}"


def test_a_method_is_known_by_its_name_to_nobody_else() -> None:
    """No module outside of the methods compares a method's name with "nsc": a method says what it needs."""
    asking = []
    for module, path in KNOWN.items():
        if not module.startswith("nsc_merge") or module.startswith("nsc_merge.methods."):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                if any(isinstance(side, ast.Constant) and side.value == "nsc" for side in sides):
                    asking.append(f"{module}:{node.lineno}")
    assert not asking, asking


def test_every_new_tensor_says_where_it_is() -> None:
    """Under ``torch.set_default_device("cuda")`` others would be on the GPU, and not beside those they meet."""
    makers = {maker.__name__ for maker in _device_constructors()}
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in ("python/nsc_merge", "nsc_kernels")
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).startswith("torch.")
        and ast.unparse(node.func).rpartition(".")[2] in makers
        and not {"device", None} & {keyword.arg for keyword in node.keywords}
    ]
    assert not silent, silent
