"""The JSON schema of recipes, from which editors complete and check keys; made of what checks them in earnest."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from nsc_merge.adapters import DORA
from nsc_merge.calibration.raw.settings import SIDES, DataSettings
from nsc_merge.methods import METHODS, Method
from nsc_merge.models.fitting import SHARED_POLICIES
from nsc_merge.models.vocabulary import ADDED_TOKENS
from nsc_merge.recipes.adapter_keys import HubAdapter
from nsc_merge.recipes.calibration_keys import DATA_KEYS
from nsc_merge.recipes.merge_recipe import Recipe
from nsc_merge.recipes.placement_keys import DEVICE_MAPS, DTYPES, QUANTIZATIONS, Placed
from nsc_merge.results.layout import FORMATS, OPTIONS_OF_RUN, RECORD
from nsc_merge.utils.json_text import plain
from nsc_merge.utils.option_checks import ChoiceError

Schema = dict[str, Any]

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
# Numbers like 1e-3, which YAML 1.1 reads as text and recipes as numbers.
_EXPONENT = r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"
_SHARD_SIZE = r"^\s*(\d+\.?\d*|\.\d+)\s*[KkMmGgTt][Bb]\s*$"
_MEMORY = r"^\s*(\d+\.?\d*|\.\d+)\s*[KkMmGg][Ii]?[Bb]\s*$"
_REPO = r"^[\w-][\w.-]*/[\w-][\w.-]*$"
_TEXT: Schema = {"type": "string", "minLength": 1}
_FLAG: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": 1}
_NULL: Schema = {"type": "null"}
# No option is called so, nor any value of one.
_NOBODY = "\0"


def schema() -> Schema:
    """The schema, of draft 2020-12. What it refuses is refused by ``nsc-merge run``; whether files are there, and what
    values go together, is said there alone.
    """
    said = {**described(Placed), **described(Recipe)}
    properties: dict[str, Schema] = {
        "model": _TEXT,
        "revision": _or_null(_TEXT),
        "trust_remote_code": {**_FLAG, "default": Recipe.trust_remote_code},
        "adapters": {**_by_task(_adapter()), "minProperties": 1},
        "calibration": _or_null(_by_task(_calibration())),
        "data": {
            **_or_null(_object(_data(), described(DataSettings))),
            "description": "How raw data is encoded, for all tasks; a task's own keys go before these.",
        },
        "batch_size": {**_COUNT, "default": Recipe.batch_size},
        "method": {
            "oneOf": [{"const": name, "description": method.summary} for name, method in METHODS.items()],
            "default": Recipe.method,
            "description": "How the adapters are merged; nsc-merge methods says more of each.",
        },
        "options": {"type": ["object", "null"], "description": "Of the method."},
        "shared_modules": _enum(SHARED_POLICIES, Recipe.shared_modules),
        "dora": _enum(DORA, Recipe.dora),
        "added_tokens": _enum(ADDED_TOKENS, Recipe.added_tokens),
        "dtype": _enum(DTYPES, Placed.dtype),
        "device": {"type": "string", "pattern": r"^(auto|cpu|mps|cuda(:\d+)?)$", "default": Placed.device},
        "device_map": _or_null(_enum(DEVICE_MAPS), _device_map()),
        "max_memory": _or_null(_max_memory()),
        "quantization": _or_null(_enum(QUANTIZATIONS)),
        "full_hash": {**_FLAG, "default": Recipe.full_hash},
        "labels": _or_null(_by_task(_labels())),
        "output": _object(
            {
                "dir": {**_TEXT, "description": said["out"]},
                "formats": {
                    "anyOf": [_enum(FORMATS), {"type": "array", "items": _enum(FORMATS), "minItems": 1}],
                    "default": list(Recipe.formats),
                },
                "rank": _or_null(_COUNT),
                "max_shard_size": _or_null({"type": "string", "pattern": _SHARD_SIZE}),
                "dequantize": {**_FLAG, "default": Recipe.dequantize},
                "plots": {**_FLAG, "default": Recipe.plots},
                "head": _or_null(_TEXT),
                "push_to_hub": _or_null({"type": "string", "pattern": _REPO}),
                "private": {**_FLAG, "default": Recipe.private},
            },
            said,
            ["dir"],
        ),
        RECORD: {"description": "What a finished merge keeps of its circumstances; ignored when it is run again."},
    }
    return {
        "$schema": _DRAFT,
        "title": "Recipe of nsc-merge run",
        "$defs": {"number": {"anyOf": [{"type": "number"}, {"type": "string", "pattern": _EXPONENT}]}},
        **_object(properties, said, ["model", "adapters", "output"]),
        "allOf": [
            {
                # Holds where the key is absent, too, as for the default it has to.
                "if": {
                    "properties": {"method": {"const": name}},
                    **({} if name == Recipe.method else {"required": ["method"]}),
                },
                "then": {"properties": {"options": {**options_of(method), "type": ["object", "null"]}}},
            }
            for name, method in METHODS.items()
        ],
    }


def options_of(method: Method) -> Schema:
    """The options of a method that a recipe can give."""
    hints, said = get_type_hints(method.options), described(method.options)
    properties: dict[str, Schema] = {}
    for option in fields(method.options):
        if option.name in OPTIONS_OF_RUN or not (found := _of_type(hints[option.name])):
            continue
        # What may also be switched on and off takes any backend of torch's compiler, which it takes seconds to list.
        if {"type": "boolean"} not in found and (choices := _choices(method, option.name)):
            found = [_enum(choices) if one == {"type": "string"} else one for one in found]
        # Of a recipe of the method's, the default is the recipe's.
        known = option.default is not MISSING and not any(option.name in one for one in method.recipes.values())
        default = {"default": plain(option.default)} if known else {}
        properties[option.name] = {**_any_of(found), **default, "description": said.get(option.name, "")}
    return {"properties": properties, "additionalProperties": False}


def described(kind: type) -> dict[str, str]:
    """Attribute -> what the docstring of a class says of it, markup aside; of one that is explained "there", what the
    class says that it comes from.
    """
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        _, _, listed = inspect.cleandoc(one.__dict__.get("__doc__") or "").partition("Attributes:\n")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n      .*)*)", listed, re.MULTILINE):
            words = re.sub(r"``|:\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", " ".join(text.split()))
            if name not in found or not words.startswith(("see there", "as all that follow")):
                found[name] = words[:1].upper() + words[1:]
    return found


def _choices(method: Method, option: str) -> list[str]:
    """The texts that an option may be, where there is a list of them: that which its check would say."""
    try:
        method.resolved({option: _NOBODY}, ["task"])
    except ChoiceError as error:
        return [one for one in error.choices if isinstance(one, str)] if error.name == option else []
    except (ValueError, TypeError):
        pass
    return []


def _of_type(hint: Any) -> list[Schema]:
    """What YAML may hold for an annotation, each kind by itself; nothing for functions and the like."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return [one for part in inner for one in _of_type(part)]
    if hint is float:
        return [{"$ref": "#/$defs/number"}]
    if hint is Any:
        return [{}]
    plainly = {str: "string", int: "integer", bool: "boolean", type(None): "null"}
    if hint in plainly:
        return [{"type": plainly[hint]}]
    if origin is Mapping and (values := _of_type(inner[1])):
        return [{"type": "object", "additionalProperties": _any_of(values)}]
    if origin is Sequence and (items := _of_type(inner[0])):
        return [{"type": "array", "items": _any_of(items)}]
    return []


def _object(properties: Mapping[str, Schema], said: Mapping[str, str], required: Sequence[str] = ()) -> Schema:
    """Keys and values, and no other keys."""
    told = {
        name: {"description": said[name], **one} if name in said and "description" not in one else dict(one)
        for name, one in properties.items()
    }
    return {
        "type": "object",
        "properties": told,
        "additionalProperties": False,
        **({"required": list(required)} if required else {}),
    }


def _by_task(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


def _any_of(kinds: Sequence[Schema]) -> Schema:
    return dict(kinds[0]) if len(kinds) == 1 else {"anyOf": list(kinds)}


def _or_null(*kinds: Schema) -> Schema:
    return {"anyOf": [*kinds, _NULL]}


def _enum(values: Sequence[Any], default: Any = None) -> Schema:
    return {"enum": list(values), **({} if default is None else {"default": default})}


def _adapter() -> Schema:
    """A folder or a place on the hub, alone or with what else says where it is."""
    said = {"adapter": "Folder, or owner/name on the hub.", **described(HubAdapter)}
    keys = {"adapter": _TEXT, "revision": _or_null(_TEXT), "subfolder": _or_null(_TEXT)}
    return _any_of([_TEXT, _object(keys, said, ["adapter"])])


def _calibration() -> Schema:
    said = {"source": "File, folder, or the id of a dataset on the hub.", **described(DataSettings)}
    return _any_of([_TEXT, _object({"source": _TEXT, **_data()}, said, ["source"])])


def _data() -> dict[str, Schema]:
    """The keys that say what is taken of raw data, and how."""
    defaults = DataSettings()
    kinds: dict[str, Schema] = {
        "texts": _or_null({"type": "array", "items": _TEXT, "minItems": 1}),
        "max_length": _COUNT,
        "max_seconds": {"type": "number", "exclusiveMinimum": 0},
        "truncation": _FLAG,
        "truncation_side": _enum(SIDES),
        "padding_side": _enum(SIDES),
        "samples": _or_null(_COUNT),
        "seed": {"type": "integer", "minimum": 0},
    }
    return {name: {**kinds.get(name, _or_null(_TEXT)), "default": getattr(defaults, name)} for name in DATA_KEYS}


def _labels() -> Schema:
    """Names in order, by number, or in a file."""
    return _any_of([_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}, {"type": "object", "minProperties": 1}])


def _device_map() -> Schema:
    place = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^(cpu|disk|cuda(:\d+)?)$"}]}
    return {"type": "object", "additionalProperties": place, "minProperties": 1}


def _max_memory() -> Schema:
    size = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": _MEMORY}]}
    return {
        "type": "object",
        "patternProperties": {r"^(cpu|\d+)$": size},
        "additionalProperties": False,
        "minProperties": 1,
    }
