"""Samples that are kept on a disk are those that would be kept in memory."""

import errno
import os
from pathlib import Path

import pytest
import torch
from audio_cases import audio_base, noise, write_wave
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_cases import llava_base, picture, vision_base, write_rows
from torch import nn

from nsc_merge.calibration import on_disk
from nsc_merge.calibration.batch_files import Batches, inputs_for
from nsc_merge.calibration.on_disk import OnDisk
from nsc_merge.calibration.raw.reading import batches_of
from nsc_merge.calibration.raw.settings import DataSettings

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def mapped(folder):
    """Files in a folder that this process has mapped; they have no name there."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), min_size=0, max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES),
    limit=st.integers(0, 20_000),
)
def test_values_shapes_and_dtypes_are_kept(tmp_path_factory, shapes, dtype, limit):
    kept = OnDisk(tmp_path_factory.mktemp("kept"), limit)
    tensors = {str(n): (10 * torch.randn(shape)).to(dtype) for n, shape in enumerate(shapes)}
    wanted = {name: one.clone() for name, one in tensors.items()}
    found = kept.keep(tensors)
    assert list(found) == list(wanted)
    for name, one in found.items():
        assert one.dtype == wanted[name].dtype
        assert one.is_contiguous() or one.data_ptr() == tensors[name].data_ptr()
        assert torch.equal(one, wanted[name])
        # Beside one another: none is written over by the next.
        one.copy_(wanted[name])
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_is_beyond_the_limit_is_in_files_without_names_until_nobody_holds_it(tmp_path):
    out = tmp_path / "new" / "out"
    kept = OnDisk(out, 3 * 40_000)
    tensors = [torch.randn(10_000) for _ in range(5)]
    found = [kept.keep({"x": one})["x"] for one in tensors]
    assert [one is other for one, other in zip(found, tensors, strict=True)] == [True, True, True, False, False]
    assert all(torch.equal(one, other) for one, other in zip(found, tensors, strict=True))
    assert list(out.iterdir()) == []
    assert len(mapped(out)) == 1
    # Strided ones as well, and views keep what they are of.
    view = kept.keep({"x": torch.arange(20_000).view(100, 200).t()})["x"][3]
    assert torch.equal(view, torch.arange(100) * 200 + 3)
    del found, kept
    assert len(mapped(out)) == 1
    assert torch.equal(view, torch.arange(100) * 200 + 3)
    del view
    assert not mapped(out)


def test_what_is_on_another_device_stays_there(tmp_path):
    kept, one = OnDisk(tmp_path / "out", 0), torch.empty(10_000, device="meta")
    assert kept.keep({"x": one})["x"] is one
    assert not (tmp_path / "out").exists()


def test_nothing_is_made_where_all_fits(tmp_path):
    kept = OnDisk(tmp_path / "out", 1 << 20)
    tensor = torch.randn(10_000)
    assert kept.keep({"x": tensor, "few": torch.ones(3)})["x"] is tensor
    assert not (tmp_path / "out").exists()
    small = torch.ones(3)
    assert OnDisk(tmp_path / "out", 0).keep({"few": small})["few"] is small
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EOPNOTSUPP])
def test_a_disk_without_room_is_told_before_it_is_written_to(tmp_path, monkeypatch, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"do not fit into memory, nor into a file: .*; expected .*\(samples: 5000\)"):
        OnDisk(tmp_path, 0).keep({"x": torch.randn(10_000)})
    assert list(tmp_path.iterdir()) == []


def test_inputs_of_another_dtype_are_kept_where_the_others_are(tmp_path):
    kept = OnDisk(tmp_path, 0)
    given = Batches([{"pixel_values": torch.randn(2, 3, 30, 30), "labels": torch.arange(2)}])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, pixel_values):
            return pixel_values

    (found,) = inputs_for(Model(), given, "a", keep=kept.keep)
    (wanted,) = inputs_for(Model(), given, "a")
    assert found["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(found["pixel_values"], wanted["pixel_values"])
    assert len(mapped(tmp_path)) == 1


def rows_of(kind, place):
    """A base, and rows of images alone, beside text, or of recordings."""
    if kind == "audio":
        files = [write_wave(place / "clips" / f"{n}.wav", noise(0.2 + 0.1 * n, n)) for n in range(5)]
        rows = [{"path": str(file), "sentence": "a b"} for file in files]
        return audio_base(place / "base", "ctc"), write_rows(place / "rows.jsonl", rows)
    rows = [{"image": picture(n), "text": "a " * (1 + n)} for n in range(5)]
    base = vision_base(place / "base") if kind == "images" else llava_base(place / "base")
    return base, [{"image": row["image"]} for row in rows] if kind == "images" else rows


@pytest.mark.parametrize("kind", ["images", "pairs", "audio"])
def test_batches_of_raw_data_are_the_same_on_a_disk(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(on_disk, "_SMALL", 1)
    base, rows = rows_of(kind, tmp_path)
    kept = OnDisk(tmp_path / "out", 0)
    wanted = batches_of(rows, str(base), DataSettings(), 2, "a")
    found = batches_of(rows, str(base), DataSettings(), 2, "a", keep=kept.keep)
    assert found.sha256 == wanted.sha256
    assert len(found) == len(wanted) == 3
    for one, other in zip(found, wanted, strict=True):
        assert list(one) == list(other)
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert len(mapped(tmp_path / "out")) == 1
