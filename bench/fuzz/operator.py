"""Random problems for the operator, its bank and its layer, forward and backward, against NumPy; and bad input."""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nsc_kernels as nk

from . import operator_oracle as oracle
from .layouts import LAYOUTS, laid_out
from .operator_bad_input import refusal
from .trial import Trial

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TOKENS = (0, 1, 2, 3, 5, 11, 12, 13, 24, 31, 64, 97, 193)
WIDTHS = (1, 2, 3, 5, 7, 8, 16, 17, 31, 32, 33, 48, 61, 64, 65, 97, 127, 128, 130)
RANKS = (0, 1, 2, 3, 4, 5, 7, 8, 13, 16, 31)
# Now and then: what is more than one block of a kernel in one direction.
MANY_TOKENS, WIDE, LARGE_RANKS, MANY_ADAPTERS = (513, 1030), (256, 511, 768, 1000), (48, 64, 100), (12, 25, 40)
# Powers of ten by which an input is scaled: sums of squares stay inside the dtype, whose limits are not the question.
SCALES = {"f64": 60, "f32": 15, "bf16": 15, "f16": 1}
# A gradient has them all, and is one number everywhere where a sum was taken.
GRADIENTS = (*LAYOUTS, "one_number")
BANKS = ("made", "made", "loaded", "copied", "from_state")


@dataclass(frozen=True)
class Problem:
    """What is tried, as it was drawn; ``seed`` and ``number`` draw it and all numbers again."""

    seed: int
    number: int
    call: str  # merged_lora | merged_lora_nsc | layer | layer_nsc
    mode: str  # eager | compiled | the dtype of autocast
    dtype: str  # of z, base, layer and bank
    raw: str  # of A and B, of which the bank is made
    lam: str
    T: int
    d_in: int
    d_out: int
    ranks: tuple[int, ...]
    factors: str  # random | repeated_rows | zero_rows | rows_of_many_sizes
    bank: str
    tokens: str  # random | zero | row_space | one_bad
    scale: int
    per_row: str  # no, or a layout
    base: str  # none, or a layout
    layout: str
    gradient: str  # layout of dy
    lead: tuple[int, ...]
    turned: bool  # two leading dimensions are in memory the other way round
    used: tuple[str, ...]  # the outputs that have a gradient
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

    def often(choices: Any, rare: Any) -> Any:
        return one(rare if rng.random() < 0.03 else choices)

    call, T = one(("merged_lora", "merged_lora_nsc", "layer", "layer_nsc")), often(TOKENS, MANY_TOKENS)
    dtype = one(tuple(DTYPES))
    mode = "eager"
    if rng.random() < 0.15:
        mode = one(("bf16", "f16")) if dtype in ("f64", "f32") else dtype
    elif rng.random() < 0.003:
        mode = "compiled"
    limit = min(SCALES[dtype], SCALES.get(mode, 99))
    scale = int(rng.integers(-limit, limit + 1)) if rng.random() < 0.3 else 0
    wider = [name for name in DTYPES if DTYPES[name].itemsize > DTYPES[dtype].itemsize]
    narrower = [name for name in DTYPES if DTYPES[name].itemsize < (8 if dtype == "f64" else 4)]
    leads = [(T,), (T,), (1, T), (T, 1)] + ([(2, T // 2)] if T % 2 == 0 else []) + ([()] if T == 1 else [])
    lead = one(leads)
    outputs = ("y", "quad", "sqnorm") if call.endswith("nsc") else ("y",)
    used = tuple(name for name in outputs if rng.random() < 0.5)
    grads = ["no_grad", "inference", "z", "lam", "z+lam"]
    given = call in ("merged_lora", "merged_lora_nsc") and rng.random() < 0.6
    return Problem(
        seed=seed,
        number=number,
        call=call,
        mode=mode,
        dtype=dtype,
        raw=one(wider) if wider and rng.random() < 0.15 else dtype,
        lam=one(narrower) if scale == 0 and rng.random() < 0.15 else "f64" if dtype == "f64" else "f32",
        T=T,
        d_in=often(WIDTHS, WIDE),
        d_out=often(WIDTHS, WIDE),
        ranks=tuple(often(RANKS, LARGE_RANKS) for _ in range(often(range(1, 7), MANY_ADAPTERS))),
        factors=one(("random", "random", "repeated_rows", "zero_rows", "rows_of_many_sizes")),
        bank=one(BANKS),
        tokens=one(("random", "random", "random", "zero", "row_space", "one_bad")),
        scale=scale,
        per_row=one(LAYOUTS) if call.startswith("merged") and rng.random() < 0.3 else "no",
        base=one(LAYOUTS) if given else "none",
        layout=one(LAYOUTS) if rng.random() < 0.6 else "plain",
        gradient=one(GRADIENTS) if rng.random() < 0.3 else "plain",
        lead=lead,
        turned=len(lead) == 2 and bool(rng.random() < 0.3),
        used=used or outputs,
        grads=one(grads + (["base", "z+lam+base"] if given else [])),
        backend=one(("auto", "cpu", "reference")),
    )


def factors(p: Problem, rng: np.random.Generator) -> list[tuple[Tensor, Tensor, float]]:
    """A, B and scaling of every adapter."""
    made = []
    for rank in p.ranks:
        A = rng.standard_normal((rank, p.d_in)) / p.d_in**0.5
        if rank and p.factors == "repeated_rows":
            independent = int(rng.integers(1, rank + 1))
            A[independent:] = 2 * A[rng.integers(0, independent, rank - independent)]
        if rank and p.factors == "zero_rows":
            A[rng.random(rank) < 0.4] = 0
        in_half = "f16" in (p.dtype, p.mode)
        if p.factors == "rows_of_many_sizes":
            A *= 2.0 ** rng.integers(-6, 7, (rank, 1)) if in_half else 4.0 ** rng.integers(-16, 17, (rank, 1))
        B = rng.standard_normal((p.d_out, rank))
        if p.factors == "rows_of_many_sizes":
            B /= np.maximum(np.abs(A).max(1, initial=0), 1e-3 if in_half else 1e-30)
        scaling = float(rng.uniform(-2, 2))
        made.append((torch.from_numpy(A).to(DTYPES[p.raw]), torch.from_numpy(B).to(DTYPES[p.raw]), scaling))
    return made


def banked(p: Problem, raw: list[tuple[Tensor, Tensor, float]]) -> nk.AdapterBank:
    A, B, scaling = zip(*raw, strict=True)
    bank = nk.AdapterBank.from_factors(A, B, scaling, dtype=None if p.raw == p.dtype else DTYPES[p.dtype])
    if p.bank == "loaded":
        with tempfile.TemporaryDirectory() as folder:
            bank.save(Path(folder) / "bank.safetensors")
            return nk.AdapterBank.load(Path(folder) / "bank.safetensors")
    if p.bank == "from_state":
        other = nk.AdapterBank(torch.zeros_like(bank.A), torch.zeros_like(bank.Bt), (0, *[bank.R] * bank.K))
        other.load_state_dict(bank.state_dict())
        return other
    return copy.deepcopy(bank) if p.bank == "copied" else bank


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


def _wide(t: Tensor) -> np.ndarray:
    return t.detach().double().numpy()


def _tried(p: Problem, rng: np.random.Generator) -> str:
    """What is wrong with the answer to a problem, or nothing."""
    dtype = DTYPES[p.dtype]
    # Autocast leaves float64 as it is.
    inner = DTYPES[p.mode] if p.mode in DTYPES and p.dtype != "f64" else dtype
    acc = torch.float64 if p.dtype == "f64" else torch.float32
    raw = factors(p, rng)
    bank = banked(p, raw)
    wrong = oracle.bank_error(
        _wide(bank.A),
        _wide(bank.Bt),
        bank.offsets,
        [(_wide(A), _wide(B), s) for A, B, s in raw],
        float(torch.finfo(torch.float64 if p.raw == "f64" else torch.float32).eps),
        *_grain(dtype),
    )
    if wrong:
        return wrong
    T, K = p.T, len(p.ranks)
    layered = p.call.startswith("layer")
    # PyTorch's own linear multiplies what lies after an odd row by zero, on processors with AMX.
    between = 1.0 if layered else np.nan
    z = laid_out(tokens(p, _wide(bank.A), rng), p.layout, dtype, between)
    given = None if p.base == "none" else laid_out(rng.standard_normal((T, p.d_out)), p.base, dtype)
    lam = torch.from_numpy(rng.uniform(-1, 1.5, K)).to(DTYPES[p.lam])
    if p.per_row != "no":
        lam = laid_out(rng.uniform(-1, 1.5, (T, K)), p.per_row, DTYPES[p.lam])
    layer = nn.Linear(p.d_in, p.d_out, bias=bool(rng.random() < 0.5), dtype=dtype, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.from_numpy(rng.standard_normal(tuple(parameter.shape)) / p.d_in**0.5))
    gradients = {
        "y": laid_out(rng.standard_normal((T, p.d_out)), p.gradient, inner, between),
        "quad": laid_out(rng.standard_normal((T, K)), p.gradient, acc),
        "sqnorm": laid_out(rng.standard_normal((T, 1)), p.gradient, acc)[:, 0],
    }
    # A compiled graph has zeros for what nobody uses, in PyTorch's functions as in ours, and not nothing.
    zeros = ("y", "quad", "sqnorm") if p.mode == "compiled" and p.call.endswith("nsc") else ()
    dy, dquad, dsqnorm = (
        _wide(t) if name in p.used else np.zeros(t.shape) if name in zeros else None for name, t in gradients.items()
    )
    n = oracle.Numbers(
        z=_wide(z.to(inner)),
        A=_wide(bank.A.to(inner)),
        Bt=_wide(bank.Bt.to(inner)),
        offsets=bank.offsets,
        lam=_wide(lam),
        base=None if given is None else _wide(given.to(inner)),
        weight=_wide(layer.weight.to(inner)) if layered else None,
        bias=_wide(layer.bias.to(inner)) if layered and layer.bias is not None else None,
        dy=dy,
        dquad=dquad,
        dsqnorm=dsqnorm,
    )
    kept = [None if t is None else t.clone() for t in (z, lam, given)]
    found = _called(p, bank, layer, z, lam, given, gradients)
    for name, before, after in zip(("z", "lam", "base"), kept, (z, lam, given), strict=True):
        if before is not None and after is not None and not torch.equal(before.nan_to_num(7), after.nan_to_num(7)):
            return f"{name} was written to"
    dtypes = {"y": inner, "dz": dtype, "dbase": dtype, "dlam": DTYPES[p.lam], "quad": acc, "sqnorm": acc}
    for name, t in found.items():
        if t.dtype is not dtypes[name]:
            return f"{name}: {t.dtype}, expected {dtypes[name]}"
    own = n
    if layered:
        weight = layer.weight.to(inner)
        into = None if dy is None else _wide(gradients["y"] @ weight)
        y = F.linear(z.detach().to(inner), weight, layer.bias if layer.bias is None else layer.bias.to(inner))
        own = replace(n, weight=None, bias=None, base=_wide(y), into=into)

    def rounding(to: torch.dtype) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: torch.from_numpy(np.asarray(x)).to(to).to(acc).numpy()

    numbers = np.float64 if p.dtype == "f64" else np.float32
    with np.errstate(invalid="ignore", over="ignore"):
        return oracle.disagreement(
            {name: _wide(t) for name, t in found.items()},
            n,
            own,
            numbers,
            rounding(inner),
            rounding(DTYPES[p.lam]),
            # lam's gradient comes of what was kept in the dtype of z.
            (_grain(inner), _grain(inner, DTYPES[p.lam])),
        )


def _grain(*dtypes: torch.dtype) -> tuple[float, float]:
    """The largest unit of some dtypes, and how far apart the smallest numbers are at most."""
    infos = [torch.finfo(dtype) for dtype in dtypes]
    return max(info.eps for info in infos), max(info.smallest_normal * info.eps for info in infos)


def _called(
    p: Problem,
    bank: nk.AdapterBank,
    layer: nn.Linear,
    z: Tensor,
    lam: Tensor,
    base: Tensor | None,
    gradients: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Outputs and the gradients asked for, of the shapes ``[T, ...]``."""
    leaves = {"z": z, "lam": lam, "base": base}
    wanted = {name: t for name, t in leaves.items() if t is not None and name in p.grads.split("+")}
    for t in wanted.values():
        t.requires_grad_()
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    mode: Callable[[], Any] = modes.get(p.grads, contextlib.nullcontext)
    autocast = torch.autocast("cpu", DTYPES.get(p.mode, torch.bfloat16), enabled=p.mode in DTYPES)

    def shaped(t: Tensor | None) -> Any:
        t = t if t is None else t.reshape(*p.lead, t.shape[-1])
        return t if t is None or not p.turned else t.transpose(0, 1).contiguous().transpose(0, 1)

    function: Callable[..., Any] = nk.merged_lora_nsc if p.call.endswith("nsc") else nk.merged_lora
    arguments = [shaped(z)]
    with mode(), autocast, nk.use_backend(p.backend):
        if p.call.startswith("layer"):
            module = nk.MergedLoRALinear(layer, bank, nn.Parameter(lam) if "lam" in wanted else lam)
            if "lam" in wanted:
                wanted["lam"] = module.lam
            function = module.nsc if p.call.endswith("nsc") else module.forward
        else:
            arguments += [bank, lam if p.per_row == "no" else shaped(lam), shaped(base)]
        if p.mode == "compiled":
            torch._dynamo.reset()
            function = torch.compile(function, backend="aot_eager", fullgraph=True)
        out = function(*arguments)
        outputs = dict(zip(("y", "quad", "sqnorm"), out if isinstance(out, tuple) else (out,), strict=False))
        for (name, t), last in zip(outputs.items(), (bank.d_out, bank.K, None), strict=False):
            if t.shape != (*p.lead, *([] if last is None else [last])):
                raise AssertionError(f"{name} has shape {tuple(t.shape)} for a z of {(*p.lead, bank.d_in)}")
        reached = [name for name in p.used if outputs[name].requires_grad]
        back = torch.autograd.grad(
            [outputs[name] for name in reached],
            list(wanted.values()),
            [gradients[name].reshape(outputs[name].shape) for name in reached],
            materialize_grads=True,
        ) if wanted and reached else [torch.zeros_like(t) for t in wanted.values()]  # fmt: skip
    found = {name: t.detach().reshape(p.T, t.shape[-1]) for name, t in outputs.items() if name != "sqnorm"}
    if "sqnorm" in outputs:
        found["sqnorm"] = outputs["sqnorm"].detach().reshape(p.T)
    return found | {f"d{name}": grad for name, grad in zip(wanted, back, strict=True)}
