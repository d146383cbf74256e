"""What is exported, and the contenders of :mod:`bench.merging.export_costs`, each from files to files."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RANK = 16


def make_base(folder: Path, layers: int, width: int, inner: int, words: int) -> None:
    """A random Llama, made shard by shard."""
    import transformers
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    heads = width // 64
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=words,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    config.save_pretrained(folder)
    state = model.state_dict()
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size="500MB"
    )
    generator = torch.Generator().manual_seed(0)
    for name, keys in split.filename_to_tensors.items():
        values = {key: (torch.randn(state[key].shape, generator=generator) * 0.02).bfloat16() for key in keys}
        save_file(values, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_adapters(base: Path, folder: Path, tasks: int, modules: str) -> None:
    """Adapters in PEFT's format, and their merge as ``nsc-merge run`` leaves it."""
    import nsc_merge
    from nsc_merge.adapters import Factor
    from nsc_merge.adapters.peft_writer import write_adapter
    from nsc_merge.models.bases.loading import load_model
    from nsc_merge.models.bases.placement import Placement

    model = load_model(str(base), local=True, placement=Placement(device="cpu", numbers=False))
    generator = torch.Generator().manual_seed(1)
    endings = ("q_proj", "v_proj") if modules == "qv" else ("_proj",)
    linears = {path: module for path, module in model.named_modules() if path.endswith(endings)}
    for task in range(tasks):
        factors = {}
        for path, linear in linears.items():
            A = torch.randn(RANK, linear.in_features, generator=generator) / linear.in_features**0.5
            factors[path] = Factor(A, 0.02 * torch.randn(linear.out_features, RANK, generator=generator), 1.0)
        place = folder / f"t{task}"
        place.mkdir(parents=True)
        write_adapter(place, factors, {}, {"base_model_name_or_path": str(base)})
    folders = {place.name: place for place in adapters_in(folder)}
    merged = nsc_merge.merge(model, folders, method="task_arithmetic", scale=1.0)
    merged.save(folder / "merged", "coefficients")


def adapters_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("t*"), key=lambda place: int(place.name[1:]))


def export(base: Path, adapters: Path, out: Path, form: str) -> Callable[[], object]:
    from nsc_merge.recipes.saved_result import load_result

    return lambda: load_result(adapters / "merged", numbers=False).save(out, form)


def loaded(base: Path, adapters: Path, out: Path, form: str) -> Callable[[], object]:
    import transformers

    from nsc_merge.api import merge

    folders = {place.name: place for place in adapters_in(adapters)}
    kind = transformers.LlamaForCausalLM

    def work() -> object:
        model = kind.from_pretrained(base, dtype="auto")
        return merge(model, folders, method="task_arithmetic", scale=1.0).save(out, form)

    return work


def peft(base: Path, adapters: Path, out: Path, form: str) -> Callable[[], object]:
    import transformers
    from peft import PeftModel

    first, *rest = adapters_in(adapters)
    kind = transformers.LlamaForCausalLM

    def work() -> object:
        model: Any = PeftModel.from_pretrained(kind.from_pretrained(base, dtype="auto"), first, first.name)
        for place in rest:
            model.load_adapter(place, place.name)
        names = [first.name, *(place.name for place in rest)]
        if form == "model":
            return model.merge_and_unload(adapter_names=names).save_pretrained(out)
        model.add_weighted_adapter(names, [1.0] * len(names), "merged", combination_type="cat")
        return model.save_pretrained(out, selected_adapters=["merged"])

    return work


def mergekit(base: Path, adapters: Path, out: Path, form: str) -> Callable[[], object]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    models = [{"model": f"{base}+{place}", "parameters": {"weight": 1.0}} for place in adapters_in(adapters)]
    config = MergeConfiguration.model_validate(
        {"merge_method": "task_arithmetic", "base_model": str(base), "models": models, "dtype": "bfloat16"}
    )
    # Beside the output, which is removed after the run.
    options = MergeOptions(lora_merge_cache=f"{out}-cache", copy_tokenizer=False, quiet=True, write_model_card=False)
    return lambda: run_merge(config, str(out), options)


WORK = {"export": export, "loaded": loaded, "peft": peft, "mergekit": mergekit}


def quiet() -> None:
    """No bars of transformers between the lines of the table."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


def measure(contender: str, base: Path, adapters: Path, out: Path, form: str) -> dict[str, float]:
    """One contender, in this process."""
    quiet()
    # transformers imports a model's code when it is asked for.
    importlib.import_module("transformers.models.llama.modeling_llama")
    work = WORK[contender](base, adapters, out, form)
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}
