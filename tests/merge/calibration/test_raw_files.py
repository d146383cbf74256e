"""Files of rows: every format gives the same rows, and a wrong file says what it looks like."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import hashlib
import io
import json
import lzma
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_cases import text_base, write_pictures, write_rows

from nsc_merge.calibration.raw.files import text_files
from nsc_merge.calibration.raw.files.text_files import rows_of_text
from nsc_merge.calibration.raw.reading import is_raw, open_source
from nsc_merge.calibration.raw.settings import DataSettings

ROWS = [{"question": "a, \"b\"\nc", "answer": "é"}, {"question": "{d}", "answer": " "}]
SETTINGS = DataSettings()


def rows_in(source, settings=SETTINGS):
    found = open_source(source, settings, "data")
    return found.rows(range(found.count))


def as_csv(rows, separator=","):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


FORMATS = {
    "lines.jsonl": "".join(json.dumps(row) + "\n\n" for row in ROWS),
    "crlf.jsonl": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "marked.jsonl": "\ufeff" + "\n".join(json.dumps(row) for row in ROWS),
    "list.json": json.dumps(ROWS, indent=1),
    "data.json": json.dumps({"version": "1.1", "data": ROWS}),
    "only.json": json.dumps({"rows": ROWS}),
    "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "commas.csv": as_csv(ROWS),
    "marked.csv": "\ufeff" + as_csv(ROWS),
    "tabs.tsv": as_csv(ROWS, "\t"),
    "UPPER.CSV": as_csv(ROWS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_rows_that_were_written(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(FORMATS[name].encode())
    found = open_source(file, SETTINGS, "data")
    assert found.rows(range(found.count)) == ROWS
    assert found.sha256 == {name: hashlib.sha256(file.read_bytes()).hexdigest()}


def test_lines_of_text_are_samples_but_blank_ones(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\n  two\x0c\n \nthree\xe2\x80\xa8still three")
    assert rows_in(tmp_path / "a.txt") == [{"text": "one"}, {"text": "  two\x0c"}, {"text": "three\u2028still three"}]
    (tmp_path / "a.jsonl").write_text('"one"\n"two"\n')
    assert rows_in(tmp_path / "a.jsonl") == [{"text": "one"}, {"text": "two"}]


def test_an_object_of_one_list_is_a_column_or_the_rows(tmp_path):
    (tmp_path / "a.json").write_text('{"prompt": ["one", "two"]}')
    assert rows_in(tmp_path / "a.json") == [{"prompt": "one"}, {"prompt": "two"}]
    (tmp_path / "b.json").write_text('{"prompts": [{"prompt": "one"}, {"prompt": "two"}]}')
    assert rows_in(tmp_path / "b.json") == [{"prompt": "one"}, {"prompt": "two"}]


def test_a_name_of_a_column_may_hold_another_separator(tmp_path):
    (tmp_path / "a.csv").write_text("text;or none,label\na,1\n")
    assert rows_in(tmp_path / "a.csv") == [{"text;or none": "a", "label": "1"}]


def test_lines_end_as_on_any_system(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\r\r\n three\n")
    assert rows_in(tmp_path / "a.txt") == [{"text": "one"}, {"text": "two"}, {"text": " three"}]


def test_numbers_of_rows_as_pandas_writes_them_are_no_column(tmp_path):
    pd.DataFrame([{"text": "a, b", "label": 1}, {"text": "c", "label": 2}]).to_csv(tmp_path / "a.csv")
    assert rows_in(tmp_path / "a.csv") == [{"text": "a, b", "label": "1"}, {"text": "c", "label": "2"}]


def test_files_of_one_kind_in_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    for number in (2, 0, 1):
        write_rows(tmp_path / f"part-{number}.jsonl", [{"text": str(number)}])
    (tmp_path / "README.md").write_text("of these")
    (tmp_path / ".hidden.csv").write_text("x")
    found = open_source(tmp_path, SETTINGS, "data")
    assert [row["text"] for row in found.rows(range(found.count))] == ["0", "1", "2"]
    assert sorted(found.sha256) == ["part-0.jsonl", "part-1.jsonl", "part-2.jsonl"]
    (tmp_path / "more.csv").write_text("text\nb\n")
    with pytest.raises(ValueError, match=r"^data: .* holds files of several kinds, \['\.csv', '\.jsonl'\]; name"):
        open_source(tmp_path, SETTINGS, "data")


VALUES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(st.lists(st.fixed_dictionaries({"a": VALUES, "b c": VALUES}), min_size=1))
def test_any_text_comes_through_csv_and_json_lines(rows):
    raw = as_csv(rows).encode()
    assert rows_of_text(Path("x.csv"), raw, "data") == rows
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    assert rows_of_text(Path("x.jsonl"), lines, "data") == rows


def archive():
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("a.txt", "a")
    return made.getvalue()


def array():
    made = io.BytesIO()
    np.save(made, np.ones(3))
    return made.getvalue()


WRONG = {
    "empty.jsonl": (b" \n", "is empty; expected rows"),
    "a.jsonl": (b'{"text": "a"}\n{"text": }\n', "a.jsonl, line 2 is not valid JSON: Expecting value"),
    "twice.jsonl": (b'{"text": "a", "text": "b"}\n', "line 1 is not valid JSON: the key 'text' is given twice"),
    "number.jsonl": (b'{"text": "a"}\n3\n', "line 2: expected an object with columns, or a text, found 3"),
    "list.jsonl": (b'[{"text": "a"}]', "looks like a JSON list; .* call it .json"),
    "pretty.jsonl": (b'[\n{"text": "a"}\n]', "one JSON value over several lines; .* call it .json"),
    "lines.json": (b'{"text": "a"}\n{"text": "b"}\n', "looks like one JSON value a line: call it .jsonl"),
    "torn.json": (b'[{"text": "a"', "torn.json is not valid JSON"),
    "config.json": (b'{"architectures": ["A"], "size": 3}', "'architectures' \\(a list of 1\\), 'size' \\(int\\)"),
    "no.json": (b"[]", "holds no row"),
    "word.json": (b'"text"', "word.json: expected a list of rows, found 'text'"),
    "ragged.json": (b'{"a": [1, 2], "b": [3]}', "columns of one length; .* 'a' .a list of 2., 'b' .a list of 1."),
    "latin.csv": ("text\na\ncaf\xe9\n".encode("latin-1"), "is not UTF-8: byte 0xe9 in line 3.*iconv"),
    "latin.jsonl": (b'{"text": "caf\xe9"}', "is not UTF-8: byte 0xe9 in line 1"),
    "wide.txt": ("a\nb".encode("utf-16"), "looks like UTF-16; save it as UTF-8"),
    "semicolon.csv": (b"text;label\na;1\n", "line 1: columns look separated by ';'; expected commas"),
    "tabs.csv": (b"text\tlabel\na\t1\n", "line 1: columns look separated by '.t'; expected commas"),
    "short.csv": (b'text,label\n"a\nb",1\nc\n', "line 4: expected 2 fields as in the header, found 1"),
    "open.csv": (b'text\na\n"b\n', "line 3: unexpected end of data"),
    "same.csv": (b"text,text\na,b\n", "line 1: expected a name of its own for every column, found 'text' twice"),
    "nameless.csv": (b'""\na\n', "line 1: expected a name of its own for every column, found a column without one"),
    "unnamed.csv": (b"text,\na,b\n", "found a column without one"),
    "numbered.csv": (b",text\n0,a\nb\n", "line 3: expected 2 fields as in the header, found 1"),
    "wide.csv": (b"text\n" + b"a" * 140_000 + b"\n", "line 2: field larger than .*; write the rows as .jsonl"),
    "header.csv": (b"text\n", "holds no row"),
    "a.pt": (pickle.dumps({"a": 1}), "looks like a pickle, .* which is never opened"),
    "a.bin": (archive(), "looks like a pickle, .* never opened"),
    "a.pkl": (pickle.dumps([1]), "looks like a pickle"),
    "a.npy": (array(), "looks like a NumPy array; write model inputs with safetensors"),
    "a.zip": (archive(), "looks like a zip archive: unpack it"),
    "a.xlsx": (archive(), "looks like a spreadsheet: save it as CSV"),
    "a.xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "spreadsheet or document"),
    "a.gz": (gzip.compress(b"a"), "looks compressed by gzip"),
    "zipped.jsonl": (gzip.compress(b'{"text": "a"}'), "looks compressed by gzip"),
    "table.csv": (b"PAR1\0\0", "looks like a Parquet file: call it .parquet"),
    "a.arrow": (b"\xff\xff\xff\xff\x80\0\0\0", "looks like an Arrow stream; .* the folder of datasets' save_to_disk"),
    "a.pdf": (b"%PDF-1.7", "looks like a PDF"),
    "a.dat": (b"\x01\0\x02", "is binary data of no kind that is known"),
    "rows.log": (b'{"text": "a"}\n{"text": "b"}', "looks like one JSON object a line: call it .jsonl"),
    "all.log": (b'[{"text": "a"}]', "looks like JSON: call it .json"),
    "a.md": (b"{% a %}", "looks like text: call it .txt if every line is a sample"),
    "nothing.md": (b"", "is empty; expected .jsonl"),
    "one.png": (b"\x89PNG\r\n\x1a\n", "is one image; give the folder"),
    "one.flac": (b"fLaC\0\0\0\"", "is one recording; give the folder of audio files"),
    "one.mp3": (b"ID3\4\0", "is one recording; give the folder of audio files"),
    "one.wav": (b"RIFF\x24\0\0\0WAVE", "is one recording or image; give the folder of them"),
    "weights": ((2).to_bytes(8, "little") + b"{}", "looks like safetensors: call it .safetensors if"),
    "a.jsonl.gz": (gzip.compress(b'{"text": "a"}')[:-9], "a.jsonl.gz is damaged"),
    "a.csv.xz": (b"text\na\n", "a.csv.xz is damaged"),
    "a.md.gz": (gzip.compress(b"a"), "looks compressed by gzip: unpack it with gunzip, or call it by what is in it"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd", "looks compressed by zstd: unpack it with unzstd"),
    "torn.parquet": (b"PAR1 and no more", "torn.parquet is damaged"),
}


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("BZ2", bz2.compress), ("xz", lzma.compress)])
def test_packed_files_give_the_rows_that_are_in_them(tmp_path, suffix, pack):
    for name in ("lines.jsonl", "list.json", "commas.csv", "tabs.tsv"):
        file = tmp_path / f"{name}.{suffix}"
        file.write_bytes(pack(FORMATS[name].encode()))
        assert rows_in(file) == ROWS
    # As repositories on the hub have their splits.
    for split, row in zip(("test", "train"), ROWS, strict=True):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl.{suffix}").write_bytes(pack(json.dumps(row).encode()))
    assert rows_in(tmp_path / "data") == [ROWS[1]]
    assert rows_in(tmp_path / "data", DataSettings(split="test")) == [ROWS[0]]


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_what_is_packed_to_fill_the_memory_is_refused(tmp_path, monkeypatch, suffix, pack):
    monkeypatch.setattr(text_files, "_MOST_UNPACKED", 10_000)
    file = tmp_path / f"lines.txt.{suffix}"
    file.write_bytes(pack(b"a\n" * 5000))
    assert len(rows_in(file)) == 5000
    file.write_bytes(pack(b"a\n" * 5001) + pack(b"a\n" * 10**6))
    with pytest.raises(ValueError, match=rf"^data: .*lines.txt.{suffix}: expected text that is packed, found \d"):
        rows_in(file)
    # Numbers at random are packed to a third, and may be of any size.
    numbers = np.random.default_rng(0).integers(0, 2**60, 3000)
    file.write_bytes(pack(b"".join(b"%d\n" % number for number in numbers.tolist())))
    assert len(rows_in(file)) == 3000


def test_no_more_is_unpacked_than_may_be(monkeypatch):
    monkeypatch.setattr(text_files, "_MOST_UNPACKED", 10_000)
    unpacked = io.BytesIO(bytes(10 * 2**20))
    monkeypatch.setitem(text_files._PACKED, ".gz", lambda packed: contextlib.nullcontext(unpacked))
    with pytest.raises(ValueError, match="found 1 bytes that unpack to more than 10000"):
        rows_of_text(Path("a.txt.gz"), b"a", "data")
    # One piece, of a MiB.
    assert unpacked.tell() == 2**20


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_says_what_it_looks_like(tmp_path, name):
    raw, message = WRONG[name]
    file = tmp_path / name
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"^data: .*{message}") as caught:
        rows_in(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_wrong_folder_says_what_it_holds(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^data: .*nowhere.jsonl is missing$"):
        rows_in(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"^data: .* is empty; expected \.jsonl"):
        rows_in(tmp_path)
    (tmp_path / "notes.md").write_text("a")
    with pytest.raises(ValueError, match=r"^data: .* holds no data; .*found notes.md$"):
        rows_in(tmp_path)
    model = text_base(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a model; expected data"):
        rows_in(model)
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter; expected data"):
        rows_in(model)
    with pytest.raises(ValueError, match=r"^data: split: .*a.jsonl has no splits, found 'test'; expected none"):
        rows_in(write_rows(tmp_path / "a.jsonl", [{"text": "a"}]), DataSettings(split="test"))


def test_objects_that_are_no_rows_are_refused():
    for wrong, message in ((3, "found 3"), ("", "found ''"), ([], r"found \[\]"), ([1], r"found \[1\]")):
        with pytest.raises(ValueError, match=f"^data: expected a .*{message}"):
            open_source(wrong, SETTINGS, "data")
    assert rows_in([{"text": "a"}]) == [{"text": "a"}]
    with pytest.raises(ValueError, match="^data: split: row list has no splits, found 'test'"):
        rows_in([{"text": "a"}], DataSettings(split="test"))
    assert rows_in(["a", "b"]) == [{"text": "a"}, {"text": "b"}]
    assert rows_in(pd.DataFrame({"text": ["a"], "n": [1]})) == [{"text": "a", "n": 1}]
    with pytest.raises(ValueError, match="^data: expected a list of texts, images, audio or dict"):
        rows_in(pd.DataFrame({"text": []}))


def test_what_is_raw(tmp_path):
    write_pictures(tmp_path / "photos", 1)
    text_base(tmp_path / "model")
    for folder in ("inputs", "model"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "0.safetensors").touch()
    assert [is_raw(tmp_path / name) for name in ("photos", "model", "a.jsonl", "a.txt")] == [True] * 4
    assert [is_raw(tmp_path / name) for name in ("inputs", "a.safetensors", "a.SafeTensors")] == [False] * 3


SETTINGS_REFUSED = {
    "max_length": (0, "at least 1, found 0"),
    "samples": (-1, "at least 1, found -1"),
    "seed": (-1, "at least 0, found -1"),
    "truncation": ("yes", r"expected one of \[True, False\], found 'yes'"),
    "padding_side": ("middle", r"expected one of \['right', 'left'\], found 'middle'"),
    "truncation_side": (None, "found None"),
    "text": (3, "expected text, found 3"),
    "tokenizer": ("", "expected text, found ''"),
}


@pytest.mark.parametrize("name", SETTINGS_REFUSED)
def test_settings_that_are_none_are_refused(name):
    value, message = SETTINGS_REFUSED[name]
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        DataSettings(**{name: value})


def test_text_and_chat_are_not_both_taken():
    with pytest.raises(ValueError, match="^text, messages: expected one of them, found 'a' and 'b'"):
        DataSettings(text="a", messages="b")


def write_splits(folder, *names):
    folder.mkdir()
    for name in names:
        write_rows(folder / f"{name}.jsonl", [{"text": name}])
    return folder


def test_files_of_other_splits_in_a_folder_are_not_drawn_from(tmp_path):
    """What is held out stays so: the splits that datasets' load_dataset tells by names of files."""
    names = ("Train", "a_train-00001", "val", "test-00000-of-00001")
    folder = write_splits(tmp_path / "all", *names)
    assert rows_in(folder) == [{"text": "Train"}, {"text": "a_train-00001"}]
    assert rows_in(folder, DataSettings(split="test")) == [{"text": "test-00000-of-00001"}]
    found = open_source(folder, DataSettings(split="validation"), "data")
    assert (found.name, set(found.sha256)) == (f"{folder}, split validation", {"val.jsonl"})
    with pytest.raises(ValueError, match=r"^data: split: expected one of \['train', 'test', 'validation'\] of .*'dev'"):
        rows_in(folder, DataSettings(split="dev"))
    held_out = write_splits(tmp_path / "held out", "test", "dev")
    with pytest.raises(ValueError, match=r"^data: split: expected one of .*, none is named$"):
        rows_in(held_out)
    alone = write_splits(tmp_path / "alone", "test", "testing-2")
    assert rows_in(alone) == [{"text": "test"}, {"text": "testing-2"}]


def test_a_repository_of_a_dataset_has_its_files_in_data(tmp_path):
    """As ``hf download --repo-type dataset`` leaves it."""
    write_splits(tmp_path / "data", "train-00000-of-00001", "test-00000-of-00001")
    (tmp_path / "README.md").write_text("of these")
    assert rows_in(tmp_path) == [{"text": "train-00000-of-00001"}]
    assert rows_in(tmp_path, DataSettings(split="test")) == [{"text": "test-00000-of-00001"}]


def test_files_of_no_split_beside_some_to_be_held_out_are_refused(tmp_path):
    folder = write_splits(tmp_path / "one", "train", "contest", "trainer")
    assert len(rows_in(folder)) == 3
    assert rows_in(folder, DataSettings(split="train")) == [{"text": "train"}]
    folder = write_splits(tmp_path / "other", "french", "french_test")
    with pytest.raises(ValueError, match=r"^data: .*other holds french.jsonl, of no split, beside test; expected"):
        rows_in(folder)
    assert rows_in(folder, DataSettings(split="test")) == [{"text": "french_test"}]
    with pytest.raises(ValueError, match=r"^data: split: .*plain has no splits, found 'test'; expected none"):
        rows_in(write_splits(tmp_path / "plain", "a", "b"), DataSettings(split="test"))


def test_images_of_other_splits_in_a_folder_are_not_drawn_from(tmp_path):
    for split, count in (("train", 3), ("Test", 2)):
        for name in ("cats", "dev"):
            write_pictures(tmp_path / "photos" / split / name, count)
    assert [row["image"] for row in rows_in(tmp_path / "photos")] == [
        f"train/{name}/{number}.png" for name in ("cats", "dev") for number in range(3)
    ]
    assert len(rows_in(tmp_path / "photos", DataSettings(split="test"))) == 4
    assert len(rows_in(tmp_path / "photos" / "Test" / "cats")) == 2
    write_rows(tmp_path / "photos" / "Test" / "metadata.jsonl", [{"file_name": "cats/1.png", "text": "a"}])
    found = open_source(tmp_path / "photos", DataSettings(split="test"), "data")
    assert found.rows([0]) == [{"file_name": "cats/1.png", "text": "a"}]
    assert found.folder == tmp_path / "photos" / "Test"
    # A table of all of them says which are meant; a name of a class, or of a photo, holds nothing out.
    write_rows(tmp_path / "photos" / "metadata.jsonl", [{"file_name": "train/cats/1.png", "text": "a"}])
    assert len(rows_in(tmp_path / "photos")) == 1
    for name in ("car", "train"):
        write_pictures(tmp_path / "vehicles" / name, 2)
    (tmp_path / "vehicles" / "car" / "0.png").rename(tmp_path / "vehicles" / "car" / "test.png")
    assert len(rows_in(tmp_path / "vehicles")) == 4
    # But the folder next to a photo does, however deep.
    for split in ("train", "test"):
        write_pictures(tmp_path / "repository" / "images" / split, 1)
    assert rows_in(tmp_path / "repository") == [{"image": "images/train/0.png"}]
    (tmp_path / "repository" / "images" / "test" / "0.png").rename(tmp_path / "vehicles" / "test.png")
    assert len(rows_in(tmp_path / "vehicles")) == 5
