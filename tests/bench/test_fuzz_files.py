"""The trials of damaged files: the same for the same seed, and a planted fault is found."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from bench.fuzz import files
from bench.fuzz.files import trials


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    """Kinds that take a moment each; what the oracle says of a recipe has to follow what recipes take."""
    monkeypatch.setattr(files, "KINDS", {kind: files.KINDS[kind] for kind in ("batches", "merge", "recipe")})


def test_the_same_seed_gives_the_same_trials_and_none_is_wrong():
    first, again = ([(one.case, one.outcome) for one in islice(trials(3), 60)] for _ in range(2))
    assert first == again
    assert {outcome for _, outcome in first} == {"right", "refused"}
    assert first != [(one.case, one.outcome) for one in islice(trials(4), 60)]


def test_a_reader_that_gives_other_values_is_found_out(monkeypatch):
    before = files.read_batches

    def doubled(*arguments):
        return [{name: value.double() * 2 for name, value in batch.items()} for batch in before(*arguments)]

    monkeypatch.setattr(files, "read_batches", doubled)
    wrong = [one for one in islice(trials(3), 60) if one.outcome == "wrong"]
    assert wrong
    assert all("batches" in one.case and "expected" in one.found for one in wrong)


def test_an_error_of_another_kind_is_found_out(monkeypatch):
    def broken(*_):
        raise KeyError("problem")

    monkeypatch.setattr(files, "read_document", broken)
    wrong = [one for one in islice(trials(3), 30) if one.outcome == "wrong"]
    assert wrong
    assert all(one.found == "KeyError: 'problem'" for one in wrong)


def test_the_oracle_reads_float8_by_definition():
    raw = bytes(range(256))
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        expected = torch.tensor(list(raw), dtype=torch.uint8).view(dtype).double()
        found = torch.from_numpy(files.oracle._numbers(name, raw))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
