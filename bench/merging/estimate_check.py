"""What a step of NSC takes by formula and what it takes, on models of the CPU's size: the second table of
docs/large_models.md; under torchrun, what each process holds and receives. Bytes and operations are counted, not timed,
so that a busy machine changes nothing.

    python -m bench.merging.estimate_check
    torchrun --nproc-per-node 2 -m bench.merging.estimate_check
"""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
from torch import nn

from bench import from_tests
from nsc_merge.models.bases.loading import load_model
from nsc_merge.models.bases.placement import Placement
from nsc_merge.processes.group import Group
from nsc_merge.processes.launch import launched, started
from nsc_merge.recipes.forecast.estimate import as_run, bytes_per_step, memory
from nsc_merge.recipes.forecast.shapes import work_of


def one_process(cases: Any) -> None:
    decoder, encoder = cases.decoder(512, 6), cases.encoder(384, 6)
    narrow = cases.decoder(512, 6, torch.bfloat16)
    rows: list[tuple[str, Any, Any, tuple[str, ...], dict[str, Any]]] = [
        ("decoder, float32", decoder, cases.texts(2, 128), cases.QV, {}),
        ("decoder, bfloat16", narrow, cases.texts(2, 128), cases.QV, {}),
        ("decoder, padded, all linears", decoder, cases.texts(2, 128, padded=True), cases.ALL, {}),
        ("decoder", decoder, cases.texts(6, 128), cases.QV, {"checkpointing": True}),
        ("decoder", decoder, cases.texts(6, 128), cases.QV, {"batch_tasks": True}),
        ("decoder", decoder, cases.texts(6, 128), cases.QV, {"batch_tasks": True, "checkpointing": True}),
        ("encoder", encoder, cases.images(2), cases.ALL, {}),
        ("encoder", encoder, cases.images(6), cases.ALL, {"checkpointing": True}),
        ("encoder", encoder, cases.images(6), cases.ALL, {"batch_tasks": True}),
        ("encoder", encoder, cases.images(6), cases.ALL, {"batch_tasks": True, "checkpointing": True}),
    ]
    print("| model | tasks | options | MB by formula | measured | ratio | GFLOP by formula | counted | ratio |")
    print("| --- | --: | --- | --: | --: | --: | --: | --: | --: |")
    for name, model, batches, names, given in rows:
        found = cases.costs(model, batches, names, **given)
        options = ", ".join(f"`{option}`" for option in given)
        numbers = [
            f"{found.bytes / 1e6:.1f}",
            f"{found.bytes_measured / 1e6:.1f}",
            f"{found.bytes / found.bytes_measured:.2f}",
            f"{found.operations / 1e9:.1f}",
            f"{found.operations_measured / 1e9:.1f}",
            f"{found.operations / found.operations_measured:.3f}",
        ]
        print("| " + " | ".join([name, str(len(batches)), options, *numbers]) + " |", flush=True)


def in_shards(cases: Any, group: Group) -> None:
    """Of a decoder in shards: the first process's bytes, with its shards, and what it receives in a step."""
    if group.is_main:
        print("| ranks | options | MB by formula | measured | ratio | MB received by formula | measured | ratio |")
        print("| --: | --- | --: | --: | --: | --: | --: | --: |")
    plain = cases.decoder(256, 6)
    for given in ({}, {"checkpointing": True}, {"batch_tasks": True, "checkpointing": True}):
        model = _in_shards(plain, group)
        torch.manual_seed(1)
        adapters, batches = cases.adapters_for(plain, 2, cases.ALL), cases.texts(2, 64)
        options = cases.options_for(plain, adapters, **{"batch_tasks": False, "fold": False, **given})
        with cases.attached(model, adapters, options) as objective:
            objective.accumulate(batches)
            with cases.Gathered() as gathered:
                objective.accumulate(batches)
            took = cases.peak(partial(objective.accumulate, batches))
        apart = work_of(plain, adapters, dict(zip(adapters, batches, strict=True)), options)
        work = as_run(apart, options.batch_tasks, 0)
        held, moved = memory(work, ranks=group.size), bytes_per_step(work, ranks=group.size)
        locally = [value.to_local() if hasattr(value, "to_local") else value for value in model.parameters()]
        bytes_there = sum(value.nbytes for value in locally) + took
        formula, received = held.total - held.adapters, gathered.bytes * (group.size - 1) / group.size
        numbers = [
            f"{formula / 1e6:.1f}",
            f"{bytes_there / 1e6:.1f}",
            f"{formula / bytes_there:.2f}",
            f"{moved.received / 1e6:.2f}",
            f"{received / 1e6:.2f}",
            f"{moved.received / received:.3f}",
        ]
        if group.is_main:
            options_given = ", ".join(f"`{option}`" for option in given)
            print("| " + " | ".join([str(group.size), options_given, *numbers]) + " |", flush=True)


def _in_shards(model: nn.Module, group: Group) -> nn.Module:
    """A model of the same numbers, of which every process holds a part."""
    saving: Any = model
    with tempfile.TemporaryDirectory() as own:
        folder = group.share([own])[0]
        if group.is_main:
            saving.save_pretrained(folder)
        group.wait()
        loaded = load_model(folder, local=True, placement=Placement(shards=True))
        group.wait()
    return loaded


def main() -> None:
    cases: Any = from_tests.module("merge/step_cases.py")
    if not launched():
        one_process(cases)
        return
    with started() as group:
        in_shards(cases, group)


if __name__ == "__main__":
    main()
