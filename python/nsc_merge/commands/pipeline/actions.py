"""What the ``pipeline`` command does: load, record, merge, draw, write."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nsc_merge.commands.pipeline.given import MERGED, Given, given_of, is_hub, option_of, prompts_of
from nsc_merge.commands.terminal import prepare, say
from nsc_merge.utils.errors import UsageError


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    given = [given_of(text) for text in arguments.adapters]
    names = [one.name for one in given]
    if len(set(names)) < len(names) or MERGED in names:
        raise UsageError(f"NAME: expected different names other than {MERGED!r}, found {names}")
    options = dict(option_of(text) for text in arguments.option)
    from nsc_merge.methods import method_of

    chosen = method_of(arguments.method)
    chosen.check_names(options)
    if chosen.needs and arguments.prompts is None:
        raise UsageError(f"--prompts: method {arguments.method!r} needs data; expected a file with prompts of {names}")
    prompts = None if arguments.prompts is None else prompts_of(arguments.prompts, names)
    if prompts is not None and not chosen.needs:
        raise UsageError(f"--prompts: method {arguments.method!r} needs no data, expected none")
    prepare(local=not any(map(is_hub, (arguments.base, *(one.place for one in given)))))
    from nsc_merge.commands.pipeline.pictures import draw
    from nsc_merge.commands.pipeline.written import write
    from nsc_merge.integrations.diffusers import calibration_data, merge
    from nsc_merge.utils.atomic_folder import check_replaceable

    check_replaceable(arguments.out)
    pipe = _loaded(arguments, given)
    weights = [one.weight for one in given]
    settings = _settings(arguments)
    data = None
    if prompts is not None:
        data = calibration_data(pipe, prompts, weights, calls=arguments.calls, seed=arguments.seed, **settings)
    merged = merge(
        pipe, names, weights, MERGED, method=arguments.method, rank=arguments.rank, data=data, **options
    )
    pictures = draw(pipe, given, arguments.images, settings, arguments.seed) if arguments.images else None
    document = write(pipe, arguments, given, options, prompts, merged, pictures)
    say(json.dumps(document) if arguments.json else _said(document, arguments.out))
    return 0


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline for everything that is drawn."""
    size = {"height": arguments.size, "width": arguments.size} if arguments.size else {}
    return {**size, **({"num_inference_steps": arguments.steps} if arguments.steps else {})}


def _loaded(arguments: argparse.Namespace, given: list[Given]) -> Any:
    """The pipeline with all adapters loaded, on its device."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    if not is_hub(arguments.base) and not (Path(arguments.base) / "model_index.json").is_file():
        raise ValueError(f"BASE: expected a folder with a pipeline (model_index.json), or a hub id: {arguments.base}")
    # What diffusers leaves out of an adapter it says in warnings, which stay.
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
    dtype = getattr(torch, arguments.dtype)
    # Pickled weights are never opened.
    base, revision = _revised(arguments.base)
    pipe = DiffusionPipeline.from_pretrained(base, torch_dtype=dtype, use_safetensors=True, **revision)
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"BASE: expected a pipeline that loads LoRA, found {type(pipe).__name__}")
    device = arguments.device
    if device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = "cpu" if found is None else found.type
    pipe.to(device, *([] if pipe.dtype == dtype else [dtype]))
    pipe.set_progress_bar_config(disable=True)
    for one in given:
        place = Path(one.place)
        where, revision = (str(place.parent), {"weight_name": place.name}) if place.is_file() else _revised(one.place)
        try:
            pipe.load_lora_weights(where, adapter_name=one.name, use_safetensors=True, **revision)
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise ValueError(f"{one.name}={one.place}: diffusers does not load it: {error}") from error
        if not any(one.name in held for held in pipe.get_list_adapters().values()):
            raise ValueError(f"{one.name}={one.place}: holds no LoRA of a model of {type(pipe).__name__}")
    return pipe


def _revised(place: str) -> tuple[str, dict[str, str]]:
    """A folder, or a hub id and its revision."""
    name, _, revision = place.partition("@")
    return (name, {"revision": revision}) if revision and is_hub(place) else (place, {})


def _said(document: Mapping[str, Any], out: Path) -> str:
    lines = []
    weights = {name: one["weight"] for name, one in document["adapters"].items()}
    for component, one in document["components"].items():
        line = f"{component}: {one['modules']} modules"
        if one["mean_coefficients"]:
            every = (f"{name} {weights[name]:g} x {value:.3f}" for name, value in one["mean_coefficients"].items())
            line += ", weights and mean coefficients " + ", ".join(every)
        if one["largest_error"]:
            line += f", truncated by at most {one['largest_error']:.3g}"
        lines.append(line)
    lines.append(f"written to {out}; pipe.load_lora_weights({str(out)!r}) loads it")
    return "\n".join(lines)
