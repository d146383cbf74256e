"""Which rows are drawn, and how samples of unequal lengths are put together."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from raw_cases import write_rows

from nsc_merge.calibration.raw.drawing import Filling, Source, batched, batches_by_length, in_order
from nsc_merge.calibration.raw.preprocessors import Base
from nsc_merge.calibration.raw.reading import draw, open_source
from nsc_merge.calibration.raw.settings import DataSettings


def drawn(source, **settings):
    chosen = DataSettings(**settings)
    base = Base("", None, None, frozenset({"input_ids"}))
    return [sample.text for sample in draw(source, chosen, "data", base)]


def rows(count, asked=None):
    def some(numbers):
        if asked is not None:
            asked.extend(numbers)
        return [{"text": str(number)} for number in numbers]

    return Source("rows", count, ("text",), some)


def test_the_order_is_that_of_sha256_of_seed_and_number():
    by_hand = sorted(range(20), key=lambda number: hashlib.sha256(f"7:{number}".encode()).hexdigest())
    assert drawn(rows(20), seed=7, samples=None) == [str(number) for number in by_hand]
    # As it was when this was written: a recipe gives the same samples in every release.
    assert drawn(rows(8), seed=0, samples=4) == ["7", "4", "3", "2"]


def test_the_order_of_many_rows_takes_some_bytes_a_row():
    count = 100_000
    tracemalloc.start()
    first = next(in_order(rows(count), 3, 4))[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first == min(range(count), key=lambda number: hashlib.sha256(f"3:{number}".encode()).digest())
    assert peak < 50 * count


def test_fewer_samples_are_the_first_of_more_and_nothing_else_is_read():
    asked: list[int] = []
    few = drawn(rows(1000, asked), samples=5)
    assert few == drawn(rows(1000), samples=9)[:5]
    assert [str(number) for number in asked] == few
    assert few != drawn(rows(1000), samples=5, seed=1)
    assert sorted(drawn(rows(30), samples=None), key=int) == [str(number) for number in range(30)]


def test_blank_rows_make_room_for_others(tmp_path, caplog):
    file = write_rows(tmp_path / "a.jsonl", [{"text": str(n) if n % 3 else " "} for n in range(30)])
    source = open_source(file, DataSettings(), "data")
    order = [row["text"] for _, row in in_order(source, 0, 30)]
    found = drawn(source, samples=12)
    assert found == [text for text in order if text != " "][:12]
    left_out = order.index(found[-1]) - 11
    assert f"data: {left_out} rows of {file} are left out: their text is blank" in caplog.text


def test_names_of_files_are_logged_as_text_alone(tmp_path, caplog):
    """One that would give the terminal another title, and hide its line, is a name like others."""
    file = write_rows(tmp_path / "a\x1b]0;title\x07\nb\r.jsonl", [{"text": text} for text in ("a b", " ")])
    assert drawn(open_source(file, DataSettings(), "data")) == ["a b"]
    (line,) = caplog.messages
    assert "a ]0;title  b .jsonl are left out: their text is blank" in line


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3), st.data())
def test_every_sample_is_in_one_batch_of_its_kind_between_its_neighbours_in_length(lengths, size, seed, data):
    kinds = [data.draw(st.sampled_from("ab")) for _ in lengths]
    batches = batches_by_length(lengths, kinds, size, seed)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    for kind in set(kinds):
        of_kind = [batch for batch in batches if kinds[batch[0]] == kind]
        assert all(kinds[number] == kind for batch in of_kind for number in batch)
        assert sum(len(batch) < size for batch in of_kind) <= 1
        assert max(map(len, of_kind)) <= size
        spans = sorted((lengths[batch[0]], lengths[batch[-1]]) for batch in of_kind)
        assert all(one[1] <= other[0] for one, other in pairwise(spans))


def padding(batches, lengths):
    places = sum(len(batch) * max(lengths[number] for number in batch) for batch in batches)
    return 1 - sum(lengths) / places


def test_padding_costs_little_where_lengths_are_skewed():
    draws = random.Random(0)
    lengths = [min(512, round(draws.lognormvariate(4, 1))) for _ in range(1024)]
    in_turn = [list(range(start, start + 8)) for start in range(0, 1024, 8)]
    bucketed = batches_by_length(lengths, [0] * 1024, 8, 0)
    assert padding(in_turn, lengths) > 0.5
    assert padding(bucketed, lengths) < 0.02
    means = [sum(lengths[number] for number in batch) / 8 for batch in bucketed]
    assert sorted(means) != means


def test_batches_are_shuffled_the_same_way_every_time():
    first = batches_by_length(list(range(40)), [0] * 40, 4, 3)
    assert first == batches_by_length(list(range(40)), [0] * 40, 4, 3)
    assert first != batches_by_length(list(range(40)), [0] * 40, 4, 4)
    assert first != sorted(first)


def test_pieces_of_images_of_several_samples_stand_behind_each_other():
    """As Qwen-VL's do, of which large images have more; what images are made of is alike."""
    samples = [
        {"input_ids": torch.arange(n), "attention_mask": torch.ones(n), "pixel_values": torch.full(shape, n)}
        for n, shape in ((3, (4, 6)), (5, (2, 6)), (4, (1, 7)))
    ]
    padded = {name: Filling(0, "right") for name in ("input_ids", "attention_mask")}
    batches = {len(batch["input_ids"]): batch for batch in batched(samples, 2, 0, padded)}
    assert batches[1]["pixel_values"].tolist() == [[4] * 7]
    assert batches[2]["pixel_values"].tolist() == [[3] * 6] * 4 + [[5] * 6] * 2
    assert batches[2]["input_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
