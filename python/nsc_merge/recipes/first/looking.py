"""What is in the data of a first recipe."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from nsc_merge.calibration.raw.reading import is_raw
from nsc_merge.recipes.first.data import Data, stored_inputs


def look(
    places: Mapping[str, str], base: str, local: bool, model: nn.Module, batch_size: int, text: str | None
) -> tuple[dict[str, Data], str | None]:
    """Task -> what is in its data, and the column or template that a recipe has to name for the text.

    Raises:
        ValueError, OSError: if it is no data for the model, naming what it looks like.
    """
    found: dict[str, Data] = {}
    for task, source in places.items():
        if not is_raw(source):
            found[task] = stored_inputs(source, model, batch_size, task)
    return found, text
