"""Damaged and hostile safetensors files: refused from the header alone, by file and reason."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nsc_merge.utils.provenance import sha256
from nsc_merge.utils.safetensors_checks import bytes_of, check_safetensors, read_checked, read_safetensors


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
        ({"a": entry(offsets=(0, 16)), "b": entry(offsets=(20, 36))}, b"\0" * 36, "begins at byte 20, expected 16"),
        ({"a": entry(), "b": entry(offsets=(8, 24))}, b"\0" * 24, "begins at byte 8, expected 16"),
        ({"a": entry(dtype="BOOL", shape=(2,), offsets=(0, 2))}, b"\1\2", "BOOL and holds other bytes than 0 and 1"),
        ({"__metadata__": {"a": 1}}, b"", "expected text by name as __metadata__"),
        (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "shape": [1]}}', b"0", "'shape' is given twice"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}", b"", "at most 40 digits"),
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


def test_a_name_that_is_given_twice_is_refused(tmp_path):
    one, other = (json.dumps(entry(offsets=offsets)) for offsets in ((0, 16), (16, 32)))
    path = write(tmp_path / "twice.safetensors", f'{{"a": {one}, "b": {other}, "a": {other}}}'.encode(), b"\0" * 32)
    with pytest.raises(ValueError, match=r"twice.safetensors is not valid safetensors: .*the key 'a' is given twice"):
        read_safetensors(path)


@pytest.mark.parametrize("kind", ["shape", "tensors", "tensors at one place", "depth", "values"])
def test_hostile_headers_take_less_than_a_second(tmp_path, kind):
    """The format's own parser takes 15 s for the first: it compares every extent with all others."""
    if kind == "shape":
        header = {"a": entry(shape=[1] * 490_000, offsets=(0, 4))}
    elif kind == "tensors":
        empty = json.dumps(entry(shape=[0], offsets=(0, 0)))
        header = ("{" + ", ".join(f'"{number}": {empty}' for number in range(150_000)) + "}").encode()
    elif kind == "tensors at one place":
        header = {str(number): entry(offsets=(0, 16)) for number in range(10_000)}
    elif kind == "depth":
        header = b'{"a": ' + b"[" * 15_000_000 + b"}"
    else:
        header = b'{"a": [' + b"[]," * 5_000_000 + b"1]}"
    path = write(tmp_path / "hostile.safetensors", header, b"\0" * 16)
    started = time.process_time()
    with pytest.raises(ValueError, match="is not valid safetensors") as error:
        check_safetensors(path)
    assert time.process_time() - started < 1
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.int64, torch.bool])
def test_bytes_are_read_as_they_lie_there_and_hashed(tmp_path, dtype):
    path = tmp_path / "good.safetensors"
    # The second begins at an odd byte.
    values = {"a": torch.tensor([1, 0, 1], dtype=torch.uint8), "b": torch.tensor([[0, 1], [1, 1]]).to(dtype)}
    raw = [value.view(torch.uint8).numpy().tobytes() for value in values.values()]
    names = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float16: "F16"}
    names |= {torch.int64: "I64", torch.bool: "BOOL"}
    header = {
        "a": entry("U8", (3,), (0, 3)),
        "b": entry(names[dtype], (2, 2), (3, 3 + len(raw[1]))),
        "__metadata__": {"x": "y"},
    }
    write(path, header, b"".join(raw))
    read = read_checked(path)
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == sha256(path)
    assert read.metadata == {"x": "y"}
    for name, value in values.items():
        assert read.tensors[name].dtype is value.dtype
        assert read.tensors[name].shape == value.shape
        assert np.array_equal(read.tensors[name].view(torch.uint8), value.view(torch.uint8))


def test_what_happens_to_the_file_does_not_reach_its_tensors(tmp_path):
    path = tmp_path / "good.safetensors"
    value = torch.arange(100_000, dtype=torch.float32)
    save_file({"a": value}, path)
    read, expected = read_safetensors(path)["a"], value.clone()
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff" * 300_000)
    assert torch.equal(read, expected)
    # Of a mapped file, what lies behind its end would end the process.
    os.truncate(path, 0)
    assert torch.equal(read, expected)


def test_a_file_takes_its_size_in_memory_once(tmp_path):
    path = tmp_path / "large.safetensors"
    save_file({str(number): torch.ones(1 << 20) for number in range(8)}, path)
    code = (
        "import resource, sys; from nsc_merge.utils.safetensors_checks import read_checked\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "before = peak(); kept = read_checked(sys.argv[1]); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.2 * path.stat().st_size


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, found in (("folder", "found a folder"), ("pipe", "found a pipe or device")):
        with pytest.raises(ValueError, match=f"{name}.safetensors is not valid safetensors: expected a file, {found}"):
            read_safetensors(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        read_safetensors(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64])
def test_bytes_are_those_of_the_file_however_a_tensor_lies(tmp_path, dtype):
    whole = torch.arange(24.0).reshape(6, 4).to(dtype)
    # One entry of a column, and one column as a row: contiguous to PyTorch, with a stride that is not 1.
    for tensor in (whole, whole.t(), whole[:1, 1:2].t(), whole[:, 1:2].t(), whole[::5, 0][:1], whole[:0], whole[2, 3]):
        save_file({"x": tensor.clone(memory_format=torch.contiguous_format)}, tmp_path / "x.safetensors")
        raw = (tmp_path / "x.safetensors").read_bytes()
        assert bytes_of(tensor).numpy().tobytes() == raw[8 + int.from_bytes(raw[:8], "little") :]
