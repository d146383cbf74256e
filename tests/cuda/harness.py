"""The CUDA kernel's source on the CPU emulator, and its plain mirror, called with tensors.

Compiles ``emulate.cpp`` with the C++ compiler at hand; no CUDA toolkit and no GPU.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc" / "cuda"
ELEMENTS = {torch.bfloat16: 0, torch.float16: 1}
ORDERS = {"ascending": 0, "descending": 1, "random": 2}
COPIES = {"late": 0, "early": 1}
UNITS = {"rounding": 0, "truncating": 1}
MOST_ADAPTERS = 64
POINTERS = ("x", "w_in", "w_out", "base", "out", "lam", "u_out", "quad", "sqnorm", "u", "dquad", "dsqnorm", "z")
POINTERS += ("dlam", "parts", "counter")


class Problem(ctypes.Structure):
    """``struct Problem`` of csrc/cuda/problem.h."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("T", "d_in", "d_out", "x_stride", "base_stride", "out_stride", "z_stride")]
        + [(name, ctypes.c_void_p) for name in POINTERS]
        + [(name, ctypes.c_int32) for name in ("R", "K", "lam_per_row")]
        + [("offsets", ctypes.c_int16 * (MOST_ADAPTERS + 1))]
    )


class Variant(NamedTuple):
    ranks: int
    tokens: int


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++")


def copy_sources(folder: Path, variant: Variant) -> None:
    """The kernels' sources, with one variant of each family: what a test changes and builds anew is built quickly."""
    for path in CSRC.glob("*.*"):
        shutil.copy(path, folder)
    geometry = folder / "geometry.h"
    one = f"X({variant.ranks}, {variant.tokens})\n"
    text = re.sub(
        r"(#define NSC_(?:WARPGROUP_)?VARIANTS\(X\)).*\\\n(?:.*\\\n)*.*\n", rf"\1 {one}", geometry.read_text()
    )
    assert text.count(one) == 2
    geometry.write_text(text)


def build(folder: Path, csrc: Path = CSRC, *, warpgroup: bool = False, fast: bool = False) -> Path:
    """Compile the emulator; exact floating point, so that it and the mirror can be compared bitwise.

    ``warpgroup``: of the kernel in warpgroup.inl, else of that in kernel.inl. ``fast``: takes twice as long to compile
    and half as long to run, which pays where many problems go through few variants.
    """
    target = folder / "libnsc_emulator.so"
    options = ["-std=c++17", "-O3" if fast else "-O1", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
    options += ["-DNSC_WARPGROUP"] if warpgroup else []
    command = [str(compiler()), *options, "-fPIC", "-shared", f"-I{csrc}", str(HERE / "emulate.cpp"), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return target


@dataclass(frozen=True)
class How:
    """``mirror`` runs the plain loops and looks at variant, cluster and unit only."""

    variant: Variant
    cluster: int = 1
    order: str = "ascending"
    copies: str = "late"
    unit: str = "rounding"
    mirror: bool = False


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None or not t.numel() else t.data_ptr()


class EmulatorError(Exception):
    """The threads of the kernel could not be run to their end."""


class Emulator:
    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        assert self.library.nsc_problem_bytes() == ctypes.sizeof(Problem)
        self.library.nsc_choose_variant.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
        self.library.nsc_choose_cluster.argtypes = [ctypes.c_int64] * 3 + [ctypes.POINTER(ctypes.c_int)]
        numbers = (ctypes.c_int * 200)()
        count = self.library.nsc_variants(numbers)
        self.variants = [Variant(numbers[2 * i], numbers[2 * i + 1]) for i in range(count)]
        self.counter = torch.zeros(1, dtype=torch.int32)

    def choose_variant(self, T: int, R: int, processors: int) -> Variant | None:
        index = self.library.nsc_choose_variant(T, R, processors)
        return None if index < 0 else self.variants[index]

    def choose_cluster(self, tiles: int, d_in: int, d_out: int, active: Sequence[int]) -> int:
        return self.library.nsc_choose_cluster(tiles, d_in, d_out, (ctypes.c_int * 5)(*active))

    def _run(self, how: How, backward: bool, dtype: torch.dtype, offsets: Sequence[int], **values: object) -> None:
        p = Problem(R=offsets[-1], K=len(offsets) - 1)
        for i, offset in enumerate(offsets):
            p.offsets[i] = offset
        for name, value in values.items():
            setattr(p, name, _pointer(value) if isinstance(value, Tensor) else value)
        what = (ctypes.byref(p), ELEMENTS[dtype], int(backward), *how.variant, how.cluster)
        if how.mirror:
            self.library.nsc_mirror(*what, UNITS[how.unit])
        else:
            ran = self.library.nsc_emulate(*what, ORDERS[how.order], COPIES[how.copies], UNITS[how.unit])
            if not ran:
                raise EmulatorError(f"{how}: a deadlock, a wrong address, or no such variant")

    def forward(
        self,
        how: How,
        z: Tensor,
        A: Tensor,
        Bt: Tensor,
        offsets: Sequence[int],
        lam: Tensor,
        base: Tensor | None,
        stats: bool = True,
        save_u: bool = True,
    ) -> tuple[Tensor | None, ...]:
        """:func:`nsc_kernels.reference.forward`; outputs start as NaN."""
        T, K, nan = z.shape[0], len(offsets) - 1, float("nan")
        y = z.new_full((T, Bt.shape[1]), nan)
        quad = lam.new_full((T, K), nan) if stats else None
        sqnorm = lam.new_full((T,), nan) if stats else None
        u = z.new_full((T, offsets[-1]), nan) if save_u else None
        self._run(
            how, False, z.dtype, offsets, T=T, d_in=A.shape[1], d_out=Bt.shape[1], x=z, x_stride=z.stride(0),
            w_in=A, w_out=Bt, lam=lam, lam_per_row=int(lam.dim() == 2), base=base,
            base_stride=0 if base is None else base.stride(0), out=y, out_stride=y.stride(0), u_out=u, quad=quad,
            sqnorm=sqnorm,
        )  # fmt: skip
        return y, quad, sqnorm, u

    def backward(
        self,
        how: How,
        dy: Tensor | None,
        dquad: Tensor | None,
        dsqnorm: Tensor | None,
        u: Tensor,
        z: Tensor | None,
        A: Tensor,
        Bt: Tensor,
        offsets: Sequence[int],
        lam: Tensor,
        dz_base: Tensor | None,
        need_dz: bool = True,
        need_dlam: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """:func:`nsc_kernels.reference.backward`; outputs start as NaN, and the counter must end as it began."""
        T, K, nan = u.shape[0], len(offsets) - 1, float("nan")
        dz = u.new_full((T, A.shape[1]), nan) if need_dz else None
        dlam = torch.full_like(lam, nan) if need_dlam else None
        parts = lam.new_full((K, -(-T // how.variant.tokens)), nan)
        self._run(
            how, True, u.dtype, offsets, T=T, d_in=Bt.shape[1], d_out=A.shape[1], x=dy,
            x_stride=0 if dy is None else dy.stride(0), w_in=Bt, w_out=A, lam=lam, lam_per_row=int(lam.dim() == 2),
            base=dz_base if need_dz else None, base_stride=0 if dz_base is None else dz_base.stride(0), out=dz,
            out_stride=A.shape[1], u=u, dquad=dquad if need_dz else None, dsqnorm=dsqnorm if need_dz else None,
            z=z if dsqnorm is not None else None, z_stride=0 if z is None else z.stride(0), dlam=dlam, parts=parts,
            counter=self.counter,
        )  # fmt: skip
        assert int(self.counter) == 0
        return dz, dlam
