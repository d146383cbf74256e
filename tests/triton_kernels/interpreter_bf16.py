"""Correct bfloat16 arithmetic for Triton's interpreter, which keeps it as uint16 and computes on the bits.

Without this ``tl.dot`` multiplies integers, float32 is truncated and not rounded, and no error is raised. Seen on
Triton 3.6 and 3.9. Also lets a run-time scalar be a loop bound on Triton 3.6 with NumPy 2.4 or newer, and
(:func:`truncating`) products be taken as tensor cores take them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits to float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _float32(handle: Any) -> Any:
    return interpreter.TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def truncated_dot(a: np.ndarray, b: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """``acc + a @ b`` as a matrix unit that cuts off: csrc/cuda/matrix_unit.h, 16 inner columns at a time."""
    a, b, acc = (np.asarray(t, np.float64) for t in (a, b, acc))
    for k in range(0, a.shape[1], 16):
        products = a[:, None, k : k + 16] * b.T[None, :, k : k + 16]
        largest = np.maximum(np.abs(products).max(-1), np.abs(acc))
        place = np.exp2(np.floor(np.log2(np.where(largest > 0, largest, 1.0))) - 25)
        cut = np.trunc(products / place[..., None]) * place[..., None]
        total = np.trunc(acc / place) * place + cut.sum(-1)
        nearest = total.astype(np.float32)
        acc = np.where(np.abs(nearest) > np.abs(total), np.nextafter(nearest, np.float32(0)), nearest).astype(
            np.float64
        )
    return acc.astype(np.float32)


@contextmanager
def truncating() -> Iterator[None]:
    """In the block, products of 16-bit numbers are taken by :func:`truncated_dot`."""
    builder = interpreter.InterpreterBuilder
    rounding = builder.create_dot

    def dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        if a.dtype.primitive_bitwidth != 16:
            return rounding(self, a, b, acc, *rest)
        wide = [_float32(t).data.astype(np.float32) for t in (a, b)]
        return interpreter.TensorHandle(truncated_dot(*wide, acc.data), tl.float32)

    builder.create_dot = dot
    try:
        yield
    finally:
        builder.create_dot = rounding


_BUILTINS: dict[Any, list[str]] = {}


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """As Triton's own, which looks through all of the language at every call of a function in the kernel, and so spends
    much of the time: what the builtins are called is found out once.
    """
    if package not in _BUILTINS:
        _BUILTINS[package] = [name for name, value in inspect.getmembers(package) if tl.core.is_builtin(value)]
    for name in _BUILTINS[package]:
        value = getattr(package, name)
        if tl.core.is_builtin(value):  # not yet wrapped by the launch that calls
            interpreter._patch_attr(package, name, value, builder, scope)


class _LanguagePatchedOnce:
    """As Triton's own ``_patch_lang``, which patches the language anew for every function that a kernel calls."""

    def __init__(self) -> None:
        self._patch, self._modules, self._patched = interpreter._patch_lang, {}, set()

    def __call__(self, function: Any) -> Any:
        if function not in self._modules:
            self._modules[function] = frozenset(
                id(value) for value in function.__globals__.values() if value is tl or value is tl.core
            )
        if self._modules[function] in self._patched:
            return None  # of a function that is called, which undoes nothing
        scope = self._patch(function)
        if not self._patched:
            undo = scope.restore
            scope.restore = lambda: (self._patched.clear(), undo())
        self._patched.add(self._modules[function])
        return scope


_scalar_dtype = functools.lru_cache(interpreter._get_np_dtype)


def _numpy_dtype(dtype: Any) -> Any:
    """As Triton's own, which makes its table anew at every call."""
    scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _scalar_dtype(scalar)


def apply() -> None:
    """Patch the interpreter once; other types keep their own code."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "corrected_bfloat16", False):
        return
    create_dot, cast_impl = builder.create_dot, builder.cast_impl
    binary_op, unary_op = builder.binary_op, builder.unary_op
    find_overflow = TritonSemantic.binary_op_sanitize_overflow_impl

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, _float32(a), _float32(b), *rest)

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return interpreter.TensorHandle(narrow(source.data), tl.bfloat16)
        if _is_bf16(source) and target.scalar == tl.float32:
            return _float32(source)
        return cast_impl(self, source, target)

    def binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not _is_bf16(left) or op in BITWISE:
            return binary_op(self, left, right, op)
        result = op(widen(left.data), widen(right.data))
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, tl.int1)
        return interpreter.TensorHandle(narrow(result), tl.bfloat16)

    def unary(self: Any, value: Any, op: Any) -> Any:
        if not _is_bf16(value):
            return unary_op(self, value, op)
        return interpreter.TensorHandle(narrow(op(widen(value.data))), tl.bfloat16)

    def overflow(self: Any, *operands: Any) -> None:
        """Of sums and products of integers; only an assert looks at it, which there is none without ``debug``."""
        if self.builder.options.debug:
            find_overflow(self, *operands)

    TritonSemantic.binary_op_sanitize_overflow_impl = overflow
    builder.create_dot, builder.cast_impl = dot, cast
    builder.binary_op, builder.unary_op = binary, unary
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(builder, name, lambda self, source, target: self.cast_impl(source, target))
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: self.cast_impl(self.get_fp32(value), tl.bfloat16)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch_tensor_with_index
    interpreter._patch_builtin = _patch_builtin
    interpreter._patch_lang = _LanguagePatchedOnce()
    interpreter._get_np_dtype = _numpy_dtype
    builder.corrected_bfloat16 = True
