"""Data in memory: tables and columns of other packages, datasets shown in other forms, names of classes."""

from __future__ import annotations

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from raw_cases import llava_base, text_base, vision_base

import nsc_merge
from nsc_merge.calibration.raw.drawing import in_order
from nsc_merge.calibration.raw.files import tables
from nsc_merge.calibration.raw.reading import open_source
from nsc_merge.calibration.raw.settings import DataSettings

ROWS = [{"text": "a b", "label": 1}, {"text": "c", "label": 0}, {"text": "d e", "label": 1}]
FEATURES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return text_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def labelled():
    return datasets.Dataset.from_list(ROWS, features=FEATURES)


def samples(source, base, text="{text} {label}"):
    return nsc_merge.calibration_data(source, base, text=text).sha256["samples"]


def rows_of(source):
    found = open_source(source, DataSettings(), "data")
    return [row for _, row in sorted(in_order(found, 0, 2))]


def test_classes_have_their_names_wherever_they_are_known(tmp_path, labelled):
    named = [{**row, "label": ["no", "yes"][row["label"]]} for row in ROWS]
    assert rows_of(labelled) == named
    assert rows_of(labelled.to_iterable_dataset()) == named
    labelled.save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved") == named
    labelled.to_parquet(tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == named
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "plain.parquet")
    assert rows_of(tmp_path / "plain.parquet") == ROWS


def test_a_class_that_is_not_known_is_no_text(base):
    unknown = datasets.Dataset.from_list([{"text": "a", "label": -1}], features=FEATURES)
    with pytest.raises(ValueError, match="row 1: holds nothing in column 'label'"):
        samples(unknown, base)


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
def test_the_form_that_a_dataset_is_shown_in_changes_nothing(tmp_path, base, labelled, form):
    expected = samples(labelled, base)
    assert samples(labelled.with_format(form), base) == expected
    assert samples(labelled.to_iterable_dataset().with_format(form), base) == expected
    # Columns that are not shown are not there.
    assert rows_of(labelled.with_format(form, columns=["text"])) == [{"text": row["text"]} for row in ROWS]


def test_a_function_of_ones_own_says_what_the_rows_are(base, labelled):
    shown = labelled.with_transform(lambda rows: {"said": [text + " f" for text in rows["text"]]})
    assert rows_of(shown) == [{"said": row["text"] + " f"} for row in ROWS]
    assert samples(shown, base, "said") == samples([row["text"] + " f" for row in ROWS], base, "text")


@pytest.mark.parametrize(
    "made",
    [pd.DataFrame, pa.Table.from_pylist, lambda rows: pd.DataFrame(rows).convert_dtypes()],
    ids=["pandas", "pyarrow", "nullable"],
)
def test_tables_of_other_packages_are_rows(made):
    rows = [*ROWS, {"text": None, "label": 0}]
    assert rows_of(made(rows)) == rows


@pytest.mark.parametrize("made", [pd.Series, pa.array, pa.chunked_array, np.array])
def test_columns_of_other_packages_are_texts(made):
    texts = ["a b", "c"]
    assert rows_of(made([texts] if made is pa.chunked_array else texts)) == [{"text": text} for text in texts]


def test_tables_of_polars_are_rows():
    """It is not among what the tests install: what matters is its name and its method."""
    frame = type("DataFrame", (), {"__module__": "polars.dataframe.frame", "to_dicts": lambda self: ROWS})
    assert rows_of(frame()) == ROWS


def test_missing_texts_of_pandas_are_left_out(base):
    table = pd.DataFrame({"text": ["a", None, "b"], "n": [1, 2, 3]})
    found = nsc_merge.calibration_data(table, base)
    assert sum(len(batch["input_ids"]) for batch in found) == 2


@pytest.mark.parametrize(
    "row",
    [
        "a \ud800 b",
        {"text": "a \ud800 b"},
        {"messages": [{"role": "user", "content": "a \ud800"}]},
        {"prompt": "a \ud800", "n": 1},
    ],
)
def test_half_a_character_is_refused(base, row):
    with pytest.raises(ValueError, match=r"^source: row list, row 1: holds '\\ud800', half of a character"):
        nsc_merge.calibration_data([row], base)


def test_pixels_are_images(tmp_path):
    """As datasets and cameras have them in memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    for base, row in ((vision_base(tmp_path / "vit"), {}), (llava_base(tmp_path / "llava"), {"text": "a"})):
        one, other = (
            nsc_merge.calibration_data([{"image": image, **row}], base) for image in (pixels, Image.fromarray(pixels))
        )
        assert one.sha256["samples"] == other.sha256["samples"]
    bare, named = (nsc_merge.calibration_data(rows, tmp_path / "vit") for rows in ([pixels], [{"image": pixels}]))
    assert bare.sha256["samples"] == named.sha256["samples"]
    with pytest.raises(ValueError, match=r"row 1: expected an image, its path, or pixels .*, found array\(\[\[\["):
        nsc_merge.calibration_data([{"image": pixels / 255}], tmp_path / "vit")


def test_arrays_of_one_number_are_numbers_and_others_no_text(base):
    rows = [{"text": "a", "n": np.array(3)}, {"text": "a", "n": torch.tensor(3)}]
    assert samples(rows, base, "{text} {n}") == samples([{"text": "a", "n": 3}] * 2, base, "{text} {n}")
    for value in (np.zeros(3), torch.zeros(3)):
        with pytest.raises(ValueError, match="row 1: column 'n': expected text, found (array|tensor)"):
            samples([{"text": "a", "n": value}], base, "{text} {n}")


def test_rows_without_a_chat_are_left_out_as_those_of_blank_text_are(base, caplog):
    chat = [{"role": "user", "content": "a"}]
    found = nsc_merge.calibration_data([{"messages": chat}, {"messages": None}, {"messages": []}], base)
    assert found.sha256["samples"] == nsc_merge.calibration_data([{"messages": chat}], base).sha256["samples"]
    assert "source: 2 rows of row list are left out: their text is blank" in caplog.text


@pytest.mark.parametrize("value", [None, {"en": "a", "de": "b"}, ["a", "b"]])
def test_no_template_is_advised_over_what_is_no_text(base, value):
    with pytest.raises(ValueError, match=r"no column of text: said \(.*\); write a column of texts$"):
        nsc_merge.calibration_data([{"said": value}], base)
    with pytest.raises(ValueError, match=r'such as text: "\{n\}"$'):
        nsc_merge.calibration_data([{"said": value, "n": 3}], base)


def test_a_long_stream_says_that_it_is_gone_through_whole(base, caplog, monkeypatch):
    """Of one without an end nobody would know what is waited for."""
    stream = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}] * 3).to_iterable_dataset()
    monkeypatch.setattr(tables, "_LONG", 6)
    nsc_merge.calibration_data(stream, base)
    assert caplog.text == ""
    monkeypatch.setattr(tables, "_LONG", 5)
    found = nsc_merge.calibration_data(stream, base)
    assert sum(len(batch["input_ids"]) for batch in found) == 6
    assert "source: the dataset is gone through whole" in caplog.text
    assert "after 5 of them; dataset.take(5) has the first alone" in caplog.text
