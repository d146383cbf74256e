"""This package as a kernel for Hugging Face ``kernels``: what is written. None of it needs ``kernels``."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import nsc_kernels as nk
from hub_builds import copied, loaded
from nsc_kernels import verified_hardware
from nsc_kernels.integrations.hf_kernels import build_layout, source_layout, write
from nsc_kernels.integrations.hf_kernels.__main__ import main
from nsc_kernels.integrations.hf_kernels.layout import VARIANT, modules
from nsc_kernels.integrations.hf_kernels.rewriting import faults, rewritten


def contents(folder: Path) -> dict[str, bytes]:
    held = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in held}


@pytest.fixture(scope="module")
def layout() -> dict[str, bytes]:
    return build_layout()


@pytest.fixture(scope="module")
def out(layout: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hub") / "out", layout)


@pytest.fixture(scope="module")
def build(out: Path) -> ModuleType:
    return loaded(out)


# What is written.


def test_two_runs_write_the_same_bytes(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main([str(tmp_path / "again")]) == 0
    told = capsys.readouterr().out
    assert contents(tmp_path / "again") == contents(out)
    assert f"get_local_kernel(Path({str(tmp_path / 'again')!r}))" in told
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_imports_are_relative_or_of_what_a_kernel_may_have(out: Path) -> None:
    """Asked here without the generator's own check."""
    roots = set()
    for path in (out / VARIANT).rglob("*.py"):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= len(path.relative_to(out / VARIANT).parts), path
            elif isinstance(node, ast.Attribute):
                assert ast.unparse(node) != "torch.ops.nsc", path
    assert roots - set(sys.stdlib_module_names) == {"torch", "triton"}


def test_metadata_and_record_have_every_file(out: Path) -> None:
    there = contents(out / VARIANT)
    metadata = json.loads(there.pop("metadata.json"))
    digests = {path: base64.b64encode(hashlib.sha256(held).digest()).decode() for path, held in there.items()}
    assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
    assert metadata["id"].isidentifier()
    assert metadata["name"] == "nsc-kernels"
    assert there.keys() >= {"__init__.py", "_ops.py", "layers.py", "nsc_kernels/__init__.py"}
    whole = contents(out)
    recorded = json.loads(whole.pop("written.json"))["files"]
    assert recorded == {path: hashlib.sha256(held).hexdigest() for path, held in whole.items()}


def test_no_operator_outside_of_its_own_namespace(build: ModuleType) -> None:
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    assert sorted(name for space, name in names if space == build.__name__) == ["merged_lora", "merged_lora_backward"]
    assert build.__name__ == importlib.import_module(f"{build.__name__}.ops").NAMESPACE


@pytest.mark.parametrize("strange", ["notes.txt", f"{VARIANT}/reference.py", "written.json"])
def test_what_it_did_not_write_is_left_alone(strange: str, layout: dict[str, bytes], tmp_path: Path) -> None:
    folder = write(tmp_path / "out", layout)
    (folder / strange).write_bytes(b"mine")
    before = contents(folder)
    with pytest.raises(FileExistsError, match="out: expected no such folder.*choose another folder") as told:
        write(folder, layout)
    assert strange == "written.json" or strange in str(told.value)
    with pytest.raises(SystemExit, match="2"):
        main([str(folder)])
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_way_and_an_empty_folder(layout: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="a file of this name"):
        write(tmp_path / "file", layout)
    (tmp_path / "empty").mkdir()
    assert contents(write(tmp_path / "empty", layout)) == layout
    assert contents(write(tmp_path / "nor" / "yet" / "there", layout)) == layout


def test_a_write_that_fails_leaves_nothing_and_loses_nothing(
    layout: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "out", layout)
    replace, calls = os.replace, []

    def fails_second(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_second)
    with pytest.raises(OSError, match="disk"):
        write(folder, source_layout())
    assert contents(folder) == layout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# How sources are rewritten.

PLACES = {name: name for name in ("a.py", "b.py", "sub/__init__.py", "sub/c.py")} | {"deep/er/moved.py": "sub/moved.py"}


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("a.py", "from nsc_kernels.b import x  # é", "from .b import x  # é"),
        ("a.py", "é = 1; from nsc_kernels import b", "é = 1; from . import b"),
        ("sub/c.py", "from nsc_kernels.b import (  # import\n    x,\n)", "from ..b import (  # import\n    x,\n)"),
        ("sub/c.py", "def f():\n    import nsc_kernels.sub.c as me", "def f():\n    from . import c as me"),
        ("sub/c.py", "from \\\n  nsc_kernels.sub import c", "from . import c"),
        ("deep/er/moved.py", "from ...b import x", "from ..b import x"),
        ("deep/er/moved.py", "from ...sub.c import x", "from .c import x"),
        ("a.py", "from .b import x\nfrom torch import y", "from .b import x\nfrom torch import y"),
        ("a.py", '"""nsc_kernels.b"""\nm = f"nsc_kernels.{x}"', '"""nsc_kernels.b"""\nm = f"{__package__}.{x}"'),
        ("sub/c.py", "import torch\ny = torch.ops.nsc.f(1)", "import torch\nfrom .. import _ops\ny = _ops.ops.f(1)"),
    ],
)
def test_rewriting(path: str, source: str, expected: str) -> None:
    assert rewritten(path, source.encode(), PLACES).decode() == expected


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import nsc_kernels", "a.py, line 1: write from nsc_kernels import module"),
        ("x = 1\nfrom .gone import y", "a.py, line 2: nsc_kernels.gone.y is not part of the build"),
        ("from nsc_kernels import b, version", "is not part of the build"),
        ("_ops = 1", "the name _ops is that of the build's namespace"),
        ("x = rf'nsc_kernels.{y}'", "must be a plain f-string"),
    ],
)
def test_what_cannot_be_rewritten_is_refused(source: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        rewritten("a.py", source.encode(), PLACES)


def test_faults_are_found() -> None:
    files = {
        "a.py": b"import numpy.linalg\nfrom safetensors import x\nfrom . import b, gone\nfrom .far import y\nimport re",
        "b.py": b"from .. import a\ntorch.ops.nsc.f\nfrom torch import nn",
        "__init__.py": b"",
    }
    first = [f"a.py, line {line}" for line in ("1: numpy.linalg", "2: safetensors", "3: gone", "4: far")]
    assert faults(files) == [*first, "b.py, line 1: ..", "b.py, line 2: torch.ops.nsc"]
    # What a package has is what it defines, assigns or imports, and the modules and packages in it.
    content = b"from .a import one as two\nONE: int = 1\ndef f(): pass\nclass C: pass\n"
    files = {"d/__init__.py": content, "d/a.py": b"", "d/e/__init__.py": b""}
    files["c.py"] = b"from .d import two, ONE, f, C, a, e\nfrom .d import one\nfrom .d.a import x\nfrom .g import h\n"
    assert faults(files) == ["c.py, line 2: d.one", "c.py, line 4: g"]


# What a build vouches for.


def test_a_verified_source_that_would_change_is_refused(tmp_path: Path) -> None:
    package = copied(tmp_path)
    with (package / "counters.py").open("a") as file:
        file.write("\nfrom nsc_kernels.contract import Call\n")
    with pytest.raises(ValueError, match=r"counters.py: verified on hardware as it is"):
        modules(package)


def test_what_a_kernel_must_not_import_is_refused(tmp_path: Path) -> None:
    package = copied(tmp_path)
    source = package / "ratio.py"
    line = len(source.read_text(encoding="utf-8").splitlines()) + 1
    with source.open("a") as file:
        file.write("import numpy\n")
    with pytest.raises(ValueError, match=f"itself alone: ratio.py, line {line}: numpy"):
        modules(package)


def test_an_edited_build_is_verified_nowhere(tmp_path: Path) -> None:
    """Edited in the package, so that it loads beside the others; the same holds of an edit in the folder."""
    package = copied(tmp_path)
    with (package / "triton" / "steps.py").open("a") as file:
        file.write("# edited\n")
    edited = loaded(write(tmp_path / "out", build_layout(package)))
    known = [entry["arch"] for entry in verified_hardware.entries() if verified_hardware.backend_of(entry) == "triton"]
    assert any(verified_hardware.verified(arch) for arch in known)
    there = importlib.import_module(f"{edited.__name__}.verified_hardware")
    assert not any(there.verified(arch) for arch in known)


def test_verified_sources_are_the_repository_s(out: Path, build: ModuleType) -> None:
    for path in verified_hardware.SOURCES.values():
        place = path.relative_to(verified_hardware.PACKAGE)
        assert (out / VARIANT / place).read_bytes() == path.read_bytes()
    there = importlib.import_module(f"{build.__name__}.verified_hardware")
    assert there.triton_source() == verified_hardware.triton_source()
    for arch in ("sm_90", "sm_80", "sm_0"):
        assert there.verified(arch) == verified_hardware.verified(arch)


@pytest.mark.parametrize("arch", [90, 80])
def test_auto_takes_triton_where_the_repository_does(arch: int, build: ModuleType, monkeypatch: Any) -> None:
    """Both told of a GPU that is not there. Of the repository's backends, those that a build has."""
    chosen = []
    for package in (nk, build):
        dispatch = importlib.import_module(f"{package.__name__}.dispatch")
        backend = importlib.import_module(f"{package.__name__}.backends.triton")
        configs = importlib.import_module(f"{package.__name__}.triton.configs")
        contract = importlib.import_module(f"{package.__name__}.contract")
        monkeypatch.setattr(backend, "unavailable", lambda: None)
        monkeypatch.setattr(backend, "_interpreted", lambda: False)
        machine = configs.Machine("GPU", arch, 100, configs.SHARED[arch])
        monkeypatch.setattr(configs, "machine", lambda device, machine=machine: machine)
        monkeypatch.setattr(dispatch, "PREFERENCE", {"triton": ("cuda",), "reference": ("cuda",)})
        dispatch.load.cache_clear()
        dispatch.select.cache_clear()
        call = contract.Call(torch.device("cuda", 0), torch.bfloat16, 64, 128, 128, (0, 16))
        chosen.append(dispatch.select("auto", call).__name__.rpartition(".")[2])
        dispatch.load.cache_clear()
        dispatch.select.cache_clear()
    assert chosen[0] == chosen[1] == ("triton" if verified_hardware.verified(f"sm_{arch}") else "reference")
