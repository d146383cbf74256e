"""Damaged and hostile safetensors files: refused from the header alone, by file and reason."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from nsc_merge.utils.provenance import sha256
from nsc_merge.utils.safetensors_checks import check_safetensors, read_safetensors


def write(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_good_files_pass(tmp_path):
    path = tmp_path / "good.safetensors"
    tensors = {
        "a": torch.randn(3, 2),
        "b": torch.zeros(0, 4, dtype=torch.bfloat16),
        "c": torch.arange(5),
        "d": torch.tensor(True),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    assert set(check_safetensors(path)) == set(tensors)
    for name, value in read_safetensors(path).items():
        assert torch.equal(value, tensors[name])
    assert len(sha256(path)) == 64


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"a": entry()}, b"\0" * 15, "tensors of 16 bytes in a file with 15"),
        ({"a": entry()}, b"\0" * 17, "tensors of 16 bytes in a file with 17"),
        ({"a": entry(shape=(1 << 40, 1 << 40))}, b"\0" * 16, "but occupies 16"),
        ({"a": entry(shape=(1 << 62, 4))}, b"\0" * 16, "but occupies 16"),
        ({"a": entry(shape=(-2, -2))}, b"\0" * 16, "has shape"),
        ({"a": entry(shape=(True, 4))}, b"\0" * 16, "has shape"),
        ({"a": entry(shape=(2.0, 2))}, b"\0" * 16, "has shape"),
        ({"a": entry(dtype="F12")}, b"\0" * 16, "unknown dtype 'F12'"),
        ({"a": entry(dtype=["F32"])}, b"\0" * 16, "unknown dtype"),
        ({"a": entry(offsets=(16, 0))}, b"\0" * 16, "data_offsets"),
        ({"a": entry(offsets=(0, 16, 32))}, b"\0" * 16, "data_offsets"),
        ({"a": entry(), "b": entry()}, b"\0" * 16, "begins at byte 0, expected 16"),
        ({"a": entry(offsets=(4, 20))}, b"\0" * 20, "begins at byte 4, expected 0"),
        ({"a": 3}, b"", "is not an object"),
        ([1], b"", "not a JSON object"),
        (b"{" * 9, b"", "the header is not valid JSON"),
        (b"[" * 100_000, b"", "the header is not valid JSON"),
        (b"\xff\xfe{}", b"", "the header is not valid JSON"),
    ],
)
def test_bad_headers(tmp_path, header, data, reason):
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ValueError, match=reason) as error:
        read_safetensors(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("length", [0, 1, 17, 1 << 40, (1 << 64) - 1])
def test_a_header_length_is_not_believed(tmp_path, length):
    path = tmp_path / "long.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + b"\0" * 14)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"header length {length} in a file of 24 bytes"):
        check_safetensors(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kept", [0, 4, 8, 20, -1])
def test_truncated_files(tmp_path, kept):
    path = tmp_path / "cut.safetensors"
    save_file({"a": torch.randn(4, 4)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is not valid safetensors"):
        read_safetensors(path)
