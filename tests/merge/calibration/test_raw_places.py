"""Where images stand in the text of a sample, and how much of it is left when it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from raw_cases import IMAGE_TOKENS, WORDS, llava_base, picture, processor

from nsc_merge.calibration.raw.inputs import pairs
from nsc_merge.calibration.raw.reading import batches_of
from nsc_merge.calibration.raw.settings import DataSettings

ONE, TWO, THREE = (picture(number) for number in range(3))


def made(row: dict[str, Any], base: Path, **settings: Any) -> Any:
    (batch,) = batches_of([row], str(base), DataSettings(**settings), 1, "calibration.a")
    return batch


def assert_same(row: dict[str, Any], base: Path, text: str, images: list[Any]) -> None:
    batch, expected = made(row, base), processor()(text=[text], images=images, return_tensors="pt")
    assert set(batch) == set(expected)
    assert all(batch[name].equal(expected[name]) for name in expected)


def test_an_image_beside_a_chat_is_shown_to_the_first_user(tmp_path):
    llava_base(tmp_path)
    said = [("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    messages = [{"role": role, "content": content} for role, content in said]
    text = "system : a user : {}b assistant : c user : d "
    assert_same({"image": ONE, "messages": messages}, tmp_path, text.format("<image> "), [ONE])
    assert_same({"images": [ONE, TWO], "messages": messages}, tmp_path, text.format("<image> <image> "), [ONE, TWO])
    alone = [{"role": "assistant", "content": "c"}]
    assert_same({"image": ONE, "messages": alone}, tmp_path, "assistant : <image> c ", [ONE])


def test_parts_without_an_image_take_those_of_the_row_in_order(tmp_path):
    llava_base(tmp_path)
    content = [{"type": "image"}, {"type": "image", "image": TWO}, {"type": "image"}, {"type": "text", "text": "a"}]
    row = {"images": [ONE, THREE], "messages": [{"role": "user", "content": content}]}
    assert_same(row, tmp_path, "user : <image> <image> <image> a ", [ONE, TWO, THREE])
    with pytest.raises(ValueError, match="row 1: expected as many images as places for them, found 3 images and 3 tim"):
        made({**row, "images": [ONE]}, tmp_path)


def test_a_line_ends_between_an_image_and_its_prompt(tmp_path, monkeypatch):
    """Tokenizers of real models see it; what stands behind the model's own token is as it was written."""
    llava_base(tmp_path, chat=None)
    texts = []
    text_of = pairs._text_with_places

    def noted(*given: Any) -> Any:
        texts.append(text_of(*given))
        return texts[-1]

    monkeypatch.setattr(pairs, "_text_with_places", noted)
    for row in ({"image": ONE, "text": "a"}, {"images": [ONE, TWO], "text": "a"}, {"image": ONE, "text": "<image>a"}):
        made(row, tmp_path)
    assert [text for text, _ in texts] == ["<image>\na", "<image><image>\na", "<image>a"]


def test_one_token_of_text_is_enough(tmp_path):
    llava_base(tmp_path, chat=None)
    batch = made({"image": ONE, "text": "a b"}, tmp_path, max_length=1)
    assert batch["input_ids"].tolist() == [[WORDS.index("<s>"), *[WORDS.index("<image>")] * IMAGE_TOKENS]]
