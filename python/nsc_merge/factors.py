"""Merging without a model: :func:`merge_factors`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.adapters.algebra.factoring import as_product, factored
from nsc_merge.adapters.algebra.low_rank import low_rank
from nsc_merge.methods.gradient_free import present, with_the_rest
from nsc_merge.methods.method import Method
from nsc_merge.methods.registry import METHODS, method_of
from nsc_merge.methods.shared_options import weights_of
from nsc_merge.utils.option_checks import check_count, check_number

# Down-projection, up-projection and scaling; one matrix; or both as this library holds them.
Update: TypeAlias = tuple[Tensor, Tensor, float] | Tensor | Factor


def merge_factors(
    adapters: Mapping[str, Mapping[str, Update]],
    method: str = "task_arithmetic",
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> Iterator[tuple[str, Factor]]:
    """Merge updates of linear layers by any method that needs no data, without a model.

    >>> tasks = {"a": {"q": (A1, B1, 2.0)}, "b": {"q": (A2, B2, 2.0)}}     # A [r, d_in], B [d_out, r]
    >>> for path, merged in merge_factors(tasks, "knots_ties", scale=0.3):
    ...     weights[path] += merged.delta()

    All arguments are checked before this returns (that ranks are equal, where a method needs that, before the first
    update). What is iterated over is then computed one path after another, and nothing of it is kept here. Each update
    is taken from its mapping once, so that one which reads a file when it is asked for has one dense delta in memory at
    a time.

    Args:
        adapters: task -> path -> update: ``(A [r, d_in], B [d_out, r], scaling)``, which stands for
            ``scaling * B @ A``; a dense delta ``[d_out, d_in]``, factored where it is of low rank
            (:func:`nsc_merge.adapters.algebra.factoring.factored`); or a :class:`Factor`, as
            ``load_adapter(folder).factors`` has them. Floating point, finite, of unequal ranks if need be, those of a
            path on one device, where they are merged; a task may lack paths. Methods that look at factors and not at
            their product, such as ``linear`` and ``lora_lego``, see what was given, or what factoring found, with a
            warning.
        method: as ``nsc-merge methods`` lists them, of those that need no data and give one update for all tasks.
        rank: of the merged updates at most. It is the option of methods that have one of that name (``svd``,
            ``lora_lego``); of others the best approximation of that rank, and None leaves them as the method gives
            them, factors or a matrix.
        tolerance: relative error (Frobenius) up to which a dense delta counts as of low rank; None is rounding.
            Products rounded to half precision need some 0.005, differences of float32 weights a thousand times as large
            as they are some 1e-4.
        options: of the method, ``scale`` and ``weights`` (task -> weight) among them where it has them.

    Returns:
        An iterator over path and merged update, in the order in which the paths first appear: a :class:`Factor` with
        scaling 1, with ``A`` and ``B`` in float32, or with ``dense [d_out, d_in]`` beside factors of rank 0;
        ``delta()`` is the update in float64 either way. Biases of LoRA layers are merged by task arithmetic, as
        :func:`nsc_merge.merge` does.

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected.
    """
    chosen = _method(method)
    if "rank" in chosen.option_names:
        # The method's own, which says more than a truncation: how many clusters, for example.
        options, rank = {**options, "rank": rank}, None
    resolved = chosen.resolved(options, list(adapters) if isinstance(adapters, Mapping) else [])
    if rank is not None:
        check_count("rank", rank)
    if tolerance is not None:
        check_number("tolerance", tolerance, 0, 1)
    held, matrix = _read(adapters, tolerance)
    weights = getattr(resolved, chosen.weighted, None)
    if isinstance(weights, Mapping) and set(weights) != set(held):
        raise ValueError(
            f"{chosen.weighted}: expected one value for each of {list(held)}, found {sorted(weights, key=str)}"
        )
    if matrix is not None and chosen.of_factors_with(resolved):
        option = chosen.factors_option(resolved)
        warnings.warn(
            f"method: {method!r} depends on how an update is factored, which {matrix} does not say: it is merged by "
            "the factors that were found for it; give the adapter's own"
            + (f", or {option} other than 'factors'" if option else ""),
            stacklevel=2,
        )
    return _merged(chosen, held, rank, resolved, full_rank=chosen.gives_with(options) == "full rank")


def _method(name: str) -> Method:
    chosen = method_of(name)
    if chosen.updates is not None:
        return chosen
    if chosen.needs:
        reason = f"needs {' and '.join(sorted(chosen.needs))}: nsc_merge.merge(model, adapters, calibration) runs it"
    else:
        reason = "gives no update for all tasks: nsc_merge.merge(model, adapters) runs it"
    known = [method.name for method in METHODS.values() if method.updates]
    raise ValueError(f"method: {name!r} {reason}; without a model, expected one of {known}")


def _read(adapters: Any, tolerance: float | None) -> tuple[dict[str, Adapter], str | None]:
    """The updates, and the name of one that was given without factors, if there is one."""
    if not isinstance(adapters, Mapping) or not adapters:
        raise TypeError(
            f"adapters: expected a mapping from task to a mapping from path to update, with at least one entry, found "
            f"{type(adapters).__name__} {adapters!r:.60}"
        )
    held: dict[str, Adapter] = {}
    first: dict[str, tuple[str, tuple[int, int], torch.device]] = {}
    matrix = None
    for task, updates in adapters.items():
        if not isinstance(task, str) or not isinstance(updates, Mapping):
            raise TypeError(
                f"adapters[{task!r:.60}]: expected a name (str) and a mapping from path to update, found "
                f"{type(updates).__name__}"
                + ("; of an adapter, give its .factors" if isinstance(updates, Adapter) else "")
            )
        factors = {}
        for path in updates:
            name, update = f"adapters[{task!r}][{path!r}]", updates[path]
            factors[path] = factor = _factor(name, update, tolerance)
            if isinstance(update, Tensor) or (isinstance(update, Factor) and update.dense is not None):
                matrix = matrix or name
            shape = factor.B.shape[0], factor.A.shape[1]
            device = factor.A.device
            other, expected, at = first.setdefault(path, (task, shape, device))
            if shape != expected:
                raise ValueError(
                    f"{name}: expected an update of {list(expected)} as {other!r} has, found one of {list(shape)}"
                )
            if device != at:
                raise ValueError(f"{name}: expected an update on {at} as {other!r} has, found one on {device}")
        held[task] = Adapter(task, factors)
    if not first:
        raise ValueError(f"adapters: expected at least one update, found none in any of {list(held)}")
    return held, matrix


def _factor(name: str, update: Any, tolerance: float | None) -> Factor:
    if isinstance(update, Tensor):
        return factored(_checked(name, update), tolerance)
    if isinstance(update, Factor):
        if update.gain is not None or update.magnitude is not None:
            raise ValueError(
                f"{name}: is DoRA, whose update depends on the base's weight: nsc_merge.merge(model, adapters) "
                "merges it; expected plain LoRA or a dense delta"
            )
        if update.dense is not None and not update.rank:
            whole = factored(_checked(name, update.dense), tolerance)
            return replace(whole, scaling=update.scaling, bias=update.bias)
        A, B, scaling, bias, transposed = update.A, update.B, update.scaling, update.bias, update.transposed
        if update.dense is not None:
            raise ValueError(f"{name}: expected factors or a dense delta, found both; add them up")
    elif isinstance(update, tuple | list) and len(update) == 3:
        (A, B, scaling), bias, transposed = update, None, False
    else:
        found = f"{type(update).__name__} of {len(update)}" if isinstance(update, tuple | list) else f"{update!r:.60}"
        raise TypeError(
            f"{name}: expected (A [r, d_in], B [d_out, r], scaling), a dense delta [d_out, d_in] or a Factor, found "
            f"{found}"
        )
    for part, matrix in (("A", A), ("B", B)):
        if not isinstance(matrix, Tensor):
            raise TypeError(f"{name}: expected {part} to be a tensor, found {type(matrix).__name__}")
    A, B = _checked(f"{name}: A", A), _checked(f"{name}: B", B)
    if A.device != B.device:
        raise ValueError(f"{name}: expected A and B on one device, found A on {A.device} and B on {B.device}")
    if A.shape[0] != B.shape[1]:
        raise ValueError(
            f"{name}: expected A [r, d_in] and B [d_out, r] of one rank, found A {list(A.shape)} and B {list(B.shape)}"
        )
    if isinstance(scaling, Tensor) and scaling.numel() == 1:
        scaling = scaling.item()
    check_number(f"{name}: scaling", scaling)
    if bias is not None and not torch.isfinite(bias).all():
        raise ValueError(f"{name}: expected a finite bias, found infinity or NaN in it")
    bias = None if bias is None else bias.detach().to(A.device)
    return Factor(A, B, float(scaling), bias, transposed=transposed)


def _checked(name: str, matrix: Tensor) -> Tensor:
    """The matrix without its history, in a dtype that can be computed with."""
    if matrix.ndim != 2 or not matrix.is_floating_point():
        raise ValueError(
            f"{name}: expected a matrix of floating point, found {list(matrix.shape)} of {matrix.dtype}; flatten a "
            "convolution to [d_out, the rest]"
        )
    if matrix.is_meta or matrix.layout is not torch.strided:
        found = "one on the meta device, of a shape alone" if matrix.is_meta else f"one of layout {matrix.layout}"
        raise ValueError(f"{name}: expected a matrix with all its numbers, found {found}")
    # In float8 numbers can be kept, and little else.
    matrix = matrix.detach().float() if matrix.itemsize == 1 else matrix.detach()
    if not torch.isfinite(matrix).all():
        raise ValueError(f"{name}: expected finite numbers, found infinity or NaN")
    return matrix


def _merged(
    method: Method, adapters: Mapping[str, Adapter], rank: int | None, options: Any, *, full_rank: bool
) -> Iterator[tuple[str, Factor]]:
    assert method.updates is not None
    held = {path: factor for adapter in adapters.values() for path, factor in adapter.factors.items()}

    def update(_: str, factor: Factor) -> Factor | None:
        if not factor.rank and factor.dense is None:
            return None
        # Dense ones are left to methods that look at entries; to others they are products with an identity.
        return factor if method.of_entries and full_rank else as_product(factor)

    not_zero = {task: adapter.with_factors(update) for task, adapter in adapters.items()}
    # Merged in the end.
    biases = {
        task: adapter.with_factors(lambda _, factor: replace(factor, dense=None)) for task, adapter in adapters.items()
    }
    paths = [path for path in held if present(not_zero, path)]
    scale = getattr(options, "scale", 1.0)
    weights = weights_of(scale, list(adapters)) if isinstance(scale, Mapping) else getattr(options, "weights", None)
    scale = 1.0 if isinstance(scale, Mapping) else float(scale)

    def whole(path: str, merged: Factor) -> tuple[str, Factor]:
        factor = with_the_rest(
            path, merged, biases, scale, averages=method.averages_with(options), weights=weights
        )
        if rank is None or (factor.dense is None and factor.rank <= rank):
            return path, factor
        A, B, _ = low_rank([(1.0, factor)], rank)
        return path, Factor(A.float(), B.float(), 1.0, factor.bias)

    computed = method.updates(not_zero, paths, options)
    for path, factor in held.items():
        if path in paths:
            yield whole(*next(computed))
        else:
            yield whole(path, Factor.empty(factor.B.shape[0], factor.A.shape[1], factor.A.device))
