"""The Triton kernels as a backend: NVIDIA GPUs from sm_80 on, and CPU tensors under ``TRITON_INTERPRET=1``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import verified_hardware
from ..contract import BackwardCall, Call, ForwardCall

OLDEST = (3, 6)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def unavailable() -> str | None:
    try:
        import triton
    except ModuleNotFoundError:
        return "triton is not installed"
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"triton {triton.__version__} is installed, {'.'.join(map(str, OLDEST))} or newer is needed"
    if _interpreted():
        return None
    if torch.version.hip is not None:
        return "written for NVIDIA GPUs, but this torch is built for ROCm"
    return None if torch.cuda.is_available() else "no CUDA device"


def rejects(call: Call) -> str | None:
    from ..triton.configs import MAX_RANK, Problem, choose, machine

    if call.dtype not in DTYPES:
        return f"computes in float32, bfloat16 and float16, not in {call.dtype}"
    R = call.offsets[-1]
    if R > MAX_RANK:
        return f"the ranks add up to {R}, more than {MAX_RANK}"
    if _interpreted():
        from triton.runtime.interpreter import InterpreterBuilder

        if call.dtype is torch.bfloat16 and not getattr(InterpreterBuilder, "corrected_bfloat16", False):
            return "Triton's interpreter multiplies the bit patterns of bfloat16 as integers"
    elif call.device.type != "cuda":
        return f"runs on CUDA devices, not on {call.device.type} (TRITON_INTERPRET=1 interprets it on the CPU)"
    on = machine(call.device)
    if on.arch < 80:
        return f"{on.name} has compute capability {on.arch / 10}, 8.0 or newer is needed"
    for mode in ("ieee", "tf32x3") if call.dtype is torch.float32 else ("half",):
        for d_in, d_out in ((call.d_in, call.d_out), (call.d_out, call.d_in)):
            if choose(on, Problem(call.T, d_in, d_out, R, mode)) is None:
                return f"no tile for R={R} in {call.dtype} fits the {on.shared} bytes of shared memory of {on.name}"
    return None


def unproven(call: Call) -> str | None:
    """Why the automatic choice should pass over this backend although it could serve the call, or None."""
    from ..triton.configs import machine

    return None if _interpreted() else verified_hardware.unproven(f"sm_{machine(call.device).arch}", "triton")


def forward(call: ForwardCall) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    from ..triton import launch

    # In one expression, as below: a loop over the record takes three microseconds of every call.
    z, A, Bt, _, lam, base, *_ = call
    if z.is_neg() or A.is_neg() or Bt.is_neg() or lam.is_neg() or (base is not None and base.is_neg()):
        call = _as_stored(call)
    return launch.forward(call)


def backward(call: BackwardCall) -> tuple[Tensor | None, Tensor | None]:
    from ..triton import launch

    dy, dquad, dsqnorm, _, z, A, Bt, _, lam, dz_base, *_ = call
    if (
        (dy is not None and dy.is_neg())
        or (dquad is not None and dquad.is_neg())
        or (dsqnorm is not None and dsqnorm.is_neg())
        or (z is not None and z.is_neg())
        or A.is_neg()
        or Bt.is_neg()
        or lam.is_neg()
        or (dz_base is not None and dz_base.is_neg())
    ):
        call = _as_stored(call)
    return launch.backward(call)


def _as_stored(call: Any) -> Any:
    """The call with every number in memory as it reads.

    torch negates some views, such as the imaginary part of a conjugate, only when an operator reads them; a kernel is
    handed the address, and would take them with the other sign.
    """
    return call._make(t.resolve_neg() if isinstance(t, Tensor) else t for t in call)
