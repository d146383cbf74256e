"""AdapterBank: what is written and read, and what is damaged refused."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nsc_kernels as nk


def factors(ranks: tuple[int, ...], d_in: int = 20, d_out: int = 12) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.randn(r, d_in) for r in ranks], [torch.randn(d_out, r) for r in ranks]


def test_state_dict_round_trip() -> None:
    bank = nk.AdapterBank.from_factors(*factors((3, 2)))
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    other = nk.AdapterBank.from_factors(*factors((1, 4)))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.ranks == (3, 2)
    assert torch.equal(other.A, bank.A)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    bank = nk.AdapterBank.from_factors(*factors((3, 0, 2)), dtype=torch.bfloat16)
    path = tmp_path / "bank.safetensors"
    bank.save(path)
    other = nk.AdapterBank.load(path)
    assert other.offsets == bank.offsets
    assert torch.equal(other.A, bank.A)
    assert torch.equal(other.B, bank.B)
    assert [p.name for p in tmp_path.iterdir()] == ["bank.safetensors"]


def test_factors_of_any_strides_are_saved(tmp_path: Path) -> None:
    bank = nk.AdapterBank.from_factors(*factors((3, 2)))
    bank.load_state_dict({**bank.state_dict(), "A": bank.A.t().contiguous().t()}, assign=True)
    assert not bank.A.is_contiguous()
    bank.save(tmp_path / "bank.safetensors")
    assert torch.equal(nk.AdapterBank.load(tmp_path / "bank.safetensors").A, bank.A)


def test_a_state_of_other_ranks_says_how_it_is_read() -> None:
    state = nk.AdapterBank.from_factors(*factors((3, 2))).state_dict()
    with pytest.raises(ValueError, match=r"R=4 in .* found \(0, 3, 5\); .*AdapterBank\(A, Bt"):
        nk.AdapterBank.from_factors(*factors((2, 2))).load_state_dict(state)
    made = nk.AdapterBank(state["A"], state["Bt"], state["_extra_state"].tolist())
    assert made.ranks == (3, 2)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = nk.AdapterBank.from_factors(*factors((2,)))
    path = tmp_path / "bank.safetensors"
    bank.save(path)
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        bank.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["bank.safetensors"]


def test_a_folder_is_no_file_to_save_to(tmp_path: Path) -> None:
    bank = nk.AdapterBank.from_factors([torch.randn(2, 8)], [torch.randn(6, 2)])
    with pytest.raises(IsADirectoryError, match=f"the name of a file, found a folder: '{tmp_path}'$"):
        bank.save(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"a folder to write into, found none: '{tmp_path}/none'$"):
        bank.save(tmp_path / "none" / "bank.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_saved_bank_is_for_whom_any_new_file_is_for(tmp_path: Path) -> None:
    nk.AdapterBank.from_factors(*factors((2,))).save(tmp_path / "bank.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "bank.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_loaded_bank_is_its_own(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    bank = nk.AdapterBank.from_factors(*factors((2, 3)))
    bank.save(path)
    loaded = nk.AdapterBank.load(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(loaded.A, bank.A)
    assert torch.equal(loaded.B, bank.B)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"A": torch.zeros(1, 1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected format nsc_kernels.AdapterBank"):
        nk.AdapterBank.load(tmp_path / "other.safetensors")


def with_header(path: Path, text: str) -> Path:
    """A good bank's file with another header over the same data."""
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode(errors="surrogateescape") + bytes(56))
    return path


A = '"A":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}'
BT = '"Bt":{"dtype":"F32","shape":[2,4],"data_offsets":[24,56]}'
OURS = '"__metadata__":{"format":"nsc_kernels.AdapterBank","version":"1","offsets":"[0, 2]"}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{{{OURS},{A},{BT},{A}}}", "the header has the key 'A' twice"),
        (f'{{{OURS},{A},{BT},"C":{{}}}}', r"expected tensors A and Bt, found \['A', 'Bt', 'C'\]"),
        (f"{{{OURS},{A}}}", r"expected tensors A and Bt, found \['A'\]"),
        (f"{{{OURS},{A.replace('2,3', '1,' * 300000 + '6')},{BT}}}", r"A must be a matrix, found shape \[1, 1"),
        ("{" + "[" * 100000, "not a bank"),
        (f"{{{OURS},{A},{BT}}}" + " " * (1 << 20), "expected a header of 2 to 1048576 bytes"),
        ("[]", "expected format"),
        ('{"\udcff":0}', "the header is no JSON: .* invalid start byte"),
        (f"{{{OURS},{A},{BT.replace('56', '48')}}}", "no valid safetensors"),
    ],
)
def test_hostile_headers_are_refused_at_once(tmp_path: Path, text: str, words: str) -> None:
    assert nk.AdapterBank.load(with_header(tmp_path / "good", f"{{{OURS},{A},{BT}}}")).ranks == (2,)
    begun = time.process_time()
    with pytest.raises(ValueError, match=words) as found:
        nk.AdapterBank.load(with_header(tmp_path / "bad", text))
    assert time.process_time() - begun < 1
    assert len(str(found.value)) < 400


def saved(path: Path, **changes: object) -> Path:
    """A bank's file with other tensors or metadata than ``save`` writes; None leaves one out."""
    from safetensors.torch import save_file

    whole = {
        "A": torch.ones(2, 3),
        "Bt": torch.ones(2, 4),
        "format": "nsc_kernels.AdapterBank",
        "version": "1",
        "offsets": "[0, 2]",
        **changes,
    }
    tensors = {name: value for name, value in whole.items() if isinstance(value, Tensor)}
    save_file(tensors, path, {name: value for name, value in whole.items() if isinstance(value, str)})
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offsets": None}, "the metadata hold no offsets"),
        ({"offsets": "[0, 1.5, 2]"}, r"offsets must be a list of ints, found '\[0, 1.5, 2\]'"),
        ({"offsets": "[0, NaN, 2]"}, "offsets must be a list of ints"),
        ({"offsets": "[false, 2]"}, "offsets must be a list of ints"),
        ({"offsets": "[" * 100000}, "offsets must be a list of ints"),
        ({"offsets": "[0, 2"}, "offsets must be a list of ints"),
        ({"offsets": "[0, 2, 1, 2]"}, "offsets must rise from 0 to R=2"),
        ({"offsets": "[0, 3]"}, "offsets must rise from 0 to R=2"),
        ({"version": "2"}, "expected format nsc_kernels.AdapterBank version 1, found .* version 2"),
        ({"A": None}, "A"),
        ({"Bt": torch.ones(3, 4)}, r"A and Bt must be \[R, d_in\] and \[R, d_out\]"),
        ({"Bt": torch.ones(2, 4).double()}, "A is torch.float32 on cpu but Bt is torch.float64"),
        ({"A": torch.ones(2, 3).int(), "Bt": torch.ones(2, 4).int()}, "must be one of float64.*found torch.int32"),
        ({"A": torch.full((2, 3), math.nan)}, "A holds 6 NaN or infinite values"),
        ({"Bt": torch.full((2, 4), math.inf)}, "Bt holds 8 NaN or infinite values"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(changes: dict, words: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "bank.safetensors", **changes)
    with pytest.raises(ValueError, match=f"bank.safetensors: not a bank that can be read.*: .*{words}") as refusal:
        nk.AdapterBank.load(path)
    assert "\n" not in str(refusal.value)


def test_a_truncated_file_is_refused_and_a_whole_one_is_not(tmp_path: Path) -> None:
    path = saved(tmp_path / "bank.safetensors")
    assert nk.AdapterBank.load(path).ranks == (2,)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="bank.safetensors: not a bank that can be read"):
        nk.AdapterBank.load(path)
    with pytest.raises(FileNotFoundError):
        nk.AdapterBank.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (torch.tensor([0.0, 5.0]), r"vector of torch.int64, found torch.float32 of shape \(2,\)"),
        (torch.tensor(5), r"vector of torch.int64, found torch.int64 of shape \(\)"),
        ([0, 5], "vector of torch.int64, found list"),
        (torch.tensor([0, 6]), "offsets must rise from 0 to R=5"),
        (torch.tensor([0, 4, 3, 5]), "offsets must rise from 0 to R=5"),
    ],
)
def test_a_damaged_state_is_refused(state: object, words: str) -> None:
    bank = nk.AdapterBank.from_factors(*factors((3, 2)))
    with pytest.raises(ValueError, match=words):
        bank.load_state_dict({**bank.state_dict(), "_extra_state": state})
    assert bank.offsets == (0, 3, 5)
