"""NSC's public code (wonyoung01/nsc_merging) with the merge computed by this library: one line in front of the last
block of its ``src/merge.py``, where its own function of that name is replaced.

    from nsc_merge.integrations.nsc_merging import train_merged_model

Its own loop on the fused operator: :mod:`nsc_merge.integrations.nsc_merging_layers`. None of its code is here; it is
imported from where it runs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import nsc_merge
from nsc_merge.calibration.batches import Batch
from nsc_merge.results.result import MergeResult

# Its tasks whose batches are model inputs as they are, and those that its collate function makes batches of.
_TEXT, _PICTURES = ("sequence_classification",), ("vqa", "captioning")


@dataclass(frozen=True)
class MergedModels:
    """What :func:`train_merged_model` gives, as far as the codebase looks at it.

    Attributes:
        models: the codebase's own, one for each task with its head, around one merged backbone.
        result: the merge, which can also be saved.
    """

    models: nn.ModuleList
    result: MergeResult

    def coeffs(self) -> dict[str, Any]:
        """Module path -> its coefficients ``[R]``, each as often as its adapter has rank there, as a numpy array."""
        adapters = self.result.adapters
        return {
            path: torch.cat(
                [
                    torch.full((adapters[task].factors[path].rank,), value, dtype=torch.float32, device="cpu")
                    for task, value in row.items()
                    if path in adapters[task].factors
                ]
            ).numpy()
            for path, row in self.result.coefficients.items()
        }


def train_merged_model(
    args: Any,
    cfgs: Sequence[Any],
    val_loaders: Sequence[Iterable[Any]],
    model_dirs: Sequence[str],
    lora_dicts: Mapping[str, str],
    preference: Any,
    device: Any,
    baselines_val: Any = None,
    **options: Any,
) -> MergedModels:
    """NSC merging with the arguments of the codebase's function of this name, by ``nsc_merge.merge(method="nsc")``.

    The objective, the optimiser and its settings are the codebase's: padding counts, and of 32 blocks the inputs of the
    last eight ``v_proj`` are measured. Of models with other numbers of blocks it is the last quarter, where the
    codebase, which looks for the numbers 24 to 31, measures nothing and changes nothing. Unlike there, adapters with
    alpha other than their rank are measured by the row space of A, and those of unequal ranks have one coefficient
    each. The merged update is added to the backbone's weights, as its own ``simple_merging`` does.

    Args:
        args: ``num_steps``, ``learning_rate`` and ``lamda`` are used; others must ask for NSC with a linear coefficient
            per adapter and module: ``kernel``, not ``ada``, ``merge_type="weight"``, ``coeff_type="linear"``,
            ``lambda_reg=0``.
        cfgs: one for each task.
        val_loaders: batches of each task, as its loaders give them; those drawn are drawn again once they end.
        model_dirs: of the tasks' heads.
        lora_dicts: task -> folder of its adapter.
        preference: not looked at, as in the codebase with ``kernel``.
        device: where the merge runs.
        baselines_val: not looked at, as in the codebase.
        options: of ``method="nsc"``, in place of what is said above; see :func:`nsc_merge.merge`.

    Raises:
        ValueError: naming the argument, what was found and what was expected, before a model is loaded.
        ImportError: if this does not run where the codebase's ``utils`` can be imported.
    """
    tasks = _checked(args, cfgs, val_loaders, model_dirs, lora_dicts)
    theirs = _imported("utils", "get_base_model", "load_lora_model")
    first = theirs.get_base_model(cfgs[0])
    base = first.vit.to(device).eval()
    kind = cfgs[0].task.name
    if kind in _PICTURES:
        collate = _imported("src.vlm.utils", "get_collate_fn").get_collate_fn
        for cfg, loader in zip(cfgs, val_loaders, strict=True):
            loader.collate_fn = collate(  # type: ignore[attr-defined]
                cfg, first.processor, with_answer=False, with_meta=False, omit_images=False, omit_text=False
            )
    calibration = {
        task: _inputs(loader, kind, base.dtype) for task, loader in zip(tasks, val_loaders, strict=True)
    }
    settings = {
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "steps": args.num_steps,
        "lr": args.learning_rate,
        "init": args.lamda / len(tasks),
        "score_modules": ["v_proj"],
        "include_pad": True,
        **options,
    }
    result = nsc_merge.merge(base, dict(lora_dicts), calibration, method="nsc", **settings)
    merged = result.apply(result.model)
    wrappers = [first] * len(tasks) if kind in _PICTURES else []
    for cfg, task, folder in zip(cfgs, tasks, model_dirs, strict=True) if not wrappers else ():
        head = os.path.join(folder, cfg.get("decoder_save_name", ""))
        wrapper = theirs.load_lora_model(theirs.get_base_model(cfg), lora_dicts[task], head)
        wrapper.vit = merged
        wrappers.append(wrapper)
    return MergedModels(nn.ModuleList(wrappers).eval(), result)


def _checked(args: Any, cfgs: Any, val_loaders: Any, model_dirs: Any, lora_dicts: Any) -> list[str]:
    """The tasks, in order."""
    wanted = {"kernel": True, "ada": False, "merge_type": "weight", "coeff_type": "linear", "lambda_reg": 0}
    ways = {"ada": '; nsc_merge.merge(method="adamerging") minimises entropies'}
    for name, value in wanted.items():
        found = getattr(args, name)
        if found != value:
            raise ValueError(
                f"args.{name}: expected {value!r}, which is NSC as the paper has it, found {found!r}"
                f"{ways.get(name, '')}; the codebase's own train_merged_model has it"
            )
    unseen = [cfg.data.name for cfg in cfgs if cfg.get("unseen", False)]
    if unseen:
        raise ValueError(
            f"cfgs: expected tasks that have adapters, found {unseen} unseen; the codebase's own train_merged_model "
            "scores them by other tasks' adapters"
        )
    tasks = [f"{cfg.data.name}-{cfg.task.name}" for cfg in cfgs]
    if list(lora_dicts) != tasks or not len(val_loaders) == len(model_dirs) == len(tasks):
        raise ValueError(
            f"lora_dicts: expected adapters of {tasks}, with a loader and a folder for each, found {list(lora_dicts)}, "
            f"{len(val_loaders)} loaders and {len(model_dirs)} folders"
        )
    return tasks


def _imported(name: str, *needed: str) -> Any:
    """A module of the codebase."""
    module = importlib.import_module(name)
    lacking = [one for one in needed if not hasattr(module, one)]
    if lacking:
        raise ImportError(
            f"{name}: expected the module of nsc_merging, with {lacking}, found {getattr(module, '__file__', None)}; "
            "its folders . and src must be on the path, as when src/merge.py runs"
        )
    return module


def _inputs(loader: Iterable[Any], kind: str, dtype: torch.dtype) -> Iterator[Batch]:
    """Model inputs of a task's batches. An iterator, so that those drawn are drawn again when they end."""
    for sample in loader:
        if kind in (*_TEXT, *_PICTURES):
            yield {name: value.to(dtype) if value.is_floating_point() else value for name, value in sample.items()}
        else:
            pixels = sample["image"]
            yield {"pixel_values": (pixels.squeeze(1) if pixels.dim() == 5 else pixels).to(dtype)}
