"""How a model is run for measurements: in evaluation mode, and once for callers that run it on the same inputs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nsc_merge.models.bases.stored_weights import offloading
from nsc_merge.models.block_finding import blocks_of
from nsc_merge.processes.launch import undisturbed

# What the running thread does: each device has a thread of its own for its part of a backward.
_here = threading.local()


class Ended(Exception):
    """No error but a signal, raised inside a forward once nothing that comes after is needed."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode, with outputs that have names; afterwards every module has the mode that it had,
    which may differ from its parent's. Models of diffusers recompute blocks, if told to, in this mode as well, in which
    those of transformers do not.
    """
    modes = [(module, module.training) for module in model.modules()]
    recomputed: list[Any] = [module for module, _ in modes if getattr(module, "gradient_checkpointing", None) is True]
    tuples, before = giving_tuples(model), _graphs_in(model)
    with unscaled(model):
        try:
            model.eval()
            for config in tuples:
                config.return_dict = True
            for one in recomputed:
                one.gradient_checkpointing = False
            yield
        finally:
            with undisturbed():
                for module, training in modes:
                    module.training = training
                for one in recomputed:
                    one.gradient_checkpointing = True
                for config in tuples:
                    config.return_dict = False
                # States that modules keep, as RecurrentGemma's do, hold no graph: no copy of a model can.
                for (number, name), (module, value) in _graphs_in(model).items():
                    if before.get((number, name), (module, None))[1] is not value:
                        setattr(module, name, value.detach())


def _graphs_in(model: nn.Module) -> dict[tuple[int, str], tuple[nn.Module, torch.Tensor]]:
    """What modules keep, beside parameters and buffers, that was computed from others with a gradient."""
    return {
        (id(module), name): (module, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    }


def giving_tuples(model: nn.Module) -> list[Any]:
    """The configurations in a model that ask for tuples in the place of outputs with names. transformers' own models
    then cannot read what their parts give.
    """
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return [config for config in configs.values() if getattr(config, "return_dict", True) is False]


@contextmanager
def unscaled(model: nn.Module) -> Iterator[None]:
    """Within it, RWKV runs with the weights that it has, and computes the same. In evaluation mode it divides some of
    them by powers of two, in place, and its hidden states with them, against overflow in float16: updates that are
    attached or added would not be divided.
    """
    held = [(module, module.config.rescale_every, module.layers_are_rescaled) for module in _rescaling(model)]
    try:
        for module, _, _ in held:
            module.config.rescale_every = 0
        yield
    finally:
        with undisturbed():
            for module, every, divided in held:
                module.config.rescale_every, module.layers_are_rescaled = every, divided


def check_unscaled(model: nn.Module) -> None:
    """Refuse a model with weights that it has divided for :func:`unscaled`'s reason.

    Raises:
        ValueError: saying what to take.
    """
    if any(module.layers_are_rescaled for module in _rescaling(model)):
        raise ValueError(
            f"model: {type(model).__name__} has run in evaluation mode, in which it divides weights by powers of two "
            "(rescale_every in its configuration), and an update is of the whole ones; expected it as it was loaded, "
            "or with config.rescale_every = 0 before it first runs, which computes the same"
        )


def _rescaling(model: nn.Module) -> list[Any]:
    """The parts that divide some of their weights in evaluation mode."""
    found: list[Any] = [module for module in model.modules() if hasattr(module, "layers_are_rescaled")]
    return [module for module in found if 0 < module.config.rescale_every < len(module.blocks)]


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Within it, modules compiled in place (``module.compile()``, or a ``forward`` put through ``torch.compile``) run
    as they were written: their graphs know nothing of attached adapters.
    """
    compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl]
    forwards = [(module, vars(module)["forward"]) for module in model.modules() if "forward" in vars(module)]
    forwards = [(module, forward) for module, forward in forwards if hasattr(forward, "_torchdynamo_orig_callable")]
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None
        for module, forward in forwards:
            module.forward = forward._torchdynamo_orig_callable
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
        for module, forward in forwards:
            module.forward = forward


@contextmanager
def shared_forward(model: nn.Module) -> Iterator[None]:
    """Within it, calling ``model`` again with the very same objects returns what the first call returned, unless other
    weights have taken the place of its own meanwhile, such as another task's head.
    """
    known: dict[tuple[Any, ...], Any] = {}
    forward = model.forward

    def once(*args: Any, **inputs: Any) -> Any:
        held = [*model.parameters(), *model.buffers()]
        named = sorted(inputs.items())
        key = (*map(id, held), *map(id, args), *((name, id(value)) for name, value in named))
        if key not in known:
            # Weights and arguments are kept as well, so that no other object takes over their identity.
            known[key] = held, args, inputs, forward(*args, **inputs)
        return known[key][-1]

    with with_forward(model, once):
        yield


@contextmanager
def ended_by(model: nn.Module, signal: type[Exception]) -> Iterator[None]:
    """Within it, a forward of ``model`` that ``signal`` breaks off returns None, so that whatever stands around it,
    such as FSDP2's gathering of weights, comes to its own end.
    """
    forward = model.forward

    def until(*args: Any, **inputs: Any) -> Any:
        with suppress(signal):
            return forward(*args, **inputs)

    with with_forward(model, until):
        yield


@contextmanager
def with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it, a module runs another ``forward``."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        restore_forward(module, own)


def restore_forward(module: nn.Module, own: Any) -> None:
    """Give a module the ``forward`` back that it had of its own, such as accelerate's, or else its class's."""
    if own is None:
        del module.forward
    else:
        module.forward = own


def blocks_without(model: nn.Module, pattern: str, scored: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The blocks that hold no measured linear: recomputing one has no effect besides its output."""
    blocks = blocks_of(model, pattern)
    return [block for path, block in blocks.items() if not any(name.startswith(f"{path}.") for name in scored)]


def recomputing() -> bool:
    """Whether a block runs for the second time, as part of a backward: it has to compute what it did in the forward,
    and whoever watches it has seen it.
    """
    return getattr(_here, "recomputing", False)


@contextmanager
def recomputed(model: nn.Module, asked: bool | None = None) -> Iterator[None]:
    """Within it, blocks keep their inputs alone, and compute their activations again in the backward: one at a time.

    A block is an element of a list of modules. Where weights are offloaded, this is what keeps them so: a graph holds
    the weights that it was made with, and after a forward all of them would be there.

    Args:
        model: whose weights are frozen.
        asked: True is for all blocks, False for none; None for those with offloaded weights.
    """
    chosen = [block for block in _blocks(model) if asked or (asked is None and _is_offloaded(block))]
    with ExitStack() as stack:
        if chosen:
            # A second run would add its keys and values to those of the first.
            stack.enter_context(without_key_value_cache(model))
        for block in chosen:
            stack.enter_context(wrapped_forward(block, True, None))
        yield


@contextmanager
def one_block_kept() -> Iterator[None]:
    """Within it, the first block with a gradient keeps its activations, and a forward what a backward holds at most."""
    _here.kept = False
    try:
        yield
    finally:
        del _here.kept


def _blocks(module: nn.Module) -> list[nn.Module]:
    found: dict[nn.Module, None] = {}
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            found[child] = None
        else:
            found.update(dict.fromkeys(_blocks(child)))
    return list(found)


def _is_offloaded(block: nn.Module) -> bool:
    return any(offloading(module) is not None for module in block.modules())


@contextmanager
def wrapped_forward(block: nn.Module, checkpointing: bool, compiler: str | None) -> Iterator[None]:
    forward = block.forward if compiler is None else torch.compile(block.forward, backend=compiler)
    if checkpointing:
        # Stopped before its end, an offloaded block would never put the last of its weights away.
        forward = functools.partial(_computed_twice, forward, not _is_offloaded(block))
    with with_forward(block, forward):
        yield


def _computed_twice(forward: Callable[..., Any], early_stop: bool, /, *args: Any, **inputs: Any) -> Any:
    """What ``forward`` returns, with a graph that runs it again.

    Args:
        early_stop: whether the second run may end once it has what the backward needs.
    """
    if getattr(_here, "kept", None) is False:
        output = forward(*args, **inputs)
        _here.kept = getattr(output[0] if isinstance(output, tuple) else output, "requires_grad", True)
        return output
    ended = False

    def run(*args: Any, **inputs: Any) -> Any:
        nonlocal ended
        try:
            return forward(*args, **inputs)
        except Ended:
            # An exception would leave the checkpoint unfinished.
            ended = True

    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "early_stop": early_stop}
    output = checkpoint(run, *args, context_fn=lambda: (nullcontext(), _Again()), **settings, **inputs)
    if ended:
        raise Ended
    return output


class _Again:
    """Entered with every backward through a block, of which one forward may have several."""

    def __enter__(self) -> None:
        _here.recomputing = True

    def __exit__(self, *_: object) -> None:
        _here.recomputing = False


@contextmanager
def without_key_value_cache(model: nn.Module) -> Iterator[None]:
    """Prefills are all there is, so decoders need not keep keys and values, which holds them in memory."""
    configs = {id(config): config for module in model.modules() if (config := _caching(module)) is not None}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


def _caching(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if getattr(config, "use_cache", False) is True else None


def wrapper_of(model: nn.Module, missed: str = "") -> str:
    """What to say where the model is in a wrapper, or a part of it is, under which every path begins otherwise.

    Args:
        missed: a path that an adapter has and the model has not.
    """
    if any("_orig_mod" in path.split(".") for path, _ in model.named_modules()):
        return (
            "; of a module that torch.compile wrapped, expected the one inside (_orig_mod), or one compiled in place "
            "with its compile()"
        )
    if isinstance(getattr(model, "module", None), nn.Module):
        return "; of a wrapper such as DistributedDataParallel, expected its .module"
    if hasattr(model, "peft_config"):
        return "; of a PeftModel, expected the base model, as its unload() gives it"
    around = [path.removesuffix(f".{missed}") for path, _ in model.named_modules() if path.endswith(f".{missed}")]
    if missed and len(around) == 1:
        inside = f"get_submodule({around[0]!r})"
        return f"; of what stands around a model, as SentenceTransformer does, expected {inside} of it"
    return ""
