"""What diffusers reads of an adapter's file, on its way into the models."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

# Models that files without end are for: of others, so many are named.
_MOST_NAMED = 4
# Where diffusers says what it leaves out of files that other programs wrote, in part at a level that is not shown, and
# where it says that magnitudes of DoRA are among it.
_CONVERSION, _PIPELINES = "diffusers.loaders.lora_conversion_utils", "diffusers.loaders.lora_pipeline"
_NOTHING_LEFT_OUT = "Non-diffusers checkpoint detected."


@dataclass
class Read:
    """Of one file.

    Attributes:
        keys: of all tensors, by the names of the pipeline's models and their modules.
        folded: how many factors have their alpha in them, as diffusers would leave out some.
        said: by diffusers, of the file's translation to its own names.
    """

    keys: list[str] = field(default_factory=list)
    folded: int = 0
    said: list[str] = field(default_factory=list)

    def left_out(self, holding: Collection[str]) -> dict[str, int]:
        """Tensors of which diffusers says nothing: what their keys begin with, if no model with the adapter is called
        so -> how many.
        """
        parts = Counter(map(_part, self.keys))
        found = [(part, count) for part, count in parts.most_common() if part not in holding]
        rest = sum(count for _, count in found[_MOST_NAMED:])
        return dict(found[:_MOST_NAMED]) | ({"others": rest} if rest else {})


@contextmanager
def watched(pipe: Any) -> Iterator[Read]:
    """While it loads one file. Read once: of several gigabytes a second time would be felt.

    Raises:
        ValueError: for the magnitudes of DoRA as kohya's and OneTrainer's programs write them, without which a file
            is another adapter.
    """
    read, inner = Read(), pipe.lora_state_dict

    def reading(*arguments: Any, **named: Any) -> Any:
        found = inner(*arguments, **named)
        # With or without alphas, in a place of their own, and settings behind these.
        state, *others = found if isinstance(found, tuple) else (found,)
        read.keys = list(state)
        if others and isinstance(others[0], Mapping) and len(others) > 1:
            state, others[0], read.folded = _folded(state, others[0])
        return (state, *others) if isinstance(found, tuple) else state

    pipe.lora_state_dict = reading
    try:
        with _heard(_CONVERSION, logging.INFO, shown=False) as said, _heard(_PIPELINES, logging.WARNING) as warned:
            yield read
    finally:
        del pipe.lora_state_dict
    read.said = [text for text in said if text != _NOTHING_LEFT_OUT]
    if any("dora_scale" in text for text in warned):
        raise ValueError(
            "it is DoRA, whose magnitudes (dora_scale) diffusers leaves out, so that another adapter remains; expected "
            "plain LoRA"
        )


@contextmanager
def _heard(logger: str, level: int, *, shown: bool = True) -> Iterator[list[str]]:
    """The messages of a logger from a level on."""
    found, heard = logging.getLogger(logger), _Heard()
    before = found.level, found.propagate
    found.addHandler(heard)
    found.setLevel(level)
    found.propagate = shown
    try:
        yield heard.messages
    finally:
        found.removeHandler(heard)
        found.setLevel(before[0])
        found.propagate = before[1]


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _folded(state: Mapping[str, Any], alphas: Mapping[str, float]) -> tuple[dict[str, Any], dict[str, float], int]:
    """Factors, and the alphas that are left, of models of which these differ between layers.

    Of kohya's files diffusers 0.42.1 gives the alpha that most layers have to every projection of attention, and to all
    of a text encoder, as it looks for the others by names that these modules do not have.
    """
    folded, left = dict(state), dict(alphas)
    for part in {_part(key) for key in alphas}:
        own = {key: float(alpha) for key, alpha in alphas.items() if _part(key) == part}
        downs = {key: _down(key) for key in own}
        if len(set(own.values())) == 1 or not all(down in state for down in downs.values()):
            continue
        for key, down in downs.items():
            up = f"{down.removesuffix('.down.weight')}.up.weight"
            folded[up] = state[up].float() * (own[key] / len(state[down]))
            del left[key]
    return folded, left, len(alphas) - len(left)


def _down(key: str) -> str:
    """The factor that an alpha, as diffusers has translated kohya's names, is for."""
    named = key.removesuffix(".alpha")
    return named if named.endswith(".down.weight") else f"{named}.lora.down.weight"


def _part(key: str) -> str:
    return key.partition(".")[0]
