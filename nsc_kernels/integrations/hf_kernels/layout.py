"""The folder that ``kernels`` loads: which files, under which name, and how they get there.

What a build vouches for. The sources that ``verified_hardware`` hashes are put into it byte for byte, at the same place
in the package, and a build in which one of them would have to change is not made. So the build's own
``verified_hardware``, which hashes the files beside it, finds the repository's digest exactly where its files are the
repository's: ``auto`` takes Triton on the GPUs that the ledger names, in the build as in the repository, and in neither
once one of those files was edited. The other modules differ from the repository's by import lines and names of
operators alone; ``written.json`` and ``metadata.json`` have the SHA-256 of every file as it was written.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from ... import verified_hardware
from ..._version import __version__
from .rewriting import PACKAGE, exporting, faults, rewritten

NAME = PACKAGE.replace("_", "-")
VARIANT = "build/torch-universal"
SOURCE = f"torch-ext/{PACKAGE}"
WRITTEN = "written.json"
# The native backends are left out, and with them what only they need: dispatch says of a backend that is not there that
# it is not part of this release, and the reference serves the CPU.
TAKEN = (
    *("__init__.py", "_version.py", "autograd.py", "bank.py", "contract.py", "counters.py", "devices.py"),
    *("dispatch.py", "functional.py", "modes.py", "module.py", "native.py", "ops.py", "ratio.py", "reference.py"),
    *("verified_hardware.py", "backends/__init__.py", "backends/reference.py", "backends/triton.py"),
    *("triton/*.py", "triton/*.json", "triton/tables/*.json"),
)
MOVED = {"integrations/hf_kernels/layers.py": "layers.py"}
REPLACED = {"bank_file.py": "integrations/hf_kernels/no_bank_file.py"}
# Backends of kernel-builder whose torch has a device that dispatch knows.
BUILDER_BACKENDS = ("cpu", "cuda", "metal", "rocm", "xpu")

_OPS = '''"""Where this build's operators are registered: in a namespace that no other content has."""

import torch

ID = "{id}"
ops = getattr(torch.ops, ID)


def add_op_namespace_prefix(op_name: str) -> str:
    """The operator's name with its namespace."""
    return f"{{ID}}::{{op_name}}"
'''

_COMPATIBILITY = '''"""What the folder above exports: older kernels look for a folder of the kernel's name."""

import importlib.util
import sys
from pathlib import Path

ID = "{id}"

if ID not in sys.modules:
    spec = importlib.util.spec_from_file_location(ID, Path(__file__).parents[1] / "__init__.py")
    sys.modules[ID] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[ID])
    except BaseException:
        del sys.modules[ID]
        raise

__all__ = sys.modules[ID].__all__
globals().update({{name: getattr(sys.modules[ID], name) for name in __all__}})
'''

_BUILD_TOML = """[general]
name = "{name}"
version = {version}
edition = 5
license = "mit"
backends = [{backends}]

[torch-noarch]
pyext = ["json", "py"]
"""

_FLAKE = """{
  description = "nsc-kernels";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs {
    inherit self;
    path = ./.;
  };
}
"""


def modules(package: Path) -> dict[str, bytes]:
    """The files of a build but for its name: path in the build -> content, from the package in ``package``.

    Raises:
        ValueError: naming file and line of what a kernel must not have and that cannot be rewritten, or a file that
            hardware was verified with and that would have to change.
    """
    taken = sorted(path for pattern in TAKEN for path in package.glob(pattern))
    kept = [*(path.relative_to(package).as_posix() for path in taken), *REPLACED]
    places = dict(zip(kept, kept, strict=True)) | MOVED
    files = {}
    for path, place in places.items():
        content = (package / REPLACED.get(path, path)).read_bytes()
        files[place] = rewritten(path, content, places) if path.endswith(".py") else content
    hashed = [path.relative_to(verified_hardware.PACKAGE).as_posix() for path in verified_hardware.SOURCES.values()]
    changed = [path for path in hashed if files.get(path) != (package / path).read_bytes()]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: verified on hardware as it is, and would have to be changed for a build; write its "
            "imports relative to the package"
        )
    files["__init__.py"] = exporting("__init__.py", files["__init__.py"], "layers")
    wrong = faults(files | {"_ops.py": b""})
    if wrong:
        raise ValueError("a kernel imports the standard library, torch, triton and itself alone: " + "; ".join(wrong))
    return dict(sorted(files.items()))


def identity(files: Mapping[str, bytes]) -> str:
    """Twelve hexadecimal digits that this content alone has."""
    digest = hashlib.sha256(f"{_version()} {_OPS} {_COMPATIBILITY}".encode())
    for path, content in sorted(files.items()):
        digest.update(f"{path} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _version() -> int:
    """The kernel's version for the hub, which keeps 0 for what may still change."""
    return int(__version__.split(".")[0])


def variant(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """A whole build variant of :func:`modules`: with its namespace, the folder for older releases and metadata."""
    name = f"_{PACKAGE}_universal_{identity(files)}"
    whole = {
        **files,
        "_ops.py": _OPS.format(id=name).encode(),
        f"{PACKAGE}/__init__.py": _COMPATIBILITY.format(id=name).encode(),
    }
    digests = {path: base64.b64encode(hashlib.sha256(whole[path]).digest()).decode() for path in sorted(whole)}
    metadata = {
        "name": NAME,
        "id": name,
        "version": _version(),
        "license": "mit",
        "python-depends": [],
        "kernel-depends": [],
        # A field without a word for all of them. CPU asks for nothing, and kernels checks nothing where no archs are.
        "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return {**whole, "metadata.json": _json(metadata)}


def build_layout(package: Path = verified_hardware.PACKAGE) -> dict[str, bytes]:
    """The repository that ``kernels.get_local_kernel`` loads: path -> content."""
    return _listed({f"{VARIANT}/{path}": content for path, content in variant(modules(package)).items()})


def source_layout(package: Path = verified_hardware.PACKAGE) -> dict[str, bytes]:
    """The sources from which kernel-builder makes a build per backend, with names of its own: path -> content."""
    backends = ", ".join(f'"{name}"' for name in BUILDER_BACKENDS)
    about = _BUILD_TOML.format(name=NAME, version=_version(), backends=backends)
    files = {f"{SOURCE}/{path}": content for path, content in modules(package).items()}
    return _listed({**files, "build.toml": about.encode(), "flake.nix": _FLAKE.encode()})


def _listed(files: dict[str, bytes]) -> dict[str, bytes]:
    """With the record by which the folder is known again."""
    record = {
        "by": f"{PACKAGE} {__version__}",
        "files": {path: hashlib.sha256(content).hexdigest() for path, content in sorted(files.items())},
    }
    return {**files, WRITTEN: _json(record)}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def write(out: Path, files: Mapping[str, bytes]) -> Path:
    """Make ``out`` hold these files and nothing else: in a folder beside it first, renamed when complete.

    Raises:
        FileExistsError: if ``out`` is there and holds anything that :func:`write` did not write, or that was changed.
    """
    out = Path(out).resolve()
    stranger = _stranger(out) if out.exists() else None
    if stranger is not None:
        raise FileExistsError(
            f"out: expected no such folder, an empty one, or one as this command wrote it, found {stranger} in {out}; "
            "choose another folder, or remove this one"
        )
    mark = secrets.token_hex(8)
    new, old = (out.with_name(f".{out.name[:40]}.{mark}.{kind}") for kind in ("new", "old"))
    try:
        for path, content in files.items():
            file = new / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(new, out)
        except BaseException:
            if old.exists():
                os.replace(old, out)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return out


def _stranger(out: Path) -> str | None:
    """What in ``out`` was not written by :func:`write`, or None. Python's bytecode does not count."""
    if not out.is_dir():
        return "a file of this name"
    held = [path for path in out.rglob("*") if path.is_symlink() or not path.is_dir()]
    there = {path.relative_to(out).as_posix(): path for path in held if path.parent.name != "__pycache__"}
    if not there:
        return None
    try:
        known = json.loads(there[WRITTEN].read_bytes())["files"] if not there[WRITTEN].is_symlink() else {}
    except (KeyError, TypeError, ValueError):
        known = {}
    for name, path in sorted(there.items()):
        written = not path.is_symlink() and known.get(name) == hashlib.sha256(path.read_bytes()).hexdigest()
        if name != WRITTEN and not written:
            return name
    return None if known else WRITTEN
