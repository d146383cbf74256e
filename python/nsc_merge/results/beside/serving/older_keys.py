"""Keys of a base's ``config.json`` that transformers 5 reads, and does not write, put back into a merged model's.

transformers has one ``rope_parameters`` in the place of ``rope_theta`` and ``rope_scaling``, and ``dtype`` in that of
``torch_dtype``. Who knows the older ones alone reads the base, and computes otherwise with the merge, without a word:
MLX-LM 0.32.2 turns a Llama's positions by its own default.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsc_merge.utils.errors import logger
from nsc_merge.utils.json_text import from_json

# Of the base's files alone, or code: what is not the merge's.
_NOT_KEPT = ("quantization_config", "transformers_version", "auto_map")


def keep_older_keys(model: Any, base: Path, file: Path) -> None:
    """Put them into ``file``, unless transformers would read it otherwise with them, or what they stand for was changed
    in ``model`` since.

    Args:
        model: of transformers.
        base: ``config.json`` of its files.
        file: that of the merged model.
    """
    own, written = (from_json(one.read_bytes(), str(one), not_finite=True) for one in (base, file))
    whole = _with_keys(own, written)
    if whole == written:
        return
    try:
        before, after, now, without = (
            _read(model.config, fields) for fields in (written, whole, own, _without_keys(own, written))
        )
    except Exception as error:  # of any kind: the configuration is written as transformers has it
        logger.info("config.json holds no older keys: %s", " ".join(str(error).split()))
        return
    told = {key for key in now.keys() | without.keys() if now.get(key) != without.get(key)}
    told = {key for key in told if key.rpartition(".")[2] != "dtype"}
    if before == after and all(now.get(key) == before.get(key) for key in told):
        file.write_text(json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_keys(own: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """``written`` with the keys of ``own`` that it lacks."""
    found = dict(written)
    for key, value in own.items():
        if key == "torch_dtype":
            # That of the merge, which may be another.
            found |= {key: written["dtype"]} if "dtype" in written else {}
        elif _is_of_a_part(key, value, written.get(key)):
            found[key] = _with_keys(value, written[key])
        elif key not in (*written, *_NOT_KEPT) and not key.startswith("_") and not key.endswith("implementation"):
            found[key] = value
    return found


def _without_keys(own: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """``own`` without the keys that ``written`` lacks."""
    return {
        key: _without_keys(value, written[key]) if _is_of_a_part(key, value, written[key]) else value
        for key, value in own.items()
        if key in written
    }


def _is_of_a_part(key: str, *values: Any) -> bool:
    """Whether values are configurations within one, as of a LLaVA's text and tower."""
    return key.endswith("_config") and all(isinstance(value, dict) for value in values)


def _read(config: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers makes of a configuration, by path."""
    found: dict[str, Any] = {}

    def flatten(values: Mapping[str, Any], place: str) -> None:
        for key, value in values.items():
            if _is_of_a_part(key, value):
                flatten(value, f"{place}{key}.")
            else:
                found[place + key] = value

    kept = {key: value for key, value in fields.items() if key not in _NOT_KEPT}
    flatten(type(config).from_dict(copy.deepcopy(kept)).to_dict(), "")
    return found
