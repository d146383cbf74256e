"""What stands behind the model of an embedding: pooling, linear layers and normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsc_merge.models.real_tokens import at_positions

Similarity = Callable[[Tensor, Tensor], Tensor]

# As sentence-transformers calls them: [..., N, d] and [..., M, d] -> [..., N, M], higher is nearer.
SIMILARITIES: dict[str, Similarity] = {
    "cosine": lambda first, second: F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).mT,
    "dot": lambda first, second: first @ second.mT,
    "euclidean": lambda first, second: -torch.cdist(first, second),
    "manhattan": lambda first, second: -torch.cdist(first, second, p=1),
}


@dataclass(frozen=True)
class Pooling:
    """One vector of the features of all tokens.

    Attributes:
        modes: of :data:`MODES`, whose vectors stand behind each other.
    """

    modes: tuple[str, ...]

    def __call__(self, features: Tensor, mask: Tensor) -> Tensor:
        """``[N, T, d]`` and ``[N, T]``, 0 at padding -> ``[N, len(modes) * d]``."""
        return torch.cat([MODES[mode](features, mask) for mode in self.modes], -1)


@dataclass(frozen=True)
class Dense:
    """A linear layer with an activation."""

    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)
    activation: str

    def __call__(self, embeddings: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(embeddings)
        activation: nn.Module = getattr(nn, self.activation)()
        made: Tensor = activation(F.linear(embeddings, self.weight.to(embeddings), bias))
        return made


def normalise(embeddings: Tensor) -> Tensor:
    """Vectors of length 1."""
    return F.normalize(embeddings, dim=-1)


@dataclass(frozen=True)
class Modules:
    """What is behind a model.

    Attributes:
        pooling: of its features.
        steps: what follows, in order.
        similarity: by which embeddings are compared, of :data:`SIMILARITIES`.
        longest: tokens at which texts are cut in use; None where nobody has said.
    """

    pooling: Pooling
    steps: Sequence[Callable[[Tensor], Tensor]] = ()
    similarity: str = "cosine"
    longest: int | None = None

    def embedding(self, model: nn.Module, features: Tensor, mask: Tensor) -> Tensor:
        """Features ``[N, T, d]`` of a model, and the mask of its inputs, 0 at padding -> ``[N, d']``."""
        mask = at_positions(model, mask, features.shape[1]).to(features.device)
        found = self.pooling(features, mask != 0)
        for step in self.steps:
            found = step(found)
        return found


def _places(features: Tensor, mask: Tensor, place: Tensor) -> Tensor:
    return features[torch.arange(len(features), device=features.device), place]


def _first(features: Tensor, mask: Tensor) -> Tensor:
    return _places(features, mask, mask.int().argmax(1))


def _last(features: Tensor, mask: Tensor) -> Tensor:
    return _places(features, mask, mask.shape[1] - 1 - mask.int().flip(1).argmax(1))


def _sum(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum ``[N, d]`` and the weights' ``[N, 1]``, in float32 at least."""
    weights = weights[..., None].to(torch.promote_types(features.dtype, torch.float32))
    return (features * weights).sum(1), weights.sum(1)


def _mean(features: Tensor, mask: Tensor) -> Tensor:
    total, count = _sum(features, mask)
    return (total / count).to(features.dtype)


def _mean_of_root(features: Tensor, mask: Tensor) -> Tensor:
    total, count = _sum(features, mask)
    return (total / count.sqrt()).to(features.dtype)


def _weighted_mean(features: Tensor, mask: Tensor) -> Tensor:
    """By places, from 1."""
    total, count = _sum(features, mask.int().cumsum(1) * mask)
    return (total / count).to(features.dtype)


def _max(features: Tensor, mask: Tensor) -> Tensor:
    return features.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)


# As sentence-transformers calls them, in the order in which it puts several behind each other.
MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_of_root,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


