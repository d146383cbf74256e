"""AdapterBank: the LoRA adapters of one linear layer, whitened once and packed for the kernels."""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .bank_file import read_bank, write_bank
from .devices import with_float64
from .modes import dispatch_watched, functorch_active, without_autocast
from .reference import accumulation_dtype

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_ADAPTERS = 4096


def whiten(A: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    """Factor ``A [r, d] = L [r, m] W [m, d]`` with orthonormal rows of ``W``; ``m`` is the numerical rank.

    float64. Rows are first scaled to one size, by powers of two and so exactly: how long a row is says nothing about
    the space that it spans, and a short one may belong to a long column of B. QR next, so that the SVD is of an r x r
    matrix. Directions with a singular value at or below ``rtol`` times the largest are dropped: what is left spans the
    true row space and nothing is ever inverted.
    """
    A = A.to(torch.float64)
    exponents = torch.frexp(A.abs().amax(1, keepdim=True)).exponent
    size = torch.ldexp(torch.ones_like(A[:, :1]), exponents - 1)
    q, r = torch.linalg.qr((A / size).t())
    left, sigma, right = torch.linalg.svd(r, full_matrices=False)
    kept = int((sigma > rtol * sigma[:1]).sum()) if sigma.numel() else 0
    return size * (right[:kept].t() * sigma[:kept]), (q @ left[:, :kept]).t()


def default_rtol(A: Tensor) -> float:
    """What is rounding in a singular value of ``A [r, d_in]``, in parts of the largest.

    Of the factor: r units of its dtype (of float32 for narrower ones, whose values are as often meant as they are). Of
    the decomposition: ``max(r, d_in)`` units of float64, as in ``torch.linalg.matrix_rank``.
    """
    own = torch.finfo(A.dtype if A.dtype is torch.float64 else torch.float32).eps
    return max(A.shape[0] * own, max(A.shape) * torch.finfo(torch.float64).eps)


class AdapterBank(nn.Module):
    """K LoRA adapters of one linear layer, of any ranks, packed along the rank.

    Each down-projection is whitened once in float64, ``A_k = L_k W_k`` with orthonormal rows of ``W_k``, and
    ``s_k B_k L_k`` takes the place of ``s_k B_k``. The update ``s_k B_k A_k`` is unchanged, and the quadratic form
    ``z^T A_k^T (A_k A_k^T)^-1 A_k z`` (Eq. 6 of arXiv 2603.26317) becomes ``||W_k z||^2``: no kernel solves an
    r x r system.

    Build one with :meth:`from_factors`. The buffers are frozen; gradients flow to z, lam and base only.

    Attributes:
        A: ``[R, d_in]``, orthonormal rows within each adapter, R the sum of the ranks.
        B: ``[d_out, R]``, scaling and whitening folded in: a view of the contiguous ``[R, d_out]`` that kernels read.
        offsets: ``K + 1`` ints; adapter k owns columns ``offsets[k]:offsets[k + 1]``.
        ranks: K ints, the numerical ranks (at most the ranks given).
        K, R, d_in, d_out: ints: adapters, the sum of their ranks, inputs and outputs of the layer.
        dtype, device: of the factors.
    """

    A: Tensor
    Bt: Tensor

    def __init__(self, A: Tensor, Bt: Tensor, offsets: Sequence[int]):
        super().__init__()
        for name, t in (("A", A), ("Bt", Bt)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must be a tensor, found {type(t).__name__}")
        if A.dim() != 2 or Bt.dim() != 2 or A.shape[0] != Bt.shape[0] or 0 in (A.shape[1], Bt.shape[1]):
            raise ValueError(f"A and Bt must be [R, d_in] and [R, d_out], found {tuple(A.shape)} and {tuple(Bt.shape)}")
        if A.dtype is not Bt.dtype or A.device != Bt.device:
            raise ValueError(f"A is {A.dtype} on {A.device} but Bt is {Bt.dtype} on {Bt.device}")
        if A.dtype not in FLOAT_DTYPES:
            raise TypeError(f"A and Bt must be one of {_names(FLOAT_DTYPES)}, found {A.dtype}")
        self.offsets = _checked_offsets(offsets, A.shape[0])
        self.register_buffer("A", A.contiguous())
        self.register_buffer("Bt", Bt.contiguous())
        self._autocast_copies: dict[torch.dtype, tuple[tuple[Any, ...], AdapterBank]] = {}

    @classmethod
    def from_factors(
        cls,
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        scaling: Sequence[float] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        rtol: float | None = None,
    ) -> AdapterBank:
        """Whiten and pack K adapters.

        Args:
            A: K down-projections ``[r_k, d_in]``. Ranks may differ and may be 0 (adapter absent from this layer).
            B: K up-projections ``[d_out, r_k]``.
            scaling: K floats, LoRA's alpha / r (or alpha / sqrt(r)); 1 each when None.
            dtype: of the packed bank; the factors' own when None, which must then be one and the same.
            device: of the packed bank; the factors' own when None, which must then be one and the same.
            rtol: singular values of A_k, its rows scaled to one size, at or below ``rtol`` times the largest count as
                zero; in [0, 1). Default: ``r_k * eps`` of A_k's dtype, with float32's eps for narrower types, and at
                least ``max(r_k, d_in) * eps`` of float64, in which it is computed.

        Raises:
            TypeError, ValueError: naming the adapter index, what was found and what was expected.
        """
        if not isinstance(A, Iterable) or not isinstance(B, Iterable):
            raise TypeError(f"A and B must hold one factor per adapter, found {type(A).__name__}, {type(B).__name__}")
        A, B = list(A), list(B)
        dtype, device = _check_factors(A, B, dtype, device)
        scales = _check_scaling(scaling, len(A))
        if rtol is not None and not 0 <= rtol < 1:
            raise ValueError(f"rtol must lie in [0, 1), found {rtol}")
        rows, columns, offsets = [], [], [0]
        place = with_float64(device)
        for k, (a, b) in enumerate(zip(A, B, strict=True)):
            lower, white = whiten(a.detach().to(place), default_rtol(a) if rtol is None else rtol)
            up = scales[k] * (b.detach().to(place, torch.float64) @ lower)
            if not torch.isfinite(up.to(dtype)).all():
                raise ValueError(f"B[{k}] (scaled by {scales[k]:g} and by A[{k}]) overflows {dtype}")
            rows.append(white.to(device, dtype))
            columns.append(up.t().to(device, dtype))
            offsets.append(offsets[-1] + white.shape[0])
        return cls(torch.cat(rows), torch.cat(columns), offsets)

    @property
    def B(self) -> Tensor:
        return self.Bt.t()

    @property
    def packed(self) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """``A [R, d_in]``, ``Bt [R, d_out]`` and ``offsets``: the operator's operands."""
        # nn.Module.__getattr__ takes 0.6 us per buffer, and this is asked for in every call.
        buffers = self._buffers
        try:
            return buffers["A"], buffers["Bt"], self.offsets  # type: ignore[return-value]
        except KeyError:
            # Somebody put a parameter there, or a parametrization.
            return self.A, self.Bt, self.offsets

    @property
    def K(self) -> int:
        return len(self.offsets) - 1

    @property
    def R(self) -> int:
        return self.offsets[-1]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True))

    @property
    def d_in(self) -> int:
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        return self.Bt.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    @property
    def device(self) -> torch.device:
        return self.A.device

    def delta(self, lam: Tensor | Sequence[float]) -> Tensor:
        """The dense update ``sum_k lam_k s_k B_k A_k``: ``[d_out, d_in]``, float32 (float64 for a float64 bank).

        Args:
            lam: ``[K]``, a coefficient per adapter; as numbers, or on any device.

        Raises:
            ValueError: if it has another shape.
        """
        acc = accumulation_dtype(self.dtype)
        lam = torch.as_tensor(lam, dtype=acc, device=self.device)
        if lam.shape != (self.K,):
            raise ValueError(f"lam must have shape ({self.K},), one coefficient per adapter, found {tuple(lam.shape)}")
        per_row = lam.repeat_interleave(torch.tensor(self.ranks, device=self.device), output_size=self.R)
        with without_autocast(self.device.type):
            return (self.Bt.to(acc) * per_row[:, None]).t() @ self.A.to(acc)

    def cast_for_autocast(self, dtype: torch.dtype) -> AdapterBank:
        """This bank in ``dtype``: itself, or a copy that is kept until the buffers are replaced or written to.

        What is written through ``.data`` or NumPy is not noticed. Nothing is kept of buffers made under
        ``torch.inference_mode``, which do not tell that they were written to, nor of copies that a mode or a transform
        may make something else of.
        """
        if dtype is self.dtype:
            return self
        A, Bt, offsets = self.packed
        tracked = not (A.is_inference() or Bt.is_inference() or dispatch_watched() or functorch_active())
        kept = self._autocast_copies.get(dtype)
        if tracked and kept is not None:
            (kept_A, state_A, kept_Bt, state_Bt), copy = kept
            # The tensors and not their ids: that of a freed tensor is given to the next.
            if kept_A is A and kept_Bt is Bt and (state_A, state_Bt) == (_state(A), _state(Bt)):
                return copy
        # A copy made in inference mode could not be saved for a backward later on.
        with torch.inference_mode(False), torch.no_grad():
            copy = AdapterBank(A.to(dtype), Bt.to(dtype), offsets)
        if tracked:
            self._autocast_copies[dtype] = ((A, _state(A), Bt, _state(Bt)), copy)
        return copy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A bank that leaves a device leaves nothing there.
        self._autocast_copies.clear()
        return super()._apply(fn, recurse)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the packed bank as safetensors: to a temporary file first, renamed when complete."""
        write_bank(path, self.A.contiguous(), self.Bt.contiguous(), self.offsets)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> AdapterBank:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the file and what in it is damaged or of another format.
        """
        try:
            bank = cls(*read_bank(path, device))
            for name, t in bank.named_buffers():
                _check_finite(name, t)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: not a bank that can be read, save it again: {error}") from error
        return bank

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.offsets, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        if not isinstance(state, Tensor) or state.dtype is not torch.int64 or state.dim() != 1:
            tensor = isinstance(state, Tensor)
            found = f"{state.dtype} of shape {tuple(state.shape)}" if tensor else type(state).__name__
            raise ValueError(f"the extra state must be the offsets, a vector of torch.int64, found {found}")
        try:
            self.offsets = _checked_offsets(state.tolist(), self.A.shape[0])
        except ValueError as error:
            raise ValueError(
                f"{error}; a state of other ranks makes a bank of its own: AdapterBank(A, Bt, _extra_state.tolist())"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_autocast_copies": {}}

    def extra_repr(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        return f"K={self.K}, ranks=({ranks}), d_in={self.d_in}, d_out={self.d_out}, {self.dtype}, {self.device}"


def _state(t: Tensor) -> tuple[int, int]:
    """What changes where a tensor is written to, or given other memory (``t.data = other``)."""
    return t._version, t.data_ptr()


def _checked_offsets(offsets: Sequence[int], rows: int) -> tuple[int, ...]:
    if not isinstance(offsets, Iterable):
        raise TypeError(f"offsets must be ints that rise from 0 to R={rows}, found {offsets!r}")
    offsets = tuple(offsets)
    try:
        offsets = tuple(operator.index(o) for o in offsets)  # int() would take 1.5 for 1
    except TypeError:
        raise TypeError(f"offsets must be ints, found {offsets}") from None
    increasing = all(a <= b for a, b in itertools.pairwise(offsets))
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != rows or not increasing:
        raise ValueError(f"offsets must rise from 0 to R={rows} in K + 1 steps, found {offsets}")
    return offsets


def _check_finite(name: str, t: Tensor) -> None:
    bad = int((~torch.isfinite(t)).sum())
    if bad:
        raise ValueError(f"{name} holds {bad} NaN or infinite values")


def _check_factors(
    A: list[Tensor], B: list[Tensor], dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[torch.dtype, torch.device]:
    if not A or len(A) != len(B):
        raise ValueError(f"A and B must hold one factor per adapter, at least one: found {len(A)} and {len(B)}")
    if len(A) > MAX_ADAPTERS:
        raise ValueError(f"at most {MAX_ADAPTERS} adapters per layer, found {len(A)}")
    for k, (a, b) in enumerate(zip(A, B, strict=True)):
        for name, t in (("A", a), ("B", b)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name}[{k}] must be a tensor, found {type(t).__name__}")
            if t.dtype not in FLOAT_DTYPES:
                raise TypeError(f"{name}[{k}] must be one of {_names(FLOAT_DTYPES)}, found {t.dtype}")
            if t.dim() != 2:
                raise ValueError(f"{name}[{k}] must be a matrix, found shape {tuple(t.shape)}")
        if a.shape[1] != A[0].shape[1] or b.shape != (B[0].shape[0], a.shape[0]):
            raise ValueError(
                f"adapter {k}: expected A [r, {A[0].shape[1]}] and B [{B[0].shape[0]}, r], "
                f"found A {tuple(a.shape)} and B {tuple(b.shape)}"
            )
        for name, t in (("A", a), ("B", b)):
            if device is None and t.device != A[0].device:
                raise ValueError(f"{name}[{k}] is on {t.device} but A[0] is on {A[0].device}; pass device=")
            if dtype is None and t.dtype is not A[0].dtype:
                raise TypeError(f"{name}[{k}] is {t.dtype} but A[0] is {A[0].dtype}; pass dtype=")
            if t.is_meta:
                raise ValueError(
                    f"{name}[{k}] is on the meta device, where there are no numbers to take a rank of; "
                    "AdapterBank(A, Bt, offsets) takes such tensors"
                )
            _check_finite(f"{name}[{k}]", t)
        if 0 in (a.shape[1], b.shape[0]):
            raise ValueError(f"adapter {k}: A and B must be of a layer with inputs and outputs, found none")
    dtype = A[0].dtype if dtype is None else dtype
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be one of {_names(FLOAT_DTYPES)}, found {dtype}")
    return dtype, A[0].device if device is None else torch.device(device)


def _check_scaling(scaling: Sequence[float] | None, K: int) -> list[float]:
    if scaling is None:
        return [1.0] * K
    if not isinstance(scaling, Iterable) or isinstance(scaling, str) or getattr(scaling, "ndim", 1) != 1:
        raise TypeError(f"scaling must hold one float per adapter ({K}), found {scaling!r}")
    given = list(scaling)
    try:
        scales = [float(s) for s in given]
    except (TypeError, ValueError):
        raise TypeError(f"scaling must hold numbers, found {given!r}") from None
    if len(scales) != K:
        raise ValueError(f"scaling must hold one float per adapter ({K}), found {len(scales)}")
    for k, s in enumerate(scales):
        if not math.isfinite(s):
            raise ValueError(f"scaling[{k}] must be finite, found {s}")
    return scales


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
