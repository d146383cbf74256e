"""Labelled batches put in another order, and their padding behind their tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nsc_merge.evaluation.rows.labelled_data import padded_behind, read_labelled, shuffled


def test_padding_in_front_is_put_behind():
    ids = torch.tensor([[0, 0, 5], [0, 6, 7], [1, 2, 3]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 5], [-100, -100, 7], [-100, 2, 3]]),
        "pixel_values": torch.arange(6.0).reshape(3, 2),
    }
    turned = [[5, 0, 0], [6, 7, 0], [1, 2, 3]]
    found = padded_behind(batch)
    assert found["input_ids"].tolist() == turned
    assert found["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert found["labels"].tolist() == [[5, -100, -100], [-100, 7, -100], [-100, 2, 3]]
    assert found["pixel_values"].equal(batch["pixel_values"])
    # Of whole rows nothing is moved, nor where positions say where each token stands, nor by a mask of pairs.
    positions = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 2]])
    for other in (
        {**batch, "attention_mask": torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]])},
        {**batch, "position_ids": positions},
        {**batch, "attention_mask": torch.zeros(3, 1, 3, 3)},
        {"input_ids": ids},
    ):
        assert padded_behind(other)["input_ids"].equal(ids)
    assert padded_behind({name: value[:2] for name, value in batch.items()})["input_ids"].tolist() == turned[:2]


def numbered(sizes: list[int], width: int = 2) -> list[dict[str, torch.Tensor]]:
    numbers = torch.arange(float(sum(sizes))).split(sizes)
    return [{"x": part[:, None].expand(-1, width), "labels": part.long()} for part in numbers]


def labels_in(batches: Any) -> list[list[int]]:
    return [batch["labels"].tolist() for batch in batches]


def test_rows_are_shuffled_and_keep_their_labels():
    batches = numbered([4, 4, 4, 3])
    found = shuffled(batches, 7)
    assert [len(one) for one in labels_in(found)] == [4, 4, 4, 3]
    assert all(bool((batch["x"] == batch["labels"][:, None]).all()) for batch in found)
    drawn = torch.cat([batch["labels"] for batch in found]).tolist()
    assert sorted(drawn) == list(range(15)) != drawn
    # A row may stand in another batch than before.
    assert {frozenset(one) for one in labels_in(found)} != {frozenset(one) for one in labels_in(batches)}
    assert labels_in(shuffled(batches, 7)) == labels_in(found) != labels_in(shuffled(batches, 8))


@pytest.mark.parametrize("why", ["shapes", "images"])
def test_batches_stay_whole_where_their_rows_fit_no_other(why):
    batches = [*numbered([2, 2, 2, 2, 2, 2])]
    if why == "shapes":
        batches[3] = {"x": torch.zeros(2, 5), "labels": batches[3]["labels"]}
    else:
        batches = [{**batch, "pixel_values": torch.zeros(3, 4)} for batch in batches]
    found = shuffled(batches, 1)
    assert sorted(map(id, found)) == sorted(map(id, batches))
    assert list(map(id, found)) != list(map(id, batches))
    assert labels_in(shuffled(batches, 1)) == labels_in(found) != labels_in(shuffled(batches, 2))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels", float("inf"), r"expected finite numbers in labels, or NaN where none is known, found inf"),
        ("labels", float("nan"), None),
        ("x", float("nan"), r"expected finite numbers in x, found nan"),
        ("x", -float("inf"), r"expected finite numbers in x, found -inf"),
        ("attention_mask", -float("inf"), None),
    ],
)
def test_no_figure_is_of_numbers_that_are_none(tmp_path, name, value, message):
    held = {key: torch.zeros(3) for key in ("x", "attention_mask", "labels")}
    held[name][1] = value
    save_file(held, tmp_path / "test.safetensors")

    def read() -> Any:
        task, recipe = SimpleNamespace(labels=None), SimpleNamespace(batch_size=3)
        place = tmp_path / "test.safetensors"
        return read_labelled(place, task, recipe, "tasks.t.test", predicts_tokens=False, classes=())  # type: ignore[arg-type]

    if message is None:
        assert read()[1] == "labels"
        return
    with pytest.raises(ValueError, match=f"tasks.t.test: {message}"):
        read()
