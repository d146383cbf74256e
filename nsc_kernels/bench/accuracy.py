"""Whether a contender computes what it is to compute, against the reference in float64.

A contender's error may be twice that of eager PyTorch in the same dtype, plus 4 float32 units in the last place of the
largest entry: where eager is exact by luck another order of summation is not an error. Eager is the larger error of
three ways to write it: with the rounding points of :mod:`nsc_kernels.reference`, with the adapters concatenated, where
u is rounded before it is squared, and with one adapter after another, where y is rounded after each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from nsc_kernels import reference

from .problem import Problem
from .registry import Contender, Result, parts

NAMES = ("y", "quad", "sqnorm", "dz", "dlam")
INPUTS = ("z", "A", "Bt", "lam", "base", "dy", "dquad", "dsqnorm", "dz_base", "W")
IN_PLACE = {"base", "dz_base"}  # what a contender registered as such may write over
UNIT = torch.finfo(torch.float32).eps
DEVIATIONS = 4  # of a sum over tokens, whose error may be small by luck

Results = dict[str, Tensor | None]  # dlam per token, before its sum


class Error(NamedTuple):
    """Largest error against float64, and what is allowed."""

    found: float
    bound: float


def by_reference(p: Problem, contender: Contender, dtype: torch.dtype) -> Results:
    """What the contender is to return, by the reference in ``dtype``."""
    acc = reference.accumulation_dtype(dtype)
    z, A, Bt, base, dz_base, dy = (t.detach().to(dtype) for t in (p.z, p.A, p.Bt, p.base, p.dz_base, p.dy))
    if p.W is not None:
        W = p.W.to(dtype)
        base, dz_base = linear(z, W), dy @ W
    if not contender.adapters:
        return {"y": base, "dz": dz_base}
    per_token = p.lam.detach().to(acc).expand(p.shape.T, -1)
    factors = (A, Bt, p.bank.offsets, per_token)
    y, quad, sqnorm, u = reference.forward(z, *factors, base, contender.stats)
    dquad, dsqnorm = (g.to(acc) if contender.stats else None for g in p.grads[1:])
    start = dz_base if contender.whole or contender.inplace else None
    dz, dlam = reference.backward(dy, dquad, dsqnorm, u, z, *factors, start, True, True)
    return {"y": y, "quad": quad, "sqnorm": sqnorm, "dz": dz, "dlam": dlam}


def squares(x: Tensor) -> Tensor:
    """The sum along the last dimension.

    A norm with a wider dtype reads its input once; ``float().square().sum()`` writes two float32 tensors first.
    """
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square()


def concatenated(p: Problem, contender: Contender) -> Results:
    """Two products, everything between them rounded to the dtype."""
    K, z = p.shape.K, p.z.detach()

    def each(x: Tensor, lam: Tensor) -> Tensor:
        return (x.unflatten(-1, (K, -1)) * lam[..., None]).flatten(-2).to(p.dtype)

    u, v, lam = z @ p.A.t(), p.dy @ p.Bt.t(), p.lam.detach()
    c = each(v, lam) + (each(u, 2 * p.dquad) if contender.stats else 0)
    start = p.dz0(contender.inplace)
    dz = c @ p.A if start is None else torch.addmm(start, c, p.A)
    if contender.stats:
        dz = dz + 2 * p.dsqnorm.to(p.dtype)[:, None] * z
    return {
        "y": torch.addmm(p.y0(), each(u, lam), p.Bt),
        "quad": squares(u.unflatten(-1, (K, -1))),
        "sqnorm": squares(z),
        "dz": dz,
        "dlam": (u * v).unflatten(-1, (K, -1)).float().sum(-1),
    }


def one_by_one(p: Problem, contender: Contender) -> Results:
    """An adapter at a time, the sum rounded after each, and what autograd makes of it."""
    with torch.enable_grad():
        z = p.z.detach().requires_grad_()
        lam = p.lam.detach().expand(p.shape.T, -1).clone().requires_grad_()
        y, us, offsets = p.base if p.W is None else linear(z, p.W), [], p.bank.offsets
        for k in range(p.shape.K):
            rows = slice(offsets[k], offsets[k + 1])
            us.append(z @ p.A[rows].t())
            y = y + (us[-1] @ p.Bt[rows]) * lam[:, k, None].to(p.dtype)
        quad, sqnorm = squares(torch.cat(us, -1).unflatten(-1, (p.shape.K, -1))), squares(z)
        outputs = (y, quad, sqnorm) if contender.stats else (y,)
        dz, dlam = torch.autograd.grad(outputs, (z, lam), p.grads[: len(outputs)])
    if contender.inplace:
        dz = dz + p.dz_base
    return {"y": y.detach(), "quad": quad.detach(), "sqnorm": sqnorm.detach(), "dz": dz, "dlam": dlam}


def _off(value: Tensor, truth: Tensor) -> float:
    """NaN where anything is not a number."""
    return float((value.detach().double() - truth).abs().max()) if truth.numel() else 0.0


def _own(name: str, value: Any) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is to be a tensor; found {type(value).__name__}")
    return value.detach().clone()


def _bound(name: str, truth: Tensor, eagers: list[Tensor]) -> float:
    if name != "dlam":
        return 2 * max(_off(one, truth) for one in eagers) + 4 * UNIT * float(truth.abs().max())
    per_token = max(float((one.double() - truth).norm(dim=0).max()) for one in eagers)
    largest = max(_off(one.sum(0), truth.sum(0)) for one in eagers)
    return max(2 * largest, DEVIATIONS * per_token) + 4 * UNIT * float(truth.norm(dim=0).max())


class Judge:
    """Holds contenders to one problem's right answers, which are computed once for each kind of contender."""

    def __init__(self, p: Problem):
        self.p = p
        self._known: dict[tuple[bool, ...], tuple[dict[str, Tensor], dict[str, float]]] = {}

    @torch.no_grad()
    def _answers(self, contender: Contender) -> tuple[dict[str, Tensor], dict[str, float]]:
        kind = contender.stats, contender.adapters, contender.inplace, contender.whole
        if kind not in self._known:
            exact = by_reference(self.p, contender, torch.float64)
            ways = [by_reference(self.p, contender, self.p.dtype)]
            if contender.adapters:
                ways += [concatenated(self.p, contender), one_by_one(self.p, contender)]
            truths = {name: truth for name, truth in exact.items() if truth is not None}
            bounds = {
                name: _bound(name, truth, [one for way in ways if (one := way[name]) is not None])
                for name, truth in truths.items()
            }
            if "dlam" in truths:
                truths["dlam"] = truths["dlam"].sum(0)
            self._known[kind] = truths, bounds
        return self._known[kind]

    def errors(self, contender: Contender) -> dict[str, Error]:
        """Of every result of the contender, as its second call has it: the first, which is given other coefficients, as
        it is when it is made, leaves what a workspace that is not cleared, or a value that is kept, would make of the
        next.

        Raises:
            ValueError: for a result that is missing, one too many, of another shape or dtype or not the contender's to
                compute, and for an input that it has written over, which the others are given as well.
        """
        truths, bounds = self._answers(contender)
        given = {name: value.detach() for name in INPUTS if (value := getattr(self.p, name)) is not None}
        kept = {name: value.clone() for name, value in given.items()}

        def put_back() -> list[str]:
            changed = [name for name, value in given.items() if not torch.equal(value, kept[name])]
            for name in changed:
                given[name].copy_(kept[name])
            return changed

        self._poison()
        try:
            with torch.set_grad_enabled(contender.autograd):
                given["lam"].neg_()
                forward, backward = parts(contender.make(self.p), "the contender", ("forward", "backward"))
                *_, saved = parts(forward(), "forward", Result._fields)
                parts(backward(saved), "backward", ("dz", "dlam"))
                put_back()
                y, quad, sqnorm, saved = forward()
                # What works in place returns what is put back below.
                values = [_own(*named) for named in zip(NAMES, (y, quad, sqnorm), strict=False)]
                values += [_own(*named) for named in zip(NAMES[3:], backward(saved), strict=True)]
        finally:
            changed = put_back()
        if wrongly := [name for name in changed if not (contender.inplace and name in IN_PLACE)]:
            more = "" if contender.inplace else ", or register it with inplace=True if it is to be base or dz_base"
            raise ValueError(f"it writes over {', '.join(wrongly)}, which all are given: write to a copy{more}")
        compared: dict[str, Error] = {}
        for name, value in zip(NAMES, values, strict=True):
            if name not in truths:
                if value is not None:
                    raise ValueError(f"{name} is not {contender.name}'s to compute, by what it was registered with")
                continue
            if value is None:
                raise ValueError(f"{name} is missing")
            if value.shape != truths[name].shape:
                raise ValueError(f"{name} is {list(value.shape)}, expected {list(truths[name].shape)}")
            dtype = self.p.dtype if name in ("y", "dz") else torch.float32
            if value.dtype is not dtype:
                raise ValueError(f"{name} is {value.dtype}, expected {dtype}")
            compared[name] = Error(_off(value, truths[name]), bounds[name])
        return compared

    def _poison(self) -> None:
        """NaN where a contender's results will probably lie: what one leaves unwritten is not another's answer."""
        p = self.p
        like = (p.base, p.dz_base, p.dquad, p.dsqnorm, p.z @ p.A.t())
        nans = [torch.full_like(t, torch.nan) for t in like for _ in range(2)]
        del nans


def faults(found: dict[str, Error]) -> list[str]:
    """In words, what is wrong; what is not a number is."""
    return [
        f"{name} is off by {error:.2g}, allowed is {bound:.2g} (twice eager PyTorch's error)"
        for name, (error, bound) in found.items()
        if not error <= bound
    ]
