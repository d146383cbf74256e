"""Turns what a model computes into a task's outputs: by its own head, one that a task brought, or a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nsc_merge.evaluation.metrics import IGNORE
from nsc_merge.methods.task_outputs import output_in
from nsc_merge.models.families import find_family
from nsc_merge.models.merged.other_values import other_values
from nsc_merge.models.real_tokens import at_positions, mask_named
from nsc_merge.models.traits import encodes
from nsc_merge.utils.errors import naming
from nsc_merge.utils.safetensors_checks import read_safetensors

Inputs = Mapping[str, Tensor]
Head = Callable[[nn.Module, Inputs], Tensor]

POOLS = ("mean", "first", "last", "patches", "tokens", "image")


@dataclass(frozen=True)
class ModelHead:
    """The model's own logits, those of pixels with classes last, or values, as of forecasts.

    Attributes:
        parameters: path of a parameter or buffer in the model -> value that takes its place meanwhile, such as a task's
            classifier; the number of classes may differ.
        shifted: leave out the last position, whose next token nobody knows, as causal language models are scored.
    """

    parameters: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    shifted: bool = False

    def __call__(self, model: nn.Module, inputs: Inputs) -> Tensor:
        with other_values(model, self.parameters, "head") if self.parameters else nullcontext():
            output = output_in(model(**inputs), model, inputs, values=True)
        if output is None:
            raise ValueError(
                f"head: {type(model).__name__} gives no logits; expected a head beside the model"
            )
        return output[:, :-1] if self.shifted else output


@dataclass(frozen=True)
class LinearHead:
    """One linear layer on the final features ``[N, T, d]`` of the model.

    Attributes:
        weight: ``[C, d]``; for pool ``"image"`` ``[C * p * p, d]``, channels first, for patches of p x p pixels.
        bias: ``[C]``, or ``[C * p * p]``.
        pool: ``"mean"`` of all tokens that the mask keeps, ``"first"`` or ``"last"`` token that it keeps, mean
            of the ``"patches"`` without class tokens, every token (``"tokens"``: ``[N, T, C]``), or patches laid
            out as an ``"image"``: ``[N, H, W, C]``.
    """

    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)
    pool: str

    def __call__(self, model: nn.Module, inputs: Inputs) -> Tensor:
        family = find_family(model)
        trunk: nn.Module = getattr(model, family.prefill if family else "base_model", model)
        features = trunk(**inputs).last_hidden_state
        if features.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"head: expected weight [C, {features.shape[-1]}] for the features of {type(model).__name__}, found "
                f"{list(self.weight.shape)}"
            )
        mask = mask_named(family.mask, inputs) if family else None
        pooled = self._pooled(features, mask, model, inputs)
        weight = self.weight.to(pooled)
        output = F.linear(pooled, weight, None if self.bias is None else self.bias.to(pooled))
        return self._image(output, model, inputs) if self.pool == "image" else output

    def _pooled(self, features: Tensor, mask: Tensor | None, model: nn.Module, inputs: Inputs) -> Tensor:
        if self.pool in ("patches", "image"):
            rows, columns, _ = _grid(model, inputs)
            patches = features[:, features.shape[1] - rows * columns :]
            return patches.mean(1) if self.pool == "patches" else patches
        if self.pool == "tokens":
            return features
        if mask is not None:
            mask = at_positions(model, mask, features.shape[1])
        if mask is None or mask.shape != features.shape[:2]:
            mask = features.new_ones(features.shape[:2])
        if self.pool == "first":
            return features[torch.arange(len(features), device=features.device), (mask != 0).int().argmax(1)]
        if self.pool == "last":
            places = torch.arange(features.shape[1], device=features.device) * (mask != 0)
            return features[torch.arange(len(features), device=features.device), places.argmax(1)]
        weights = (mask != 0).to(features)[..., None]
        return (features * weights).sum(1) / weights.sum(1).clamp(min=1)

    def _image(self, output: Tensor, model: nn.Module, inputs: Inputs) -> Tensor:
        rows, columns, patch = _grid(model, inputs)
        if output.shape[-1] % patch**2:
            raise ValueError(
                f"head: pool 'image' expects weight [C * {patch} * {patch}, d], found {list(self.weight.shape)}"
            )
        size = (rows * patch, columns * patch)
        return F.fold(output.transpose(1, 2), size, patch, stride=patch).movedim(1, -1)


@dataclass(frozen=True)
class GeneratingHead:
    """Generation: ``[N, length]`` new tokens, :data:`IGNORE` after the end of each; greedily, or by so many ``beams``.

    Prompts of different lengths must be padded in front, but for models whose encoder reads them. Of the model's
    generation config all holds that says which tokens are likely; :data:`_NOT_SEARCHED` does not, and a token that it
    has the last one be only where the limit is of answers (``limited``), and not of labels.
    """

    length: int
    beams: int = 1
    limited: bool = False

    def __call__(self, model: nn.Module, inputs: Inputs) -> Tensor:
        from transformers import StoppingCriteriaList

        mask = inputs.get("attention_mask")
        if not encodes(model) and mask is not None and not bool((mask[:, -1] != 0).all()):
            raise ValueError("generate: expected prompts padded in front (left), found padding at their end")
        anyone: Any = model
        config = getattr(model, "generation_config", None)
        fronts: list[Tensor] = []
        steps = 0

        def seen(tokens: Tensor, _scores: Any, **_others: Any) -> Tensor:
            nonlocal steps
            steps += 1
            if not fronts:
                fronts.append(tokens[:, :-1].clone())
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

        unasked = _NOT_SEARCHED | ({} if self.limited else {"forced_eos_token_id": None})
        settings = {name: value for name, value in unasked.items() if getattr(config, name, None) is not None}
        settings |= {"max_new_tokens": self.length, "num_beams": self.beams, "do_sample": False}
        tokens = anyone.generate(
            **_begun_by(model, inputs), **settings, stopping_criteria=StoppingCriteriaList([seen])
        )
        # What stands in front of the new tokens differs: the prompt, what a decoder starts with, or nothing.
        new = tokens
        if fronts and (self.beams > 1 or tokens.shape[1] > steps):
            # Of every answer there are several beams, and the best ones may be shorter than the search was.
            front = fronts[0][:: len(fronts[0]) // len(tokens)]
            new = new[:, front.shape[1] :] if torch.equal(new[:, : front.shape[1]], front) else new
        new = new[:, : self.length]
        ends = torch.isin(new, torch.tensor(ends_of(model), dtype=new.dtype, device=new.device))
        new = new.masked_fill(ends.cumsum(1) - ends.long() > 0, IGNORE)
        return F.pad(new, (0, self.length - new.shape[1]), value=IGNORE)


# What a base's generation config may ask for and is not done: other searches, several answers, and some that time cuts.
_NOT_SEARCHED: dict[str, Any] = {
    "return_dict_in_generate": False,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "prompt_lookup_num_tokens": None,
    "dola_layers": None,
    "max_time": None,
}


def _begun_by(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs, without what a decoder reads where this is what begins all answers alone: it is for generation to
    say, which may begin by another token than the model was trained by.
    """
    start, config = inputs.get("decoder_input_ids"), getattr(model, "config", None)
    own = getattr(config, "decoder_start_token_id", None)
    if start is None or own is None or start.shape[1:] != (1,) or bool((start != own).any()):
        return inputs
    return {name: value for name, value in inputs.items() if not name.startswith("decoder_")}


class CTCHead:
    """What a model of speech hears (CTC): the likeliest token of every frame, of repeated ones one, without blanks:
    ``[N, T]``, :data:`IGNORE` behind the end of each.
    """

    def __call__(self, model: nn.Module, inputs: Inputs) -> Tensor:
        logits = model(**inputs).logits
        best, blank = logits.argmax(-1), getattr(model.config, "pad_token_id", None)
        mask = inputs.get("attention_mask")
        real = torch.ones_like(best, dtype=torch.bool)
        if mask is not None and (frames := at_positions(model, mask, best.shape[1])).shape == best.shape:
            real = frames.bool()
        new = torch.ones_like(real)
        new[:, 1:] = best[:, 1:] != best[:, :-1]
        heard = [row[kept] for row, kept in zip(best, real & new & (best != blank), strict=True)]
        return pad_sequence(heard, batch_first=True, padding_value=IGNORE)


def ends_of(model: nn.Module) -> tuple[int, ...]:
    """The tokens by which a model ends what it generates."""
    end: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return () if end is None else tuple(end) if isinstance(end, list) else (int(end),)


def read_head(file: Path, model: nn.Module, pool: str | None, argument: str) -> Head:
    """The head that a safetensors file holds: parameters of the model by name, or ``weight`` and perhaps ``bias``.

    Raises:
        ValueError: naming ``argument``, what was found and what was expected.
    """
    with naming(argument):
        tensors = read_safetensors(file)
    return head_of(tensors, model, pool, f"{argument}: {file}")


def head_of(tensors: Mapping[str, Tensor], model: nn.Module, pool: str | None, argument: str) -> Head:
    """The head that ``tensors`` are: parameters of the model by name, or weight and perhaps bias of one linear layer.

    Raises:
        ValueError: naming ``argument``, what was found and what was expected.
    """
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    if tensors and set(tensors) <= names:
        if pool is not None:
            raise ValueError(
                f"{argument}: holds parameters of the model, to which no pool applies; found {pool!r}"
            )
        return ModelHead({name: value.float() for name, value in tensors.items()})
    parts = {name.rpartition(".")[2]: value for name, value in tensors.items()}
    layers = {name.rpartition(".")[0] for name in tensors}
    fits = len(layers) == 1 and "weight" in parts and set(parts) <= {"weight", "bias"}
    if not fits or parts["weight"].dim() != 2:
        raise ValueError(
            f"{argument}: expected parameters of {type(model).__name__}, or weight and bias of one linear layer, found "
            f"{ {name: list(value.shape) for name, value in tensors.items()} }"
        )
    if pool is None:
        raise ValueError(
            f"{argument}: expected a pool for a linear layer on features, one of {list(POOLS)}, found none"
        )
    bias = parts.get("bias")
    return LinearHead(parts["weight"].float(), None if bias is None else bias.float(), pool)


def _grid(model: nn.Module, inputs: Inputs) -> tuple[int, int, int]:
    """Rows and columns of patches of an image model, and pixels along the side of one."""
    config: Any = getattr(model, "config", None)
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int) or "pixel_values" not in inputs:
        raise ValueError(f"pool: expected a model of images with a patch_size, found {type(model).__name__}")
    height, width = inputs["pixel_values"].shape[-2:]
    return height // patch, width // patch, patch
