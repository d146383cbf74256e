"""The outputs of tasks' heads: functions that give them, what they parametrise, and which positions count."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nsc_merge.adapters import Adapter
from nsc_merge.calibration.batches import MASK, Batch
from nsc_merge.calibration.forward_passes import Pass
from nsc_merge.models.bases.stored_weights import is_dtensor
from nsc_merge.models.embeddings.files import modules_of
from nsc_merge.models.families import Family, plain_family
from nsc_merge.models.real_tokens import at_positions, of_tokens
from nsc_merge.models.traits import classifiers

POSITIONS = ("all", "last")
# What outputs of transformers' models call logits, and values that are all that a model predicts.
_LOGITS = ("logits", "prediction_logits")
_VALUES = (
    *("prediction_outputs", "regression_outputs", "mean_predictions", "quantile_preds"),
    *("predicted_depth", "heatmaps"),
)
# What diffusers' models predict, of latents of images [N, C, H, W] and of videos [N, C, F, H, W], or of tokens
# [N, T, C]; and of the sound beside a video.
_LATENTS, _SOUND = "sample", "audio_sample"
Outputs = Mapping[str, Callable[[nn.Module, Batch], Tensor]]


def plain_options(options: Any) -> dict[str, Any]:
    """Options as a recipe can hold them: functions are named by the tasks that they serve."""
    return {
        one.name: plain_family(value)
        if one.name == "family"
        else sorted(value)
        if _holds_functions(value)
        else value
        for one in fields(options)
        for value in [getattr(options, one.name)]
    }


def _holds_functions(value: Any) -> bool:
    return isinstance(value, Mapping) and any(callable(item) for item in value.values())


def check_outputs(outputs: Outputs | None, tasks: Sequence[str] | None = None) -> None:
    """Refuse what is no mapping to functions, and functions for other than ``tasks``, where they are known.

    Raises:
        ValueError, TypeError: naming the task.
    """
    if outputs is not None and not isinstance(outputs, Mapping):
        raise TypeError(f"outputs: expected a mapping of tasks to functions of model and batch, found {outputs!r}")
    for task, function in (outputs or {}).items():
        if tasks is not None and task not in tasks:
            raise ValueError(f"outputs: expected functions for some of {list(tasks)}, found one for {task!r}")
        if not callable(function):
            raise TypeError(f"outputs[{task!r}]: expected a function of model and batch, found {function!r}")


def with_heads(
    outputs: Outputs | None, adapters: Mapping[str, Adapter], model: nn.Module, values: Collection[str] | None = None
) -> dict[str, Any]:
    """``outputs``, and for every task without a function whose adapter brought a head, what the model gives with it.
    The base's own head tells other classes apart, be they as many.

    Args:
        values: tasks whose outputs are taken for values; None where the method has no such choice.

    Raises:
        ValueError: naming a task, if the model has no place for its head.
    """
    found = dict(outputs or {})
    for task, adapter in adapters.items():
        if adapter.trained and task not in found:
            head = _placed(task, adapter.trained, model)
            taken = None if values is None else task in values
            found[task] = partial(_of_model, task=task, values=taken, head=head)
    return found


def _placed(task: str, head: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The head in dtype and place of the model's own."""
    parameters = dict(model.named_parameters())
    own = {**parameters, **dict(model.named_buffers())}
    for name in head:
        place = own.get(name)
        # A weight in whole numbers is quantised; a BatchNorm counts in them, in a buffer.
        quantised = name in parameters and not parameters[name].is_floating_point()
        # What is gathered, or fetched from memory or disk, as the model runs would take the place again.
        if place is None or place.is_meta or is_dtensor(place) or quantised:
            raise ValueError(
                f"outputs: the adapter of {task!r} brought a head ({name}), for which {type(model).__name__}, as it is "
                "loaded, has no place; expected a base that was saved with such a head (by "
                "AutoModelForSequenceClassification and the like), a function of model and batch for it, or method "
                "'match' or 'nsc', which need no heads"
            )
    return {name: value.to(own[name]) for name, value in head.items()}


def output_of(
    outputs: Outputs | None, task: str, model: nn.Module, batch: Batch, *, values: bool | None = None
) -> Tensor:
    """A task's output, on the device of the batch: of its own function, or what the model gives. That is its logits,
    those of pixels with classes last, and of where an answer starts and ends ``[N, 2, T]``; or its ``values``.

    Args:
        values: whether the output is taken for values, as of forecasts, where the model gives no logits; None where
            the method has no such choice.

    Raises:
        TypeError: if the function returns no tensor of numbers.
        ValueError: if there is neither.
    """
    if outputs is not None and task in outputs:
        own = outputs[task](model, batch)
        if not isinstance(own, Tensor) or not own.is_floating_point() or own.dim() == 0:
            kind = f"{own.dtype} of shape {list(own.shape)}" if isinstance(own, Tensor) else type(own).__name__
            instead = "; return its logits" if hasattr(own, "logits") else ""
            raise TypeError(f"outputs[{task!r}]: expected a tensor of numbers [N, ...], found {kind}{instead}")
        return beside(batch, own)
    return beside(batch, _of_model(model, batch, task=task, values=values))


def _of_model(
    model: nn.Module, batch: Batch, *, task: str, values: bool | None, head: dict[str, Tensor] | None = None
) -> Tensor:
    """What a model gives for a batch, with a task's ``head`` where there is one; see :func:`output_of`."""
    found = model(**batch) if head is None else functional_call(model, head, (), dict(batch))
    if isinstance(found, Tensor):
        # A tensor of another model may be anything; timm's are the logits themselves.
        output = _classes_last(found) if head is not None or classifiers(model) else None
    else:
        output = output_in(found, model, batch, values=bool(values))
        if output is None and values:
            output = _embedding(found, model, batch)
    if output is None:
        latents = predicted_latents(found) is not None
        name = "" if values is None else _LATENTS if latents else _named(found, _VALUES)[0]
        if values is False and not name and modules_of(model) is not None:
            name = "embedding"
        instead = f"; likelihood 'gaussian' takes its {name}" if name else ""
        raise ValueError(
            f"outputs: {type(model).__name__} has no logits{instead}; expected a function of model and batch for "
            f"{task!r}, or method 'match' or 'nsc', which need no heads"
        )
    return output


def _embedding(found: Any, model: nn.Module, batch: Batch) -> Tensor | None:
    """The embeddings ``[N, d]`` of texts, of a model that was loaded from a folder of sentence-transformers."""
    features, mask, modules = getattr(found, "last_hidden_state", None), batch.get(MASK), modules_of(model)
    if modules is None or not isinstance(features, Tensor) or mask is None:
        return None
    return modules.embedding(model, features, mask)


def output_in(found: Any, model: nn.Module, batch: Batch, *, values: bool) -> Tensor | None:
    """What a model says, in the output of transformers that it gives for a batch: logits, those of pixels with classes
    last, and of where an answer starts and ends ``[N, 2, T]``; else its values, where these are asked for.
    """
    logits = _named(found, _LOGITS)[1]
    if logits is not None:
        # GLiNER has [N, words, widths, C] of texts.
        return _classes_last(logits) if "pixel_values" in batch else logits
    if getattr(found, "start_logits", None) is not None:
        return _ends(found, model, batch)
    if not values:
        return None
    latents = predicted_latents(found)
    return _named(found, _VALUES)[1] if latents is None else _channels_last(latents, model)


def predicted_latents(found: Any) -> Tensor | None:
    """What a model of diffusers predicts, if ``found`` is an output of one: of a list, as Z-Image has of images, which
    are of one size, all; and what comes after a video is its sound, where that is as wide, as in LTX-2.
    """
    latents, sound = getattr(found, _LATENTS, None), _named(found, [_SOUND])[1]
    if isinstance(latents, list | tuple) and len({getattr(one, "shape", None) for one in latents} - {None}) == 1:
        latents = torch.stack(list(latents))
    if not isinstance(latents, Tensor):
        return None
    if sound is None or not latents.dim() == sound.dim() == 3 or latents.shape[2] != sound.shape[2]:
        return latents
    return torch.cat([latents, sound], 1)


def _classes_last(logits: Tensor) -> Tensor:
    """transformers has logits of pixels, as of segmentation, ``[N, C, H, W]``."""
    return logits.movedim(1, -1) if logits.dim() == 4 else logits


def _channels_last(latents: Tensor, model: nn.Module) -> Tensor:
    """Of tokens, ``[N, T, C]``, they are. Of images and videos they are where the model's number of them is, which
    CogVideoX has behind the frames, and Kandinsky 5 last.
    """
    if latents.dim() < 4:
        return latents
    config = getattr(model, "config", None)
    count = getattr(config, "out_channels", None) or getattr(config, "out_visual_dim", None)
    return latents.movedim(next((dim for dim in range(1, latents.dim()) if latents.shape[dim] == count), 1), -1)


def _named(found: Any, names: Sequence[str]) -> tuple[str, Tensor | None]:
    """The first tensor that an output holds under one of some names."""
    held = ((name, getattr(found, name, None)) for name in names)
    return next(((name, one) for name, one in held if isinstance(one, Tensor)), ("", None))


def _ends(found: Any, model: nn.Module, batch: Batch) -> Tensor:
    """Logits of the positions where an answer starts, and of those where it ends, ``[N, 2, T]``: none is at padding."""
    ends = torch.stack([found.start_logits, found.end_logits], 1)
    mask = of_tokens(batch.get(MASK))
    if mask is None:
        return ends
    real = at_positions(model, mask, ends.shape[-1]).bool().to(ends.device)
    fits = real.shape == (ends.shape[0], ends.shape[-1])
    return ends.masked_fill(~real[:, None], torch.finfo(ends.dtype).min) if fits else ends


def beside(batch: Batch, value: Tensor) -> Tensor:
    """A tensor on the device of a batch: of a model on several devices, what it gives may be on another."""
    return value.to(next((one.device for one in batch.values() if isinstance(one, Tensor)), value.device))


def predicts_next(model: nn.Module, family: Family | None) -> bool:
    """Whether a model's own logits are of the next token, so that those at the last one are its answer. One that labels
    every token, be it a decoder, has none that counts more than others.
    """
    writes = getattr(model, "can_generate", lambda: True)
    return bool(family and family.causal and family.tokens and family.mask and writes())


def mask_of_outputs(family: Family | None) -> str | None:
    """Name of the input that is 0 at padding of what a model's outputs are of: none where one tower reads no mask."""
    return family.mask if family and not family.unmasked else None


def labels_positions(model: nn.Module) -> bool:
    """Whether a model's head says something of every position, by what transformers calls such models: a decoder may,
    whose last token then counts no more than others.
    """
    heads = ("ForTokenClassification", "ForQuestionAnswering")
    return any(kind.__name__.endswith(heads) for kind in type(model).__mro__)


def last_token(output: Tensor, mask: Tensor | None) -> Tensor:
    """Of ``output [N, T, ...]``, what is at the last real token of every row, ``[N, ...]``."""
    if mask is None:
        # A copy, so that whoever keeps it does not keep all positions.
        return output[:, -1].clone()
    positions = torch.arange(output.shape[1], device=output.device)
    last = torch.where(mask.bool(), positions, -1).amax(1)
    return output[torch.arange(len(output), device=output.device), last]


def real_positions(model: nn.Module, output: Tensor, mask: Tensor | None) -> Tensor | None:
    """``[N, T]`` bool, False at padding, of an output ``[N, T, C]``; None where the mask does not speak of its
    positions.

    Args:
        model: that the output is of.
        output: of every position, or of all but the last where a causal model is scored by the next token; a prediction
            is then real if both tokens are.
        mask: of the inputs, 0 at padding.
    """
    told = of_tokens(mask)
    if told is None or output.dim() != 3:
        return None
    real = at_positions(model, told, output.shape[1]).bool()
    shifted = real[:, 1:] & real[:, :-1]
    return next((one for one in (real, shifted) if one.shape == output.shape[:2]), None)


def share_of(model: nn.Module, one: Pass, real: Tensor | None, mask: str | None) -> float:
    """The part of all positions that count in a whole pass that count in this process's part of it.

    Args:
        model: that the output is of.
        one: the part.
        real: its positions that count, as :func:`real_positions` finds them; all where None.
        mask: the input that says so.
    """
    if real is None or mask is None or one.part is None or one.part.rows is None:
        return one.share
    of_all = one.whole[mask]
    whole = real_positions(model, real.new_empty(len(of_all), real.shape[1], 1), of_all)
    assert whole is not None, "a part has positions that the whole has"
    return int(real.sum()) / max(int(whole.sum()), 1)
