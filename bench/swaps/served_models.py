"""Merged models in CTranslate2 and MLX-LM on a CPU: what they compute, held to transformers and PEFT.

    python -m bench.swaps.served_models --tokenizer FOLDER --out bench/results/serving/models.jsonl

Models of several families are made, tiny and random, with a configuration as on the hub: ``rope_theta``, of
half a million, where transformers 5 has ``rope_parameters``. Adapters of all linears are made by PEFT, merged by
``nsc_merge``, and saved as an adapter and as a model. Each engine that is installed reads base and model, and the
logarithms of all probabilities after every token of three prompts are compared:

    base      the largest difference from transformers of the base
    differs   that of the merged model from transformers with the base and the merged adapter, in float32
    moved     the largest that the adapter makes, so that what is not in the model differs by as much
    said      the engine's error, where it does not take them
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from torch import Tensor

import nsc_merge
from bench.merging.cost_rows import environment, write_rows
from bench.swaps.servers import FAMILIES, adapter, apart, prompts_of, write_base
from nsc_merge.models.bases.loading import load_model


def by_ctranslate2(model: Path, prompts: Sequence[list[int]], folder: Path) -> list[Tensor]:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoTokenizer

    made = TransformersConverter(str(model)).convert(str(folder / "ctranslate2"), force=True)
    engine = ctranslate2.Generator(made, device="cpu", compute_type="float32")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = [tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts]
    return [torch.tensor(np.array(engine.forward_batch([one])))[0] for one in tokens]


def by_mlx_lm(model: Path, prompts: Sequence[list[int]], folder: Path) -> list[Tensor]:
    import mlx.core as mx
    import mlx_lm

    mx.set_default_device(mx.cpu)
    engine, _ = mlx_lm.load(str(model))
    return [torch.tensor(np.array(engine(mx.array([prompt])).astype(mx.float32)))[0] for prompt in prompts]


# Name of the package -> the logits that it makes of a model.
ENGINES: dict[str, Callable[[Path, Sequence[list[int]], Path], list[Tensor]]] = {
    "ctranslate2": by_ctranslate2,
    "mlx_lm": by_mlx_lm,
}


@torch.no_grad()
def by_transformers(model: Any, prompts: Sequence[list[int]]) -> list[Tensor]:
    return _logarithms([model(torch.tensor([prompt])).logits[0] for prompt in prompts])


def _logarithms(logits: Sequence[Tensor]) -> list[Tensor]:
    return [one.float().log_softmax(-1) for one in logits]


def as_on_the_hub(folder: Path) -> None:
    """A base whose configuration is as transformers 4 wrote it, where positions are turned in one way."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["torch_dtype"] = config.pop("dtype")
    # The last token of a tokenizer's special ones: CTranslate2 asks for one.
    config["eos_token_id"] = 2
    if "rope_theta" in config.get("rope_parameters", {}):
        found = config.pop("rope_parameters")
        kept = {key: found[key] for key in found.keys() & {"partial_rotary_factor"}}
        config |= {"rope_theta": 500000.0, "rope_scaling": None, **kept}
    file.write_text(json.dumps(config))


def rows_of(family: str, engines: Sequence[str], tokenizer: Path, folder: Path) -> Iterator[dict[str, Any]]:
    from peft import PeftModel
    from transformers import AutoTokenizer

    base = folder / "base"
    write_base(base, family, tokenizer)
    as_on_the_hub(base)
    for number in range(2):
        adapter(base, {"r": 8}, number).save_pretrained(folder / str(number))
    plain: Any = load_model(str(base), local=True)
    tasks = {f"task{number}": folder / str(number) for number in range(2)}
    result = nsc_merge.merge(plain, tasks, method="task_arithmetic", scale=0.7)
    model, lora = result.save(folder / "model", "model"), result.save(folder / "lora", "lora")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(model)
    prompts = prompts_of(base)
    before = by_transformers(plain, prompts)
    after = by_transformers(PeftModel.from_pretrained(plain, str(lora)).eval(), prompts)
    for engine in engines:
        row: dict[str, Any] = {"engine": engine, "family": family}
        try:
            alone, found = (_logarithms(ENGINES[engine](one, prompts, folder)) for one in (base, model))
        except Exception as error:
            yield row | {"said": f"{type(error).__name__}: {error}".replace(f"{folder}/", "")[:300]}
            continue
        yield row | {"base": apart(alone, before), "differs": apart(found, after), "moved": apart(before, after)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of one that the models are given")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=[*FAMILIES], metavar="FAMILY")
    parser.add_argument("--out", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    engines = [name for name in ENGINES if find_spec(name)]
    if not engines:
        parser.error(f"expected one of {', '.join(ENGINES)} to be installed, found none")
    rows: list[dict[str, Any]] = []
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as place:
            for row in rows_of(family, engines, arguments.tokenizer, Path(place)):
                rows.append(row)
                print(json.dumps(row), flush=True)
    if arguments.out:
        named = environment(peft=version("peft"), **{name: version(name.replace("_", "-")) for name in engines})
        write_rows(arguments.out, [named, *rows])


if __name__ == "__main__":
    main()
