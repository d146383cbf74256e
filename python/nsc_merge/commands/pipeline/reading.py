"""What diffusers reads of an adapter's file, on its way into the models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

# Models that files without end are for: of others, so many are named.
_MOST_NAMED = 4


@dataclass
class Read:
    """Of one file.

    Attributes:
        keys: of all tensors, by the names of the pipeline's models and their modules.
        folded: how many factors have their alpha in them, as diffusers would leave out some.
    """

    keys: list[str] = field(default_factory=list)
    folded: int = 0

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
    """While it loads one file. Read once: of several gigabytes a second time would be felt."""
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
        yield read
    finally:
        del pipe.lora_state_dict


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
