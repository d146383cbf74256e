"""JSON that is read: once per key, finite, bounded, or refused in one line."""

from __future__ import annotations

import math
import time

import pytest

from nsc_merge.utils.json_text import from_json


def test_values_are_those_of_json():
    text = '{"a": [1, -2.5e3, "\\u00e9\\ud83d\\ude00", true, null], "b": {"a": 1, "c": 100000000000000000000}}'
    expected = {"a": [1, -2500.0, "é😀", True, None], "b": {"a": 1, "c": 10**20}}
    assert from_json(text, "it") == from_json(text.encode(), "it") == expected
    found = from_json("[NaN, -Infinity]", "it", not_finite=True)
    assert math.isnan(found[0])
    assert found[1] == -math.inf
    assert from_json("[" * 64 + "]" * 64, "it")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"r": 4, "r": 8}', "the key 'r' is given twice"),
        ('{"a": [{"r": 4, "alpha": 1, "r": 4}]}', "the key 'r' is given twice"),
        ('{"r": 4, "\\u0072": 8}', "the key 'r' is given twice"),
        ("[NaN]", "expected finite numbers, found NaN"),
        ("[-Infinity]", "expected finite numbers, found -Infinity"),
        ("[1e999]", "expected finite numbers, found 1e999"),
        ("9" * 5000, "at most 40 digits, found 99999999999999999999... of 5000"),
        ("[" * 65 + "]" * 65, "nested deeper than 64"),
        ("[" * 1_000_000, "nested deeper than 64"),
        ("[" + "[]," * 1_000_000 + "1]", "expected at most 500000 values"),
        ('["\\ud800"]', "surrogates not allowed"),
        (b'{"a": "\xff"}', "invalid start byte"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
    ],
)
def test_refusals_are_one_line_and_quick(text, reason):
    started = time.process_time()
    with pytest.raises(ValueError, match=reason) as error:
        from_json(text, "file.json")
    assert time.process_time() - started < 1
    assert str(error.value).startswith("file.json is not valid JSON: ")
    assert "\n" not in str(error.value)


def test_a_key_that_comes_again_after_many_others_is_found_at_once():
    text = "{" + ", ".join(f'"{number}": 1' for number in range(100_000)) + ', "99999": 2}'
    started = time.process_time()
    with pytest.raises(ValueError, match="the key '99999' is given twice"):
        from_json(text, "it")
    assert time.process_time() - started < 1
