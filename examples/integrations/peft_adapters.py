"""Merge adapters that are loaded in a PeftModel, in place of ``add_weighted_adapter`` or beside it.

    python examples/integrations/peft_adapters.py BASE a=FOLDER b=FOLDER [--type dare_ties] [--density 0.5] [--out OUT]

BASE is a causal language model, and every FOLDER (or hub id) an adapter of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM

import nsc_merge
from nsc_merge.integrations.combinations import COMBINATIONS
from nsc_merge.integrations.peft import merge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("adapters", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--type", choices=COMBINATIONS, default="cat")
    parser.add_argument("--density", type=float, help="of types that drop or trim entries")
    parser.add_argument("--out", type=Path, default=Path("merged-adapters"))
    arguments = parser.parse_args()
    folders = dict(pair.split("=", 1) for pair in arguments.adapters)

    first, *others = folders
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(arguments.base), folders[first], first)
    for name in others:
        model.load_adapter(folders[name], name)

    # Was: model.add_weighted_adapter(list(folders), weights, "both", combination_type=..., density=...)
    weights = [1 / len(folders)] * len(folders)
    options = {} if arguments.density is None else {"density": arguments.density}
    merged = merge(model, list(folders), weights, "both", combination_type=arguments.type, **options)
    model.set_adapter("both")
    model.save_pretrained(arguments.out, selected_adapters=["both"])
    print(f"{arguments.out / 'both'}: {len(merged.errors)} modules, relative error {max(merged.errors.values()):.2g}")

    # A wrapped base stands for the base under the adapters, and any method takes the model's own.
    result = nsc_merge.merge(model, dict.fromkeys(folders, model), method="knots_ties", scale=0.6)
    result.save(arguments.out / "knots", format="lora")
    print(f"{arguments.out / 'knots'}: {len(result.paths)} modules")


if __name__ == "__main__":
    main()
