"""Chats that call tools, in the formats that people have them in, as transformers renders them."""

from __future__ import annotations

import json

import datasets
import pytest
from raw_cases import llama_config, llava_base, tokenizer

import nsc_merge
from nsc_merge.calibration.raw.chats import messages_of, tools_of

# As Qwen's and Llama's templates write tools and calls.
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }} {% endfor %}"
    "{% for m in messages %}{{ m.role }} : {{ m.content }} "
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }} {% endfor %}"
    "{% endfor %}"
)
FUNCTION = {"name": "weather", "description": "of a town", "parameters": {"town": {"type": "string"}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
ARGUMENTS = {"town": "Ulm"}
CHAT = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": "b"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}],
    },
    {"role": "tool", "content": "d"},
    {"role": "assistant", "content": "e"},
]
CALL = {"name": "weather", "arguments": ARGUMENTS}
SHAREGPT = [
    {"from": "system", "value": "a"},
    {"from": "human", "value": "b"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "d"},
    {"from": "gpt", "value": "e"},
]
OPENAI = json.loads(json.dumps(CHAT))
OPENAI[2]["tool_calls"][0] = {"id": "1", "type": "function", "function": {**CALL, "arguments": json.dumps(ARGUMENTS)}}
OPENAI[2]["content"] = None


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama_config(max_position_embeddings=512).save_pretrained(folder)
    tool = tokenizer(chat=TEMPLATE)
    # Words that the small tokenizer does not know would all be the same.
    tool.add_tokens(tool.apply_chat_template(CHAT, tools=TOOLS, tokenize=False).split())
    config = llama_config(max_position_embeddings=512, vocab_size=len(tool))
    config.save_pretrained(folder)
    tool.save_pretrained(folder)
    return folder, tool


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "tools": TOOLS},
        {"messages": OPENAI, "tools": json.dumps(TOOLS)},
        {"conversations": SHAREGPT, "tools": json.dumps([FUNCTION])},
        {"conversations": [*SHAREGPT[:2], {"from": "function_call", "value": [CALL]}, *SHAREGPT[3:]], "tools": TOOLS},
    ],
    ids=["transformers", "openai", "sharegpt", "list"],
)
def test_tools_and_calls_are_rendered_as_transformers_renders_them(base, row):
    folder, tool = base
    expected = tool.apply_chat_template(CHAT, tools=TOOLS, return_dict=True, return_tensors="pt")["input_ids"]
    assert tool.unk_token_id not in expected
    (batch,) = nsc_merge.calibration_data([row], folder)
    assert batch["input_ids"].tolist() == expected.tolist()


def test_what_arrow_fills_up_is_not_in_the_prompt(base):
    """Objects of one column have all keys there, with nothing in those that they lack."""
    folder, _ = base
    other = {"type": "function", "function": {"name": "time", "parameters": {"zone": {"type": "string"}}}}
    rows = [{"messages": CHAT, "tools": TOOLS}, {"messages": CHAT, "tools": [other]}]
    held = datasets.Dataset.from_list(rows)
    assert held[0]["tools"][0]["function"]["parameters"]["zone"] is None
    found = nsc_merge.calibration_data(held, folder).sha256["samples"]
    assert found == nsc_merge.calibration_data(rows, folder).sha256["samples"]


def test_a_chat_without_tools_is_what_it_was(base):
    folder, tool = base
    for tools in ({}, {"tools": None}, {"tools": []}, {"tools": ""}):
        (batch,) = nsc_merge.calibration_data([{"messages": CHAT[:2], **tools}], folder)
        expected = tool.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert batch["input_ids"][0].tolist() == expected


def test_arguments_that_are_no_json_stay_what_they_are():
    call = {"type": "function", "function": {"name": "weather", "arguments": "{town"}}
    (message,) = messages_of([{"role": "assistant", "content": "so", "tool_calls": [call]}], "row")
    # And so does what is said beside a call.
    assert (message["tool_calls"], message["content"]) == ([call], "so")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda: tools_of("hammer", "row"), "^row: tools: expected a list of functions .*, found 'hammer'; a column"),
        (lambda: tools_of(["hammer"], "row"), "^row: tools: expected a list of functions"),
        (lambda: tools_of([*TOOLS, "hammer"], "row"), "^row: tools: expected a list of functions"),
        (
            lambda: messages_of([{"from": "function_call", "value": "weather"}], "row"),
            "^row, message 1: the call of a tool is not valid JSON",
        ),
        (
            lambda: messages_of([{"from": "function_call", "value": '{"name": "a"}'}], "row"),
            r"^row, message 1: expected a call of a tool \{name, arguments\}, found",
        ),
        (
            lambda: messages_of([{"from": "function_call", "value": "[3]"}], "row"),
            r"^row, message 1: expected a call of a tool \{name, arguments\}, found 3",
        ),
    ],
)
def test_what_is_no_tool_is_refused(found, message):
    with pytest.raises(ValueError, match=message):
        found()


def test_images_in_a_chat_with_tools(tmp_path):
    """Processors take tools, too."""
    base = llava_base(tmp_path / "base")
    rows = [{"messages": [{"role": "user", "content": "a"}], "tools": TOOLS, "image": []}]
    assert len(list(nsc_merge.calibration_data(rows, base))) == 1
