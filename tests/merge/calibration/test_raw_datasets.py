"""Parquet files, and datasets in memory, on disk and on the hub."""

from __future__ import annotations

import hashlib
import json
import sys
from datetime import datetime

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from raw_cases import picture, text_base, vision_base, write_rows

import nsc_merge
from nsc_merge.calibration.raw.files import tables
from nsc_merge.calibration.raw.reading import batches_of, is_raw, open_source
from nsc_merge.calibration.raw.settings import DataSettings

ROWS = [{"question": f"a {'b ' * number}", "n": number} for number in range(23)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return text_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def expected(base):
    return nsc_merge.calibration_data(ROWS, base, batch_size=4, samples=9)


def made(source, base, **settings):
    return batches_of(source, str(base), DataSettings(samples=9, **settings), 4, "calibration.a")


def assert_same(batches, expected):
    assert batches.sha256["samples"] == expected.sha256["samples"]
    for one, other in zip(batches, expected, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def write_parquet(file, rows=ROWS, group=5):
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=group)
    return file


@pytest.mark.parametrize("kept", [1 << 28, 0])
def test_a_parquet_file_gives_the_rows_that_were_written(tmp_path, base, expected, monkeypatch, kept):
    monkeypatch.setattr(tables, "_KEPT", kept)
    file = write_parquet(tmp_path / "a.parquet")
    batches = made(file, base)
    assert_same(batches, expected)
    assert batches.sha256["a.parquet"] == hashlib.sha256(file.read_bytes()).hexdigest()
    source = open_source(file, DataSettings(), "data")
    assert source.rows([22, 0, 7, 5]) == [ROWS[22], ROWS[0], ROWS[7], ROWS[5]]


def test_a_large_row_group_is_read_some_rows_at_a_time(tmp_path):
    """A file of some kilobytes may hold gigabytes of one text; more than 2 GiB were called damaged."""
    rows = [{"question": f"{number % 7} " + "b" * 2000, "n": number} for number in range(20_000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=len(rows), store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        source = open_source(tmp_path / "a.parquet", DataSettings(), "data")
        for numbers in ([19_999, 0, 1023, 1024], [1024], [5], range(2000, 2003)):
            assert source.rows(numbers) == [rows[number] for number in numbers]
    finally:
        pa.set_memory_pool(before)
    assert 0 < pool.max_memory() < 10 << 20


def test_parquet_files_in_a_folder_are_one(tmp_path, base, expected):
    for number, (start, end) in enumerate(((0, 9), (9, 10), (10, 23))):
        write_parquet(tmp_path / f"train-{number}.parquet", ROWS[start:end])
    batches = made(tmp_path, base)
    assert_same(batches, expected)
    assert set(batches.sha256) == {"train-0.parquet", "train-1.parquet", "train-2.parquet", "samples"}


def test_parquet_files_that_are_damaged_or_empty_are_refused(tmp_path, base):
    file = write_parquet(tmp_path / "a.parquet")
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="^calibration.a: .*a.parquet is damaged: "):
        made(file, base)
    file.write_bytes(raw[:4] + bytes(len(raw) // 2 - 4) + raw[len(raw) // 2 :])
    with pytest.raises(ValueError, match="^calibration.a: .*a.parquet is damaged: "):
        made(file, base)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), file)
    with pytest.raises(ValueError, match="^calibration.a: .*a.parquet holds no row"):
        made(file, base)


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path, base):
    """Rows would hold the last of them."""
    write_parquet(tmp_path / "a.parquet")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="^calibration.a: .* expected a name of its own for every column, found"):
        made(tmp_path, base)


def test_datasets_of_all_kinds_give_the_same_samples(tmp_path, base, expected):
    held = datasets.Dataset.from_list(ROWS)
    assert_same(made(held, base), expected)
    assert_same(made(datasets.DatasetDict(train=held, test=held.select(range(3))), base), expected)
    assert_same(made(datasets.DatasetDict(validation=held), base), expected)
    assert_same(made(held.to_iterable_dataset(num_shards=3), base), expected)
    everything = DataSettings(samples=None)
    streamed = batches_of(held.to_iterable_dataset(), str(base), everything, 4, "a")
    assert_same(streamed, batches_of(ROWS, str(base), everything, 4, "a"))
    shuffled = held.select(range(22, -1, -1)).select(range(22, -1, -1))
    assert_same(made(shuffled, base), expected)
    held.save_to_disk(tmp_path / "held")
    assert is_raw(tmp_path / "held")
    batches = made(tmp_path / "held", base)
    assert_same(batches, expected)
    state = hashlib.sha256((tmp_path / "held" / "state.json").read_bytes()).hexdigest()
    assert batches.sha256["held/state.json"] == state
    datasets.DatasetDict(train=held).save_to_disk(tmp_path / "splits")
    batches = made(tmp_path / "splits", base)
    assert_same(batches, expected)
    assert set(batches.sha256) == {"splits/train/state.json", "samples"}


def test_splits_are_named_where_there_are_several(tmp_path, base):
    held = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict(validation=held.select(range(3)), test=held.select(range(5)))
    assert sum(len(batch["input_ids"]) for batch in made(splits, base, split="test")) == 5
    listed = r"^calibration.a: split: expected one of \['validation', 'test'\] of DatasetDict, "
    with pytest.raises(ValueError, match=listed + "none is named"):
        made(splits, base)
    with pytest.raises(ValueError, match=listed + "found 'train'"):
        made(splits, base, split="train")
    with pytest.raises(ValueError, match="^calibration.a: split: Dataset has no splits, found 'train'"):
        made(held, base, split="train")


def test_datasets_that_hold_nothing_or_are_damaged_are_refused(tmp_path, base):
    empty = datasets.Dataset.from_list(ROWS).select([])
    with pytest.raises(ValueError, match="^calibration.a: Dataset holds no row"):
        made(empty, base)
    with pytest.raises(ValueError, match="^calibration.a: the dataset holds no row"):
        made(datasets.IterableDataset.from_generator(lambda: iter(())), base)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "held")
    (tmp_path / "held" / "data-00000-of-00001.arrow").write_bytes(b"no")
    with pytest.raises(ValueError, match="^calibration.a: .*held is damaged: ") as caught:
        made(tmp_path / "held", base)
    assert "\n" not in str(caught.value)


def test_images_in_datasets_and_parquet_are_those_in_files(tmp_path):
    base = vision_base(tmp_path / "base")
    expected = made([{"image": picture(number)} for number in range(3)], base)
    held = datasets.Dataset.from_dict({"image": [picture(number) for number in range(3)]})
    held = held.cast_column("image", datasets.Image())
    held.to_parquet(tmp_path / "a.parquet")
    for source in (held, held.to_iterable_dataset(), tmp_path / "a.parquet"):
        batches = made(source, base)
        assert torch.equal(
            torch.cat([batch["pixel_values"] for batch in batches]),
            torch.cat([batch["pixel_values"] for batch in expected]),
        )
        assert batches.sha256["samples"] == expected.sha256["samples"]
        assert "images" in batches.sha256


@pytest.mark.parametrize("kind", ["List", "struct", "Audio", "Video"])
def test_nothing_is_opened_that_a_dataset_holds_beside(tmp_path, base, expected, monkeypatch, kind):
    """What somebody else saved may name an address in the place of a file; and text needs no decoder of sounds."""
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    one = {"bytes": None, "path": "http://127.0.0.1:9/picture.png"}
    shape, value, feature = {
        "List": (datasets.List(stored), [one], {"_type": "List", "feature": {"_type": "Image"}}),
        "struct": ({"inner": stored}, {"inner": one}, {"inner": {"_type": "Image"}}),
    }.get(kind, (stored, one, {"_type": kind}))
    features = datasets.Features({"question": datasets.Value("string"), "beside": shape})
    rows = [{"question": row["question"], "beside": value} for row in ROWS]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "a")
    about = json.loads((tmp_path / "a" / "dataset_info.json").read_text())
    about["features"]["beside"] = feature
    (tmp_path / "a" / "dataset_info.json").write_text(json.dumps(about))
    (file,) = (tmp_path / "a").glob("*.arrow")
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": about["features"]}})})
    with pa.OSFile(str(file), "wb") as opened, pa.ipc.new_stream(opened, table.schema) as stream:
        stream.write_table(table)

    def connect(*where):
        raise AssertionError(f"asked {where}")

    monkeypatch.setattr("socket.socket.connect", connect)
    held = datasets.load_from_disk(str(tmp_path / "a"))
    for source in (tmp_path / "a", held, held.to_iterable_dataset(), held.with_format("torch")):
        assert_same(made(source, base, text="question"), expected)
    assert open_source(held, DataSettings(), "data").rows([0]) == [rows[0]]


def test_values_of_datasets_are_what_they_say(base):
    features = {
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "grid": datasets.Array2D((1, 2), "int32"),
        "several": datasets.List({"a": datasets.Value("int64")}),
        "when": datasets.Value("timestamp[s]"),
    }
    row = {"label": 1, "grid": [[1, 2]], "several": [{"a": 1}, {"a": 2}], "when": datetime(2026, 1, 2)}
    held = datasets.Dataset.from_list([row], features=datasets.Features(features))
    assert open_source(held, DataSettings(), "data").rows([0]) == [{**row, "label": "dog"}]
    text = datasets.Dataset.from_dict({"calls": ['{"a": [1]}']}, features=datasets.Features({"calls": datasets.Json()}))
    assert open_source(text, DataSettings(), "data").rows([0]) == [text[0]]


def test_a_hub_id_is_loaded_by_datasets_and_nothing_else_is(base, expected, monkeypatch):
    asked = []

    def load_dataset(name, config, **given):
        asked.append((name, config, given))
        return datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = DataSettings(samples=9, config="plain", revision="v1")
    assert_same(batches_of("owner/name", str(base), settings, 4, "a", local=False), expected)
    assert asked == [("owner/name", "plain", {"revision": "v1"})]
    assert_same(nsc_merge.calibration_data("owner/name", base, batch_size=4, samples=9), expected)
    for path in ("owner/name.jsonl", "./owner/name", "name", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="is missing"):
            nsc_merge.calibration_data(path, base)
    assert len(asked) == 2


def test_what_the_hub_says_is_one_line(base, monkeypatch):
    def load_dataset(name, config, **given):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="^a: the dataset owner/name cannot be loaded: no network .split, config and"):
        batches_of("owner/name", str(base), DataSettings(), 4, "a", local=False)


def test_a_missing_package_is_named(tmp_path, base, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    file = write_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"reading it needs pyarrow: pip install 'nsc-kernels\[data\]'"):
        made(file, base)


def test_csv_and_json_need_no_other_package(tmp_path, base, expected):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert_same(made(tmp_path / "a.json", base), expected)
    assert_same(made(write_rows(tmp_path / "a.jsonl", ROWS), base), expected)
