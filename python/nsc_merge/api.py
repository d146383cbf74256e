"""The one entry point: :func:`merge`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from nsc_merge.adapters import AdapterSource, load_adapter
from nsc_merge.calibration.batches import Calibration
from nsc_merge.methods import Problem
from nsc_merge.methods.registry import method_of
from nsc_merge.models.bases.adapted import without_adapters
from nsc_merge.models.bases.loading import keep_folder
from nsc_merge.models.fitting import fit
from nsc_merge.models.own_base import own_base
from nsc_merge.models.vocabulary import with_vocabulary
from nsc_merge.processes.group import together
from nsc_merge.results.result import MergeResult

_at_work: dict[int, object] = {}


def merge(
    model: nn.Module,
    adapters: Mapping[str, AdapterSource],
    calibration: Calibration | None = None,
    method: str = "nsc",
    *,
    shared_modules: str = "lambda",
    dora: str = "exact",
    added_tokens: str = "refuse",
    process_group: Any = None,
    **options: Any,
) -> MergeResult:
    """Merge LoRA adapters into one update of the base model, by any method of :data:`nsc_merge.methods.METHODS`.

    Args:
        model: a transformers model, the base on which the adapters were trained. It is used and left
            unchanged. Where adapters change one of its tied weights, the result's model is a copy that shares all other
            tensors with it; see :func:`nsc_merge.models.own_base.own_base`. A ``PeftModel``, or a model with adapters
            in it, stands for its base without them, which the result's model then is; it keeps its adapters, and
            shares its weights. See :func:`nsc_merge.models.bases.adapted.without_adapters`.
        adapters: task -> PEFT folder, ``"owner/name"`` or ``"owner/name@revision"`` on the hub, :class:`Adapter`,
            ``PeftModel`` or other model with an adapter in it (also ``model`` itself), or mapping with ``config`` and
            ``weights``.
        calibration: task -> iterable of batches, each a dictionary of model inputs (no labels). Every step
            takes the next batch of every task, in order, and starts again when an iterable ends. Methods that
            need no data do not look at it. :func:`nsc_merge.calibration_data` makes batches of raw data.
        method: ``"nsc"`` (options: :class:`nsc_merge.methods.gradient.nsc_options.NSCOptions`), or another name that
            ``nsc-merge methods`` lists.
        shared_modules: what happens to modules that the adapters trained in full and that are the base's own, such as
            LLaVA's projector or a language model's head: ``"lambda"`` gives them coefficients, too; ``"mean"`` and
            ``"first"`` do not. See :func:`nsc_merge.models.fitting.fit`.
        dora: DoRA adapters are merged as the ``"exact"`` updates that they are to the base: each alone and both
            formats are what PEFT computes (which, with several active, applies the second to what the first made).
            Format ``"lora"`` is then a DoRA adapter, which vLLM does not serve. ``"convert"`` makes plain LoRA updates
            of the same rank of them, with the error in the notes; ``"refuse"`` refuses them. See
            :func:`nsc_merge.models.fitting.fit`.
        added_tokens: where adapters have a larger vocabulary than the base, what rows its new tokens get: the
            ``"mean"`` over the tasks that have them, those of the ``"first"``, or none (``"base"``); ``"refuse"``
            refuses such adapters. See :func:`nsc_merge.models.vocabulary.with_vocabulary`.
        process_group: of ``torch.distributed``, whose processes all call this with equal arguments and share the work;
            each returns the same result. None works alone.
        options: of the method.

    Returns:
        The merged update, as coefficients or as factors, with everything needed to apply or save it.

    Raises:
        TypeError, ValueError, FileNotFoundError: naming the argument, what was found and what was expected,
            before the model is touched.
        RuntimeError: if another merge of the same model is at work, as in another thread.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a loaded model, as AutoModel.from_pretrained gives it, found {model!r:.60}; a recipe of "
            "nsc-merge run takes a folder or a hub id"
        )
    chosen = method_of(method)
    chosen.check_names(options)
    if not isinstance(adapters, Mapping) or not adapters:
        raise ValueError(
            f"adapters: expected a mapping from task to adapter with at least one entry, found {adapters!r}"
        )
    for task in adapters:
        if not isinstance(task, str):
            raise TypeError(f"adapters: expected names of tasks (str), found {task!r}")
    bare = without_adapters(model)
    loaded = {task: load_adapter(source, task, dora=dora) for task, source in adapters.items()}
    with together(process_group), _alone(model):
        base, loaded = own_base(*with_vocabulary(bare, loaded, added_tokens))
        keep_folder(base)
        problem = Problem(base, fit(loaded, base, shared_modules), calibration)
        result = chosen.run(problem, options)
    inputs = {"shared_modules": shared_modules, "dora": dora}
    if added_tokens != "refuse":
        inputs["added_tokens"] = added_tokens
    return replace(result, inputs=inputs, about=chosen.paragraph)


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """One merge of a model at a time: a second would find the modules of the first in it, and leave some behind."""
    this = object()
    if _at_work.setdefault(id(model), this) is not this:
        raise RuntimeError(
            "model: another merge of this very model is at work, and there are other modules in it meanwhile; expected "
            "one at a time, or a copy of it"
        )
    try:
        yield
    finally:
        del _at_work[id(model)]
