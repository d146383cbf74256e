"""The merge handlers of KnOTS (arXiv 2410.19735) and Core Space (arXiv 2509.17786), over
:func:`nsc_merge.merge_factors`.

In a script of either codebase, in place of ``from task_merger import get_merge_handler``:

    from nsc_merge.integrations.task_mergers import get_merge_handler

The handlers take their models, parameter handlers and ``task_merge_config``, and give what theirs give. As there,
alpha / r is not looked at: an update is ``B @ A``. Where adapters have another scaling than 1, fold it into B first, or
merge with :func:`nsc_merge.merge`.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import nsc_merge
from nsc_merge.adapters import Factor

logger = logging.getLogger("nsc_merge")

Config = Mapping[str, Any]
# PEFT's names of an adapter's two factors, of one adapter called "default" or as its files have them.
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?(\.weight)?")
_THEIRS = "task_merger's own get_merge_handler has it"


@dataclass(frozen=True)
class Plan:
    """What a ``task_merge_config`` stands for: a method of :func:`nsc_merge.merge_factors` and its options, with
    ``scale`` for a scaling coefficient of 1.
    """

    method: str
    options: dict[str, Any]


class TaskMerger:
    """A merge handler: ``transform``, ``set_scaling_coeffs`` and ``merge`` of theirs.

    A merge that is repeated with other scaling coefficients is computed once: an update is proportional to them. The
    merged updates of the last configuration are kept for it.

    Args:
        finetuned_models: as the codebase loads them: models or state dictionaries.
        pretrained_model: with the parameters that updates are added to; not modified.
        param_handler: the codebase's class that finds a model's trained parameters. Factors of LoRA are taken as
            factors and never multiplied out; of others, what its ``get_ft_ab_parameters`` or ``get_ft_parameters``
            gives, less the pretrained model's.
        device: not looked at; merging runs on the CPU.
        merge_config: not looked at; :meth:`merge` is given it.

    Attributes:
        scaling_coeffs: ``[K]``, all equal.
    """

    _plan: Callable[[Config, int], Plan]

    def __init__(
        self,
        finetuned_models: Sequence[Any],
        pretrained_model: nn.Module,
        param_handler: Callable[[Any], Any],
        device: Any = 0,
        merge_config: Config | None = None,
    ) -> None:
        self.finetuned_models = list(finetuned_models)
        if not self.finetuned_models:
            raise ValueError("finetuned_models: expected at least one, found none")
        self.pretrained_model = pretrained_model
        self.param_handler = param_handler
        self.device, self.merge_config = device, merge_config
        self.scaling_coeffs = torch.ones(len(self.finetuned_models), dtype=torch.float32, device="cpu")
        self._kept: tuple[Plan, list[tuple[str, Factor]]] | None = None

    def transform(self, merge_config: Config) -> None:
        """Check the configuration and read the updates; :meth:`merge` does so too where this was not called.

        Raises:
            ValueError: naming the entry of the configuration, or the update, what was found and what was expected.
        """
        if merge_config.get("ingredients_path") is not None:
            logger.warning("ingredients_path is neither written nor read: merging from the models takes less time")
        type(self)._plan(merge_config, len(self.finetuned_models))
        self._updates  # noqa: B018

    def set_scaling_coeffs(self, scaling_coeffs: Any) -> None:
        """One number for all tasks, or one for each if they are equal.

        Raises:
            ValueError: if they differ. The codebases then apply the first one to all tasks.
        """
        found = torch.as_tensor(scaling_coeffs, dtype=torch.float64, device="cpu").flatten()
        fits = len(found) in (1, len(self.finetuned_models)) and bool(found.isfinite().all())
        if not fits or bool((found != found[0]).any()):
            raise ValueError(
                f"scaling_coeffs: expected one finite number for all {len(self.finetuned_models)} tasks, found "
                f"{scaling_coeffs!r:.80}; nsc_merge.merge_factors takes one for each (task_arithmetic: scale, ties: "
                "weights)"
            )
        self.scaling_coeffs = found[:1].expand(len(self.finetuned_models)).clone()

    @torch.no_grad()
    def merge(self, merge_config: Config) -> nn.Module:
        """A copy of the pretrained model with the merged update added.

        Args:
            merge_config: their ``task_merge_config``.

        Raises:
            ValueError: naming the entry of the configuration, what was found and what was expected, before anything is
                computed: also for methods that there are in their code alone.
        """
        plan = type(self)._plan(merge_config, len(self.finetuned_models))
        targets = self._targets
        if self._kept is None or self._kept[0] != plan:
            self._kept = None
            self._kept = plan, list(nsc_merge.merge_factors(self._updates, plan.method, **plan.options))
        merged = copy.deepcopy(self.pretrained_model)
        held = merged.state_dict()
        scale = float(self.scaling_coeffs[0])
        for name, factor in self._kept[1]:
            update = factor.B @ factor.A if factor.dense is None else factor.dense
            target = held[targets[name]]
            # Of the base's dtype, so that a sum in half precision is rounded once.
            target.add_(update.view(target.shape).to(target.device), alpha=scale)
        return merged

    @functools.cached_property
    def _updates(self) -> dict[str, dict[str, tuple[Tensor, Tensor, float] | Tensor]]:
        base = _found(self.param_handler(self.pretrained_model))
        found = {}
        for number, model in enumerate(self.finetuned_models):
            updates = _found(self.param_handler(model))
            if not updates:
                raise ValueError(
                    f"finetuned_models[{number}]: expected parameters that {self.param_handler.__name__} finds, "
                    f"found none in {type(model).__name__}"
                )
            found[f"task{number}"] = {name: self._less(name, update, base) for name, update in updates.items()}
        return found

    def _less(self, name: str, update: Any, base: Mapping[str, Any]) -> tuple[Tensor, Tensor, float] | Tensor:
        """``update`` less what the pretrained model has of that name."""
        own = base.get(name)
        if isinstance(update, Tensor):
            delta = (update if own is None else update - own).detach().cpu()
            if delta.dim() != 2 and not isinstance(self, VectorMerger):
                raise ValueError(
                    f"{name}: expected a matrix or factors of LoRA, found {list(delta.shape)} trained in full; "
                    f"representation 'vector' takes it, and {_THEIRS}"
                )
            return delta.flatten(1) if delta.dim() > 1 else delta.view(1, -1)
        A, B = (part.detach().cpu() for part in update)
        if own is not None and own[1].any():
            A, B = torch.cat([A, own[0].detach().cpu()]), torch.cat([B, -own[1].detach().cpu()], 1)
        return A, B, 1.0

    @functools.cached_property
    def _targets(self) -> dict[str, str]:
        """Name of an update -> key of the pretrained model's parameter that it is added to."""
        held = self.pretrained_model.state_dict()
        targets = {}
        for name in dict.fromkeys(name for updates in self._updates.values() for name in updates):
            stem, _, leaf = name.rpartition(".")
            fitting = [key for key in (name, f"{stem}.base_layer.{leaf}") if key in held]
            if not fitting:
                raise ValueError(
                    f"pretrained_model: expected a parameter {name!r}, or {stem}.base_layer.{leaf}, found neither in "
                    f"{type(self.pretrained_model).__name__}"
                )
            targets[name] = fitting[0]
        return targets


def _found(handler: Any) -> dict[str, Any]:
    """Name of a parameter -> ``(A [r, d_in], B [d_out, r])``, or the parameter where it is no LoRA."""
    source: Any = getattr(handler, "base_model", None)
    if source is None:
        source = getattr(handler, "state_dict", {})
    held = source.state_dict() if isinstance(source, nn.Module) else source
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in held.items() if isinstance(held, Mapping) else ():
        match = _LORA.fullmatch(key)
        if match:
            parts.setdefault(match[1] + (match[3] or ""), {})[match[2]] = value
    if parts:
        lacking = [name for name, part in parts.items() if len(part) < 2]
        if lacking:
            raise ValueError(f"{lacking[0]}: expected lora_A and lora_B, found only lora_{''.join(parts[lacking[0]])}")
        return {name: (part["A"], part["B"]) for name, part in sorted(parts.items())}
    if hasattr(handler, "get_ft_ab_parameters"):
        return dict(handler.get_ft_ab_parameters())
    return {name: value for name, value in handler.get_ft_parameters().items() if value.is_floating_point()}


def _choice(config: Config, name: str, known: Sequence[Any], default: str | None = None, theirs: str = "") -> str:
    """The entry of a configuration, one of ``known``; ``theirs`` are what only their code has."""
    value = config.get(name, default)
    if value not in known:
        way_out = f"; {_THEIRS}" if str(value) in theirs.split() else ""
        raise ValueError(f"task_merge_config: {name}: expected one of {list(known)}, found {value!r}{way_out}")
    return str(value)


def _density(config: Config, default: float) -> float:
    """``topK``, a share or, above 1, a percentage, which is all from 100 on."""
    top = config.get("topK", default)
    return float(min(top / 100 if top > 1 else top, 1.0))


def _dropping(config: Config, default: float | None = None) -> dict[str, Any]:
    drop = config.get("dare_pruning_coeffs", default)
    if drop is None:
        raise ValueError("task_merge_config: dare_pruning_coeffs: expected a probability, found none")
    return {"drop": float(drop), "seed": int(config.get("dare_seed", 0))}


def _only_in_core(config: Config) -> None:
    if config.get("isotropize"):
        raise ValueError(
            "task_merge_config: isotropize: expected False but with merge_space='core', found True: of an update of "
            "low rank it fills all other directions of the layer, which only rounding chooses, with the mean singular "
            f"value; {_THEIRS}"
        )


def _vector(config: Config, tasks: int) -> Plan:
    _only_in_core(config)
    method = _choice(config, "merge_method", ("tv", "sum", "ties", "dare-ties"), theirs="tsv cart")
    ties = method in ("ties", "dare-ties")
    kind = _choice(config, "merging_type", ("mean", "sum"), "mean" if ties else "sum", theirs="max")
    dare = _dropping(config) if config.get("dare") or method == "dare-ties" else None
    if not ties:
        scale = {"scale": 1 / tasks if kind == "mean" else 1.0}
        return Plan("task_arithmetic", scale) if dare is None else Plan("dare", {**scale, **dare})
    steps = {"preset": "knots", "density": _density(config, 10), "aggregate": kind, "scale": 1.0}
    return Plan("ties", steps) if dare is None else Plan("dare_ties", {**steps, **dare})


def _svd(config: Config, tasks: int) -> Plan:
    _only_in_core(config)
    method = _choice(config, "merge_method", ("tv", "sum", "ties", "dare-ties"), theirs="tsv cart")
    kind = _choice(config, "merging_type", ("mean", "sum"), theirs="max unmerged")
    if config.get("merge_other_params"):
        raise ValueError(f"task_merge_config: merge_other_params: expected False, found True; {_THEIRS}")
    density = _density(config, 100)
    dare = _dropping(config) if config.get("dare") or method == "dare-ties" else None
    if method in ("tv", "sum"):
        if density < 1 or dare is not None:
            raise ValueError(
                f"task_merge_config: merge_method: expected 'ties' with topK={config.get('topK', 100)} and "
                f"dare={bool(dare)}, or 'tv' with topK=100 and dare=False, found {method!r}: trimming and dropping of "
                f"aligned vectors without an election of signs is no method here; {_THEIRS}"
            )
        # Aligned vectors add up to what the updates do.
        return Plan("task_arithmetic", {"scale": 1 / tasks if kind == "mean" else 1.0})
    mode = _choice(config, "sign_resolve_mode", ("sum_of_values", "sum_of_signs"), "sum_of_values")
    steps = {
        "preset": "knots",
        "density": density,
        "aggregate": kind,
        "scale": 1.0,
        "sign": "sum" if mode == "sum_of_values" else "count",
        "zero": "majority" if mode == "sum_of_values" else "negative",
        "along": "columns" if config.get("concat_across_output", True) else "rows",
    }
    return Plan("knots_ties", steps) if dare is None else Plan("knots_dare_ties", {**steps, **dare})


def _per_layer(config: Config, tasks: int) -> Plan:
    space = _choice(config, "merge_space", ("full", "knots", "core"))
    known = ("mean", "sum", "tv", "ties", "dare", "dare-ties", *(["tsv"] if space == "core" else []))
    method = _choice(config, "merge_method", known, theirs="tsv cart")
    if method == "tsv":
        _choice(config, "isotropize", (False, None), theirs="True")
        return Plan("tsv", {"room": "core", "scale": 1.0})
    ties = {"density": _density(config, 10)}
    dare = _dropping(config, 0.3) if method in ("dare", "dare-ties") else {}
    scale = {"scale": 1 / tasks if method == "mean" else 1.0}
    if space == "core":
        # Trimming counts the entries that belong to singular values of zero, too, where there are any.
        core = {**scale, "null_directions": True, "isotropise": bool(config.get("isotropize"))}
        merge = {"mean": "sum", "tv": "sum", "dare-ties": "dare_ties"}.get(method, method)
        return Plan("core_space", {**core, "merge": merge, **ties, **dare})
    _only_in_core(config)
    if method in ("mean", "sum", "tv"):
        return Plan("task_arithmetic", scale)
    steps = {"preset": "knots", "trim_scope": "tensor", "aggregate": "mean", **scale, **ties}
    if space == "full":
        options = {"ties": ("ties", steps), "dare": ("dare", {**scale, **dare})}
        return Plan(*options.get(method, ("dare_ties", {**steps, **dare})))
    if method == "dare":
        raise ValueError(
            "task_merge_config: merge_method: expected 'dare-ties' with merge_space='knots', found 'dare': dropping of "
            "aligned vectors without an election of signs is no method here; merge_space 'full' and 'core' have it"
        )
    steps = {**steps, "vectors": "plain", **dare}
    return Plan("knots_ties" if method == "ties" else "knots_dare_ties", steps)


class VectorMerger(TaskMerger):
    """Representation ``"vector"``: task arithmetic, DARE, TIES and DARE-TIES of the updates, trimmed over all layers
    together.
    """

    _plan = staticmethod(_vector)


class SVDMerger(TaskMerger):
    """Representation ``"svd-vector"`` (KnOTS) or ``"svd"`` (Core Space): KnOTS-TIES and KnOTS-DARE-TIES, trimmed over
    all layers together.
    """

    _plan = staticmethod(_svd)


class MatrixPerLayerMerger(TaskMerger):
    """Representation ``"matrix_per_layer"`` (Core Space): each layer by itself, in any of the three ``merge_space``."""

    _plan = staticmethod(_per_layer)


_HANDLERS = {
    "vector": VectorMerger,
    "svd-vector": SVDMerger,
    "svd": SVDMerger,
    "matrix_per_layer": MatrixPerLayerMerger,
}


def get_merge_handler(rep_type: str) -> type[TaskMerger]:
    """The handler's class of a representation, as ``task_merger.get_merge_handler`` of either codebase.

    Raises:
        ValueError: for a representation that neither has.
    """
    if rep_type not in _HANDLERS:
        raise ValueError(f"representation: expected one of {list(_HANDLERS)}, found {rep_type!r}")
    return _HANDLERS[rep_type]
