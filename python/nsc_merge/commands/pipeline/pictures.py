"""The same prompts drawn by the base, each adapter and their merge."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from nsc_merge.commands.pipeline.given import MERGED, Given
from nsc_merge.utils.plot_style import pyplot_in_style
from nsc_merge.utils.progress import Progress


def draw(
    pipe: Any, given: Sequence[Given], prompts: Sequence[str], settings: Mapping[str, Any], seed: int
) -> Any:
    """A figure of pyplot with a row for each prompt: the base, each adapter at its weight, all of them at once, and the
    merge, from the same noise.
    """
    names, weights = [one.name for one in given], [one.weights for one in given]
    ways: dict[str, Callable[[], Any]] = {"base": pipe.disable_lora}
    for one in given:
        ways[f"{one.name} {one.weight:g}"] = partial(pipe.set_adapters, [one.name], [one.weights])
    ways["all at once"] = partial(pipe.set_adapters, names, weights)
    ways["merged"] = partial(pipe.set_adapters, MERGED)
    found: dict[str, list[Any]] = {title: [] for title in ways}
    with Progress("drawing", len(ways) * len(prompts)) as progress:
        for title, choose in ways.items():
            pipe.enable_lora()
            choose()
            for number, prompt in enumerate(prompts):
                found[title].append(_drawn(pipe, prompt, settings, seed + number))
                progress.update()
    with pyplot_in_style() as pyplot:
        figure, axes = pyplot.subplots(
            len(prompts), len(found), figsize=(2.6 * len(found), 2.8 * len(prompts)), squeeze=False
        )
        for column, (title, images) in enumerate(found.items()):
            axes[0][column].set_title(title)
            for row, image in enumerate(images):
                axes[row][column].imshow(image)
                axes[row][column].set(xticks=[], yticks=[])
        for row, prompt in enumerate(prompts):
            axes[row][0].set_ylabel(prompt if len(prompt) <= 32 else f"{prompt[:31]}…")
        figure.tight_layout()
        return figure


def _drawn(pipe: Any, prompt: str, settings: Mapping[str, Any], seed: int) -> Any:
    """An image, or of a video the frame in its middle."""
    taken = inspect.signature(pipe.__call__).parameters
    noise = {"generator": torch.Generator("cpu").manual_seed(seed)} if "generator" in taken else {}
    made = pipe(prompt=prompt, **settings, **noise)
    if hasattr(made, "images"):
        return made.images[0]
    if not hasattr(made, "frames"):
        raise ValueError(f"expected a pipeline of images or videos, found one that gives {', '.join(made)}")
    frames = made.frames[0]
    return frames[len(frames) // 2]
