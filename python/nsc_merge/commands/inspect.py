"""The ``inspect`` command."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from nsc_merge.commands.terminal import positive, prepare, say
from nsc_merge.utils.errors import UsageError


def add(commands: Any) -> None:
    """Add the command to a parser's."""
    inspect = commands.add_parser("inspect", help="ranks, modules and overlap of adapters; fit to given inputs")
    inspect.add_argument("adapters", nargs="+", metavar="ADAPTER", help="PEFT folder, or owner/name on the hub")
    inspect.add_argument("--model", metavar="DIR|ID", help="base model: checks that every module is in it")
    inspect.add_argument(
        "--inputs", type=Path, metavar="FILE|DIR", help="measure null-space ratios on these (needs --model)"
    )
    inspect.add_argument("--batch-size", type=positive, default=32, metavar="N", help="of --inputs (default: 32)")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from nsc_merge.utils.option_checks import is_hub_id

    if arguments.inputs and not arguments.model:
        raise UsageError("--inputs: needs --model")
    local = not (arguments.model and is_hub_id(arguments.model))
    prepare(local=local and not any(is_hub_id(one.partition("@")[0]) for one in arguments.adapters))
    from nsc_merge.adapters import load_adapter
    from nsc_merge.adapters.formats.parameter_stacks import updates_of
    from nsc_merge.analysis import adapter_overlap
    from nsc_merge.calibration.batch_files import inputs_for, read_batches
    from nsc_merge.models.attachment import merged_linears
    from nsc_merge.models.bases.loading import load_model
    from nsc_merge.models.fitting import fit
    from nsc_merge.models.own_base import linears_of, own_base
    from nsc_merge.utils.json_text import finite_or_none

    called = [Path(place).name for place in arguments.adapters]
    if len(set(called)) != len(called):
        called = list(arguments.adapters)
    if len(set(called)) != len(called):
        raise UsageError(f"ADAPTER: {max(called, key=called.count)} is given twice")
    adapters = {
        name: load_adapter(place, name, dora="convert")
        for name, place in zip(called, arguments.adapters, strict=True)
    }
    document: dict[str, Any] = {}
    if arguments.model:
        model = load_model(arguments.model, local=local)
        model, adapters = own_base(model, adapters)
        adapters = fit(adapters, model)
        merged_linears(model, adapters)
        if arguments.inputs:
            read = read_batches(arguments.inputs, arguments.batch_size, "--inputs")
            batches = inputs_for(model, read, "--inputs")
            document["null_space_ratio"] = adapter_overlap.null_space_ratios(
                model, {name: linears_of(adapter, model) for name, adapter in adapters.items()}, batches
            )
    else:
        adapters = {name: replace(one, factors=updates_of(one)) for name, one in adapters.items()}
    document["adapters"] = {name: adapter_overlap.describe(adapter) for name, adapter in adapters.items()}
    document["overlaps"] = adapter_overlap.overlaps(adapters)
    say(json.dumps(finite_or_none(document)) if arguments.json else adapter_overlap.render(document))
    return 0
