"""Small models with adapters by PEFT: what they compute, and how far a merge is from it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import nsc_merge

# Of the largest difference that the adapters make, in float64 with adapters in float32.
EQUAL = 1e-5
METHODS: dict[str, dict[str, Any]] = {
    "nsc": {"steps": 2, "compile": False, "progress": False},
    "match": {"steps": 2, "warm_up": 0, "progress": False},
    "distill": {"steps": 2, "warm_up": 0, "progress": False},
}


def outputs(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Every number of a forward, but for key/value caches."""
    wide = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    bare = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if getattr(bare, "_can_set_experts_implementation", lambda: False)():
        bare.set_experts_implementation("eager")  # type: ignore[operator]  # the grouped product knows no float64
    if "use_cache" in inspect.signature(bare.forward).parameters:
        wide["use_cache"] = False  # type: ignore[assignment]
    torch.manual_seed(0)
    with torch.no_grad():
        found = copy.deepcopy(model).to(dtype).eval()(**wide)
    return list(_tensors(found))


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        if found.is_floating_point():
            yield found
    elif isinstance(found, dict):
        for name, value in found.items():
            if "past_key_values" not in name and "cache" not in name:
                yield from _tensors(value)
    elif isinstance(found, (list, tuple)):
        for value in found:
            yield from _tensors(value)


def apart(found: list[Tensor], expected: list[Tensor], base: list[Tensor]) -> float:
    """The largest difference from what is expected, in units of the largest that the adapters make."""
    effect = max(_far(one, other) for one, other in zip(expected, base, strict=True))
    if effect == 0:
        raise ValueError("the adapters change nothing")
    return max(_far(one, other) for one, other in zip(found, expected, strict=True)) / effect


def _far(one: Tensor, other: Tensor) -> float:
    if not one.numel():
        return 0.0
    both = torch.stack([one, other]).nan_to_num(0.0, 0.0, 0.0)
    return float((both[0] - both[1]).abs().max())


def config_of(adapter: str, model: nn.Module, without: list[str]) -> dict[str, Any]:
    """What PEFT's ``LoraConfig`` takes for a kind of adapter, on all linears but those ``without``.

    Raises:
        ValueError: if the model has nothing of the kind.
    """
    linears = {"target_modules": "all-linear", "exclude_modules": without or None}
    if adapter == "dora":
        return {**linears, "use_dora": True}
    if adapter == "bias":
        return {**linears, "lora_bias": True}
    if adapter == "embeddings":
        get: Any = model
        ends = {id(get.get_input_embeddings()), id(get.get_output_embeddings())}
        return {"target_modules": [path for path, part in model.named_modules() if id(part) in ends]}
    if adapter == "experts":
        stacks = [path for path, value in model.named_parameters() if value.dim() == 3 and "expert" in path]
        if not stacks:
            raise ValueError("no experts in stacks")
        return {"target_modules": [], "target_parameters": stacks}
    return linears


def adaptable(model: nn.Module) -> nn.Module:
    """A copy that PEFT can adapt: it asks for the embeddings of tokens, and those of transformers' detectors that have
    none raise an error.
    """
    own: Any = copy.deepcopy(model)
    try:
        own.get_input_embeddings()
    except NotImplementedError:
        own.get_input_embeddings = nn.Identity
    return own


def write_adapter(model: nn.Module, folder: Path, seed: int, **config: Any) -> Path:
    """A PEFT folder with random numbers in all that PEFT would train."""
    held = peft.get_peft_model(adaptable(model), peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in held.named_parameters():
            if value.requires_grad:
                # A magnitude of DoRA is the norm of a column of the weight.
                unit = value.abs().mean() if "magnitude" in name else 1.0
                value.add_(0.1 * unit * torch.randn(value.shape, generator=generator))
    held.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def together(model: nn.Module, folders: dict[str, Path], scale: float) -> nn.Module:
    """PEFT's model with all adapters active, each scaled by ``scale``.

    The numbers are put into it here: PEFT itself treats some tensors' names as transformers treats those of older
    checkpoints when it loads an adapter, and loses them.
    """
    held: Any = adaptable(model)
    for task, folder in folders.items():
        config = peft.PeftConfig.from_pretrained(str(folder))
        held = held if isinstance(held, peft.PeftModel) else peft.get_peft_model(held, config, adapter_name=task)
        if task not in held.peft_config:
            held.add_adapter(task, config)
    held.base_model.set_adapter(list(folders))
    state = held.state_dict()
    for task, folder in folders.items():
        for name, value in load_file(folder / "adapter_model.safetensors").items():
            stem, last = name.rsplit(".", 1)
            named = (f"{stem}.{task}.{last}", f"{name}.{task}", f"{name}.{task}.weight")
            state[next(one for one in named if one in state)].copy_(value)
    for layer in held.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling = {task: value * scale for task, value in layer.scaling.items()}
    return held


def nudged(model: nn.Module) -> nn.Module:
    """A copy whose numbers are each another by 1e-7, about the rounding of float32."""
    own, generator = copy.deepcopy(model).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in own.parameters():
            value.mul_(1 + 1e-7 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    return own


class _Noted(nn.Module):
    """In the place of a linear, as PEFT puts its own."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear, self.gave_a_tensor = linear, False

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__["_modules"]
        return modules["linear"] if name == "linear" else getattr(modules["linear"], name)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        output = self.linear(*inputs, **named)
        self.gave_a_tensor = isinstance(output, Tensor)
        return output


def passed_over(model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
    """Linears that PEFT cannot adapt: a forward does not call what is in their place, as their weight is read past them
    or not at all, or the model has them in a list of its own, as Mask2Former's MLPs; or they return more than a tensor.
    """
    own = copy.deepcopy(model)
    paths = [path for path, part in own.named_modules() if isinstance(part, (nn.Linear, Conv1D))]
    noted = {path: _Noted(own.get_submodule(path)) for path in paths}
    for path, one in noted.items():
        own.set_submodule(path, one)
    with torch.no_grad():
        own(**batch)
    return [path for path, one in noted.items() if not one.gave_a_tensor]


def run(
    found: dict[str, Any],
    method: str,
    model: nn.Module,
    folders: dict[str, Path],
    data: dict[str, list[dict[str, Tensor]]],
) -> str:
    """Two steps of a method."""
    done = nsc_merge.merge(model, folders, data, method, **METHODS[method])
    if method == "nsc":
        found["measured"] = done.options["scored"]
    values = {value for row in done.coefficients.values() for value in row.values()}
    return "ran" if len(values) > 1 else "no coefficient moved"


def attempt(found: dict[str, Any], what: str, action: Callable[[], Any], keep: bool = False) -> Any:
    """What an action gives, in a row too where it is to be kept; of what fails the row has the error's first line."""
    try:
        value = action()
    except TimeoutError:
        raise  # of the whole row
    except Exception as error:
        found[what] = line(error)
        return None
    if keep:
        found[what] = value
    return value


def line(error: Exception) -> str:
    """The first line of an error, with its kind."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:400]
