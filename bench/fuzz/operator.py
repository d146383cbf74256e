"""Random problems for the operator, its bank and its layer, forward and backward, against NumPy; and bad input."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nsc_kernels as nk

from . import operator_oracle as oracle
from .operator_bad_input import refusal
from .trial import Trial

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TOKENS = (0, 1, 2, 3, 5, 11, 12, 13, 24, 31, 64, 97, 193)
WIDTHS = (1, 2, 3, 5, 7, 8, 16, 17, 31, 32, 33, 48, 61, 64, 65, 97, 127, 128, 130)
RANKS = (0, 1, 2, 3, 4, 5, 7, 8, 13, 16, 31)
# Powers of ten by which an input is scaled: sums of squares stay inside the dtype, whose limits are not the question.
SCALES = {"f64": 60, "f32": 15, "bf16": 15, "f16": 1}
LAYOUTS = ("plain", "columns_of_wider", "every_other_row", "every_other_column", "transposed", "expanded")


@dataclass(frozen=True)
class Problem:
    """What is tried, as it was drawn; ``seed`` and ``number`` draw it and all numbers again."""

    seed: int
    number: int
    call: str  # merged_lora | merged_lora_nsc | layer | layer_nsc
    dtype: str
    T: int
    d_in: int
    d_out: int
    ranks: tuple[int, ...]
    factors: str  # random | repeated_rows | zero_rows | rows_of_many_sizes
    tokens: str  # random | zero | row_space | one_bad
    scale: int
    per_row: bool
    base: str  # none, or a layout
    layout: str
    lead: tuple[int, ...]
    grads: str  # which of z, lam, base; "no_grad"; "inference"
    backend: str


def trials(seed: int) -> Iterator[Trial]:
    """Endless; the n-th is :func:`trial` of the seed and n."""
    for number in itertools.count():
        yield trial(seed, number)


def trial(seed: int, number: int) -> Trial:
    rng = np.random.default_rng((seed, number))
    # The factors' and tokens' numbers are NumPy's; nothing here takes from torch's generator.
    if rng.random() < 0.15:
        return refusal(seed, number, rng)
    problem = draw(seed, number, rng)
    try:
        found = _tried(problem, rng)
    except Exception as error:  # whatever it is, no valid call may raise it
        found = f"{type(error).__name__}: {error}"
    return Trial(str(problem), "wrong" if found else "right", found)


def draw(seed: int, number: int, rng: np.random.Generator) -> Problem:
    def one(choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    call, T = one(("merged_lora", "merged_lora_nsc", "layer", "layer_nsc")), one(TOKENS)
    dtype = one(tuple(DTYPES))
    leads = [(T,), (T,), (1, T), (T, 1)] + ([(2, T // 2)] if T % 2 == 0 else []) + ([()] if T == 1 else [])
    grads = ["no_grad", "inference", "z", "lam", "z+lam"]
    given = call in ("merged_lora", "merged_lora_nsc") and rng.random() < 0.6
    return Problem(
        seed=seed,
        number=number,
        call=call,
        dtype=dtype,
        T=T,
        d_in=one(WIDTHS),
        d_out=one(WIDTHS),
        ranks=tuple(one(RANKS) for _ in range(int(rng.integers(1, 7)))),
        factors=one(("random", "random", "repeated_rows", "zero_rows", "rows_of_many_sizes")),
        tokens=one(("random", "random", "random", "zero", "row_space", "one_bad")),
        scale=int(rng.integers(-SCALES[dtype], SCALES[dtype] + 1)) if rng.random() < 0.3 else 0,
        per_row=call.startswith("merged") and bool(rng.random() < 0.3),
        base=one(LAYOUTS) if given else "none",
        layout=one(LAYOUTS) if rng.random() < 0.6 else "plain",
        lead=one(leads),
        grads=one(grads + (["base", "z+lam+base"] if given else [])),
        backend=one(("auto", "cpu", "reference")),
    )


def factors(p: Problem, rng: np.random.Generator) -> list[tuple[Tensor, Tensor, float]]:
    """A, B and scaling of every adapter, in the problem's dtype."""
    made = []
    for rank in p.ranks:
        A = rng.standard_normal((rank, p.d_in)) / p.d_in**0.5
        if rank and p.factors == "repeated_rows":
            independent = int(rng.integers(1, rank + 1))
            A[independent:] = 2 * A[rng.integers(0, independent, rank - independent)]
        if rank and p.factors == "zero_rows":
            A[rng.random(rank) < 0.4] = 0
        if p.factors == "rows_of_many_sizes":
            A *= 2.0 ** rng.integers(-6, 7, (rank, 1)) if p.dtype == "f16" else 4.0 ** rng.integers(-16, 17, (rank, 1))
        B = rng.standard_normal((p.d_out, rank))
        if p.factors == "rows_of_many_sizes":
            B /= np.maximum(np.abs(A).max(1, initial=0), 1e-3 if p.dtype == "f16" else 1e-30)
        scaling = float(rng.uniform(-2, 2))
        made.append((torch.from_numpy(A).to(DTYPES[p.dtype]), torch.from_numpy(B).to(DTYPES[p.dtype]), scaling))
    return made


def tokens(p: Problem, A: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    z = rng.standard_normal((p.T, p.d_in))
    if p.tokens == "row_space" and len(A):
        z = rng.standard_normal((p.T, len(A))) @ A
    z *= 10.0**p.scale
    if p.tokens == "zero":
        z[rng.random(p.T) < 0.7] = 0
    if p.tokens == "one_bad" and p.T and not p.call.startswith("layer"):
        z[int(rng.integers(p.T)), int(rng.integers(p.d_in))] = rng.choice([np.nan, np.inf])
    return z


def laid_out(x: np.ndarray, layout: str, dtype: torch.dtype, between: float = np.nan) -> Tensor:
    """``x [T, d]`` as a tensor with other strides; ``between`` lies between its elements where something does."""
    t = torch.from_numpy(x).to(dtype)
    T, d = t.shape
    if layout == "columns_of_wider":
        whole = torch.full((T, d + 5), between, dtype=dtype)
        whole[:, 2:-3] = t
        return whole[:, 2:-3]
    if layout == "every_other_row":
        whole = torch.full((2 * T, d), between, dtype=dtype)
        whole[::2] = t
        return whole[::2]
    if layout == "every_other_column":
        whole = torch.full((T, 2 * d), between, dtype=dtype)
        whole[:, ::2] = t
        return whole[:, ::2]
    if layout == "transposed":
        return t.t().contiguous().t()
    return t[:1].expand(T, d) if layout == "expanded" else t


def _wide(t: Tensor) -> np.ndarray:
    return t.detach().double().numpy()


def _tried(p: Problem, rng: np.random.Generator) -> str:
    """What is wrong with the answer to a problem, or nothing."""
    dtype = DTYPES[p.dtype]
    acc = torch.float64 if p.dtype == "f64" else torch.float32
    raw = factors(p, rng)
    bank = nk.AdapterBank.from_factors([A for A, _, _ in raw], [B for _, B, _ in raw], [s for _, _, s in raw])
    T, K = p.T, len(p.ranks)
    stats, layered = p.call.endswith("nsc"), p.call.startswith("layer")
    # PyTorch's own linear multiplies what lies after an odd row by zero, on processors with AMX.
    between = 1.0 if layered else np.nan
    z = laid_out(tokens(p, _wide(bank.A), rng), p.layout, dtype, between)
    given = None if p.base == "none" else laid_out(rng.standard_normal((T, p.d_out)), p.base, dtype)
    lam = torch.from_numpy(rng.uniform(-1, 1.5, (T, K) if p.per_row else (K,))).to(acc)
    layer = nn.Linear(p.d_in, p.d_out, bias=bool(rng.random() < 0.5), dtype=dtype, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.from_numpy(rng.standard_normal(tuple(parameter.shape)) / p.d_in**0.5))
    dy = laid_out(rng.standard_normal((T, p.d_out)), "plain" if rng.random() < 0.7 else p.layout, dtype, between)
    dquad = torch.from_numpy(rng.standard_normal((T, K))).to(acc)
    dsqnorm = torch.from_numpy(rng.standard_normal(T)).to(acc)
    stats, layered = p.call.endswith("nsc"), p.call.startswith("layer")
    n = oracle.Numbers(
        z=_wide(z),
        A=_wide(bank.A),
        Bt=_wide(bank.Bt),
        offsets=bank.offsets,
        lam=_wide(lam),
        base=None if given is None else _wide(given),
        weight=_wide(layer.weight) if layered else None,
        bias=_wide(layer.bias) if layered and layer.bias is not None else None,
        dy=_wide(dy),
        dquad=_wide(dquad) if stats else None,
        dsqnorm=_wide(dsqnorm) if stats else None,
    )
    own = float(torch.finfo(torch.float64 if p.dtype == "f64" else torch.float32).eps)
    unit = float(torch.finfo(dtype).eps)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    wrong = oracle.bank_error(n, [(_wide(A), _wide(B), s) for A, B, s in raw], own, unit, tiny)
    if wrong:
        return wrong
    kept = [None if t is None else t.clone() for t in (z, lam, given)]
    found = _called(p, bank, layer, z, lam, given, (dy, dquad, dsqnorm))
    for name, before, after in zip(("z", "lam", "base"), kept, (z, lam, given), strict=True):
        if before is not None and after is not None and not torch.equal(before.nan_to_num(7), after.nan_to_num(7)):
            return f"{name} was written to"
    for name, t in found.items():
        expected = acc if name in ("quad", "sqnorm", "dlam") else dtype
        if t.dtype is not expected:
            return f"{name}: {t.dtype}, expected {expected}"
    numbers = np.float64 if p.dtype == "f64" else np.float32
    with np.errstate(invalid="ignore", over="ignore"):
        return oracle.disagreement(
            {name: _wide(t) for name, t in found.items()},
            n,
            numbers,
            lambda x: torch.from_numpy(np.asarray(x)).to(dtype).to(acc).numpy(),
            unit,
            tiny,
        )


def _called(
    p: Problem,
    bank: nk.AdapterBank,
    layer: nn.Linear,
    z: Tensor,
    lam: Tensor,
    base: Tensor | None,
    gradients: tuple[Tensor, ...],
) -> dict[str, Tensor]:
    """Outputs and the gradients asked for, of the shapes ``[T, ...]``."""
    leaves = {"z": z, "lam": lam, "base": base}
    wanted = {name: t for name, t in leaves.items() if t is not None and name in p.grads.split("+")}
    for t in wanted.values():
        t.requires_grad_()
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    mode: Callable[[], Any] = modes.get(p.grads, contextlib.nullcontext)

    def shaped(t: Tensor | None) -> Any:
        return t if t is None else t.reshape(*p.lead, t.shape[-1])

    stats = p.call.endswith("nsc")
    with mode(), nk.use_backend(p.backend):
        if p.call.startswith("layer"):
            module = nk.MergedLoRALinear(layer, bank, nn.Parameter(lam) if "lam" in wanted else lam)
            if "lam" in wanted:
                wanted["lam"] = module.lam
            out = module.nsc(shaped(z)) if stats else module(shaped(z))
        else:
            function = nk.merged_lora_nsc if stats else nk.merged_lora
            out = function(shaped(z), bank, shaped(lam) if p.per_row else lam, shaped(base))
        outputs = dict(zip(("y", "quad", "sqnorm"), out if stats else (out,), strict=False))
        for (name, t), last in zip(outputs.items(), (bank.d_out, bank.K, None), strict=False):
            if t.shape != (*p.lead, *([] if last is None else [last])):
                raise AssertionError(f"{name} has shape {tuple(t.shape)} for a z of {(*p.lead, bank.d_in)}")
        into = dict(zip(("y", "quad", "sqnorm"), gradients, strict=True))
        reached = [name for name, t in outputs.items() if t.requires_grad]
        back = torch.autograd.grad(
            [outputs[name] for name in reached],
            list(wanted.values()),
            [into[name].reshape(outputs[name].shape) for name in reached],
        ) if wanted else ()
    found = {name: t.detach().reshape(p.T, t.shape[-1]) for name, t in outputs.items() if name != "sqnorm"}
    if stats:
        found["sqnorm"] = outputs["sqnorm"].detach().reshape(p.T)
    return found | {f"d{name}": grad for name, grad in zip(wanted, back, strict=True)}
