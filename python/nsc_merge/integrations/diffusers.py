"""Several LoRA adapters of a diffusers pipeline: in one fused call per layer while it runs, or merged into one.

    from nsc_merge.integrations.diffusers import accelerate, merge

    pipe.set_adapters(["ink", "toy"], [0.7, 0.5])
    with accelerate(pipe):
        image = pipe("a lighthouse").images[0]

    merge(pipe, ["ink", "toy"], [0.7, 0.5], "both")           # or method="ties", "knots_ties", ..., with its options
    pipe.set_adapters("both")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from nsc_kernels.integrations import peft as fused
from nsc_merge.integrations import peft
from nsc_merge.integrations.peft import Merged, NothingToRegister
from nsc_merge.methods import method_of


class Accelerated:
    """What :func:`accelerate` did to a pipeline; a context manager.

    Attributes:
        layers: component -> how many of its layers run fused.
    """

    def __init__(self, handles: dict[str, fused.Accelerated]) -> None:
        self._handles = handles
        self.layers = {component: handle.layers for component, handle in handles.items()}

    def remove(self) -> None:
        """Give the layers PEFT's own forward back. A second call does nothing."""
        for handle in self._handles.values():
            handle.remove()

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def accelerate(pipe: Any) -> Accelerated:
    """Make every model of a pipeline that holds LoRA compute its active adapters in one fused call per linear.

    What :func:`nsc_kernels.integrations.peft.accelerate` says holds for each of them: ``set_adapters`` with weights,
    for a component or a block as well, ``cross_attention_kwargs={"scale": ...}``, ``fuse_lora`` and whatever else
    changes adapters or scalings works as before, and convolutions keep PEFT's own forward.

    Args:
        pipe: a pipeline of diffusers with LoRA loaded. Models that get their first adapter later are not touched.

    Raises:
        TypeError: if ``pipe`` is no pipeline that loads LoRA.
        ValueError: if none of its models holds LoRA on a linear.
    """
    models = _adapted(pipe)
    with ExitStack() as undo:
        handles: dict[str, fused.Accelerated] = {}
        for component, model in models.items():
            # That a model has LoRA on convolutions alone is its one reason to refuse.
            with suppress(ValueError):
                handles[component] = undo.enter_context(fused.accelerate(model))
        if not handles:
            raise ValueError(
                f"pipe: expected LoRA on linears, found {'none' if models else 'no adapters'} in "
                f"{list(models) or type(pipe).__name__}; load it first (pipe.load_lora_weights)"
            )
        undo.pop_all()
    return Accelerated(handles)


def merge(
    pipe: Any,
    adapters: Sequence[str],
    weights: Any = None,
    adapter_name: str = "merged",
    method: str = "task_arithmetic",
    output: str | None = None,
    rank: int | None = None,
    **options: Any,
) -> dict[str, Merged]:
    """Merge loaded adapters into a new one in every model of a pipeline that holds some of them.

    ``pipe.set_adapters(adapter_name)`` then gives, by task arithmetic, what ``pipe.set_adapters(adapters, weights)``
    does, at the cost of one adapter. The new one is registered as :func:`nsc_merge.integrations.peft.merge` says, and
    not activated; active adapters and their weights stay as they are.

    Args:
        pipe: a pipeline of diffusers with the adapters loaded.
        adapters: their names; a model may lack some, or all.
        weights: as ``pipe.set_adapters`` takes them: a number, or a list with a number, None, or a dictionary by
            component and block, for each adapter; 1 each when None. Each is a part of its adapter's scaling, for every
            method; what an adapter was last activated with plays no role.
        adapter_name: of the new adapter.
        method: as ``nsc-merge methods`` lists them, of those that need no data and give one update for all tasks.
        output: as ``rank``, in :func:`nsc_merge.integrations.peft.merge`; methods whose update is of full rank need a
            rank.
        rank: see ``output``.
        options: of the method. Task arithmetic's ``scale`` is 1 here if none is given.

    Returns:
        Component -> what was registered there; none where the update is zero, as of text encoders with a weight of 0.

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected; no model then has the new
            adapter.
    """
    models = _adapted(pipe)
    held = {component: list(getattr(model, "peft_config", ())) for component, model in models.items()}
    known = list(dict.fromkeys(name for loaded in held.values() for name in loaded))
    names = _checked_names(adapters, weights, adapter_name, known)
    chosen = method_of(method)
    if chosen.needs:
        raise ValueError(
            f"method: {method!r} needs {' and '.join(sorted(chosen.needs))}; nsc_merge.integrations.peft.merge takes "
            f"it for one model, such as pipe.{next(iter(models))}"
        )
    # A coefficient for each task is what the weights are already.
    options = {"scale": 1.0, **options} if chosen.weighted == "scale" else options
    merged: dict[str, Merged] = {}
    nothing: list[NothingToRegister] = []
    with _as_weighted(pipe, models, names, weights):
        try:
            for component, model in models.items():
                if present := [name for name in names if name in held[component]]:
                    try:
                        merged[component] = peft.merge(
                            model, present, None, adapter_name, method=method, output=output, rank=rank, **options
                        )
                    except NothingToRegister as error:
                        nothing.append(error)
            if not merged:
                raise nothing[0]
        except BaseException:
            for component in merged:
                _delete(models[component], adapter_name)
            raise
    return merged


def _checked_names(adapters: Sequence[str], weights: Any, adapter_name: str, known: list[str]) -> list[str]:
    names = [adapters] if isinstance(adapters, str) else list(adapters)
    if not names or len(set(names)) < len(names) or set(names) - set(known):
        raise ValueError(f"adapters: expected different names among {known}, found {adapters!r}")
    if adapter_name in known:
        raise ValueError(f"adapter_name: {adapter_name!r} is already loaded; loaded are {known}")
    if isinstance(weights, dict) and len(names) > 1:
        raise ValueError(
            "weights: expected a list with an entry for each adapter, found one dictionary, of which diffusers gives "
            f"the first adapter's weights to {names[0]!r} alone and 1 to the others"
        )
    return names


def _adapted(pipe: Any) -> dict[str, nn.Module]:
    """Component -> model, of those that hold adapters."""
    if not callable(getattr(pipe, "get_list_adapters", None)):
        raise TypeError(
            f"pipe: expected a pipeline of diffusers that loads LoRA, found {type(pipe).__name__}; for one model there "
            "are nsc_kernels.integrations.peft.accelerate and nsc_merge.integrations.peft.merge"
        )
    for component in getattr(pipe, "_lora_loadable_modules", ()):
        # diffusers knows no adapters in it, neither those to list nor those to activate.
        if hasattr(getattr(getattr(pipe, component, None), "_orig_mod", None), "peft_config"):
            raise ValueError(
                f"pipe: expected models that diffusers finds adapters in, found pipe.{component} in the wrapper of "
                f"torch.compile(...), which its set_adapters passes over; put pipe.{component}._orig_mod back and "
                f"compile it in place, by pipe.{component}.compile()"
            )
    return {component: getattr(pipe, component) for component in pipe.get_list_adapters()}


@contextmanager
def _as_weighted(pipe: Any, models: dict[str, nn.Module], names: list[str], weights: Any) -> Iterator[None]:
    """Scalings as ``set_adapters`` sets them, and afterwards those of before, with what was active and trained."""
    # Of LoKr and others as well, beside LoRA: it deactivates them.
    layers: list[Any] = [one for model in models.values() for one in model.modules() if isinstance(one, BaseTunerLayer)]
    before = [(layer, dict(getattr(layer, "scaling", {})), layer.active_adapters) for layer in layers]
    trained = [(value, value.requires_grad) for model in models.values() for value in model.parameters()]
    try:
        pipe.set_adapters(names, weights)
        yield
    finally:
        for layer, scaling, active in before:
            if scaling:
                layer.scaling.update(scaling)
            layer.set_adapter(active)
        for value, required in trained:
            value.requires_grad_(required)


def _delete(model: Any, adapter_name: str) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.delete_adapter(adapter_name)
    model.peft_config.pop(adapter_name, None)
