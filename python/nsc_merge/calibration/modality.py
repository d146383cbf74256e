"""Batches restricted to their text or to their images, as in Table 9 of arXiv 2603.26317."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nsc_merge.calibration.batches import Batch
from nsc_merge.models.families import Family
from nsc_merge.models.traits import image_token_of

MODALITIES = ("joint", "text", "image")
# Of which kind each token is, as Gemma 3, PaliGemma and Qwen-VL are told.
_KINDS = ("token_type_ids", "mm_token_type_ids")

Restriction = Callable[[Batch], dict[str, Any]]


def restriction(modality: str, family: Family, model: nn.Module) -> Restriction | None:
    """What leaves only one kind of input in a batch; None for ``"joint"``, which leaves everything.

    * ``"text"``: neither images nor image tokens; every other token stays.
    * ``"image"``: the images and their tokens, after a start token where the row begins with one: the shortest prompt
      that the model takes.

    What is left of every row keeps its order. Padding goes, and comes back at the end of rows that are shorter than
    the longest.

    Raises:
        ValueError: if models of the family take one kind of input only; when it is called, if a batch has inputs that
            it cannot restrict, or a row of which nothing would be left.
    """
    if modality == "joint":
        return None
    config: Any = model.config
    image_token = image_token_of(model)
    if not family.images or family.tokens is None or image_token is None:
        raise ValueError(
            f"modality: expected 'joint', since models of the family {family.name} do not take images beside text; "
            f"found {modality!r}"
        )
    start = getattr(config.get_text_config(), "bos_token_id", None)
    return functools.partial(_restricted, modality, family, image_token, start)


def filler_of(model: nn.Module) -> int:
    """A token to pad with; any will do but the one that stands for an image."""
    return _other_than(image_token_of(model))


def _other_than(image_token: int | None) -> int:
    return 1 if image_token == 0 else 0


def _restricted(
    modality: str, family: Family, image_token: int, start: int | None, batch: Batch
) -> dict[str, Any]:
    tokens, mask = str(family.tokens), str(family.mask)
    expected = [tokens, mask, *family.images]
    ids = batch.get(tokens)
    shape = getattr(ids, "shape", None)
    beside = [name for name in _KINDS if name in batch and getattr(batch[name], "shape", None) == shape]
    unknown = sorted(set(batch) - {*expected, *beside})
    if unknown or not isinstance(ids, Tensor) or ids.dim() != 2:
        found = {name: list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for name, v in batch.items()}
        raise ValueError(
            f"modality: {modality!r} expects batches of {tokens} [rows, tokens] and at most "
            f"{', '.join(expected[1:])} beside it, found {found}"
        )
    given = batch.get(mask)
    if given is not None and given.shape != ids.shape:
        raise ValueError(f"{mask}: expected the shape of {tokens}, {list(ids.shape)}, found {list(given.shape)}")
    real = torch.ones_like(ids, dtype=torch.bool) if given is None else given != 0
    is_image = real & (ids == image_token)
    wanted = real & ~is_image if modality == "text" else is_image
    empty = (~wanted.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"modality: {modality!r} expects {'a text' if modality == 'text' else 'an image'} token in every row of "
            f"a batch, found none in rows {empty} (image tokens are {image_token})"
        )
    if modality == "image" and start is not None:
        first = real & (real.cumsum(1) == 1)
        wanted = wanted | (first & (ids == start))
    fillers = {tokens: _other_than(image_token), **dict.fromkeys(beside, 0)}
    left = {name: [row[kept] for row, kept in zip(batch[name], wanted, strict=True)] for name in fillers}
    restricted: dict[str, Any] = {
        name: pad_sequence(rows, batch_first=True, padding_value=fillers[name]) for name, rows in left.items()
    }
    rows = left[tokens]
    if given is not None or len({len(row) for row in rows}) > 1:
        like = ids if given is None else given
        restricted[mask] = pad_sequence([like.new_ones(len(row)) for row in rows], batch_first=True)
    if modality == "image":
        restricted |= {name: batch[name] for name in family.images if name in batch}
    return restricted
