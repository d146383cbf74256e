"""Whether a contender of operator_gpu.py computes what it is to compute, against the reference in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from nsc_kernels import reference

from .gpu_contenders import Contender
from .gpu_data import Data

# Of the scale of a result. bfloat16 has 2^-9; contenders round u before they square it; only the norm of z is float32.
BOUNDS = {"y": 2**-6, "quad": 2**-6, "sqnorm": 2**-14, "dz": 2**-6, "dlam": 2**-6}


def expected(d: Data, contender: Contender, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """What the contender is to return, by the reference in ``dtype``; dlam before its sum over the tokens."""
    acc = reference.accumulation_dtype(dtype)
    z, A, Bt, base, dz_base, dy = (
        t.detach().to(dtype) for t in (d.z, d.bank.A, d.bank.Bt, d.base, d.dz_base, d.grads[0])
    )
    if contender.whole:
        W = d.W.to(dtype)
        base, dz_base = z @ W.t(), dy @ W
    if not contender.adapters:
        return {"y": base, "dz": dz_base}
    per_token = d.lam.detach().to(acc).expand(d.shape.T, -1)
    factors = (A, Bt, d.bank.offsets, per_token)
    y, quad, sqnorm, u = reference.forward(z, *factors, base, contender.stats)
    dquad, dsqnorm = (g.to(acc) if contender.stats else None for g in d.grads[1:])
    start = dz_base if contender.whole or contender.inplace else None
    dz, dlam = reference.backward(dy, dquad, dsqnorm, u, z, *factors, start, True, True)
    return {"y": y, "quad": quad, "sqnorm": sqnorm, "dz": dz, "dlam": dlam}


def errors(contender: Contender, d: Data) -> dict[str, tuple[float, float]]:
    """Largest error of each result, and that of the reference in bfloat16, both against float64 and of its scale.

    The scale is the largest entry; for dlam, a sum over tokens that may cancel, the norm of what is summed. ``d`` is
    written to by what works in place.
    """
    exact, eager = expected(d, contender, torch.float64), expected(d, contender, torch.bfloat16)
    with torch.set_grad_enabled(contender.autograd):
        found = contender.forward(d)
        values = found[:3] + tuple(contender.backward(d, found.saved))
    compared: dict[str, tuple[float, float]] = {}
    for name, value in zip(BOUNDS, values, strict=True):
        truth, other = exact.get(name), eager.get(name)
        if truth is None or other is None:
            assert value is None, f"{name} is not {contender.name}'s to compute"
            continue
        scale = truth.abs().max()
        if name == "dlam":
            truth, other, scale = truth.sum(0), other.sum(0), truth.norm(dim=0).max()
        assert value is not None, f"{name} is missing"
        assert value.shape == truth.shape, f"{name} is {tuple(value.shape)} in place of {tuple(truth.shape)}"
        ours, eagers = (float((x.detach().double() - truth).abs().max() / scale) for x in (value, other))
        compared[name] = ours, eagers
    return compared


def faults(found: dict[str, tuple[float, float]]) -> list[str]:
    """In words, what is wrong; what is not a number is."""
    return [
        f"{name} is off by {error:.2g} of its scale, eager bfloat16 by {eager:.2g}"
        for name, (error, eager) in found.items()
        if not error <= BOUNDS[name]
    ]
