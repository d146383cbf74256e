"""How well embeddings of questions find the documents that belong to them, among all documents of a set."""

from __future__ import annotations

import torch
from torch import Tensor

from nsc_merge.models.embeddings.modules import SIMILARITIES

# How many of the first documents count.
AT = 10
# Similarities that are held at once.
_AT_ONCE = 2**24


def ndcg(outputs: Tensor, labels: Tensor, similarity: str = "cosine", k: int = AT) -> float:
    """Normalised discounted cumulative gain of the first ``k`` documents (Järvelin and Kekäläinen 2002), of relevance 0
    or 1, mean over questions.

    Args:
        outputs: embeddings ``[N, S, d]``: of a question, of the document that belongs to it, and of others.
        labels: numbers ``[N, S]`` that the same questions share in the first column, and the same documents in the
            others. All documents of all rows are searched; a question may be in several rows, with a document each.
        similarity: key of :data:`SIMILARITIES`.
        k: documents that count.

    Raises:
        TypeError, ValueError: for other dtypes or shapes.
    """
    return ndcg_per_sample(outputs, labels, similarity, k).nanmean().item()


def mrr(outputs: Tensor, labels: Tensor, similarity: str = "cosine", k: int = AT) -> float:
    """Mean over questions of 1 / place of the first document that belongs to it, 0 behind the first ``k``; arguments
    and errors as in :func:`ndcg`.
    """
    return mrr_per_sample(outputs, labels, similarity, k).nanmean().item()


def recall(outputs: Tensor, labels: Tensor, similarity: str = "cosine", k: int = AT) -> float:
    """Share of the documents that belong to a question that are among its first ``k``, mean over questions; arguments
    and errors as in :func:`ndcg`.
    """
    return recall_per_sample(outputs, labels, similarity, k).nanmean().item()


def ndcg_per_sample(outputs: Tensor, labels: Tensor, similarity: str = "cosine", k: int = AT) -> Tensor:
    """By row; NaN of a question that an earlier row has."""
    hits, counts, rows = _found(outputs, labels, similarity, k)
    gains = 1 / torch.arange(2, k + 2, dtype=torch.float64, device="cpu").log2()
    ideal = gains.cumsum(0)[counts.clamp(max=k) - 1]
    return _at_rows((hits * gains[: hits.shape[1]]).sum(1) / ideal, rows, len(labels))


def mrr_per_sample(outputs: Tensor, labels: Tensor, similarity: str = "cosine", k: int = AT) -> Tensor:
    """By row; NaN of a question that an earlier row has."""
    hits, _, rows = _found(outputs, labels, similarity, k)
    places = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64, device="cpu")
    return _at_rows((hits / places).amax(1), rows, len(labels))


def recall_per_sample(outputs: Tensor, labels: Tensor, similarity: str = "cosine", k: int = AT) -> Tensor:
    """By row; NaN of a question that an earlier row has."""
    hits, counts, rows = _found(outputs, labels, similarity, k)
    return _at_rows(hits.sum(1) / counts, rows, len(labels))


def _found(outputs: Tensor, labels: Tensor, similarity: str, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the first ``k`` documents belong to each question, nearest first, ``[Q, k]`` or fewer; how many do,
    ``[Q]``; and the first row of each, ``[Q]``.
    """
    if not outputs.is_floating_point():
        raise TypeError(f"outputs: expected floating point, found {outputs.dtype}")
    if labels.is_floating_point():
        raise TypeError(f"labels: expected integers, found {labels.dtype}")
    if outputs.dim() != 3 or labels.shape != outputs.shape[:2] or labels.shape[1] < 2:
        raise ValueError(
            f"outputs, labels: expected embeddings [N, S, d] and numbers [N, S] of at least two texts, found "
            f"{list(outputs.shape)} and {list(labels.shape)}"
        )
    asked, rows = _first(labels[:, 0].contiguous())
    numbers = labels[:, 1:].reshape(-1)
    documents, places = _first(numbers)
    held = outputs[:, 1:].reshape(len(numbers), -1)[places].double()
    belonging = torch.stack(
        [torch.searchsorted(asked, labels[:, 0].contiguous()), torch.searchsorted(documents, labels[:, 1].contiguous())]
    ).unique(dim=1)
    hits = []
    for some in torch.arange(len(asked), device="cpu").split(max(1, _AT_ONCE // len(documents))):
        near = SIMILARITIES[similarity](outputs[rows[some], 0].double(), held)
        # What is no number is near to nothing.
        best = near.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).sort(descending=True, stable=True)
        of_some, document = belonging[:, (belonging[0] >= some[0]) & (belonging[0] <= some[-1])]
        wanted = torch.zeros(near.shape, dtype=torch.bool, device="cpu")
        wanted[of_some - some[0], document] = True
        hits.append((wanted.gather(1, best.indices) & (best.values > -torch.inf))[:, :k])
    return torch.cat(hits).double(), belonging[0].bincount(minlength=len(asked)), rows


def _first(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The different numbers in order, and where each is first."""
    found, back = numbers.unique(return_inverse=True)
    places = torch.full((len(found),), len(numbers), dtype=torch.long, device="cpu")
    here = torch.arange(len(numbers), device="cpu")
    return found, places.scatter_reduce(0, back, here, "amin")


def _at_rows(values: Tensor, rows: Tensor, count: int) -> Tensor:
    found = torch.full((count,), torch.nan, dtype=torch.float64, device="cpu")
    found[rows] = values
    return found
