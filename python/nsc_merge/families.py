"""What NSC needs to know about a model architecture: a table with one entry per family."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        name: for messages.
        model_types: values of ``model.config.model_type`` that belong to it.
        block: regular expression that finds the block number, as group 1, in a module path.
        score_modules: names of the linears whose input is measured by default.
        recipe: default settings of the optimisation, a key of :data:`nsc_merge.nsc.RECIPES`.
    """

    name: str
    model_types: tuple[str, ...]
    block: str
    score_modules: tuple[str, ...]
    recipe: str


# To add a family, name its model types, say where the block number stands in a path, and which linear the
# paper measures for that kind of model.
FAMILIES = (
    Family(
        name="ViT",
        model_types=("vit",),
        block=r"(?:^|\.)layers\.(\d+)\.",
        score_modules=("o_proj",),
        recipe="vision",
    ),
)


def family_of(model: nn.Module) -> Family:
    """The family of a transformers model.

    Raises:
        ValueError: if its ``config.model_type`` is in no family.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(repr(kind) for family in FAMILIES for kind in family.model_types)
    raise ValueError(
        f"model: {type(model).__name__} has config.model_type {model_type!r}, which "
        f"no family lists (known: {known})"
    )


def scored_paths(
    family: Family,
    model: nn.Module,
    adapted: Iterable[str],
    score_modules: Sequence[str] | None,
    score_blocks: str | int | Sequence[int],
) -> list[str]:
    """Paths of the adapted linears whose input enters the objective, the set J_tgt of Eq. 4.

    Args:
        adapted: paths of all linears that carry an adapter.
        score_modules: last components of the paths; the family's own when None.
        score_blocks: ``"last_quarter"`` (rounded up), how many last blocks, or block numbers.

    Raises:
        ValueError: naming the option, if it selects nothing or a block that does not exist.
    """
    pattern = re.compile(family.block)
    numbers = [int(match[1]) for path, _ in model.named_modules() if (match := pattern.search(path + "."))]
    count = max(numbers, default=-1) + 1
    if score_blocks == "last_quarter":
        blocks = set(range(count - math.ceil(count / 4), count))
    elif isinstance(score_blocks, int) and not isinstance(score_blocks, bool):
        if not 1 <= score_blocks <= count:
            raise ValueError(f"score_blocks: expected 1 to {count} last blocks, found {score_blocks}")
        blocks = set(range(count - score_blocks, count))
    elif isinstance(score_blocks, Sequence) and not isinstance(score_blocks, str):
        blocks = set(score_blocks)
        if not blocks or not blocks <= set(range(count)):
            raise ValueError(
                f"score_blocks: expected block numbers from 0 to {count - 1}, found {list(score_blocks)}"
            )
    else:
        raise ValueError(f"score_blocks: expected 'last_quarter', a number or a list, found {score_blocks!r}")

    names = tuple(score_modules) if score_modules is not None else family.score_modules
    adapted = list(adapted)
    chosen = [
        path
        for path in adapted
        if path.rsplit(".", 1)[-1] in names and (match := pattern.search(path)) and int(match[1]) in blocks
    ]
    if not chosen:
        carried = sorted({path.rsplit(".", 1)[-1] for path in adapted})
        raise ValueError(
            f"score_modules: no adapter touches {list(names)} in blocks {sorted(blocks)}; "
            f"adapted modules: {carried}"
        )
    return chosen
