"""Methods against what their papers and public codes write, on dense matrices in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from factor_cases import factor, merged, random_adapters, relative

from nsc_merge.adapters import Adapter
from nsc_merge.methods.task_vectors import emr, fr_merging


def uneven():
    """Unequal ranks and scalings, one of them negative; the second adapter lacks a module."""
    adapters = random_adapters((4, 2, 5), (0.7, -2.0, 1.0))
    del adapters["1"].factors["y"]
    return adapters


def updates(adapters, path):
    return {task: one.factors[path].delta() for task, one in adapters.items() if path in one.factors}


def ties(vectors, density):
    """Of vectors of float64, of which those that float32 keeps alike are equally large; trimmed each for itself."""
    kept = []
    for vector in vectors:
        magnitude = vector.abs().float()
        kept.append(vector * (magnitude >= magnitude.sort().values[-int(density * len(vector)) - 1]))
    stack = torch.nn.utils.rnn.pad_sequence(kept).t()
    agrees = stack * stack.sum(0).sign() > 0
    return (stack * agrees).sum(0) / agrees.sum(0).clamp(min=1)


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, "magnitude"])
def test_svd_cur_trims_over_all_modules_and_blends_in_each(alpha, rows):
    """A task without a module has nothing there to count."""
    adapters, bases = uneven(), {}
    for path in "xy":
        held = updates(adapters, path)
        wide = torch.cat(list(held.values()), 1)
        left, sigma, _ = torch.linalg.svd(wide, full_matrices=False)
        count = {"x": 11, "y": 9}[path]
        columns = wide[:, wide.norm(dim=0).topk(count).indices]
        solved = torch.linalg.pinv(columns, rtol=1e-9)
        if rows:
            largest = wide.norm(dim=1).topk(rows).indices
            few = wide[largest]
            coefficients = {task: solved @ wide @ torch.linalg.pinv(few) @ one[largest] for task, one in held.items()}
        else:
            coefficients = {task: solved @ one for task, one in held.items()}
        basis = left[:, :count]
        assert sigma[count] < 1e-9 < sigma[count - 1]
        bases[path] = (basis, {task: basis.t() @ one for task, one in held.items()}), (columns, coefficients)
    branches = []
    for n in (0, 1):
        vectors = [torch.cat([bases[p][n][1][t].flatten() for p in "xy" if t in bases[p][n][1]]) for t in adapters]
        flat = ties(vectors, 0.2).split([bases[p][n][0].shape[1] * 30 for p in "xy"])
        branches.append({p: bases[p][n][0] @ part.view(-1, 30) for p, part in zip("xy", flat, strict=True)})
    found = merged("svd_cur", adapters, alpha=alpha, rows=rows, svd_scale=0.8, cur_scale=1.5, scale=0.5)
    for path, update in found.items():
        first, second = 0.8 * branches[0][path], 1.5 * branches[1][path]
        share = float(first.norm() / (first.norm() + second.norm())) if isinstance(alpha, str) else alpha
        assert relative(update, 0.5 * (share * first + (1 - share) * second)) < 1e-8


def trimmed(side, density):
    least = side.abs().flatten().kthvalue(int(side.numel() * (1 - density))).values
    return torch.where(side.abs() >= least, side, 0.0)


def test_algorithm_1_of_robustmerge_shares_a_row_among_the_tasks_that_have_it():
    adapters = uneven()
    for path, update in merged("robustmerge_alg1", adapters, density=0.3, scale=0.5).items():
        held = [one.factors[path] for one in adapters.values() if path in one.factors]
        kept = [trimmed(one.A, 0.3) for one in held]
        made_up = [one.A.abs().sum(1) / part.abs().sum(1) for one, part in zip(held, kept, strict=True)]
        expected = 0
        for one, down, row in zip(held, kept, made_up, strict=True):
            up = one.scaling * trimmed(one.B, 0.3)
            for i, share in enumerate(row):
                total = sum(other[i] for other in made_up if i < len(other))
                expected = expected + 0.5 * share / total * torch.outer(up[:, i], down[i])
        assert relative(update, expected) < 1e-12


@pytest.mark.parametrize("method", ["robustmerge", "robustmerge_alg1"])
def test_robustmerge_makes_up_for_the_factor_that_peft_calls_A(method):
    """Of an embedding PEFT has both factors transposed, and so the merge."""
    adapters = random_adapters()
    embeddings = {
        task: Adapter(task, {p: replace(f, A=f.B.t(), B=f.A.t(), transposed=True) for p, f in one.factors.items()})
        for task, one in adapters.items()
    }
    found = factor(method, embeddings)
    assert found.A.shape[1] == 20
    assert relative(found.delta(), factor(method, adapters).delta().t()) < 1e-12


@pytest.mark.parametrize("shape", [(24, 24), (9, 40), (31, 8), (1, 12)])
def test_fr_shifted_is_a_high_pass(shape):
    """The bins nearer to frequency zero than a tenth of the smaller side, or than one bin, are left out."""
    adapters = random_adapters((3, 1, 2), (1.0, 20.0, -0.5), shape[1], shape[0], "x")
    away = [torch.minimum(torch.arange(side), side - torch.arange(side)).double() for side in shape]
    kept = (away[0][:, None] ** 2 + away[1] ** 2).sqrt() >= max(1, min(shape) // 10)
    parts = [torch.fft.ifft2(torch.fft.fft2(one) * kept).real for one in updates(adapters, "x").values()]
    largest = max(part.abs().mean() for part in parts)
    expected = 0.7 * sum(part * largest / part.abs().mean() for part in parts)
    found = dict(fr_merging.fr(adapters, ["x"], fr_merging.FROptions(preset="shifted")))["x"].delta()
    assert relative(found, expected) < 1e-5


def test_emr_is_its_code():
    adapters = uneven()
    own, left, unified, masks = dict.fromkeys(adapters, 0.0), dict.fromkeys(adapters, 0.0), {}, {}
    for path in "xy":
        held = updates(adapters, path)
        flag = torch.where(torch.stack(list(held.values())).mean(0) > 0, 1.0, -1.0).double()
        agrees = {task: update * flag > 0 for task, update in held.items()}
        largest = torch.stack([update.abs() * agrees[task] for task, update in held.items()]).amax(0)
        unified[path], masks[path] = largest * flag, agrees
        for task, update in held.items():
            own[task] += float(update.abs().mean())
            left[task] += float((unified[path] * agrees[task]).abs().mean())
    rescale, shared = emr.rescaling(adapters, list("xy")), emr.UnifiedUpdates(adapters)
    for task, one in adapters.items():
        assert rescale[task] == pytest.approx(own[task] / left[task], rel=1e-5)
        each = emr.Modulated(task, shared, one.factors, rescale[task])
        for path in one.factors:
            expected = unified[path] * masks[path][task] * own[task] / left[task]
            assert relative(each[path].delta(), expected) < 1e-5
    for path, update in emr.emr_unified(adapters, list("xy"), emr.UnifiedOptions(scale=0.3)):
        assert relative(update.delta(), 0.3 * unified[path]) < 1e-6
