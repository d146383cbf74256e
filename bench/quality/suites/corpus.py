"""Real text that every installation carries: Python's own sources and those of packages that are dependencies.

Sources of the standard library and of eight packages, code and docstrings alike, are split by a hash of the file's path
into train, validation and test files, 70 to 10 to 20, and encoded by a byte-level BPE that is trained on the training
files. Versions of the packages differ between installations, and so does the text: what was read is stored once, with
the versions, and used from then on.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..suite import Log
from .training import new_folder

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
PACKAGES = {
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "torch": "torch",
    "transformers": "transformers",
    "sympy": "sympy",
    "matplotlib": "matplotlib",
    "networkx": "networkx",
}
SOURCES = ("python", *PACKAGES)
SECTIONS = ("Summary", "Parameters", "Returns", "Raises", "Notes", "See Also")
# Those whose docstrings are in numpydoc's style.
_SECTIONED = ("numpy", "scipy", "sklearn", "networkx", "matplotlib")
VOCABULARY = 1024
PAD, START, BREAK = 0, 1, 2

# Characters per source, so that none outweighs the others.
_BUDGET: dict[Split, int] = {"train": 700_000, "val": 100_000, "test": 200_000}
_FILE_CHARACTERS = 8_000
_SECTION_CHARACTERS = 400
_SHORTEST = 60
# Optional in some installations, generated, or not the package's own.
_LEFT_OUT = frozenset(
    {"_vendor", "__pycache__", "ensurepip", "externals", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test"}
    | {"testing", "tests", "tkinter", "turtledemo"}
)
_SECTION = re.compile(r"^(\w[\w ]*)\n-{3,}\n", re.MULTILINE)


@dataclass(frozen=True)
class Texts:
    """Tokens of many texts, one after another.

    Attributes:
        tokens: ``[N]``, int64.
        ends: ``[F]``, int64, where each text ends.
        labels: ``[F]``, int64: a text's source, or its kind of docstring section.
    """

    tokens: Tensor
    ends: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ends)

    def text(self, number: int) -> Tensor:
        """Tokens of one text."""
        return self.tokens[int(self.ends[number - 1]) if number else 0 : int(self.ends[number])]


def load_corpus(work: Path, log: Log) -> tuple[dict[Split, Texts], dict[Split, Texts]]:
    """Whole files labelled by their source, and docstring sections labelled by their kind.

    Args:
        work: folder of the suite; ``corpus/`` in it is written first if it is not there.
        log: receives a line then.
    """
    from safetensors.torch import load_file

    folder = work / "corpus"
    if not folder.is_dir():
        with new_folder(folder) as part:
            log(_write(part))
    stored = load_file(folder / "tokens.safetensors")
    found = [
        {
            split: Texts(*(stored[f"{kind}.{split}.{name}"].long() for name in ("tokens", "ends", "labels")))
            for split in SPLITS
        }
        for kind in ("files", "sections")
    ]
    return found[0], found[1]


def split_of(name: str) -> Split:
    """The split of a file, from a hash of its path."""
    part = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10
    return "train" if part < 7 else "val" if part < 8 else "test"


def sections(source: str) -> Iterator[tuple[str, str]]:
    """Name and text of the docstring sections of a module in numpydoc's style, summaries included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        # The summary and then, in turn, names and texts.
        parts = _SECTION.split(inspect.cleandoc(ast.get_docstring(node, clean=False) or ""))
        if len(parts) > 1:
            yield "Summary", parts[0].strip()
            yield from zip(parts[1::2], (text.strip() for text in parts[2::2]), strict=True)


def _write(folder: Path) -> str:
    from safetensors.torch import save_file
    from tokenizers import ByteLevelBPETokenizer

    files: dict[Split, list[tuple[int, str]]] = {split: [] for split in SPLITS}
    parts: dict[Split, list[tuple[int, str]]] = {split: [] for split in SPLITS}
    for label, source in enumerate(SOURCES):
        left = dict(_BUDGET)
        for split, text in _files(source):
            if source in _SECTIONED:
                parts[split] += [
                    (SECTIONS.index(name), body[:_SECTION_CHARACTERS])
                    for name, body in sections(text)
                    if name in SECTIONS and len(body) >= _SHORTEST
                ]
            text = text[: min(_FILE_CHARACTERS, left[split])]
            if len(text) >= _SHORTEST:
                files[split].append((label, text))
                left[split] -= len(text)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        (text for _, text in files["train"]),
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<start>", "<break>"],
        show_progress=False,
    )
    tensors = {}
    for kind, texts in (("files", files), ("sections", parts)):
        for split in SPLITS:
            encoded = [one.ids for one in tokenizer.encode_batch([text for _, text in texts[split]])]
            tensors[f"{kind}.{split}.tokens"] = torch.tensor(list(chain.from_iterable(encoded)), dtype=torch.int16)
            tensors[f"{kind}.{split}.ends"] = torch.tensor([len(ids) for ids in encoded]).cumsum(0)
            tensors[f"{kind}.{split}.labels"] = torch.tensor([label for label, _ in texts[split]])
    save_file(tensors, folder / "tokens.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))
    versions = {"python": sysconfig.get_python_version()}
    versions |= {name: version(distribution) for name, distribution in PACKAGES.items()}
    (folder / "versions.json").write_text(json.dumps(versions, indent=2) + "\n", encoding="utf-8")
    counts = ", ".join(
        f"{split} {len(files[split])} files, {len(tensors[f'files.{split}.tokens']) / 1e6:.2f} M tokens, "
        f"{len(parts[split])} sections"
        for split in SPLITS
    )
    return f"corpus: {counts}"


def _files(source: str) -> Iterator[tuple[Split, str]]:
    """Split and text of a source's files, in an order that has nothing to do with their place."""
    root = _root(source)
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    for name in _shuffled(f"{source}/{name}" for name in names if not _LEFT_OUT & set(name.split("/"))):
        text = (root / name.removeprefix(f"{source}/")).read_text(encoding="utf-8", errors="ignore")
        text = text[_licence_end(text) :]
        yield split_of(name), text


def _root(source: str) -> Path:
    if source == "python":
        return Path(sysconfig.get_path("stdlib"))
    found = importlib.util.find_spec(source)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def _shuffled(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"order {name}".encode()).digest())


def _licence_end(text: str) -> int:
    """Where comments at the top, which name the project, end."""
    end = 0
    for line in text.splitlines(keepends=True):
        if line.strip() and not line.startswith("#"):
            break
        end += len(line)
    return end
