"""What FusionBench's pools hold, as updates of a base and as batches of its inputs. Needs no FusionBench."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

import nsc_merge
from nsc_merge.adapters import Factor
from nsc_merge.adapters.algebra.factoring import factored
from nsc_merge.methods import METHODS

_LABELS = ("labels", "label", "return_loss")
_SPLITS = ("val", "test", "train")


def linear_weights(model: nn.Module) -> set[str]:
    """Names of the weights of those ``nn.Linear`` whose own forward is all that computes with them."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for value in module._parameters.values():
            if value is not None:
                owners[id(value)] = owners.get(id(value), 0) + 1
    return {
        f"{path}.weight"
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and owners[id(module.weight)] == 1
        and not isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention)
    }


def updates_of(
    base: nn.Module, source: Any, task: str, tolerance: float | None = None
) -> dict[str, Factor | Tensor]:
    """Parameter -> update of one task, without those that are zero: factors ``[d_out, d_in]`` of linears where it has
    low rank, otherwise a tensor of the parameter's shape.

    Args:
        base: in which the parameters are.
        source: a model of the same parameters, or what :func:`nsc_merge.load_adapter` takes.
        task: how messages call the source.
        tolerance: relative error (Frobenius) up to which a difference of models counts as of low rank; see
            :func:`nsc_merge.adapters.algebra.factoring.factored`.

    Raises:
        TypeError, ValueError: naming the task, the parameter, what was found and what was expected.
    """
    if is_dense(source):
        return _differences(base, source, task, tolerance)
    result = nsc_merge.merge(base, {task: source}, method="task_arithmetic", scale=1.0)
    if result.model is not base:
        raise ValueError(f"{task}: changes a weight that the base ties to another one; expected adapters of others")
    modules, updates = dict(base.named_modules()), dict[str, Factor | Tensor]()
    for path, factor in result.adapters[task].factors.items():
        own = dict(modules[path].named_parameters(recurse=False)) if path in modules else {}
        if "weight" not in own:
            raise ValueError(f"{task}: {path}: expected a module with a weight in the base, found none")
        name = f"{path}.weight"
        if factor.gain is not None:
            # DoRA: of the base's weight, which is at hand here.
            updates[name] = shaped(result.delta(path), base, name)
        elif factor.dense is not None or (factor.rank and type(modules[path]) is not nn.Linear):
            updates[name] = shaped(factor.delta(), base, name)
        elif factor.rank:
            updates[name] = Factor(factor.A, factor.B, factor.scaling)
        bias = factor.bias_delta()
        if bias is None or not bias.any():
            continue
        if "bias" not in own:
            raise ValueError(f"{task}: {path}: has a bias (lora_bias), and the base's module none to add it to")
        updates[f"{path}.bias"] = bias
    return updates


def is_dense(source: Any) -> bool:
    """Whether a source is a model without adapters in it."""
    return isinstance(source, nn.Module) and not hasattr(source, "peft_config")


def _differences(base: nn.Module, model: nn.Module, task: str, tolerance: float | None) -> dict[str, Factor | Tensor]:
    theirs, linears = dict(model.named_parameters()), linear_weights(base)
    updates: dict[str, Factor | Tensor] = {}
    for name, value in base.named_parameters():
        other = theirs.get(name)
        if other is None or other.shape != value.shape:
            found = "none" if other is None else str(list(other.shape))
            raise ValueError(f"{task}: expected a parameter {name} {list(value.shape)} as the base has, found {found}")
        delta = (other - value).detach()
        if not torch.isfinite(delta).all():
            raise ValueError(f"{task}: {name}: expected finite numbers, found infinity or NaN")
        if not delta.any():
            continue
        factor = factored(delta, tolerance) if name in linears else None
        updates[name] = delta if factor is None or factor.dense is not None else factor
    return updates


def as_factors(updates: Mapping[str, Factor | Tensor], base: nn.Module, task: str) -> dict[str, Factor]:
    """The same updates by module, as an ``Adapter`` holds them.

    Raises:
        ValueError: naming a parameter that is no ``weight`` or ``bias``.
    """
    weights: dict[str, Factor] = {}
    biases: dict[str, Tensor] = {}
    for name, update in updates.items():
        path, _, part = name.rpartition(".")
        if part == "bias" and isinstance(update, Tensor):
            biases[path] = update
        elif part == "weight":
            weights[path] = update if isinstance(update, Factor) else Factor.of_matrix(_matrix(update, base, path))
        else:
            raise ValueError(
                f"{task}: changes {name}, which is no weight or bias of a layer; expected models made of LoRA "
                "adapters, or a method of their entries that needs no data, such as 'task_arithmetic' or 'ties'"
            )
    factors = {}
    for path in dict.fromkeys([*weights, *biases]):
        one = weights.get(path)
        if one is None:
            weight = base.get_parameter(f"{path}.weight")
            one = Factor.empty(*_matrix(weight, base, path).shape)
        factors[path] = Factor(one.A, one.B, one.scaling, biases.get(path), one.dense)
    return factors


def merged_into(
    base: nn.Module, tasks: Mapping[str, Mapping[str, Factor | Tensor]], method: str, options: Mapping[str, Any]
) -> nn.Module:
    """Merge updates of parameters by :func:`nsc_merge.merge_factors`, each parameter one matrix, and add them to the
    base, in place.

    Raises:
        TypeError, ValueError: as ``merge_factors``; or if a method that looks at more than entries is to merge what is
            no matrix. The base is then as it was.
    """
    # A sum with coefficients treats each entry alone, too.
    entries = [known.name for known in METHODS.values() if known.of_entries or known.gives == "coefficients"]
    entries = [name for name in entries if METHODS[name].updates is not None]
    for task, updates in tasks.items():
        other = [name for name in updates if base.get_parameter(name).dim() != 2]
        if other and method not in entries:
            shape = list(base.get_parameter(other[0]).shape)
            raise ValueError(
                f"method: {method!r} merges matrices, and {task} also changes {other[0]!r} {shape}; expected models "
                f"made of LoRA adapters, or one of {entries}"
            )
    matrices = {
        task: {
            name: update if isinstance(update, Factor) else update.reshape(1 if update.dim() == 1 else len(update), -1)
            for name, update in updates.items()
        }
        for task, updates in tasks.items()
    }
    merged = dict(nsc_merge.merge_factors(matrices, method, **options))
    with torch.no_grad():
        for name, factor in merged.items():
            value = base.get_parameter(name)
            value.copy_(value.double() + factor.delta().reshape(value.shape).to(value.device))
    return base


def shaped(delta: Tensor, base: nn.Module, name: str) -> Tensor:
    """An update ``[d_out, d_in]`` in the shape of the parameter: of Conv1D turned, of a convolution unfolded."""
    value = base.get_parameter(name)
    return delta.t() if _is_turned(base, name.rpartition(".")[0]) else delta.reshape(value.shape)


def _matrix(update: Tensor, base: nn.Module, path: str) -> Tensor:
    return update.t() if _is_turned(base, path) else update.reshape(len(update), -1)


def _is_turned(base: nn.Module, path: str) -> bool:
    return type(base.get_submodule(path)).__name__ == "Conv1D"


def _tensor(value: Any) -> Tensor:
    """By NumPy, which makes wide numbers of a list's whatever torch's default dtype is."""
    return value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value), device="cpu")


def batches_of(
    modelpool: Any, task: str, model: nn.Module, split: str | None, samples: int, batch_size: int
) -> list[dict[str, Tensor]]:
    """Unlabelled batches of a base's inputs, drawn from a pool's dataset of a task with a fixed seed.

    Rows may be dictionaries of model inputs, of which those are taken that the model's ``forward`` names; or images, or
    pairs of image and label, which the pool's ``load_processor()`` encodes unless they are tensors. An encoder-decoder
    without ``decoder_input_ids`` in its rows is given its start token.

    Raises:
        ValueError: naming the argument, what was found and what was expected.
    """
    held = {name: list(getattr(modelpool, f"{name}_dataset_names", [])) for name in _SPLITS}
    if split is None:
        split = next((name for name in ("val", "test") if task in held[name]), None)
    if split not in held or task not in held[split]:
        raise ValueError(
            f"dataset: expected a dataset of {task!r} among the pool's val_datasets or test_datasets, or in the one "
            f"that is named, found {split!r} and {held}; methods that need no data run without"
        )
    dataset = getattr(modelpool, f"load_{split}_dataset")(task)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0), device="cpu")[:samples].tolist()
    if not order:
        raise ValueError(f"dataset: expected rows of {task!r}, found none")

    @functools.cache
    def processor() -> Any:
        if not hasattr(modelpool, "load_processor"):
            raise ValueError(
                f"dataset: expected a pool with a processor for the images of {task!r}, such as "
                f"CLIPVisionLoRAPool, or rows with pixel_values, found a {type(modelpool).__name__}"
            )
        return modelpool.load_processor()

    rows = [_inputs(dataset[number], model, processor, task) for number in order]
    shapes = {tuple((name, value.shape) for name, value in row.items()) for row in rows}
    if len(shapes) > 1:
        raise ValueError(f"dataset: expected rows of one length for {task!r}, found {len(shapes)}; pad them")
    return [default_collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def _inputs(row: Any, model: nn.Module, processor: Callable[[], Any], task: str) -> dict[str, Tensor]:
    """The model's inputs of one row, without a dimension of rows."""
    image = row[0] if isinstance(row, tuple | list) else row.get("image", row.get("img"))
    if image is None:
        taken = set(inspect.signature(model.forward).parameters) - {*_LABELS}
        inputs = {name: _tensor(value) for name, value in row.items() if name in taken}
    elif isinstance(image, Tensor):
        inputs = {"pixel_values": image}
    else:
        inputs = {"pixel_values": processor()(images=[image], return_tensors="pt")["pixel_values"][0]}
    if not inputs:
        raise ValueError(f"dataset: expected inputs of {type(model).__name__} in the rows of {task!r}, found {row}")
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        inputs.setdefault("decoder_input_ids", torch.tensor([config.decoder_start_token_id], device="cpu"))
    return inputs
