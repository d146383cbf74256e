"""The public functions: checks, autocast, and three routes to the backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from . import reference
from .autograd import MergedLoRAFunction
from .bank import AdapterBank
from .contract import ForwardCall
from .modes import any_autocast, autocast_enabled, dispatch_watched, functorch_active, jit_tracing, results_watched
from .ops import refuse_other_than_reference, run_forward, select_backend
from .reference import accumulation_dtype

# What has no forward of its own for torch's operators.
_PLAIN = frozenset((Tensor, nn.Parameter))
# By autocast, to its own dtype.
_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)


def merged_lora(z: Tensor, bank: AdapterBank, lam: Tensor, base: Tensor | None = None) -> Tensor:
    """Merged LoRA update ``y = base + sum_k lam_k s_k B_k A_k z`` in one kernel.

    Args:
        z: ``[..., d_in]``, float64, float32, bfloat16 or float16, the dtype and device of ``bank``; rows of any stride.
        bank: the K whitened adapters of one linear layer.
        lam: merge coefficients, ``[K]`` or one set per row ``[..., K]`` with the leading shape of ``z``. Computed with
            in float32 (float64 for float64 ``z``); a narrower dtype is widened, a wider one refused.
        base: ``[..., d_out]``, usually the frozen layer's own output; zero when None. Not modified.

    Returns:
        ``[..., d_out]`` in z's dtype, accumulated in float32 (float64) and rounded once. In bfloat16 on processors with
        AVX512-BF16 or AMX, what is below 1.2e-38 on the way counts as zero (:mod:`nsc_kernels.backends.cpu`).

    Differentiable once with respect to ``z``, ``lam`` and ``base``; a second derivative raises. Under
    ``torch.autocast`` z, base and bank are computed in the autocast dtype and ``lam`` stays float32. Under
    ``torch.func`` transforms and forward-mode differentiation the reference backend serves the call.

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected, before any work.
        RuntimeError: if an explicitly chosen backend cannot serve the call.
    """
    return _call(z, bank, lam, base, None, False)


def merged_lora_nsc(
    z: Tensor, bank: AdapterBank, lam: Tensor, base: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`merged_lora` together with the null-space statistics of ``z``, in the same kernel, with the same
    arguments and errors.

    Returns:
        y: ``[..., d_out]`` as :func:`merged_lora`.
        quad: ``[..., K]``, ``quad_k = z^T A_k^T (A_k A_k^T)^-1 A_k z``, float32 (float64 for float64 ``z``).
        sqnorm: ``[...]``, ``||z||^2``, same dtype as ``quad``.

    All three are differentiable; :func:`null_space_ratio` turns the last two into Eq. 6 of arXiv 2603.26317.
    """
    return _call(z, bank, lam, base, None, True)


def merged_linear(z: Tensor, linear: nn.Module, bank: AdapterBank, lam: Tensor, stats: bool) -> Any:
    """The above with ``base = linear(z)`` for a frozen ``linear``.

    In eager mode an nn.Linear and its adapters are one node of the graph: the gradient that reaches z through the layer
    is where the kernel starts its sum, and not a tensor to be added afterwards. Of other layers, what they return is
    the base; where that or z has another dtype than the bank, z is rounded to the bank's for the update alone, and the
    sum has the layer's.
    """
    return _call(z, bank, lam, None, linear, stats)


def output_dtype(z: Tensor) -> torch.dtype:
    """The dtype of ``y`` for this input: its own or, where autocast applies to it, autocast's."""
    return torch.get_autocast_dtype(z.device.type) if any_autocast() and _autocast_applies(z) else z.dtype


def _call(z: Tensor, bank: AdapterBank, lam: Tensor, base: Tensor | None, linear: nn.Module | None, stats: bool) -> Any:
    if not (
        isinstance(z, Tensor)
        and not z.is_nested
        and isinstance(lam, Tensor)
        and not lam.is_nested
        and isinstance(bank, AdapterBank)
        and (base is None or (isinstance(base, Tensor) and not base.is_nested))
    ):
        _refuse_types(z, bank, lam, base)
    if any_autocast() and _autocast_applies(z):
        kind = z.device.type
        narrow = torch.get_autocast_dtype(kind)
        base = base if linear is None else _output_of(linear, z)
        for name, t in (("z", z), ("base", base), ("bank", bank)):
            # What autocast would not round for torch's own products, either.
            if t is not None and t.dtype not in _ROUNDED:
                raise TypeError(f"{name} is {t.dtype}, which autocast does not round to {narrow}; convert it")
        base = base if base is None else base.to(narrow)
        with torch.autocast(kind, enabled=False):
            return _call(z.to(narrow), _autocast_bank(bank, narrow), lam, base, None, stats)
    if linear is not None and not _is_plain(linear):
        return _on_top(z, linear, bank, lam, stats)
    device, dtype = z.device, z.dtype
    A, Bt, offsets = bank.packed
    acc = accumulation_dtype(dtype)
    K = len(offsets) - 1
    # The whole contract in one expression for the calls that keep it; which part was broken is found out afterwards.
    if not (
        dtype is A.dtype
        and lam.dtype is acc
        and device == A.device == lam.device
        and z.layout is lam.layout is torch.strided
        and type(z) in _PLAIN
        and type(lam) in _PLAIN
        and type(A) in _PLAIN
        and z.dim() > 0
        and z.shape[-1] == A.shape[1]
        and ((lam.dim() == 1 and lam.shape[0] == K) or lam.shape == (*z.shape[:-1], K))
        and (
            base is None
            or (
                base.dtype is dtype
                and base.device == device
                and base.layout is torch.strided
                and base.shape == (*z.shape[:-1], Bt.shape[1])
                and type(base) in _PLAIN
            )
        )
    ):
        _refuse(z, bank, lam, base, acc)
        lam = lam.to(acc)
    if z.dim() == 2:
        return _route(z, A, Bt, offsets, lam, base, linear, stats)
    flat = _route(
        z.reshape(-1, z.shape[-1]),
        A,
        Bt,
        offsets,
        lam if lam.dim() == 1 else lam.reshape(-1, lam.shape[-1]),
        base if base is None else base.reshape(-1, base.shape[-1]),
        linear,
        stats,
    )
    lead = z.shape[:-1]
    if not stats:
        return flat.view(lead + flat.shape[1:])
    return tuple(t.view(lead + t.shape[1:]) for t in flat)


def _on_top(z: Tensor, linear: nn.Module, bank: AdapterBank, lam: Tensor, stats: bool) -> Any:
    """With what ``linear`` itself returns as the base, in whatever dtype it computes."""
    lead = z.shape[:-1]
    shapes_fit = z.dim() > 0 and z.shape[-1] == bank.d_in and _fits(lam, lead, bank.K)
    if not shapes_fit or z.device != bank.device:
        _refuse(z, bank, lam, None, accumulation_dtype(z.dtype))
    if z.dim() != 2:
        flat = z.reshape(-1, z.shape[-1])
        found = _on_top(flat, linear, bank, lam if lam.dim() == 1 else lam.reshape(-1, lam.shape[-1]), stats)
        if not stats:
            return found.view(lead + found.shape[1:])
        return tuple(t.view(lead + t.shape[1:]) for t in found)
    base = _output_of(linear, z)
    if z.dtype is base.dtype is bank.dtype:
        return _call(z, bank, lam, base, None, stats)
    for name, dtype in (("z", z.dtype), ("linear(z)", base.dtype)):
        if not dtype.is_floating_point:
            raise TypeError(f"{name} must be of a floating dtype, found {dtype}")
    if base.shape != (*lead, bank.d_out):
        raise ValueError(f"linear(z) must have shape {(*lead, bank.d_out)}, found {tuple(base.shape)}")
    found = _call(z.to(bank.dtype), bank, lam, None, None, stats)
    update, *rest = found if stats else (found,)
    y = (base + update).to(base.dtype)
    return (y, *rest) if stats else y


def _fits(lam: Tensor, lead: Sequence[int], K: int) -> bool:
    """Whether lam is ``[K]`` or ``[*lead, K]``: by its dimensions first, as shapes of two lengths are told apart by
    their first sizes, of which export would keep that a number of rows is, or is not, K.
    """
    return tuple(lam.shape) == (K,) if lam.dim() == 1 else tuple(lam.shape) == (*lead, K)


def _output_of(linear: nn.Module, z: Tensor) -> Tensor:
    y = linear(z)
    if not isinstance(y, Tensor):
        raise TypeError(f"linear must return a tensor, found {type(y).__name__} from {type(linear).__name__}")
    return y


def _route(
    z: Tensor,
    A: Tensor,
    Bt: Tensor,
    offsets: tuple[int, ...],
    lam: Tensor,
    base: Tensor | None,
    linear: Any,
    stats: bool,
) -> Any:
    """``z [T, d_in]`` by the cheapest route that is right in this context; ``linear`` is plain."""
    compiling = torch.compiler.is_compiling()
    transformed = functorch_active() or forward_ad._current_level >= 0
    # Modes see the operator, as they see torch's own, and what they see of it is enough to trace it or run it again.
    tracing = not compiling and jit_tracing()
    as_op = compiling or tracing or dispatch_watched()
    grad = torch.is_grad_enabled()
    if grad and not (transformed or as_op) and (A.requires_grad or Bt.requires_grad):
        name = "A" if A.requires_grad else "Bt"
        raise RuntimeError(f"bank.{name} requires a gradient, but the factors are frozen here; detach it")
    saved = grad and not (compiling or transformed) and (z.requires_grad or lam.requires_grad)
    if saved and (A.is_inference() or Bt.is_inference() or lam.is_inference()):
        _refuse_inference(A, Bt)
    grad = grad and (z.requires_grad or lam.requires_grad or (base is not None and base.requires_grad))
    # Runs with other inputs later on, which may require a gradient. torch.jit.trace checks a trace under no_grad.
    any_inputs = tracing or (compiling and torch.is_grad_enabled() and torch.compiler.is_exporting())
    grad = grad or any_inputs
    # What a hook or a subclass returns may be held elsewhere; what nn.Linear itself returns is new.
    own_base = linear is not None and (as_op or transformed or not grad)
    if own_base:
        base, linear = linear(z), None
    if transformed:
        refuse_other_than_reference()
        y, quad, sqnorm, _ = reference.forward(z, A, Bt, offsets, lam, base, stats)
    elif as_op:
        y, quad, sqnorm, _ = torch.ops.nsc.merged_lora(z, A, Bt, offsets, lam, base, stats, grad)
        if stats and compiling and not (z.requires_grad or any_inputs):
            # They depend on z alone, whatever else of the op's arguments requires a gradient. What other modes record
            # may run with other inputs later on.
            quad, sqnorm = quad.detach(), sqnorm.detach()
    else:
        backend = select_backend(z, A, Bt, offsets)
        if grad:
            weight, bias = (None, None) if linear is None else (linear.weight, linear.bias)
            found = MergedLoRAFunction.apply(z, lam, base, weight, bias, A, Bt, offsets, stats, backend)
            return found[:3] if stats else found[0]
        reuse_base = own_base and not results_watched()
        y, quad, sqnorm, _ = run_forward(backend, ForwardCall(z, A, Bt, offsets, lam, base, stats, False, reuse_base))
    return (y, quad, sqnorm) if stats else y


def _is_plain(linear: Any) -> bool:
    """Whether calling ``linear`` is F.linear with frozen parameters and nothing else: no subclass, of the layer or of
    its weight, no hook, of its own or of all modules, and no wrapper.
    """
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and "forward" not in linear.__dict__
        and not (linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks)
        and not linear._backward_pre_hooks
        and not has_any_global_hook()
        and not linear.weight.requires_grad
        and (linear.bias is None or not linear.bias.requires_grad)
    )


def _autocast_applies(z: Tensor) -> bool:
    return autocast_enabled(z.device.type) and z.dtype is not torch.float64


def _autocast_bank(bank: AdapterBank, dtype: torch.dtype) -> AdapterBank:
    if not torch.compiler.is_compiling():
        return bank.cast_for_autocast(dtype)
    return AdapterBank(bank.A.to(dtype), bank.Bt.to(dtype), bank.offsets)


def refuse_other_bank(bank: Any) -> None:
    if isinstance(bank, AdapterBank):
        return
    kind = type(bank)
    # A build for Hugging Face kernels has classes of its own, beside those of the installed package.
    copied = f" of {kind.__module__}, another copy of this package; make one of this copy: AdapterBank(*bank.packed)"
    found = kind.__name__ + copied * (kind.__name__ == AdapterBank.__name__)
    raise TypeError(f"bank must be an AdapterBank, found {found}")


def _refuse_types(z: Any, bank: Any, lam: Any, base: Any) -> None:
    """Raise for the argument that is not of its type, or a nested one, which has no shape to ask for."""
    refuse_other_bank(bank)
    for name, t in (("z", z), ("lam", lam), ("base", base)):
        if isinstance(t, Tensor) and t.is_nested:
            raise TypeError(
                f"{name} must be dense, found a nested tensor; take torch.cat({name}.unbind()), or {name}.values() of "
                "a jagged one. nn.TransformerEncoder makes none with enable_nested_tensor=False"
            )
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, found {type(t).__name__}")


def _refuse_inference(A: Tensor, Bt: Tensor) -> None:
    """Raise for a tensor that autograd does not keep for the backward."""
    in_bank = A.is_inference() or Bt.is_inference()
    copy = "AdapterBank(bank.A.clone(), bank.Bt.clone(), bank.offsets)" if in_bank else "lam.clone()"
    raise RuntimeError(
        f"{'bank' if in_bank else 'lam'} was made or moved under torch.inference_mode and serves no call with a "
        f"gradient; make it outside, or take a copy there: {copy}"
    )


def _refuse(z: Tensor, bank: AdapterBank, lam: Tensor, base: Tensor | None, acc: torch.dtype) -> None:
    """Raise for what the kernels would misread; return where ``lam`` is only narrower than they want it, or where
    something is of a subclass of torch.Tensor that they can do with.
    """
    given: dict[str, Any] = {"z": z, "bank.A": bank.A, "lam": lam, "base": base}
    for name, t in given.items():
        if hasattr(t, "full_tensor"):
            raise TypeError(
                f"{name} must be a plain tensor, found a {type(t).__name__} placed {t.placements}; take its to_local() "
                "or full_tensor()"
            )
    if z.dtype is not bank.dtype:
        raise TypeError(f"z is {z.dtype}, but the bank is {bank.dtype}; convert one of them (bank.to(dtype=...))")
    for name, t in (("z", z), ("lam", lam), ("base", base)):
        if t is not None and t.layout is not torch.strided:
            raise TypeError(f"{name} must be dense (torch.strided), found {t.layout}; take {name}.to_dense()")
    if z.device != bank.device:
        raise ValueError(f"z is on {z.device}, but the bank is on {bank.device}; move one of them (bank.to(device))")
    if lam.device != z.device:
        raise ValueError(f"lam is on {lam.device}, but z is on {z.device}")
    if z.dim() == 0 or z.shape[-1] != bank.d_in:
        raise ValueError(f"z must have shape [..., d_in={bank.d_in}], found {tuple(z.shape)}")
    if not lam.dtype.is_floating_point or lam.dtype.itemsize > acc.itemsize:
        raise TypeError(f"lam must be {acc} or narrower for z of {z.dtype}, found {lam.dtype}")
    lead, K = z.shape[:-1], bank.K
    if not _fits(lam, lead, K):
        raise ValueError(f"lam must have shape ({K},) or {(*lead, K)}, found {tuple(lam.shape)}")
    if base is not None:
        if base.dtype is not z.dtype:
            raise TypeError(f"base is {base.dtype}, but z is {z.dtype}")
        if base.device != z.device:
            raise ValueError(f"base is on {base.device}, but z is on {z.device}")
        if base.shape != (*lead, bank.d_out):
            raise ValueError(f"base must have shape {(*lead, bank.d_out)}, found {tuple(base.shape)}")
