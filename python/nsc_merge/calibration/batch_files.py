"""Calibration batches from safetensors files."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nsc_merge.calibration.batches import MASK, rows_without_tokens
from nsc_merge.utils.safetensors_checks import read_safetensors


class Batches:
    """Batches of model inputs, restartable.

    Args:
        inputs: input name -> ``[N, ...]``, cut into batches along the first dimension; or a sequence of such
            mappings, each a batch of its own.
        batch_size: rows per batch for a single mapping; the last batch may be smaller.
    """

    def __init__(
        self, inputs: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]], batch_size: int = 32
    ) -> None:
        if isinstance(inputs, Mapping):
            count = len(next(iter(inputs.values())))
            self._batches: list[Mapping[str, Tensor]] = [
                {name: value[start : start + batch_size] for name, value in inputs.items()}
                for start in range(0, count, batch_size)
            ]
        else:
            self._batches = list(inputs)

    @property
    def names(self) -> list[str]:
        return sorted({name for batch in self._batches for name in batch})

    def to(self, dtype: torch.dtype) -> Batches:
        """The same batches with all floating-point inputs in ``dtype``; the others are kept."""
        return Batches(
            [
                {name: v.to(dtype) if v.is_floating_point() else v for name, v in batch.items()}
                for batch in self._batches
            ]
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        return iter(self._batches)


def read_batches(place: str | Path, batch_size: int, argument: str) -> Batches:
    """Read a safetensors file of stacked inputs, or a folder whose files are one batch each.

    Args:
        place: file or folder.
        batch_size: for a file.
        argument: how messages call it.

    Raises:
        FileNotFoundError, ValueError: naming ``argument`` and the file, what was found and what was expected.
    """
    place = Path(place)
    if place.is_dir():
        files = sorted(place.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{argument}: {place} holds no .safetensors file")
        return Batches([_read(file, argument) for file in files])
    if not place.is_file():
        raise FileNotFoundError(f"{argument}: {place} is missing")
    return Batches(_read(place, argument), batch_size)


def check_names(batches: Batches, model: nn.Module, argument: str) -> None:
    """Refuse inputs that the model does not take.

    Raises:
        ValueError: naming them and the model's own.
    """
    parameters = inspect.signature(model.forward).parameters
    takes = [name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    unknown = [name for name in batches.names if name not in takes]
    if unknown:
        raise ValueError(f"{argument}: {type(model).__name__} takes no input {unknown}; it takes {takes}")


def _read(file: Path, argument: str) -> dict[str, Tensor]:
    try:
        tensors = read_safetensors(file)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None
    rows = {name: value.shape[0] if value.dim() else None for name, value in tensors.items()}
    if len(set(rows.values())) != 1 or None in rows.values() or 0 in rows.values():
        raise ValueError(
            f"{argument}: {file}: expected tensors with one and the same number of rows, found {rows}"
        )
    empty = rows_without_tokens(tensors)
    if empty:
        raise ValueError(f"{argument}: {file}: {MASK} has no real token in {len(empty)} rows: {empty[:5]}")
    return tensors
