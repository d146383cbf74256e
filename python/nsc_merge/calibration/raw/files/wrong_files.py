"""What a file that is no calibration data looks like, and what to give instead."""

from __future__ import annotations

import re
from pathlib import Path

ACCEPTED = (
    ".jsonl, .json, .csv, .tsv, .txt (each also packed as .gz, .bz2 or .xz) or .parquet, a folder of them, of images "
    "or of audio files, a folder written by datasets' save_to_disk, or .safetensors of model inputs"
)
_PICKLE = (
    "looks like a pickle, as torch.save and pickle write it, which is never opened; expected text or images, or model "
    "inputs written by safetensors.torch.save_file"
)
# First bytes of a file -> what it looks like, and what to do.
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\x93NUMPY", "looks like a NumPy array; write model inputs with safetensors.torch.save_file"),
    (b"PAR1", "looks like a Parquet file: call it .parquet"),
    (b"ARROW1", "looks like an Arrow file; write it as .parquet, or give the folder of datasets' save_to_disk"),
    (b"\xff\xff\xff\xff", "looks like an Arrow stream; write .parquet, or give the folder of datasets' save_to_disk"),
    (b"\x1f\x8b", "looks compressed by gzip: unpack it with gunzip, or call it by what is in it, such as .jsonl.gz"),
    (b"\x28\xb5\x2f\xfd", "looks compressed by zstd: unpack it with unzstd"),
    (b"BZh", "looks compressed by bzip2: unpack it with bunzip2, or call it by what is in it, such as .jsonl.bz2"),
    (b"\xfd7zXZ", "looks compressed by xz: unpack it with unxz, or call it by what is in it, such as .jsonl.xz"),
    (b"%PDF", "looks like a PDF; write its text as .txt, one sample a line, or as .jsonl"),
    (b"\xd0\xcf\x11\xe0", "looks like a spreadsheet or document of an office program: save it as CSV in UTF-8"),
    (b"\x89PNG", "is one image; give the folder of images"),
    (b"\xff\xd8\xff", "is one image; give the folder of images"),
    (b"fLaC", "is one recording; give the folder of audio files"),
    (b"OggS", "is one recording; give the folder of audio files"),
    (b"ID3", "is one recording; give the folder of audio files"),
    (b"RIFF", "is one recording or image; give the folder of them"),
    (b"\xff\xfe", "looks like UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "looks like UTF-16; save it as UTF-8"),
    (b"GGUF", "looks like weights of a model in GGUF; give data, not a model"),
    (b"SQLite", "looks like a database; export a table as CSV"),
)


def looks_like(file: Path, head: bytes) -> str:
    """What a file looks like by its first bytes, and what to write instead; empty if nothing is known of them.

    Args:
        head: the first bytes of it, some hundred.
    """
    suffix = file.suffix.lower()
    if head.startswith(b"PK\x03\x04"):
        if suffix in (".xlsx", ".xlsm", ".ods"):
            return "looks like a spreadsheet: save it as CSV in UTF-8"
        if suffix in (".pt", ".pth", ".bin", ".ckpt"):
            return _PICKLE
        return "looks like a zip archive: unpack it and give the files or the folder"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _PICKLE
    for signature, words in _SIGNATURES:
        if head.startswith(signature):
            return words
    if len(head) > 9 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 1 << 30:
        return "looks like safetensors: call it .safetensors if it holds model inputs"
    return ""


def refused_file(file: Path, argument: str) -> ValueError:
    """The error for a file whose suffix is of no data."""
    with file.open("rb") as opened:
        head = opened.read(512)
    place = f"{argument}: {file}"
    words = looks_like(file, head)
    if words:
        return ValueError(f"{place} {words}")
    if not head:
        return ValueError(f"{place} is empty; expected {ACCEPTED}")
    text = head.lstrip()
    if b"\0" in head:
        kind = "is binary data of no kind that is known here"
    elif text.startswith(b'{"') and b'}\n{"' in head:
        kind = "looks like one JSON object a line: call it .jsonl"
    elif re.match(rb'\{\s*"|\[\s*["{\[]', text):
        kind = "looks like JSON: call it .json"
    else:
        kind = "looks like text: call it .txt if every line is a sample"
    return ValueError(f"{place} {kind}; expected {ACCEPTED}")


def refused_folder(folder: Path, argument: str) -> ValueError:
    """The error for a folder that holds no data."""
    place = f"{argument}: {folder}"
    if (folder / "adapter_config.json").is_file():
        return ValueError(f"{place} holds an adapter; expected data: {ACCEPTED}")
    if (folder / "config.json").is_file():
        return ValueError(f"{place} holds a model; expected data: {ACCEPTED}")
    held = sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".")
    if not held:
        return ValueError(f"{place} is empty; expected {ACCEPTED}")
    listed = ", ".join(held[:5]) + (", ..." if len(held) > 5 else "")
    return ValueError(f"{place} holds no data; expected {ACCEPTED}; found {listed}")
