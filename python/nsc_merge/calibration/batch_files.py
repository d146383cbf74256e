"""Calibration batches from safetensors files."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nsc_merge.calibration.batches import MASK, other_mask, rows_without_tokens
from nsc_merge.calibration.on_disk import Keep, in_memory
from nsc_merge.models.bases.sharded import class_name
from nsc_merge.models.traits import input_embeddings
from nsc_merge.utils.errors import naming
from nsc_merge.utils.safetensors_checks import CheckedFile, read_checked

# Beside text, these have a row for every image or recording, or for every piece of one.
_OF_MEDIA = ("pixel_", "image_", "video_", "audio_", "input_features", "feature_")


class Batches:
    """Batches of model inputs, restartable.

    Args:
        inputs: input name -> ``[N, ...]``, cut into batches along the first dimension; or a sequence of such
            mappings, each a batch of its own.
        batch_size: rows per batch for a single mapping; the last batch may be smaller.
        sha256: of batches that were read, file name -> SHA-256 of the very bytes that they were made of.
        first: of batches made of raw data, the first sample as a person reads it.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
        batch_size: int = 32,
        sha256: Mapping[str, str] | None = None,
        first: str = "",
    ) -> None:
        self.sha256 = dict(sha256 or {})
        self.first = first
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

    def to(self, dtype: torch.dtype, keep: Keep = in_memory) -> Batches:
        """The same batches with all floating-point inputs in ``dtype``; the others are kept.

        Args:
            keep: where what is of another dtype than before is held.
        """
        made = []
        for batch in self._batches:
            others = {name: v.to(dtype) for name, v in batch.items() if v.is_floating_point() and v.dtype != dtype}
            made.append({**batch, **keep(others)})
        return Batches(made, sha256=self.sha256, first=self.first)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        return iter(self._batches)


def read_batches(place: str | Path, batch_size: int, argument: str) -> Batches:
    """Read a safetensors file of stacked inputs, or a folder whose files are one batch each: there samples of text may
    have several images each, or none.

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
        read = {file.name: _read(file, argument, whole=True) for file in files}
        sha256 = {name: one.sha256 for name, one in read.items()}
        return Batches([one.tensors for one in read.values()], sha256=sha256)
    if not place.exists():
        raise FileNotFoundError(f"{argument}: {place} is missing")
    stacked = _read(place, argument, whole=False)
    return Batches(stacked.tensors, batch_size, {place.name: stacked.sha256})


def inputs_for(
    model: nn.Module, batches: Batches, argument: str, labels: str | None = "labels", keep: Keep = in_memory
) -> Batches:
    """What a model takes of batches, which may hold labels beside its inputs as the files of ``nsc-merge eval`` do, in
    the model's dtype.

    Raises:
        ValueError: as :func:`check_names` and :func:`check_tokens`.
    """
    inputs = Batches([{name: value for name, value in batch.items() if name != labels} for batch in batches])
    check_names(inputs, model, argument)
    check_tokens(inputs, model, argument)
    return inputs.to(next(model.parameters()).dtype, keep)


def check_names(batches: Batches, model: nn.Module, argument: str) -> None:
    """Refuse inputs that the model does not take.

    Raises:
        ValueError: naming them and the model's own.
    """
    parameters = inspect.signature(model.forward).parameters
    takes = [name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    unknown = [name for name in batches.names if name not in takes]
    if unknown:
        raise ValueError(f"{argument}: {class_name(model)} takes no input {unknown}; it takes {takes}")


def check_tokens(batches: Batches, model: nn.Module, argument: str) -> None:
    """Refuse text of other tokens than the model has; beside images, some stand for these and are in no table.

    Raises:
        ValueError: naming what was found and what was expected.
    """
    known = getattr(input_embeddings(model), "num_embeddings", None)
    if known is None:
        return
    for batch in batches:
        tokens = batch.get("input_ids")
        others = (name for name, value in batch.items() if value.is_floating_point() and not name.endswith(MASK))
        if tokens is None or any(name != "input_ids" for name in others):
            continue
        what = f"{argument}: expected tokens from 0 to {known - 1} in input_ids, which {class_name(model)} has"
        if tokens.is_floating_point():
            raise ValueError(f"{what}, found {tokens.dtype}; expected whole numbers")
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or most >= known:
            found = least if least < 0 else most
            raise ValueError(f"{what}, found {found}; expected text encoded by the tokenizer of the base")


def _read(file: Path, argument: str, *, whole: bool) -> CheckedFile:
    """What a file holds: ``whole`` if it is one batch, and not to be cut into several."""
    with naming(argument):
        read = read_checked(file)
    tensors = read.tensors
    rows = {name: value.shape[0] if value.dim() else None for name, value in tensors.items()}
    own = {name: count for name, count in rows.items() if not (whole and name.startswith(_OF_MEDIA))} or rows
    if 0 in rows.values():
        raise ValueError(f"{argument}: {file}: expected a row for every sample, found none: {rows}")
    if len(set(own.values())) != 1 or None in rows.values():
        way = "" if whole else "; a batch whose samples have several images each is a file of its own in a folder"
        raise ValueError(
            f"{argument}: {file}: expected tensors with one and the same number of rows, found {rows}{way}"
        )
    if wrong := other_mask(tensors):
        raise ValueError(f"{argument}: {file}: {wrong}")
    empty = rows_without_tokens(tensors)
    if empty:
        raise ValueError(f"{argument}: {file}: {MASK} has no real token in rows {empty[:5]} ({len(empty)} in all)")
    return read
