"""Chats as OpenAI's and ShareGPT's formats have them, with calls of tools, made messages of one form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from nsc_merge.utils.json_text import from_json

Message = dict[str, Any]

# As ShareGPT calls them, and those who write calls of tools in it.
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "function_call": "assistant", "observation": "tool",
}
_CALL = "function_call"
# Kinds of parts that are no text.
MEDIA = ("image", "audio")
_KNOWN = ("system", "developer", "user", "assistant", "tool")


# How messages begin that a table holds as text: of JSON, or as Python shows them.
_WRITTEN = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")


def is_chat(value: Any) -> bool:
    """Whether a value of a row is a list of messages, or such a list as text."""
    if isinstance(value, str):
        return _WRITTEN.match(value) is not None
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(one: Any) -> bool:
    return isinstance(one, dict) and ({"role", "content"} <= set(one) or {"from", "value"} <= set(one))


def messages_of(value: Any, where: str) -> list[Message]:
    """Messages with ``role`` and ``content``, a text or a list of parts.

    Raises:
        ValueError: naming the row, what was found and what was expected.
    """
    if isinstance(value, str) and is_chat(value):
        value = from_json(value, f"{where}: the chat, which is text and expected to be JSON,")
    if isinstance(value, str) or not is_chat(value):
        raise ValueError(
            f"{where}: expected a list of messages {{role, content}} or {{from, value}}, found {value!r:.80}"
        )
    return [_message(one, f"{where}, message {number}") for number, one in enumerate(value, 1)]


def _message(one: dict[str, Any], where: str) -> Message:
    if "role" in one:
        role, content = one["role"], one["content"]
        others = {name: held for name, held in one.items() if name not in ("role", "content") and held is not None}
    else:
        role, content, others = _ROLES.get(str(one["from"]), one["from"]), one["value"], {}
        if one["from"] == _CALL:
            others, content = {"tool_calls": _calls(content, where)}, None
    if role not in _KNOWN:
        raise ValueError(f"{where}: expected a role of {[*_KNOWN, *_ROLES]}, found {role!r:.40}")
    if isinstance(content, list):
        content = [_part(part, where) for part in content]
    elif content is None and others:
        # An assistant's message that only calls tools.
        content = ""
    elif not isinstance(content, str):
        raise ValueError(f"{where}: expected text or a list of parts as content, found {content!r:.60}")
    if isinstance(others.get("tool_calls"), list):
        others["tool_calls"] = [_called(call) for call in others["tool_calls"]]
    return {"role": role, "content": content, **others}


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls that a ShareGPT message ``function_call`` holds: one, or a list of them, mostly as JSON in a text."""
    found = from_json(value, f"{where}: the call of a tool") if isinstance(value, str) else value
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or not {"name", "arguments"} <= set(call):
            raise ValueError(f"{where}: expected a call of a tool {{name, arguments}}, found {call!r:.60}")
    return [{"type": "function", "function": call} for call in calls]


def _called(call: Any) -> Any:
    """A call whose arguments are an object, as chat templates expect them, and not the JSON that OpenAI's format has:
    a template would quote it once more. What a model wrote that is no JSON stays as it is.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        with suppress(ValueError):
            arguments = from_json(arguments, "")
    return without_nulls({**call, "function": {**function, "arguments": arguments or {}}})


def tools_of(value: Any, where: str) -> list[dict[str, Any]] | None:
    """The tools that a chat may call, as chat templates take them; None where there are none.

    Raises:
        ValueError: naming the row, what was found and what was expected.
    """
    if isinstance(value, str) and value.strip():
        with suppress(ValueError):
            value = from_json(value, "")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ValueError(
            f"{where}: tools: expected a list of functions that the chat may call, found {value!r:.60}; a column of "
            "other things needs another name"
        )
    whole = ({"type": "function", "function": one} if "name" in one else one for one in value)
    return [without_nulls(one) for one in whole]


def without_nulls(value: Any) -> Any:
    """A value of a table without the keys that hold nothing there, with which Arrow makes all objects alike."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def _part(part: Any, where: str) -> dict[str, Any]:
    """A part ``{type: text, text}``, ``{type: image}`` or ``{type: audio}``, these with what the row holds of it by the
    same name.
    """
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    media = next((one for one in MEDIA if kind in (one, f"{one}_url")), None)
    if media is not None:
        names = (media, f"{media}_url", "url", "path")
        held = next((part[name] for name in names if part.get(name) is not None), None)
        held = held.get("url") if isinstance(held, dict) and "url" in held else held
        return {"type": media} if held is None else {"type": media, media: held}
    raise ValueError(
        f"{where}: expected parts {{type: text, text}}, {{type: image, image}} or {{type: audio, audio}}, found "
        f"{part!r:.60}"
    )


def plain_text(messages: Sequence[Message], where: str) -> list[Message]:
    """The same messages with texts as contents, for templates that know no parts.

    Raises:
        ValueError: if one holds an image or audio.
    """
    found = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            media = next((part["type"] for part in content if part["type"] in MEDIA), None)
            if media is not None:
                held = "an image" if media == "image" else media
                raise ValueError(f"{where}: a message holds {held}, and the base takes text alone")
            content = "".join(part["text"] for part in content)
        found.append({**message, "content": content})
    return found


def said_last(messages: Sequence[Message]) -> str | None:
    """What an assistant says at the end of a chat, also in parts; None where nobody does, or not in text alone."""
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return None
    said = messages[-1]["content"]
    parts = [{"text": said}] if isinstance(said, str) else said
    return "".join(part["text"] for part in parts) if all("text" in part for part in parts) else None


def in_parts(messages: Sequence[Message], tokens: Mapping[str, str]) -> list[Message]:
    """The same messages with parts as contents, where the token of a kind (``image``, ``audio``) in a text becomes a
    part of that kind.
    """
    return [{**message, "content": _parts(message["content"], tokens)} for message in messages]


def _parts(content: Any, tokens: Mapping[str, str]) -> list[dict[str, Any]]:
    if not isinstance(content, str):
        return content
    kinds = {token: kind for kind, token in tokens.items()}
    # Texts, with a token between every two.
    pieces = re.split(f"({'|'.join(map(re.escape, kinds))})", content) if kinds else [content]
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number % 2:
            parts.append({"type": kinds[piece]})
            continue
        text = piece.lstrip() if number else piece
        text = text.rstrip() if number < len(pieces) - 1 else text
        if text:
            parts.append({"type": "text", "text": text})
    return parts
