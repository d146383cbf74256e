"""Proposition 1 of arXiv 2603.26317 (Section C.1), checked on real inputs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.adapters import AdapterSource, Factor
from nsc_merge.analysis.null_space_ratios import low_rank_part, with_room
from nsc_merge.analysis.rank_correlation import rank_correlation
from nsc_merge.calibration.batches import naming_inputs
from nsc_merge.evaluation.scoring import applied
from nsc_merge.models.bases.stored_weights import input_device
from nsc_merge.models.forward_contexts import eager, evaluating
from nsc_merge.models.real_tokens import RealTokens
from nsc_merge.results.result import MergeResult

# Rounding of float64 products over a few thousand terms stays well below.
_SLACK = 1e-9
_KEPT = 20_000


@torch.no_grad()
def check_bound(
    model: nn.Module,
    source: MergeResult | Mapping[str, AdapterSource],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    modules: Sequence[str] | None = None,
    blocks: str | int | Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Check ``||s B A z|| >= C sqrt(1 - w(z)^2) ||z||`` at every input z of every adapted module.

    C is ``s sigma_min(B) sigma_min(A)``, the least singular values; of A the least that is not 0 (relative to the
    greatest), as the proof allows. Everything is computed in float64, with the projection on A's row space taken from
    its singular vectors and not from the kernels. The inequality is a theorem, so that a violation means an error
    here or in the adapter's numbers. What is not a theorem is how much it says: how far above the bound the effect
    lies, and whether inputs of a lower ratio have a larger effect at all.

    Args:
        model: the base model; it is left as it was.
        source: a merge: inputs are those in the merged model. Or adapters: inputs are those in ``model`` as it is.
            The bound is on one adapter's own update; a coefficient multiplies both of its sides.
        batches: model inputs.
        modules, blocks: as in :func:`nsc_merge.analysis.per_sample_ratios`.

    Returns:
        For every task and module ``task``, ``path``, ``constant`` (C), ``inputs`` (how many z, without padding),
        ``violations``, ``tightness`` (median of effect / bound; None where the bound is 0 everywhere), ``least`` (the
        smallest) and ``rho``: Spearman between w and effect / ||z||, negative where a lower ratio goes with a larger
        effect. Median and rho are of at most 20,000 inputs, evenly spread over all.

    Raises:
        ValueError: as :func:`nsc_merge.analysis.per_sample_ratios`.
    """
    adapters = source.adapters if isinstance(source, MergeResult) else source
    model = with_room(model, source)
    chosen = low_rank_part(model, adapters, modules, blocks)
    checks = [
        _Check(task, path, factor)
        for task, adapter in chosen.items()
        for path, factor in adapter.factors.items()
    ]
    tokens = RealTokens(model)
    inputs: dict[str, Tensor] = {}

    def see(check: _Check, z: Tensor) -> None:
        real = tokens.of(check.path, z[..., 0], inputs)
        check.add(z.flatten(0, -2) if real is None else z[real])

    device = input_device(model)
    with ExitStack() as stack:
        if isinstance(source, MergeResult):
            stack.enter_context(applied(model, source))
        stack.enter_context(evaluating(model))
        stack.enter_context(eager(model))
        for check in checks:
            linear = model.get_submodule(check.path)
            hook = linear.register_forward_pre_hook(lambda _, given, check=check: see(check, given[0]))
            stack.callback(hook.remove)
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items()}
            with naming_inputs("inputs", inputs):
                model(**inputs)
    silent = [check.path for check in checks if not check.inputs]
    if silent:
        raise RuntimeError(f"inputs: the forward reaches no {silent[0]}")
    return [check.document() for check in checks]


def summary(checks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over all modules: ``inputs``, ``violations``, ``held``, ``trivial`` (modules whose bound is 0 because a factor
    is rank-deficient, as B is before training), and medians of ``tightness`` and ``rho``.
    """
    tightness = [check["tightness"] for check in checks if check["tightness"] is not None]
    rho = [check["rho"] for check in checks if not math.isnan(check["rho"])]
    violations = sum(check["violations"] for check in checks)
    return {
        "inputs": sum(check["inputs"] for check in checks),
        "violations": violations,
        "held": violations == 0,
        "modules": len(checks),
        "trivial": sum(check["constant"] == 0 for check in checks),
        "tightness": statistics.median(tightness) if tightness else None,
        "rho": statistics.median(rho) if rho else None,
    }


class _Check:
    """The inequality at one module, over all inputs that it has seen."""

    def __init__(self, task: str, path: str, factor: Factor) -> None:
        self.task, self.path, self.inputs, self._violations = task, path, 0, 0
        self._A, self._B = factor.A.double(), factor.scaling * factor.B.double()
        _, sigma, rows = torch.linalg.svd(self._A, full_matrices=False)
        full = int((sigma > sigma[0] * max(self._A.shape) * torch.finfo(factor.A.dtype).eps).sum())
        self._rows = rows[:full]
        least_a = float(sigma[full - 1]) if full else 0.0
        up = torch.linalg.svdvals(self._B)
        # With more columns than rows some direction is mapped to 0.
        deficient = self._B.shape[1] > self._B.shape[0]
        least_b = 0.0 if deficient or up[-1] <= up[0] * torch.finfo(factor.B.dtype).eps else float(up[-1])
        self.constant = least_a * least_b
        # Of every so many inputs: ratio, effect and how many times the bound that is.
        self._kept, self._every = torch.empty(0, 3, dtype=torch.float64, device="cpu"), 1
        self._least = math.inf

    def add(self, z: Tensor) -> None:
        z = z.cpu().double()
        norm = z.norm(dim=-1)
        z, norm = z[norm > 0], norm[norm > 0]
        inside = (z @ self._rows.t()).norm(dim=-1)
        effect = (z @ self._A.t() @ self._B.t()).norm(dim=-1)
        bound = self.constant * inside
        self._violations += int((effect < bound * (1 - _SLACK)).sum())
        times = torch.where(bound > 0, effect / bound, torch.nan)
        self._least = min([self._least, *times[bound > 0].tolist()])
        columns = torch.stack([(1 - (inside / norm).square()).clamp(min=0).sqrt(), effect / norm, times], 1)
        self._kept = torch.cat([self._kept, columns[-self.inputs % self._every :: self._every]])
        self.inputs += len(z)
        while len(self._kept) > _KEPT:
            self._kept, self._every = self._kept[::2], 2 * self._every

    def document(self) -> dict[str, Any]:
        ratio, effect, times = self._kept.unbind(1)
        times = times[~times.isnan()]
        return {
            "task": self.task,
            "path": self.path,
            "constant": self.constant,
            "inputs": self.inputs,
            "violations": self._violations,
            "tightness": times.median().item() if len(times) else None,
            "least": None if math.isinf(self._least) else self._least,
            "rho": rank_correlation(ratio.tolist(), effect.tolist()),
        }
