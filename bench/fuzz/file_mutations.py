"""Ways to damage a file: its bytes, the header of a safetensors file, values and keys of JSON and YAML."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

DTYPES = ["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64"]
DTYPES += ["U64", "C64", "F8_E8M0", "F4", "X", ""]

# JSON that takes the place of a value.
EXTREMES = ["null", "true", "false", "0", "-1", "1", "2", "4", "0.5", "9.5", "1e308", "1e999", "-0.0", "1e-320", "NaN"]
EXTREMES += ["Infinity", "18446744073709551616", "9" * 30, "9" * 400, '""', '"q"', '"v"', '"none"', '"true"', '"("']
EXTREMES += ['"(.*)*$"', '"1e3"', '"LORA"', '"../../x"', '"all"', '"\\ud800"', '"\\u0000"', '"a\\nb"', "[]", "{}"]
EXTREMES += ['[""]', '["q"]', '["v", "q"]', "[null]", "[1.5]", '{"q": 3}', '{"a": null}', "[" * 70 + "]" * 70]
EXTREMES += ["[" * 3000 + "]" * 3000]

# YAML beside it.
ALIASES = ["*a", "&a [*a]", "!!python/object:os.system x", "2001-01-01", "yes", "0x1f", "1_0", "~", "!!int x", "|"]
ALIASES += ["? a", "<<: 3"]

FILLERS = [b"\0", b"\n", b" ", b"\xff", b"9", b'"', b"{", b"," * 9, b"\xef\xbb\xbf"]
FLOATS = [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\0" * 4, b"\xff" * 4]


def mutate(file: Path, draw: random.Random) -> str:
    """Changes ``file``; says how, in a few words."""
    ways = {".safetensors": SAFETENSORS, ".yaml": YAML}.get(file.suffix, JSON)
    for _ in range(20):
        name, way = draw.choice(ways)
        before = file.read_bytes()
        after, said = way(before, draw)
        if after != before:
            file.write_bytes(after)
            return f"{name} {said}"
    return "nothing"


Way = Callable[[bytes, random.Random], tuple[bytes, str]]


def flip(raw: bytes, draw: random.Random) -> tuple[bytes, str]:
    place, bit = draw.randrange(len(raw)), draw.randrange(8)
    return raw[:place] + bytes([raw[place] ^ (1 << bit)]) + raw[place + 1 :], f"bit {bit} of byte {place}"


def cut(raw: bytes, draw: random.Random) -> tuple[bytes, str]:
    kept = draw.choice([0, 1, 7, 8, 9, len(raw) - 1, draw.randrange(len(raw))])
    return raw[:kept], f"to {kept} of {len(raw)} bytes"


def grow(raw: bytes, draw: random.Random) -> tuple[bytes, str]:
    place, what = draw.randrange(len(raw) + 1), draw.choice(FILLERS)
    return raw[:place] + what + raw[place:], f"by {what!r} at {place}"


def move(raw: bytes, draw: random.Random) -> tuple[bytes, str]:
    first, second = sorted(draw.randrange(len(raw) + 1) for _ in range(2))
    length = draw.randrange(1, 20)
    part = raw[first : first + length]
    return raw[:first] + raw[first + length : second] + part + raw[second:], f"{length} bytes from {first} to {second}"


def _parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _whole(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data


def header_bit(raw: bytes, draw: random.Random) -> tuple[bytes, str]:
    place = draw.randrange(8 + int.from_bytes(raw[:8], "little"))
    return raw[:place] + bytes([raw[place] ^ (1 << draw.randrange(8))]) + raw[place + 1 :], f"of byte {place}"


def header_length(raw: bytes, draw: random.Random) -> tuple[bytes, str]:
    length = int.from_bytes(raw[:8], "little")
    other = draw.choice([0, 1, 2, length - 1, length + 1, length - 8, length + 8, len(raw), 10**9, 2**63, 2**64 - 1])
    return other.to_bytes(8, "little") + raw[8:], f"{other}"


def entry(raw: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A field of one tensor's entry."""
    header, data = _parts(raw)
    name = draw.choice([key for key in header if key != "__metadata__"])
    field = draw.choice(["dtype", "shape", "data_offsets", "extra", "gone", "all"])
    old = header[name].get(field)
    shape, offsets = header[name]["shape"], header[name]["data_offsets"]
    if field == "dtype":
        header[name]["dtype"] = draw.choice(DTYPES)
    elif field == "shape":
        others = [shape[::-1], [*shape, 1], [1] * 100 + shape, [-1, *shape], [0], [], [2**40, 2**40], [True], [1.0]]
        header[name]["shape"] = draw.choice([*others, "4", None])
    elif field == "data_offsets":
        others = [offsets[::-1], [0, 0], [offset + 1 for offset in offsets], offsets[:1], [*offsets, 0], [-1, 3]]
        header[name]["data_offsets"] = draw.choice([*others, [0, 2**70], None])
    elif field == "extra":
        header[name][draw.choice(["scale", "Dtype", ""])] = 1
    elif field == "gone":
        del header[name][draw.choice(["dtype", "shape", "data_offsets"])]
    else:
        header[name] = draw.choice([None, 3, [], {}, "F32"])
    return _whole(header, data), f"{field} of {name}, was {old}"


def names(raw: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Which name goes with which tensor."""
    header, data = _parts(raw)
    held = [key for key in header if key != "__metadata__"]
    first, second = draw.choice(held), draw.choice(held)
    kind = draw.choice(["swapped", "renamed", "twice", "gone", "added", "data"])
    if kind == "swapped":
        header[first], header[second] = header[second], header[first]
    elif kind == "renamed":
        others = ["x", "", first + ".x", first.upper(), first.replace("lora_A", "lora_B"), "é", "__metadata__"]
        other = draw.choice(others)
        header = {other if key == first else key: value for key, value in header.items()}
    elif kind == "twice":
        text = json.dumps(header)
        return _whole(f"{text[:-1]}, {json.dumps(first)}: {json.dumps(header[second])}}}", data), f"twice {first}"
    elif kind == "gone":
        del header[first]
    elif kind == "added":
        more = draw.choice([4, 8, 0])
        header["more"] = {"dtype": "F32", "shape": [more // 4], "data_offsets": [len(data), len(data) + more]}
        data += b"\0" * more
    else:
        header[first]["data_offsets"] = header[second]["data_offsets"]
    return _whole(header, data), f"{kind} {first} {second}"


def metadata(raw: bytes, draw: random.Random) -> tuple[bytes, str]:
    header, data = _parts(raw)
    held = header.get("__metadata__") or {}
    if isinstance(held, dict) and held and draw.random() < 0.8:
        key = draw.choice(list(held))
        if draw.random() < 0.5 or not held[key].startswith(("{", "[")):
            held[key] = draw.choice(["", "2", "pt", "null", "[]", "{}", "[0, 1]", "[0, 2, 3, 7]", '{"step": 1}'])
        else:
            changed, _ = draw.choice([value, key_of])(held[key].encode(), draw)
            held[key] = changed.decode("utf-8", "replace")
        header["__metadata__"] = held
    else:
        header["__metadata__"] = draw.choice([None, {}, [], {"a": 1}, {"format": "pt"}, "x", {"a": None}])
    return _whole(header, data), str(header["__metadata__"])[:80]


def numbers(raw: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Extreme values in the data."""
    start = 8 + int.from_bytes(raw[:8], "little")
    place = draw.randrange(start, len(raw))
    what = draw.choice(FLOATS)
    return raw[:place] + what[: len(raw) - place] + raw[place + 4 :], f"{what!r} at {place}"


def long_shape(raw: bytes, draw: random.Random) -> tuple[bytes, str]:
    header, data = _parts(raw)
    name = draw.choice([key for key in header if key != "__metadata__"])
    header[name]["shape"] = [1] * draw.choice([65, 1000, 50_000]) + header[name]["shape"]
    return _whole(header, data), f"of {name}"


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every container and key of a value in it."""
    found = []
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        found.append((document, key))
        if isinstance(value, dict | list):
            found += _places(value)
    return found


def value(raw: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Another value in JSON, of whatever type."""
    lines = raw.decode().splitlines() if raw.count(b"\n{") else [raw.decode()]
    number = draw.randrange(len(lines))
    document = json.loads(lines[number])
    container, key = draw.choice(_places(document))
    container[key], other = "@@", draw.choice(EXTREMES)
    lines[number] = json.dumps(document).replace('"@@"', other)
    return "\n".join(lines).encode(), f"{key}: {other[:40]}"


def key_of(raw: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A key of JSON: gone, renamed, or given twice."""
    lines = raw.decode().splitlines() if raw.count(b"\n{") else [raw.decode()]
    number = draw.randrange(len(lines))
    document = json.loads(lines[number])
    keyed = [(container, key) for container, key in _places(document) if isinstance(container, dict)]
    if not keyed:
        return raw, ""
    container, key = draw.choice(keyed)
    kind = draw.choice(["gone", "renamed", "twice"])
    if kind == "gone":
        del container[key]
    elif kind == "renamed":
        container[draw.choice(["x", key + " ", key.upper(), ""])] = container.pop(key)
    else:
        container["@@"] = container[key]
    lines[number] = json.dumps(document).replace('"@@"', json.dumps(key))
    return "\n".join(lines).encode(), f"{kind} {key!r}"


def yaml_line(raw: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A line: gone, twice, moved in, or with another value."""
    lines = raw.decode().splitlines()
    number = draw.randrange(len(lines))
    kind = draw.choice(["gone", "twice", "indented", "valued", "valued", "valued"])
    if kind == "gone":
        del lines[number]
    elif kind == "twice":
        lines.insert(draw.randrange(len(lines)), lines[number])
    elif kind == "indented":
        lines[number] = " " * draw.randrange(4) + lines[number].strip()
    else:
        other = draw.choice([*EXTREMES, *ALIASES])
        lines[number] = f"{lines[number].partition(':')[0]}: {other}"
    return ("\n".join(lines) + "\n").encode(), f"{kind} {lines[min(number, len(lines) - 1)][:60]!r}"


BYTES: list[tuple[str, Way]] = [("flipped", flip), ("cut", cut), ("grown", grow), ("moved", move)]
SAFETENSORS: list[tuple[str, Way]] = [
    *BYTES,
    ("header bit", header_bit),
    ("header length", header_length),
    ("metadata", metadata),
    ("numbers", numbers),
    ("long shape", long_shape),
    # More often what keeps the file one of the format.
    *3 * [("entry", entry), ("names", names)],
]
JSON: list[tuple[str, Way]] = [*BYTES, ("key", key_of), *3 * [("value", value)]]
YAML: list[tuple[str, Way]] = [*BYTES, *3 * [("line", yaml_line)]]
