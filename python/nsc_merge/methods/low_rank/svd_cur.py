"""The hybrid of "On the Representation Geometry of LoRA Model Merging": KnOTS-TIES blended with a CUR decomposition.

``alpha S + (1 - alpha) C T``: S is KnOTS-TIES of the updates; C holds columns of all of them next to one another, and
T is TIES on the tasks' coefficients ``C^+ s_k B_k A_k``. Both count over all modules what they trim, and S is merged as
KnOTS' code has it, from right singular vectors times singular values, where Eq. 9 and 10 of the paper have them plain.

The paper leaves several choices open; each is an option here, with the reading that its equations support best as the
default.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient_free import gradient_free, present
from nsc_merge.methods.low_rank.common_bases import cores, in_float32, numerical_rank, without_rounding
from nsc_merge.methods.low_rank.knots import KnotsTiesOptions, knots_ties
from nsc_merge.methods.task_vectors.elementwise import Ties, tasks_by_path, ties_merge
from nsc_merge.utils.option_checks import check_choice, check_count, check_number

CHOICES = ("norm", "pivoted")
# Singular values of the SVD branch at or below this share of a module's largest are dropped: an absolute bound, as
# KnOTS' code has one, would take the branch away from weak updates, and with it its share of the blend.
_LEAST = 1e-5


@dataclass(frozen=True)
class SVDCUROptions:
    """Options of ``method="svd_cur"``.

    Attributes:
        scale: multiplies the blended update.
        alpha: share of the SVD branch: ``"magnitude"``, its norm by the sum of both branches' norms in each module
            (Eq. 32 and 33; the residual energies of Eq. 31 would weigh the branches the other way round from what the
            paper's theorem asks for), or a number for all modules.
        svd_scale: of the SVD branch, KnOTS-TIES.
        svd_density: of its TIES.
        cur_scale: of the CUR branch.
        cur_density: of its TIES, on the coefficients U R (Eq. 29). Both branches trim as the code of TIES' authors
            does; that of this paper could not be had.
        columns: how many columns C keeps of all tasks' updates next to one another; None keeps as many as the ranks
            of a module's updates add up to, which are those of its adapters but where factors are of deficient rank.
            (The paper does not say how many; its energy tables cannot come from fewer.)
        choice: of the columns: the largest by ``"norm"``, as the paper says, or ``"pivoted"`` QR, which does not take
            two that are nearly parallel. By norm one adapter with large updates can take all columns, whereas as many
            pivoted ones as the ranks add up to span every adapter. Of pivoted columns there are no more than span all
            updates, beyond which only rounding chooses.
        rows: how many rows, the largest by norm, R keeps; 0 takes the best coefficients of C instead, which needs no
            rows. (The paper does not define U.)
    """

    scale: float = 1.0
    alpha: float | str = "magnitude"
    svd_scale: float = 1.0
    svd_density: float = 0.2
    cur_scale: float = 1.0
    cur_density: float = 0.2
    columns: int | None = None
    choice: str = "norm"
    rows: int = 0

    def __post_init__(self) -> None:
        for name in ("scale", "svd_scale", "cur_scale"):
            check_number(name, getattr(self, name))
        for name in ("svd_density", "cur_density"):
            check_number(name, getattr(self, name), 0, 1, above=True)
        if isinstance(self.alpha, str):
            check_choice("alpha", self.alpha, ("magnitude",))
        else:
            check_number("alpha", self.alpha, 0, 1)
        if self.columns is not None:
            check_count("columns", self.columns)
        check_choice("choice", self.choice, CHOICES)
        check_count("rows", self.rows, 0)


@dataclass(frozen=True)
class CUR:
    """``s_k B_k A_k ~ U C coefficients[k]``.

    Attributes:
        U: ``[d_out, p]``, orthonormal columns; those of ``U C`` are columns of the updates.
        C: ``[p, c]``.
        coefficients: task -> ``[c, d_in]``.
    """

    U: Tensor
    C: Tensor
    coefficients: dict[str, Tensor]


def decompose(factors: Mapping[str, Factor], options: SVDCUROptions) -> CUR:
    """The columns kept of one module's updates, and each task's coefficients (Eq. 29), without a matrix of the updates'
    own size.
    """
    common = cores(factors)
    # Columns of U M_k V have the norms of those of M_k V.
    side = torch.cat([part @ common.V for part in common.M.values()], 1)
    # Of the updates, and not of their factors, which may be of more than the update's own rank.
    count = options.columns or max(1, sum(numerical_rank(part) for part in common.M.values()))
    if options.choice == "pivoted":
        count = min(count, max(1, numerical_rank(torch.cat(list(common.M.values()), 1))))
    count = min(count, side.shape[1])
    chosen = side[:, _columns(side, count, options.choice)]
    backward = torch.linalg.pinv(chosen)
    if not options.rows:
        solved = backward
    else:
        stacked = torch.cat(list(common.M.values()), 1)
        norms = (common.U @ stacked).norm(dim=1)
        rows = common.U[norms.topk(min(options.rows, len(norms))).indices]
        solved = backward @ stacked @ torch.linalg.pinv(rows @ stacked) @ rows
    parts = {task: without_rounding(solved @ part @ common.V) for task, part in common.M.items()}
    return CUR(common.U, chosen, parts)


def _columns(side: Tensor, count: int, choice: str) -> Tensor:
    if choice == "norm":
        return side.norm(dim=0).topk(count).indices
    from scipy.linalg import qr

    return torch.from_numpy(qr(side.cpu().numpy(), mode="r", pivoting=True)[1][:count].copy()).long()


def svd_cur(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: SVDCUROptions
) -> Iterator[tuple[str, Factor]]:
    """Path and blended update (Eq. 34)."""

    @functools.lru_cache(maxsize=1)
    def decomposed(path: str) -> CUR:
        return decompose(present(adapters, path), options)

    steps = Ties(options.cur_density, "global", "next", "sum", "majority", "mean")
    branch = ties_merge(
        lambda path, task: decomposed(path).coefficients[task], tasks_by_path(adapters, paths), steps
    )
    svd = KnotsTiesOptions(
        preset="canonical", density=options.svd_density, scale=options.svd_scale, atol=0.0, rtol=_LEAST
    )
    for (path, first), (_, coefficients) in zip(knots_ties(adapters, paths, svd), branch, strict=True):
        found = decomposed(path)
        # Both branches lie in the span of U, which is the rank that the blend needs.
        left = (found.U.t() @ first.B) @ first.A
        right = options.cur_scale * (found.C @ coefficients)
        _check_finite("svd_scale", options.svd_scale, path, left)
        _check_finite("cur_scale", options.cur_scale, path, right)
        alpha = options.alpha
        if isinstance(alpha, str):
            norms = [float(side.norm()) for side in (left, right)]
            alpha = norms[0] / sum(norms) if sum(norms) else 0.5
        yield path, Factor(alpha * left + (1 - alpha) * right, options.scale * found.U, 1.0)


def _check_finite(name: str, scale: float, path: str, branch: Tensor) -> None:
    if not torch.isfinite(branch.float()).all():
        raise ValueError(
            f"{name}: the branch of {path} is not finite with {name}={scale:g}; expected a {name}, and adapters, whose "
            "products float32 holds"
        )


METHODS = (
    gradient_free(
        "svd_cur",
        "KnOTS-TIES blended with TIES on a column (CUR) decomposition",
        "On the Representation Geometry of LoRA Model Merging (code: lcytoronto/knots_cur)",
        SVDCUROptions,
        in_float32(svd_cur),
        averages=True,
    ),
)
