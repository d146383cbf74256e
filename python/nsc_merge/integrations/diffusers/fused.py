"""Several active adapters of a pipeline in one fused call per linear."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

from nsc_kernels.integrations import peft as fused
from nsc_merge.integrations.diffusers.pipelines import adapted, check_in_memory


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
        ValueError: if none of its models holds LoRA on a linear, or one is offloaded to disk or module by module.
    """
    models = adapted(pipe)
    # What runs fused reads factors without calling the modules that would bring them.
    check_in_memory(models)
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
