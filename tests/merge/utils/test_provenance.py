"""Digests of files: of headers, of names in a cache, and of whole files, which are kept."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from nsc_merge.utils import provenance
from nsc_merge.utils.provenance import in_form_of, quick, whole


def weights(path, value=1.0):
    save_file({"a": torch.full((8,), value)}, path)
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Where digests are kept; files here are large, and were written to long ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(provenance, "WORTH_KEEPING", 0)
    monkeypatch.setattr(provenance, "_SETTLED_NS", -1)
    provenance._hash_once.cache_clear()
    yield tmp_path / "cache" / "nsc_merge" / "digests.json"
    provenance._hash_once.cache_clear()


@pytest.fixture
def read(monkeypatch):
    """The files that were read in full."""
    names = []
    before = provenance.sha256
    monkeypatch.setattr(provenance, "sha256", lambda path: (names.append(os.path.basename(path)), before(path))[1])
    return names


def test_a_header_tells_layout_and_size_and_not_numbers(tmp_path):
    first, second = weights(tmp_path / "a.safetensors"), weights(tmp_path / "b.safetensors", 2.0)
    assert quick(first) == quick(second)
    assert whole(first) != whole(second)
    save_file({"b": torch.ones(8)}, second)
    assert quick(first) != quick(second)
    longer = tmp_path / "c.safetensors"
    longer.write_bytes(first.read_bytes() + b"0")
    assert quick(longer) == {**quick(first), "size": quick(first)["size"] + 1}
    # A header longer than any is read no further than the longest may be.
    first.write_bytes(b"\xff" * 8 + b"{}")
    assert quick(first)["header_sha256"] == sha256(first)


def test_the_name_in_the_cache_of_the_hub_is_the_digest(tmp_path, read):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    weights(blobs / "new")
    name = sha256(blobs / "new")
    (blobs / "new").rename(blobs / name)
    file = snapshot / "model.safetensors"
    file.symlink_to(f"../../blobs/{name}")
    assert quick(file) == name
    assert read == []
    # A record of the header is compared by the header, wherever the file lies now, and one of all bytes by these.
    plain = weights(tmp_path / "model.safetensors")
    assert in_form_of({"model.safetensors": quick(plain)})(file) == quick(plain)
    assert in_form_of({"model.safetensors": name})(plain) == name
    assert in_form_of({"model.safetensors": name})(file) == name
    assert read == ["model.safetensors"]
    # A name of another kind of digest, and a link to elsewhere, are none.
    for other in (blobs / name[:40], tmp_path / name):
        weights(other)
        file.unlink()
        file.symlink_to(other)
        assert quick(file) == quick(plain)


def test_digests_of_whole_files_are_kept_for_as_long_as_they_hold(tmp_path, kept, read):
    file = weights(tmp_path / "model.safetensors")
    for _ in range(2):
        assert whole(file) == sha256(file)
        provenance._hash_once.cache_clear()
    assert read == ["model.safetensors"]
    stamp = file.stat().st_mtime_ns
    weights(file, 2.0)
    os.utime(file, ns=(stamp, stamp))
    assert whole(file) == sha256(file)
    assert len(read) == 2
    assert list(json.loads(kept.read_text())) == [str(file.resolve())]


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"PATH": "text"}', '{"PATH": {"mark": MARK, "sha256": 1}}'])
def test_what_is_none_of_ours_is_not_trusted(tmp_path, kept, text):
    file = weights(tmp_path / "model.safetensors")
    kept.parent.mkdir(parents=True)
    mark = json.dumps(list(provenance._mark(file)))
    kept.write_text(text.replace("PATH", str(file.resolve())).replace("MARK", mark))
    assert whole(file) == sha256(file)


def test_a_file_that_may_still_change_and_a_small_one_are_not_kept(tmp_path, kept, monkeypatch):
    file = weights(tmp_path / "model.safetensors")
    monkeypatch.setattr(provenance, "_SETTLED_NS", 60_000_000_000)
    assert whole(file) == sha256(file)
    monkeypatch.setattr(provenance, "_SETTLED_NS", -1)
    monkeypatch.setattr(provenance, "WORTH_KEEPING", 1 << 20)
    provenance._hash_once.cache_clear()
    assert whole(file) == sha256(file)
    assert not kept.exists()


def test_without_a_place_to_keep_them_files_are_read(tmp_path, kept):
    file = weights(tmp_path / "model.safetensors")
    (tmp_path / "cache").write_text("a file")
    assert whole(file) == sha256(file)
