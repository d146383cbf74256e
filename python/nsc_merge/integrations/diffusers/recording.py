"""Calibration data of a pipeline: what its models are called with while it makes images by each adapter."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from nsc_merge.calibration.batches import each_tensor
from nsc_merge.integrations.diffusers.pipelines import (
    adapted,
    as_weighted,
    check_runs,
    check_taken,
    check_weights,
    held_in,
    loaded_in,
)
from nsc_merge.models.forward_contexts import eager
from nsc_merge.utils.progress import Progress

# Of one model, in the order of its calls.
Calls = list[dict[str, Any]]
# Adapter -> component -> calls of its model.
PipelineData = Mapping[str, Mapping[str, Calls]]
# What pipelines call arguments of attention, of which "scale" is one for adapters.
_ATTENTION = ("attention_kwargs", "cross_attention_kwargs", "joint_attention_kwargs")


def calibration_data(
    pipe: Any,
    prompts: Mapping[str, Sequence[str | Mapping[str, Any]]],
    weights: Any = None,
    *,
    calls: int | None = 8,
    seed: int = 0,
    progress: bool | None = None,
    **settings: Any,
) -> dict[str, dict[str, Calls]]:
    """Make images by each adapter alone, and record what the pipeline calls its models with on the way.

    The calls are data for the methods that need some: latents on their way from noise to an image of the adapter's, the
    time, and the prompt's embedding. Prompts are all that has to be known of an adapter; images are not decoded.

    Args:
        pipe: a pipeline of diffusers with the adapters loaded. What is active in it, and with what weights, plays no
            role and does not change.
        prompts: adapter -> prompts that it is for; in the place of a prompt also a mapping with arguments of the
            pipeline by name, such as ``{"prompt": "a lighthouse", "image": image, "strength": 0.6}``.
        weights: as ``pipe.set_adapters`` takes them, in the order of ``prompts``; those that :func:`merge` is to get.
        calls: how many calls of each model are kept of every image, drawn at random from as many equal parts of its
            way; None keeps all.
        seed: of the noise, for prompt ``i`` of each adapter ``seed + i``, and of the draw.
        progress: whether to show how many prompts are drawn; None shows a bar on a terminal, and lines elsewhere.
        settings: arguments of the pipeline for all prompts, such as ``num_inference_steps``, ``height``,
            ``guidance_scale``.

    Returns:
        Adapter -> component -> its calls, each a dictionary of inputs by name, on the CPU: what :func:`merge` takes as
        ``data``, and of one component :func:`nsc_merge.merge` as ``calibration``. Components that hold nothing of an
        adapter, or were not called, are left out.

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected, before an image is made; and
            if no model with the adapter was called.
    """
    models = adapted(pipe)
    check_runs(models)
    held = held_in(models)
    _check(prompts, loaded_in(held), calls)
    names = list(prompts)
    every = weights if isinstance(weights, list | tuple) else [weights] * len(names)
    check_weights(weights, names)
    if len(every) != len(names):
        raise ValueError(f"weights: expected one for each of {names}, found {len(every)}")
    planned = {
        name: [_arguments(pipe, prompt, settings, seed + number) for number, prompt in enumerate(prompts[name])]
        for name in names
    }
    data: dict[str, dict[str, Calls]] = {}
    with Progress("recording", sum(map(len, planned.values())), progress) as shown:
        for name, weight in zip(names, every, strict=True):
            holding = {component: model for component, model in models.items() if name in held[component]}
            with as_weighted(pipe, models, [name], [weight]):
                found = _recorded(pipe, holding, planned[name], calls, seed, shown)
            data[name] = {component: kept for component, kept in found.items() if kept}
            if not data[name]:
                raise ValueError(
                    f"prompts[{name!r}]: expected calls of {list(holding)}, found none while images were made"
                )
    return data


def _recorded(
    pipe: Any, models: Mapping[str, nn.Module], planned: Sequence[Mapping[str, Any]], calls: int | None, seed: int,
    shown: Progress,
) -> dict[str, Calls]:  # fmt: skip
    found: dict[str, Calls] = {component: [] for component in models}
    with ExitStack() as stack:
        recorded = {component: stack.enter_context(_recording(model)) for component, model in models.items()}
        for number, arguments in enumerate(planned):
            draw = random.Random(f"{seed} {number}")
            pipe(**arguments)
            for component, made in recorded.items():
                found[component] += _drawn(made, calls, draw)
                made.clear()
            shown.update()
    return found


def _check(prompts: Any, known: list[str], calls: Any) -> None:
    if not isinstance(prompts, Mapping) or not prompts or set(prompts) - set(known):
        found = list(prompts) if isinstance(prompts, Mapping) else prompts
        raise ValueError(f"prompts: expected a mapping with some of the adapters {known}, found {found!r:.80}")
    for name, every in prompts.items():
        # A string is a sequence, too.
        fits = isinstance(every, Sequence) and not isinstance(every, str) and len(every) > 0
        if not fits or not all(isinstance(one, str | Mapping) for one in every):
            raise ValueError(
                f"prompts[{name!r}]: expected a list of prompts, or of mappings with arguments of the pipeline, found "
                f"{every!r:.80}"
            )
    if calls is not None and (isinstance(calls, bool) or not isinstance(calls, int) or calls < 1):
        raise ValueError(f"calls: expected a whole number of at least 1, or None, found {calls!r}")


def _arguments(pipe: Any, prompt: str | Mapping[str, Any], settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What the pipeline is called with: with noise of its own, and without decoding what comes out, unless asked to."""
    given = {**settings, **({"prompt": prompt} if isinstance(prompt, str) else prompt)}
    for name in _ATTENTION:
        if "scale" in (given.get(name) or {}):
            raise ValueError(f"{name}: its scale is one of adapters; expected it in weights, found it in {name}")
    check_taken(pipe, given)
    taken = inspect.signature(pipe.__call__).parameters
    usual = {
        "output_type": "latent",
        "generator": torch.Generator("cpu").manual_seed(seed),
        # Of Qwen-Image 2.1 and others: calls would read what an earlier one left there.
        "use_kv_cache": False,
        # Of perturbed-attention guidance, which puts other attention into the model while it draws.
        "pag_scale": 0.0,
    }
    return {**{name: value for name, value in usual.items() if name in taken}, **given}


def _drawn(made: Calls, count: int | None, draw: random.Random) -> Calls:
    """One call of each of ``count`` equal parts. At random: those with the prompt and without it may alternate."""
    if count is None or count >= len(made):
        return list(made)
    edges = [len(made) * part // count for part in range(count + 1)]
    return [made[draw.randrange(first, last)] for first, last in itertools.pairwise(edges)]


@contextmanager
def _recording(model: Any) -> Iterator[Calls]:
    """The inputs of every call of a model within it."""
    made: Calls = []
    signature = inspect.signature(type(model).forward)
    processors = dict(getattr(model, "attn_processors", {}))
    attention = list(processors.values())

    def record(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = dict(signature.bind(model, *arguments, **named).arguments)
        # Of arguments that it gathers, such as those of transformers' text encoders.
        others = [name for name, one in signature.parameters.items() if one.kind is one.VAR_KEYWORD and name in given]
        given |= {key: value for name in others for key, value in given.pop(name).items()}
        del given[next(iter(signature.parameters))]
        # Outputs have names wherever they are measured.
        given.pop("return_dict", None)
        _check_alone(model, given)
        if any(one is not other for one, other in itertools.zip_longest(_attention(model), attention)):
            raise ValueError(
                f"pipe: expected calls of {type(model).__name__} as it is outside of the pipeline, found attention "
                "that the pipeline puts in while it draws, as for perturbed-attention guidance; pag_scale=0 leaves it "
                "out"
            )
        # Of what was made in inference mode no gradient could be taken.
        with torch.inference_mode(False):
            made.append({name: _copied(value) for name, value in given.items() if value is not None})

    # A compiled one would run as it was traced before.
    with eager(model):
        handle = model.register_forward_pre_hook(record, with_kwargs=True)
        try:
            yield made
        finally:
            handle.remove()
            if _attention(model) != attention:
                # A call that was refused, or failed otherwise, never came to where the pipeline puts its own back.
                model.set_attn_processor(processors)


def _attention(model: nn.Module) -> list[Any]:
    """What the attention of a model of diffusers computes by, of each of its layers."""
    return list(getattr(model, "attn_processors", {}).values())


def _check_alone(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Refuse a call that reads or writes keys and values of others: what it computes again is of whichever was last."""
    for name, value in given.items():
        if ("cache" in name or name == "past_key_values") and not isinstance(value, bool | str | None):
            raise ValueError(
                f"pipe: expected calls of {type(model).__name__} that compute everything anew, found {name} with keys "
                "and values of other calls; use_kv_cache=False among the arguments, where the pipeline has it, or its "
                "variant without a cache"
            )


def _copied(value: Any) -> Any:
    """On the CPU, with what is in dictionaries and lists; schedulers write into some of their tensors."""
    return each_tensor(value, lambda one: one.detach().to("cpu", copy=True))
