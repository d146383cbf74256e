"""The commands that come after a merge, for the folder that it was written to."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from nsc_merge.models.bases.sharded import class_name
from nsc_merge.results.beside.loading_code import has_chat_template, quoted
from nsc_merge.results.beside.serving.sentence_modules import loaded_by
from nsc_merge.results.beside.uses import SPEECH, reads_and_hears, use_of
from nsc_merge.results.dora_adapter import has_gains
from nsc_merge.results.merged_update import MergedUpdate
from nsc_merge.utils.json_text import from_json

# The hub's name of a task -> file that a pipeline needs beside the weights, and what it is tried on.
_TRIED = {
    "text-generation": ("tokenizer_config.json", "Once upon a time"),
    "text-classification": ("tokenizer_config.json", "A sentence."),
    "token-classification": ("tokenizer_config.json", "A sentence."),
    "image-classification": ("preprocessor_config.json", "picture.png"),
    "image-segmentation": ("preprocessor_config.json", "picture.png"),
    "object-detection": ("preprocessor_config.json", "picture.png"),
    "depth-estimation": ("preprocessor_config.json", "picture.png"),
    "video-classification": ("preprocessor_config.json", "video.mp4"),
    SPEECH: ("preprocessor_config.json", "speech.wav"),
    "audio-classification": ("preprocessor_config.json", "speech.wav"),
}


def next_commands(result: MergedUpdate, out: Path, files: Sequence[str], *, pushed: bool) -> list[str]:
    """One that runs the merge through sentence-transformers or a pipeline of transformers, where there is one for it,
    and one that uploads it, unless it has been.

    Args:
        result: of the merge.
        out: its folder.
        files: that were written there, by their paths within it.
        pushed: whether it was uploaded.
    """
    found = []
    for format in ("model", "lora"):
        config = "config.json" if format == "model" else "adapter_config.json"
        place = next((f"{one}/" if one else "" for one in (format, "") if f"{one}/{config}".lstrip("/") in files), None)
        if place is None:
            continue
        kind = class_name(result.model)
        if format == "model":
            # That of a head which was put in.
            kind = from_json((out / place / config).read_bytes(), config).get("architectures", [kind])[0]
        own = loaded_by(out / place) if format == "model" and kind == class_name(result.model) else None
        if own is not None:
            called = f"{own.kind}({quoted(str(out / place))}).{own.call}"
            found.append(shlex.join(["python", "-c", f"from sentence_transformers import {own.kind}; print({called})"]))
            break
        use = use_of(kind)
        needed, example = _TRIED.get(use.tag if use else "", ("", ""))
        if use is None or f"{place}{needed}" not in files or (use.tag == SPEECH and reads_and_hears(kind)):
            continue
        # An adapter goes onto the base as it is: a head of its own needs more than a pipeline, and so does DoRA.
        if format == "lora" and (use.tag != "text-generation" or has_gains(result)):
            continue
        if use.tag == "text-generation" and has_chat_template(out / place):
            told: str | list[dict[str, str]] = [{"role": "user", "content": "Hello!"}]
        else:
            told = example
        called = f'pipeline("{use.tag}", model={quoted(str(out / place))})({json.dumps(told)})'
        found.append(shlex.join(["python", "-c", f"from transformers import pipeline; print({called})"]))
        break
    if not pushed:
        found.append(shlex.join(["nsc-merge", "export", str(out), "--push-to-hub"]) + " OWNER/NAME")
    return found
