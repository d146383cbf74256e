"""Runs an attached model without its head, and collects features and null-space ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsc_kernels import null_space_ratio
from nsc_merge.calibration.batches import MASK, Batch
from nsc_merge.calibration.forward_passes import Pass
from nsc_merge.methods.method import Problem
from nsc_merge.methods.task_outputs import beside, labels_positions, last_token, predicted_latents
from nsc_merge.models import attachment
from nsc_merge.models.attachment import adapted_linears, measurable
from nsc_merge.models.bases.sharded import class_name, gathers_for_backward, output_of
from nsc_merge.models.block_finding import trunk_of
from nsc_merge.models.families import Family, family_of, find_family, scored_paths
from nsc_merge.models.forward_contexts import recomputing
from nsc_merge.models.real_tokens import at_positions, mask_named, of_tokens, positions_first, rereads, without_heads
from nsc_merge.models.traits import classifiers, encodes, output_embeddings

# Under which the input of the model's head is kept; no path of a module is empty but the model's own.
_HEAD = ""


@dataclass(frozen=True)
class Seen:
    """What one forward shows.

    Attributes:
        features: one tensor ``[..., d]`` per matched place, of the positions that are matched.
        ratios: the mean null-space ratio of every adapter over the modules that it touches, ``[K]``, of a process's
            part of a pass what adds up to it; None where none was asked for.
    """

    features: list[Tensor]
    ratios: Tensor | None


class Watcher:
    """Runs an attached model without its head and collects features and ratios.

    Made before adapters are attached.

    Args:
        problem: the adapters and the model that they will be attached to.
        features: ``"final"``, the last hidden state, after the final norm; or paths of modules whose outputs are seen.
        positions: ``"all"`` or ``"last"``; None takes ``"last"`` for models of tokens whose final features are seen,
            unless they label every token.
        ratios: whether null-space ratios are measured, too.
        given: the option ``family``.
    """

    def __init__(
        self,
        problem: Problem,
        features: str | Sequence[str],
        positions: str | None,
        *,
        ratios: bool = False,
        given: Family | Mapping[str, Any] | None = None,
    ) -> None:
        # Which module ends before the head is known of families, of models that point out their head, as timm's
        # convolutional ones, or their trunk, as those of transformers; modules can be named in any model.
        final = isinstance(features, str) and not classifiers(problem.model)
        trunk = trunk_of(problem.model) if final else problem.model
        needed = ratios or (final and trunk is problem.model)
        linears = adapted_linears(problem.model, problem.adapters)
        paths: list[str] | None = measurable(linears, problem.adapters) or list(linears)
        if not ratios and find_family(problem.model, paths) is None:
            # Such as experts alone, whose blocks have other linears.
            paths = None

        def family_with(adapted: list[str] | None) -> Family | None:
            known = needed or given is not None
            return family_of(problem.model, adapted, given) if known else find_family(problem.model, adapted)

        family = family_with(paths)
        # What is adapted may be the encoder; what is matched is of the decoder after it.
        last = family_with(None) if final else family
        # Where nothing is known, attention_mask is what transformers calls a mask of tokens.
        self._model, self._mask = problem.model, last.mask if last else MASK
        self._measured_mask = family.mask if family else None
        writes = isinstance(features, str) and last is not None and last.tokens is not None and last.causal
        answers_last = writes and not labels_positions(problem.model)
        self._last = (positions or ("last" if answers_last else "all")) == "last"
        self._trunk: nn.Module = trunk
        if family is not None:
            self._trunk = getattr(problem.model, family.prefill, problem.model)
        self._places: list[str] | None = None if isinstance(features, str) else list(features)
        modules = dict(problem.model.named_modules())
        unknown = [path for path in self._places or () if path not in modules]
        if unknown:
            name = type(problem.model).__name__
            raise ValueError(f"features: expected 'final' or paths of modules of {name}, found {unknown[0]!r}")
        self._scored: list[str] = []
        if ratios and family is not None and paths is not None:
            self._scored = scored_paths(family, problem.model, paths, None, "last_quarter")
        touched = attachment.presence(self._scored, problem.adapters)
        self._touched = dict(zip(self._scored, touched, strict=True))

    def masks(self, batch: Batch, seen: Sequence[Tensor]) -> list[Tensor | None]:
        """For each of what is ``seen [rows, positions, d]``, ``[rows, positions]`` bool where it is of tokens and not
        of padding, if the batch says so; of another shape where that is said of other positions.
        """
        return [self._real(batch, self._mask, feature) for feature in seen]

    def _real(self, batch: Batch, name: str | None, seen: Tensor) -> Tensor | None:
        mask = of_tokens(mask_named(name, batch))
        if mask is None:
            return None
        return (at_positions(self._model, mask, seen.shape[1]) if seen.dim() > 1 else mask).bool()

    def see(self, one: Pass) -> Seen:
        """One forward at the coefficients that the modules have now."""
        kept: dict[str, Tensor] = {}
        ratios: dict[str, Tensor] = {}

        def record(path: str, quad: Tensor, sqnorm: Tensor) -> None:
            ratio = null_space_ratio(quad, sqnorm)
            sqnorm = sqnorm.reshape(without_heads(sqnorm.shape))
            ratio = ratio.reshape(*sqnorm.shape, -1)
            if sqnorm.dim() == 2 and positions_first(self._model, path):
                ratio, sqnorm = ratio.transpose(0, 1), sqnorm.t()
            part, whole = (self._real(batch, self._measured_mask, sqnorm) for batch in (one.inputs, one.whole))
            if part is not None and whole is not None and part.shape == sqnorm.shape:
                real = one.mine(whole).to(ratio)[..., None]
                found = (ratio * real).flatten(0, -2).sum(0) / whole.sum().clamp(min=1).to(ratio)
            else:
                found = ratio.flatten(0, -2).sum(0) / max(sqnorm.numel(), 1) * one.share
            if not recomputing():
                ratios[path] = beside(one.inputs, found)

        # Measured until the adapters are taken out: a block that is recomputed in the backward is measured there, too.
        for path in self._scored:
            module: Any = self._model.get_submodule(path)
            module.measure = record
        with ExitStack() as stack:
            for path in self._places or ():
                place = self._model.get_submodule(path)
                hook = place.register_forward_hook(lambda _, __, y, path=path: kept.update({path: _tensor(y)}))
                stack.callback(hook.remove)
            head = None
            if self._places is None:
                whole = _head_of(self._model) if self._trunk is self._model else None
                head = next(iter(classifiers(self._trunk)), None) if whole is None else whole
            if head is not None:
                # Of T5, timm's and others nothing else ends in front of the head.
                before = head.register_forward_pre_hook(lambda _, arguments: kept.update({_HEAD: arguments[0]}))
                stack.callback(before.remove)
            if self._trunk is not self._model and encodes(self._model) and rereads(one.inputs):
                # What the decoder reads is made in front of the trunk.
                made: list[Any] = []
                stack.callback(self._trunk.register_forward_hook(lambda _, __, y: made.append(y)).remove)
                output_of(self._model, self._model, one.inputs)
                output = made[0] if made else output_of(self._model, self._trunk, one.inputs)
            else:
                output = output_of(self._model, self._trunk, one.inputs)
        if self._places is None:
            features = [kept[_HEAD] if _HEAD in kept else _final(output, self._trunk, one)]
        else:
            silent = [path for path in self._places if path not in kept]
            if silent:
                raise RuntimeError(
                    f"features: the forward of {class_name(self._trunk)} never reached {silent}, expected modules that "
                    "run in it"
                )
            features = [kept[path] for path in self._places]
            for path, value in (*kept.items(), *ratios.items()):
                gathers_for_backward(self._model, path, value)
        features = [beside(one.inputs, feature) for feature in features]
        masks = self.masks(one.inputs, features)
        features = [self._matched(feature, mask) for feature, mask in zip(features, masks, strict=True)]
        return Seen(features, self._mean(ratios) if ratios else None)

    def _matched(self, feature: Tensor, mask: Tensor | None) -> Tensor:
        """What is matched of a place's output: what is at the positions of tokens, or all of what has others."""
        of_tokens = feature.dim() > 2 and (mask is None or mask.shape == feature.shape[:2])
        return last_token(feature, mask) if self._last and of_tokens else feature

    def _mean(self, ratios: Mapping[str, Tensor]) -> Tensor:
        """``[K]``, over the modules that each adapter touches; 0 where there is none."""
        touched = torch.stack([self._touched[path] for path in ratios]).to(next(iter(ratios.values())))
        return (torch.stack(list(ratios.values())) * touched).sum(0) / touched.sum(0).clamp(min=1)


def _head_of(model: nn.Module) -> nn.Module | None:
    """What makes logits of tokens, as the model says or the language model in it."""
    return next((head for part in (model, *model.children()) if (head := output_embeddings(part)) is not None), None)


def _final(output: Any, trunk: nn.Module, one: Pass) -> Tensor:
    """The last hidden state of what ``trunk`` gives for a pass, or the first that it gives, as the logits of images and
    texts, or of sound and texts.

    Raises:
        ValueError: if it gives logits of a head, which may be any task's; or of the rows of a process with each other,
            which are no part of those of all rows.
    """
    pairs = any(getattr(output, f"logits_per_{what}", None) is not None for what in ("image", "audio"))
    if pairs and one.part is not None and one.part.rows is not None:
        raise ValueError(
            f"features: 'final' of {class_name(trunk)} are logits of every image or sound with every text of a "
            "batch, which processes that share its rows do not see; expected paths of modules whose outputs are "
            "matched, such as its projections, or one process"
        )
    if getattr(output, "last_hidden_state", None) is None and getattr(output, "logits", None) is not None:
        raise ValueError(
            f"features: 'final' is the last hidden state, and {type(trunk).__name__} gives logits alone; expected "
            "paths of modules whose outputs are matched, such as its last norm, or a family whose prefill ends there"
        )
    return _tensor(output)


def _tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    hidden = getattr(output, "last_hidden_state", None)
    hidden = predicted_latents(output) if hidden is None else hidden
    if hidden is None and getattr(output, "feature_maps", None):
        # A backbone's, of several of its stages.
        return output.feature_maps[-1]
    return hidden if hidden is not None else output[0]
