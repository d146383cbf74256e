"""What the ``pipeline`` command does: load, record, merge, draw, write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsc_merge.commands.pipeline.given import (
    MERGED,
    SECOND,
    given_of,
    on_hub,
    opened,
    option_of,
    prompts_of,
    with_pictures,
)
from nsc_merge.commands.terminal import log, prepare, say
from nsc_merge.utils.errors import UsageError


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    given = given_of(arguments.adapters)
    names = [one.name for one in given]
    options = dict(option_of(text) for text in arguments.option)
    arguments.argument = dict(option_of(text, "--argument") for text in arguments.argument)
    from nsc_merge.methods import method_of

    chosen = method_of(arguments.method)
    chosen.check_names(options)
    if chosen.needs and arguments.prompts is None:
        raise UsageError(f"--prompts: method {arguments.method!r} needs data; expected a file with prompts of {names}")
    prompts = None if arguments.prompts is None else prompts_of(arguments.prompts, names)
    if prompts is not None and not chosen.needs:
        raise UsageError(f"--prompts: method {arguments.method!r} needs no data, expected none")
    prepare(local=not any(map(on_hub, (arguments.base, *(place for one in given for place in one.places)))))
    from nsc_merge.commands.pipeline.loading import check_apart, loaded
    from nsc_merge.commands.pipeline.pictures import draw
    from nsc_merge.commands.pipeline.written import write
    from nsc_merge.integrations.diffusers import calibration_data, merge
    from nsc_merge.integrations.diffusers.pipelines import check_taken
    from nsc_merge.utils.atomic_folder import check_replaceable

    check_replaceable(arguments.out)
    check_apart(arguments.out, arguments.base, given)
    settings = _settings(arguments)
    drawn = None if prompts is None else with_pictures(prompts, arguments.prompts.resolve().parent)
    pipe = loaded(arguments, given)
    weights = [one.weights for one in given]
    check_taken(pipe, settings)
    data = None
    if drawn is not None:
        data = calibration_data(pipe, drawn, weights, calls=arguments.calls, seed=arguments.seed, **settings)
    merged = merge(
        pipe, names, weights, MERGED, method=arguments.method, rank=arguments.rank, data=data, **options
    )
    pictures: Any = None
    failed: BaseException | None = None
    if arguments.images:
        # The merge may have taken long: it is kept whatever the pipeline raises, and if the drawing is interrupted.
        try:
            pictures = draw(pipe, given, arguments.images, settings, arguments.seed)
        except (Exception, KeyboardInterrupt) as error:
            failed = error
    document = write(pipe, arguments, given, options, prompts, merged, pictures)
    if failed is not None:
        told = f"--images: the merge is written to {arguments.out}, without pictures"
        if isinstance(failed, KeyboardInterrupt):
            log(told)
            raise failed
        raise ValueError(f"{told}: {str(failed) or type(failed).__name__}") from failed
    say(json.dumps(document) if arguments.json else _said(document, arguments.out))
    return 0


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline for everything that is drawn."""
    size = {"height": arguments.size.height, "width": arguments.size.width} if arguments.size else {}
    steps = {"num_inference_steps": arguments.steps} if arguments.steps else {}
    return {**size, **steps, **opened(arguments.argument, Path(), "--argument")}


def _said(document: Mapping[str, Any], out: Path) -> str:
    lines = []
    for component, one in document["components"].items():
        weights = {name: about.get(component, about).get("weight", 1.0) for name, about in document["adapters"].items()}
        line = f"{component}: {one['modules']} modules"
        if one["mean_coefficients"]:
            every = (f"{name} {weights[name]:g} x {value:.3f}" for name, value in one["mean_coefficients"].items())
            line += ", weights and mean coefficients " + ", ".join(every)
        if one["largest_error"]:
            line += f", truncated by at most {one['largest_error']:.3g}"
        lines.append(line)
    lines.append(f"written to {out}; pipe.load_lora_weights({str(out)!r}) loads it")
    if SECOND in document["components"]:
        lines.append(f"and pipe.load_lora_weights({str(out / SECOND)!r}, load_into_transformer_2=True) the other")
    return "\n".join(lines)
