"""Sources made to work under any name: imports of the package relative, operators in the build's own namespace.

Edits are spans that the parser names; everything around them stays as it is, byte for byte.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

PACKAGE = "nsc_kernels"
NAMESPACE = "nsc"
# What a kernel may import besides itself.
ALLOWED = frozenset(sys.stdlib_module_names) | {"torch", "triton"}

Edit = tuple[int, int, str]


class _Source:
    """A file's bytes, its tree, and where in the bytes a node is."""

    def __init__(self, path: str, content: bytes) -> None:
        self.path, self.content = path, content
        self.tree = ast.parse(content, path)
        self.nodes = list(ast.walk(self.tree))
        self._starts = [0]
        for line in content.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def at(self, line: int, column: int) -> int:
        return self._starts[line - 1] + column  # ast counts columns in bytes of UTF-8

    def span(self, node: ast.AST) -> tuple[int, int]:
        start = self.at(node.lineno, node.col_offset)  # type: ignore[attr-defined]
        return start, self.at(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def text(self, start: int, end: int) -> str:
        return self.content[start:end].decode()

    def refuse(self, node: ast.AST, why: str) -> ValueError:
        return ValueError(f"{self.path}, line {node.lineno}: {why}")  # type: ignore[attr-defined]

    def after_imports(self) -> int:
        """The end of the last import at the top level."""
        imports = [node for node in self.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        return self.span(imports[-1])[1] if imports else 0

    def edited(self, edits: list[Edit]) -> bytes:
        content = self.content
        for start, end, new in sorted(edits, reverse=True):
            content = content[:start] + new.encode() + content[end:]
        return content


def rewritten(path: str, content: bytes, places: Mapping[str, str]) -> bytes:
    """A module of the package as it stands in a build.

    Args:
        path: of the file in the package, with ``/``.
        content: of it.
        places: every file of the build, by its path in the package -> by its path in the build.

    Raises:
        ValueError: naming file and line of what cannot be rewritten.
    """
    source = _Source(path, content)
    if any(isinstance(node, ast.Name) and node.id == "_ops" for node in source.nodes):
        raise ValueError(f"{path}: the name _ops is that of the build's namespace; call it something else")
    edits = list(_imports(source, places))
    operators = list(_operators(source))
    if operators:
        dots = "." * len(PurePosixPath(places[path]).parts)
        edits += [*operators, (source.after_imports(),) * 2 + (f"\nfrom {dots} import _ops",)]
    return source.edited([*edits, *_names(source, places[path])])


def exporting(path: str, content: bytes, name: str) -> bytes:
    """A package's ``__init__`` that also imports its module ``name`` and lists it in ``__all__``."""
    source = _Source(path, content)
    lists = [
        node.value
        for node in source.tree.body
        if isinstance(node, ast.Assign) and [t.id for t in node.targets if isinstance(t, ast.Name)] == ["__all__"]
    ]
    if len(lists) != 1 or not isinstance(lists[0], ast.List) or not lists[0].elts:
        raise ValueError(f"{path}: expected one list __all__")
    last, end = source.span(lists[0].elts[-1])[1], source.after_imports()
    return source.edited([(last, last, f', "{name}"'), (end, end, f"\nfrom . import {name}")])


def _imports(source: _Source, places: Mapping[str, str]) -> Iterator[Edit]:
    """Imports of the package, where they must change: relative, and to where the module is in the build."""
    for node in source.nodes:
        if isinstance(node, ast.Import):
            own = [alias for alias in node.names if alias.name.split(".")[0] == PACKAGE]
            if not own:
                continue
            if len(node.names) > 1 or own[0].asname is None or "." not in own[0].name:
                raise source.refuse(node, f"write from {PACKAGE} import module, which can be made relative")
            parts = own[0].name.split(".")[1:]
            new = _relative(source, places, node, parts[:-1], [parts[-1]])
            yield *source.span(node), f"from {new} import {parts[-1]} as {own[0].asname}"
        elif isinstance(node, ast.ImportFrom):
            named = (node.module or "").split(".") if node.module else []
            if node.level:
                above = PurePosixPath(source.path).parent.parts
                if node.level - 1 > len(above):
                    raise source.refuse(node, "leaves the package")
                parts = [*above[: len(above) - node.level + 1], *named]
            elif named[0] == PACKAGE:
                parts = named[1:]
            else:
                continue
            new = _relative(source, places, node, parts, [alias.name for alias in node.names])
            if new != "." * node.level + (node.module or ""):
                start, first = source.span(node)[0], source.at(node.names[0].lineno, node.names[0].col_offset)
                yield start, start + _keyword(source.text(start, first)), f"from {new} "


def _relative(source: _Source, places: Mapping[str, str], node: ast.AST, parts: list[str], names: list[str]) -> str:
    """What stands between ``from`` and ``import`` for ``names`` of the module ``parts`` of the package."""

    def place(parts: list[str]) -> list[str] | None:
        for file in ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"])):
            if file in places:
                found = PurePosixPath(places[file])
                return list(found.parent.parts if found.name == "__init__.py" else found.with_suffix("").parts)
        return None

    targets = []
    for name in names:
        submodule = place([*parts, name])
        target = place(parts) if submodule is None else submodule[:-1]
        if target is None or (submodule is not None and submodule[-1] != name):
            raise source.refuse(node, f"{'.'.join([PACKAGE, *parts, name])} is not part of the build under this name")
        targets.append(target)
    if any(target != targets[0] for target in targets):
        raise source.refuse(node, "imports from several places at once; make it several imports")
    here = list(PurePosixPath(places[source.path]).parent.parts)
    common = 0
    while common < min(len(here), len(targets[0])) and here[common] == targets[0][common]:
        common += 1
    return "." * (1 + len(here) - common) + ".".join(targets[0][common:])


def _keyword(text: str) -> int:
    """Bytes before the keyword ``import`` in the beginning of a ``from ... import``."""
    lines = text.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME and token.string == "import":
            row, column = token.start
            return len("".join([*lines[: row - 1], lines[row - 1][:column]]).encode())
    raise AssertionError(text)


def _is_namespace(node: ast.AST) -> bool:
    """Whether this is ``torch.ops.nsc``."""
    return (
        isinstance(node, ast.Attribute)
        and node.attr == NAMESPACE
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "ops"
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id == "torch"
    )


def _operators(source: _Source) -> Iterator[Edit]:
    """The library's namespace, and operators that are called in it."""
    for node in source.nodes:
        if _is_namespace(node):
            yield *source.span(node), "_ops.ops"
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and node.value.value == NAMESPACE
            and [t.id for t in node.targets if isinstance(t, ast.Name)] == ["NAMESPACE"]
        ):
            # Of all that kernel-builder's own _ops.py offers, this function alone tells the namespace.
            yield *source.span(node.value), '_ops.add_op_namespace_prefix("").removesuffix("::")'


def _names(source: _Source, place: str) -> Iterator[Edit]:
    """Module names put together at run time: ``f"nsc_kernels.x.{name}"``."""
    for node in source.nodes:
        if not isinstance(node, ast.JoinedStr) or not isinstance(first := node.values[0], ast.Constant):
            continue
        if str(first.value).startswith(f"{PACKAGE}."):
            start, end = source.span(node)
            if "/" in place or source.text(start, end)[:2] not in ('f"', "f'"):
                raise source.refuse(node, "a module name at run time must be a plain f-string in a module at the top")
            yield start + 2, start + 2 + len(PACKAGE), "{__package__}"


def faults(files: Mapping[str, bytes]) -> list[str]:
    """What in the modules of a build is not as kernels must be: names of files, lines and imports.

    An absolute import of anything but torch, triton and the standard library; a relative one of what is not there; an
    operator outside of the build's namespace.
    """
    found = []
    for path, content in files.items():
        if not path.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(content, path)):
            if isinstance(node, ast.Import):
                wrong = [alias.name for alias in node.names if alias.name.split(".")[0] not in ALLOWED]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                wrong = [] if (node.module or "").split(".")[0] in ALLOWED else [str(node.module)]
            elif isinstance(node, ast.ImportFrom):
                wrong = _missing(path, node, files)
            else:
                wrong = [f"torch.ops.{NAMESPACE}"] if _is_namespace(node) else []
            found += [f"{path}, line {node.lineno}: {name}" for name in wrong]  # type: ignore[attr-defined]
    return found


def _missing(path: str, node: ast.ImportFrom, files: Mapping[str, bytes]) -> list[str]:
    """What a relative import names, where the build has no such file and no such name."""
    above = PurePosixPath(path).parent.parts
    if node.level - 1 > len(above):
        return ["." * node.level]
    parts = [*above[: len(above) - node.level + 1], *((node.module or "").split(".") if node.module else [])]
    if "/".join(parts) + ".py" in files:
        return []
    package = files.get("/".join([*parts, "__init__.py"]))
    if package is None:
        return [".".join(parts)]
    bound = set()
    for statement in ast.parse(package).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            bound.add(statement.name)
        elif isinstance(statement, ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in statement.names}
        else:
            bound |= {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    modules = {name for name in (alias.name for alias in node.names) if "/".join([*parts, name]) + ".py" in files}
    modules |= {alias.name for alias in node.names if "/".join([*parts, alias.name, "__init__.py"]) in files}
    return [".".join([*parts, alias.name]) for alias in node.names if alias.name not in bound | modules]
