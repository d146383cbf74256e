"""The grid that every backend is held to, and the float64 oracle that holds it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import nsc_kernels as nk
from nsc_kernels.reference import accumulation_dtype, gather, spread

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
OUTPUTS = ("y", "quad", "sqnorm", "dz", "dlam", "dbase")


@dataclass(frozen=True)
class Case:
    """One call. ``ranks`` are the ranks of the whitened bank; a negative number asks for a rank-deficient factor."""

    name: str
    T: int = 7
    d_in: int = 48
    d_out: int = 40
    ranks: tuple[int, ...] = (4, 4)
    per_row: bool = False
    base: bool = True
    scale: float = 1.0
    z: str = "random"  # random | zero | row_space | strided_rows | transposed | expanded


CASES = (
    Case("plain"),
    Case("no_base", base=False),
    Case("one_token", T=1),
    Case("no_tokens", T=0),
    Case("two_tokens", T=2),
    Case("one_adapter_rank_one", ranks=(1,)),
    Case("unequal_ranks", T=13, ranks=(3, 1, 16, 7)),
    Case("absent_adapter", ranks=(0, 5, 0)),
    Case("nothing_adapted", ranks=(0, 0)),
    Case("rank_deficient", ranks=(-6, 4)),
    Case("primes", T=31, d_in=127, d_out=61, ranks=(5, 11, 3)),
    Case("odd_and_wide", T=17, d_in=1031, d_out=77, ranks=(13, 2)),
    Case("narrow_in_wide_out", T=5, d_in=3, d_out=517, ranks=(2, 3)),
    Case("single_feature", d_in=1, d_out=1, ranks=(1, 1)),
    Case("several_blocks", T=205, d_in=96, d_out=72, ranks=(8, 8, 8)),
    Case("rank_above_panel", T=29, d_in=160, d_out=80, ranks=(64, 37, 50)),
    Case("many_adapters", T=9, ranks=(2,) * 64),
    Case("per_row", T=19, ranks=(3, 5), per_row=True),
    Case("per_row_no_tokens", T=0, per_row=True),
    Case("full_rank", d_in=16, ranks=(16, 16)),
    Case("huge", scale=1e15),
    Case("tiny", scale=1e-15),
    Case("zero_input", z="zero"),
    Case("row_space", z="row_space", ranks=(6,)),
    Case("strided_rows", z="strided_rows"),
    Case("transposed", z="transposed"),
    Case("expanded", z="expanded"),
)


@dataclass
class Inputs:
    bank: nk.AdapterBank
    z: Tensor
    lam: Tensor
    base: Tensor | None
    dy: Tensor
    dquad: Tensor
    dsqnorm: Tensor


def make_bank(case: Case, dtype: torch.dtype, device: str = "cpu") -> nk.AdapterBank:
    A, B = [], []
    for rank in case.ranks:
        a = torch.randn(abs(rank), case.d_in, dtype=torch.float64) / case.d_in**0.5
        if rank < 0:
            a[-rank // 2 :] = a[: -rank - (-rank // 2)]
        A.append(a)
        B.append(torch.randn(case.d_out, abs(rank), dtype=torch.float64))
    return nk.AdapterBank.from_factors(A, B, dtype=dtype, device=device)


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Fresh random inputs; the generator is the global one."""
    bank = make_bank(case, dtype, device)
    acc, T, K = accumulation_dtype(dtype), case.T, len(case.ranks)
    if case.z == "zero":
        z = torch.zeros(T, case.d_in)
    elif case.z == "row_space":
        z = torch.randn(T, bank.R) @ bank.A.float().cpu()
    else:
        z = torch.randn(T, case.d_in)
    # Half precision ends at 65504.
    scale = case.scale if dtype is not torch.float16 else min(max(case.scale, 1e-3), 1e3)
    z = (z * scale).to(device, dtype)
    if case.z == "strided_rows":
        wide = torch.full((T, case.d_in + 5), float("nan"), dtype=dtype, device=device)
        wide[:, 2:-3] = z
        z = wide[:, 2:-3]
    elif case.z == "transposed":
        z = z.t().contiguous().t()
    elif case.z == "expanded":
        z = z[:1].expand(T, -1)
    return Inputs(
        bank=bank,
        z=z,
        lam=torch.rand((T, K) if case.per_row else (K,), dtype=acc, device=device) - 0.3,
        base=torch.randn(T, case.d_out).to(device, dtype) if case.base else None,
        dy=torch.randn(T, case.d_out).to(device, dtype),
        dquad=torch.randn(T, K, dtype=acc, device=device),
        dsqnorm=torch.randn(T, dtype=acc, device=device),
    )


def run(backend: str, inputs: Inputs) -> dict[str, Tensor]:
    """All outputs and gradients of the public function on one backend."""
    z = inputs.z.detach().requires_grad_()
    lam = inputs.lam.detach().requires_grad_()
    base = None if inputs.base is None else inputs.base.detach().requires_grad_()
    with nk.use_backend(backend):
        y, quad, sqnorm = nk.merged_lora_nsc(z, inputs.bank, lam, base)
        wanted = [z, lam] if base is None else [z, lam, base]
        grads = torch.autograd.grad((y, quad, sqnorm), wanted, (inputs.dy, inputs.dquad, inputs.dsqnorm))
    return dict(zip(OUTPUTS, (y.detach(), quad.detach(), sqnorm.detach(), *grads), strict=False))


def oracle(inputs: Inputs) -> dict[str, Tensor]:
    """The reference in float64 on the very numbers the kernels read."""
    bank = nk.AdapterBank(inputs.bank.A.double(), inputs.bank.Bt.double(), inputs.bank.offsets)

    def widen(t: Tensor) -> Tensor:
        return t.double()

    return run(
        "reference",
        Inputs(
            bank,
            *map(widen, (inputs.z, inputs.lam)),
            None if inputs.base is None else inputs.base.double(),
            *map(widen, (inputs.dy, inputs.dquad, inputs.dsqnorm)),
        ),
    )


def magnitudes(inputs: Inputs) -> dict[str, Tensor]:
    """Sums of absolute values in place of sums: what rounding errors are in proportion to, cancellation or not."""
    A, Bt, offsets = inputs.bank.A.double(), inputs.bank.Bt.double(), inputs.bank.offsets
    z, dy = inputs.z.double(), inputs.dy.double()
    u, v = (z @ A.t()).abs(), (dy @ Bt.t()).abs()
    lam = spread(inputs.lam.double().abs(), offsets)
    dlam = gather(u * v, offsets)
    y = (lam * u) @ Bt.abs()
    return {
        "y": y if inputs.base is None else y + inputs.base.double().abs(),
        "quad": gather(u * u, offsets),
        "sqnorm": z.square().sum(-1),
        "dz": (lam * v + 2 * spread(inputs.dquad.double().abs(), offsets) * u) @ A.abs()
        + 2 * inputs.dsqnorm.double().abs()[:, None] * z.abs(),
        "dlam": dlam if inputs.lam.dim() == 2 else dlam.sum(0),
        "dbase": dy,
    }


def relative_error(found: Tensor, expected: Tensor, magnitude: Tensor | None = None) -> float:
    scale = (expected if magnitude is None else magnitude).norm().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found.double() - expected).norm() / scale)


def check_against_oracle(backend: str, inputs: Inputs) -> None:
    """Errors at most twice those of eager PyTorch with the same rounding points, in proportion to the magnitudes.

    A sum of a few numbers can come out of eager PyTorch exactly, so four units of the accumulation dtype are allowed
    besides. In float64 the oracle is eager PyTorch, with rounding errors of its own: there the bound is 32 units.
    """
    expected, eager, found = oracle(inputs), run("reference", inputs), run(backend, inputs)
    units = 32 if inputs.lam.dtype is torch.float64 else 4
    floor = units * torch.finfo(inputs.lam.dtype).eps
    scales = magnitudes(inputs)
    for name, want in expected.items():
        got = found[name]
        assert got.shape == want.shape, name
        assert got.dtype is eager[name].dtype, name
        assert bool(torch.isfinite(got).all()), f"{name} holds NaN or infinity"
        error = relative_error(got, want, scales[name])
        allowed = 2 * relative_error(eager[name], want, scales[name]) + floor
        assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"
