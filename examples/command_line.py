"""What the examples share: a model, adapters and raw data named on the command line, merged and saved."""

from __future__ import annotations

import argparse
from typing import Any

import nsc_merge


def pairs(parser: argparse.ArgumentParser, what: str, items: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in items:
        task, _, source = item.partition("=")
        if not (task and source):
            parser.error(f"{what}: expected TASK=FOLDER or the like, found {item!r}")
        if task in found:
            parser.error(f"{what}: task {task!r} is named twice; give each a name of its own")
        found[task] = source
    return found


def run(description: str | None, model_class: Any, *, batch_size: int, steps: int, out: str) -> None:
    """Merge what the command line names, and save one adapter with everything in it.

    Args:
        model_class: of transformers, whose ``from_pretrained`` loads the base.
        batch_size: samples of a batch.
        steps: of the merge, where the command line says nothing.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("adapters", nargs="+", metavar="TASK=ADAPTER", help="folder or hub id of each task's")
    parser.add_argument("--data", nargs="+", required=True, metavar="TASK=DATA", help="raw data of each task")
    parser.add_argument("--text", help="column that holds the text, or a template such as '{question}\\n{answer}'")
    parser.add_argument("--steps", type=int, default=steps, help="default: %(default)s")
    parser.add_argument("--out", default=out)
    arguments = parser.parse_args()
    adapters, data = (pairs(parser, name, getattr(arguments, name)) for name in ("adapters", "data"))
    if adapters.keys() != data.keys():
        parser.error(f"data: expected some of each task, {', '.join(adapters)}, found that of {', '.join(data)}")
    model = model_class.from_pretrained(arguments.model, dtype="auto", device_map="auto")
    read: dict[str, Any] = {}
    for source in data.values():
        if source not in read:  # tasks that are given the same batches share their forward passes
            read[source] = nsc_merge.calibration_data(source, model, batch_size=batch_size, text=arguments.text)
    batches = {task: read[source] for task, source in data.items()}
    result = nsc_merge.merge(model, adapters, batches, steps=arguments.steps)
    print(f"null-space ratio {result.objective['before']:.4f} -> {result.objective['after']:.4f}")
    print(f"one adapter with everything merged: {result.save(arguments.out, format='lora')}")
