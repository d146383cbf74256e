"""What of a row is taken: one rule for what is not named, templates that look up columns and nothing else, chats."""

from __future__ import annotations

import json
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsc_merge.calibration.raw.chats import in_parts, messages_of, plain_text
from nsc_merge.calibration.raw.columns import Columns, choose
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.calibration.raw.templates import Template, text_of

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def chosen(row, takes="text", **settings):
    return choose([row], DataSettings(**settings), "data", text="text" in takes, images="images" in takes)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"label": 1, "body": "a"}, "body"),
        ({"prompt": "a", "text": "b"}, "text"),
        ({"question": "a", "prompt": "b"}, "prompt"),
        ({"answer": "a", "question": "b"}, "question"),
        ({"instruction": "a", "input": "b", "output": "c"}, "instruction"),
        ({"output": "c", "content": "b"}, "content"),
        ({"text": None, "body": "a"}, "body"),
        ({"photo": "a.png", "body": "a"}, "body"),
        ({"messages": "a"}, "messages"),
    ],
)
def test_the_text_where_none_is_named(row, column):
    assert chosen(row) == Columns(text=column)


def test_chats_come_first_and_a_name_before_all():
    assert chosen({"text": "a", "messages": CHAT}) == Columns(messages="messages")
    assert chosen({"text": "a", "conversations": SHARED}) == Columns(messages="conversations")
    assert chosen({"text": "a", "messages": CHAT}, text="text") == Columns(text="text")
    assert chosen({"turns": CHAT, "text": "a"}, messages="turns") == Columns(messages="turns")


def test_images_where_none_is_named():
    assert chosen({"image": "a.png"}, "images") == Columns(image="image")
    assert chosen({"photo": "a.JPG", "label": 1}, "images") == Columns(image="photo")
    assert chosen({"photo": ["a.png"], "prompt": "a"}, "text, images") == Columns(text="prompt", image="photo")
    assert chosen({"prompt": "a"}, "text, images") == Columns(text="prompt")
    assert chosen({"photo": "a.png", "image": "b.png"}, "images", image="photo") == Columns(image="photo")


REFUSED = {
    "ambiguous": (
        {"title": "x", "body": "y", "n": 1}, {},
        "several columns of text and none is named: title \\('x'\\), body \\('y'\\), n \\(1\\); write text: NAME, or a "
        'template such as text: "{title}.n{body}"',
    ),
    "none": ({"n": 1}, {}, "no column of text: n \\(1\\)"),
    "column": ({"prompt": "a"}, {"text": "promt"}, "text: column 'promt' is not there; did you mean prompt?"),
    "columns": ({"a": "a"}, {"text": "zzz"}, "text: column 'zzz' is not there \\(columns: a\\)"),
    "template": ({"prompt": "a"}, {"text": "{promt}"}, "text: the template's column 'promt' is not there; did"),
    "constant": ({"prompt": "a"}, {"text": "{{}}"}, "text: the template '{{}}' names no column of \\['prompt'\\]"),
    "brace": ({"prompt": "a"}, {"text": "{prompt} }"}, "text: a '}' alone in the template .* write '}}'"),
    "attribute": ({"a": "a"}, {"text": "{a.__class__}"}, "text: the template's column 'a.__class__' is not there"),
    "index": ({"a": "a"}, {"text": "{a[0]}"}, "text: the template's column 'a\\[0\\]' is not there"),
    "conversion": ({"a": "a"}, {"text": "{a!r:>9}"}, "text: the template's column 'a!r:>9' is not there"),
    "messages": ({"messages": CHAT}, {"messages": "message"}, "messages: column 'message' is not there; did you mean"),
    "other chat": ({"turns": CHAT}, {}, "no column of text; 'turns' holds chats: write messages: turns"),
    "image": ({"text": "a"}, {"image": "image"}, "image: 'image' is named, and the base takes no images"),
    "images": ({"image": "a.png"}, {}, "holds images alone \\(image \\('a.png'\\)\\), and the base takes text: write"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_clear_is_refused_with_what_to_write(case):
    row, settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^data: {message}") as caught:
        chosen(row, **settings)
    assert "\n" not in str(caught.value)


def test_images_that_are_not_clear_are_refused():
    with pytest.raises(ValueError, match=r"several columns of images, \['left', 'right'\]: left \('a.png'\)"):
        chosen({"left": "a.png", "right": "b.png"}, "images")
    # Nor are they left out where text alone would do.
    with pytest.raises(ValueError, match=r"several columns of images, \['left', 'right'\]"):
        chosen({"left": "a.png", "right": "b.png", "prompt": "a"}, "text, images")
    with pytest.raises(ValueError, match=r"no column of images: text \('a'\); write image: NAME, or give a folder"):
        chosen({"text": "a"}, "images")
    with pytest.raises(ValueError, match="text: is named, and the base takes images alone"):
        choose([{"image": "a.png"}], DataSettings(text="image"), "data", text=False, images=True)
    with pytest.raises(ValueError, match="holds images alone .* takes text beside them: write a .jsonl"):
        chosen({"image": "a.png"}, "text, images")


NAMES = st.text(st.characters(exclude_characters="{}", exclude_categories=["Cs"]), min_size=1)
ROW = st.dictionaries(NAMES, st.text(), min_size=1, max_size=3)


@given(ROW, st.lists(st.text(), min_size=2, max_size=4), st.data())
def test_a_template_is_its_texts_with_the_columns_between(row, texts, data):
    names = [data.draw(st.sampled_from(sorted(row))) for _ in texts[1:]]
    template, expected = "", ""
    for number, text in enumerate(texts):
        template += text.replace("{", "{{").replace("}", "}}")
        expected += text
        if number < len(names):
            template += "{" + names[number] + "}"
            expected += row[names[number]]
    assert Template.parse(template, list(row), "data").fill(row, "row") == expected


def test_numbers_are_text_and_nothing_else_is():
    template = Template.parse("{a}|{b}", ["a", "b"], "data")
    assert template.fill({"a": 3, "b": True}, "row 1") == "3|True"
    with pytest.raises(ValueError, match="^row 1: holds nothing in column 'b'; expected text"):
        template.fill({"a": "x"}, "row 1")
    with pytest.raises(ValueError, match="^row 1: column 'a': expected text, found .*; write messages: a$"):
        template.fill({"a": CHAT, "b": ""}, "row 1")


def test_rows_of_blank_text_give_no_sample():
    assert Columns(text="text").sample({"text": " \n"}, "row") is None
    assert Columns(text="text").sample({"text": None}, "row") is None
    template = Template.parse("Q: {q} A: {a}", ["q", "a"], "data")
    assert Columns(text=template).sample({"q": "", "a": " "}, "row") is None
    assert Columns(text=template).sample({"q": "", "a": "x"}, "row").text == "Q:  A: x"
    with pytest.raises(ValueError, match="^row: holds an image and no text in column 'text', images in column 'image'"):
        Columns(text="text", image="image").sample({"text": "", "image": "a.png"}, "row")
    with pytest.raises(ValueError, match="^row: holds no image in column 'image'"):
        Columns(image="image").sample({"image": None}, "row")
    with pytest.raises(ValueError, match="^row: lacks the column 'messages'"):
        Columns(messages="messages").sample({}, "row")
    for row in ({}, {"text": float("nan")}):
        with pytest.raises(ValueError, match="^row: holds nothing in column 'text'; expected text"):
            Columns(text="text").sample(row, "row")


def test_both_forms_of_chats_are_one():
    assert messages_of(SHARED, "row") == messages_of(CHAT, "row") == CHAT
    system = [{"from": "system", "value": "x"}, {"from": "user", "value": "y"}]
    assert [turn["role"] for turn in messages_of(system, "row")] == ["system", "user"]
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "refusal": None}
    assert messages_of([called], "row") == [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "^row: expected a list of messages"),
        ("a", "^row: expected a list of messages {role, content} or {from, value}, found 'a'"),
        ([{"role": "user"}], "^row: expected a list of messages"),
        ([*CHAT, {"role": "boss", "content": "a"}], "^row, message 3: expected a role of .*, found 'boss'"),
        ([{"role": "user", "content": 3}], "^row, message 1: expected text or a list of parts .*found 3"),
        ([{"role": "user", "content": None}], "^row, message 1: expected text or a list of parts .*found None"),
        ([{"role": "user", "content": [{"type": "video"}]}], "^row, message 1: expected parts .*'video'}"),
    ],
)
def test_what_is_no_chat_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        messages_of(value, "row")


def test_a_chat_that_a_table_holds_as_text_is_one():
    """As in a .csv, or in a column of JSON of a .parquet; it is never encoded with its brackets and names."""
    for chat in (CHAT, SHARED):
        text = json.dumps(chat, indent=1)
        assert messages_of(text, "row") == CHAT
        assert chosen({"messages": text}) == Columns(messages="messages")
    with pytest.raises(ValueError, match="no column of text; 'turns' holds chats: write messages: turns"):
        chosen({"turns": json.dumps(CHAT)})
    with pytest.raises(ValueError, match=r"^row: the chat, which is text and .* is not valid JSON"):
        chosen({"messages": str(CHAT)}).sample({"messages": str(CHAT)}, "row")
    assert chosen({"text": "[x] [{a}]"}) == Columns(text="text")
    assert chosen({"turns": json.dumps(CHAT)}, text="turns") == Columns(text="turns")


def test_parts_of_messages():
    content = [
        {"type": "text", "text": "a"}, "b", {"type": "image"},
        {"type": "image_url", "image_url": {"url": "c.png"}}, {"type": "image", "path": "d.png"},
    ]  # fmt: skip
    (message,) = messages_of([{"role": "user", "content": content}], "row")
    assert message["content"] == [
        {"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"},
        {"type": "image", "image": "c.png"}, {"type": "image", "image": "d.png"},
    ]  # fmt: skip
    with pytest.raises(ValueError, match="^row: a message holds an image, and the base takes text alone"):
        plain_text([message], "row")
    spoken = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert plain_text([spoken], "row") == [{"role": "user", "content": "ab"}]
    # Blanks are looked at once each.
    blanks = " " * 10**6
    tokens = {"image": "<image>"}
    assert in_parts([{"role": "user", "content": f"x{blanks}y{blanks}<image>"}], tokens)[0]["content"] == [
        {"type": "text", "text": f"x{blanks}y"},
        {"type": "image"},
    ]
    assert in_parts([{"role": "user", "content": "x <image>\ny<image>"}], tokens)[0]["content"] == [
        {"type": "text", "text": "x"}, {"type": "image"}, {"type": "text", "text": "y"}, {"type": "image"},
    ]  # fmt: skip


@pytest.mark.parametrize("value", [3, 2.5, True, np.int64(3), np.float32(2.5), Decimal("2.50")])
def test_numbers_are_text_in_a_template(value):
    assert text_of({"a": value}, "a", "row") == str(value)
    with pytest.raises(ValueError, match="^row: holds nothing in column 'a'"):
        text_of({"a": type(value)("nan") if isinstance(value, float | np.floating | Decimal) else None}, "a", "row")
