"""Adapters of random kinds, made by PEFT on small models of several families, merged, saved and loaded again.

What a task's adapter does to the base is what PEFT's own ``merge_and_unload`` makes of the weights, and task arithmetic
adds that up. Of every method, what was saved must be loaded by PEFT or transformers with the weights of the result.
"""

from __future__ import annotations

import copy
import itertools
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nsc_merge

from .trial import Trial

_SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24}
_SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA: dict[str, Any] = {**_SMALL, "vocab_size": 32, "num_key_value_heads": 1}
_GPT2 = transformers.GPT2Config(
    vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
)
_T5 = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
# Kind -> class, configuration, modules that may be adapted, and those that may be trained in full.
KINDS: dict[str, tuple[Any, Any, tuple[str, ...], tuple[str, ...]]] = {
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**_LLAMA),
        ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"),
        ("lm_head", "norm"),
    ),
    "qwen3": (
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config(**_LLAMA, head_dim=8),
        ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "embed_tokens"),
        ("embed_tokens",),
    ),
    "tied llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True),
        ("q_proj", "v_proj", "gate_proj"),
        ("input_layernorm",),
    ),
    "gpt2": (transformers.GPT2LMHeadModel, _GPT2, ("c_attn", "c_proj", "c_fc"), ("ln_f",)),
    "vit": (
        transformers.ViTModel,
        transformers.ViTConfig(**_SMALL, image_size=8, patch_size=4, num_channels=1),
        ("q_proj", "v_proj", "fc1", "fc2", "projection"),
        ("layernorm",),
    ),
    "t5": (transformers.T5ForConditionalGeneration, _T5, ("q", "v", "wi", "wo"), ("final_layer_norm",)),
}
METHODS = ("task_arithmetic", "task_arithmetic", "ties", "svd", "knots_ties", "tsv", "breadcrumbs", "wudi")
HALF = (torch.bfloat16, torch.float16)
Weights = dict[str, Tensor]


def trials(seed: int) -> Iterator[Trial]:
    """Endless; the n-th is :func:`trial` of the seed and n."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    bases = {kind: _base(kind) for kind in KINDS}
    for number in itertools.count():
        yield trial(bases, seed, number)


def _base(kind: str) -> nn.Module:
    model = KINDS[kind][0](KINDS[kind][1]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = np.random.default_rng(parameter.numel()).standard_normal(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(0.3 * drawn))
    return model


def trial(bases: dict[str, nn.Module], seed: int, number: int) -> Trial:
    rng = np.random.default_rng((seed, number))
    kind = _one(rng, tuple(KINDS))
    configs = [_config(rng, kind) for _ in range(_one(rng, (1, 1, 2, 3)))]
    method, scale = _one(rng, METHODS), _one(rng, (1.0, 0.5, 0.3))
    case = f"adapters: seed {seed}, trial {number}: {kind}: {method} {scale} of {configs}"
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _tried(case, bases[kind], kind, configs, method, scale, Path(name), rng)
        except Exception as error:  # whatever it is, no good adapter may raise it
            return Trial(case, "wrong", f"{type(error).__name__}: {error}"[:600])


def _one(rng: np.random.Generator, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _config(rng: np.random.Generator, kind: str) -> dict[str, Any]:
    _, _, targets, whole = KINDS[kind]
    chosen = [name for name in targets if rng.random() < 0.5] or [targets[0]]
    config: dict[str, Any] = {"r": _one(rng, (1, 2, 3, 4)), "lora_alpha": _one(rng, (1, 2, 3, 8, 16))}
    config["target_modules"] = chosen if rng.random() < 0.9 else rf".*\.({'|'.join(chosen)})"
    config |= {name: True for name in ("use_rslora", "use_dora") if rng.random() < 0.2}
    # PEFT has them on linears that have one, and not with DoRA.
    if kind in ("gpt2", "vit") and "use_dora" not in config and rng.random() < 0.3:
        config["lora_bias"] = True
    if rng.random() < 0.3:
        config["rank_pattern"] = {_one(rng, chosen): _one(rng, (1, 2, 5))}
    if rng.random() < 0.3:
        config["alpha_pattern"] = {_one(rng, chosen): _one(rng, (1, 3, 32))}
    if rng.random() < 0.15 and isinstance(config["target_modules"], list):
        config["layers_to_transform"] = [0]
    if rng.random() < 0.15:
        config["modules_to_save"] = [name for name in whole if name not in chosen] or None
    return config | {"dtype": _one(rng, ("f32", "f32", "bf16", "f16"))}


def _made(base: nn.Module, config: dict[str, Any], folder: Path, rng: np.random.Generator) -> Weights | None:
    """A folder as PEFT saves it, and the weights that PEFT makes of it in float64; None where PEFT makes none."""
    given = {name: value for name, value in config.items() if name != "dtype"}
    fan = any(type(module).__name__ == "Conv1D" for module in base.modules())
    try:
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**given, fan_in_fan_out=fan, init_lora_weights=False))
    except (ValueError, TypeError):
        return None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                by = 0.2 * torch.from_numpy(rng.standard_normal(tuple(parameter.shape)))
                parameter.copy_(by + parameter if "lora_" not in name or "magnitude" in name else by)
    model.save_pretrained(str(folder))
    if config["dtype"] != "f32":
        file, half = folder / "adapter_model.safetensors", HALF[config["dtype"] == "f16"]
        # What was trained in full stays: PEFT keeps the base's own rows there, too.
        tensors = {name: value.to(half) if "lora_" in name else value for name, value in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    loaded: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).double()
    try:
        return _weights(loaded.merge_and_unload())
    except RuntimeError:  # biases of linears that have none
        return None


def _weights(model: nn.Module) -> Weights:
    return {name: value.double() for name, value in model.state_dict().items()}


def _tried(
    case: str,
    base: nn.Module,
    kind: str,
    configs: list[dict[str, Any]],
    method: str,
    scale: float,
    place: Path,
    rng: np.random.Generator,
) -> Trial:
    made = {f"task {k}": _made(base, config, place / f"task {k}", rng) for k, config in enumerate(configs)}
    if any(weights is None for weights in made.values()):
        return Trial(case, "refused", "PEFT makes no such adapter")
    model = copy.deepcopy(base)
    adapters = {task: place / task for task in made}
    try:
        result = nsc_merge.merge(model, adapters, method=method, scale=scale)
    except ValueError as error:
        return _refused(case, str(error))
    if any(not torch.equal(one, other) for one, other in zip(model.parameters(), base.parameters(), strict=True)):
        return Trial(case, "wrong", "the base was changed")
    applied = copy.deepcopy(model)
    result.apply(applied)
    expected = _weights(applied)
    if method == "task_arithmetic":
        before = _weights(base)
        tasks = [weights for weights in made.values() if weights is not None]
        by_peft = {name: w + scale * sum(one[name] - w for one in tasks) for name, w in before.items()}
        if wrong := _differing(expected, by_peft):
            return Trial(case, "wrong", f"applied: {wrong}")
    formats: dict[str, Callable[[Path], Any]] = {
        "lora": lambda folder: PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).double().merge_and_unload(),
        "model": lambda folder: KINDS[kind][0].from_pretrained(folder),
    }
    refusals = []
    for format, read in formats.items():
        try:
            result.save(place / format, format=format, rank=99 if format == "lora" else None)
        except ValueError as error:
            if (place / format).exists():
                return Trial(case, "wrong", f"{format} is refused, and there: {error}")
            refusals.append(str(error))
            continue
        if wrong := _differing(_weights(read(place / format)), expected):
            return Trial(case, "wrong", f"{format}: {wrong}")
    return _refused(case, refusals[0]) if refusals else Trial(case, "right")


def _differing(found: Weights, expected: Weights) -> str:
    """The tensor that differs most, if one does by more than float32's rounding of sums and products."""
    for name, want in expected.items():
        if name not in found or found[name].shape != want.shape:
            return f"{name} is missing or has another shape"
        off = float((found[name] - want).norm() / (want.norm() + 1e-6))
        if not off <= 2e-5:
            return f"{name} is off by {off:.3g}"
    return ""


def _refused(case: str, said: str) -> Trial:
    """A refusal names what cannot be merged or saved, and the way out."""
    fair = re.search(r"DoRA|lora_bias|embedding|shared by|modules_to_save|rank", said) and "\n" not in said
    return Trial(case, "refused" if fair else "wrong", said[:600])
