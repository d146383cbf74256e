"""Presets named after public codebases, against what those compute, written down anew from their definitions."""

from __future__ import annotations

import pytest
import torch
from data_cases import Dense, alone, heads, pooled, problem_of
from factor_cases import factor, merged, random_adapters, relative

import nsc_merge
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods import METHODS
from nsc_merge.methods.closed_form import fisher
from nsc_merge.methods.task_vectors import fr_merging
from nsc_merge.methods.task_vectors.elementwise import Ties, ties_merge


def whole(tensors):
    """Adapters whose update is that matrix exactly, from task -> matrix."""
    return {t: Adapter(t, {"x": Factor(torch.eye(x.shape[1]).double(), x, 1.0)}) for t, x in tensors.items()}


def matrices(shape, tasks="abc"):
    generator = torch.Generator().manual_seed(sum(shape))
    # Of unlike sizes, so that aligning them matters.
    return {t: (1 + n) * torch.randn(shape, generator=generator).double() for n, t in enumerate(tasks)}


def distances(shape):
    vertical, horizontal = (torch.arange(side)[:, None] - side // 2 for side in shape)
    return (vertical**2 + horizontal.t() ** 2).double().sqrt()


SHAPES = [(24, 24), (20, 90), (90, 20), (7, 31), (3, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_fr_original_is_the_authors_code(shape):
    """Two masks of an unshifted spectrum that share the bins where they meet; every task's *filtered* update scaled
    to the largest mean magnitude of these; added; times 0.7.
    """
    updates = matrices(shape)
    low, high, distance = min(shape) // 10, 0.7 * min(shape), distances(shape)
    weight = (distance <= low).double() + ((distance >= low) & (distance <= high)).double()
    filtered = [torch.fft.ifft2(torch.fft.fft2(update) * weight).real for update in updates.values()]
    means = [update.abs().mean() for update in filtered]
    expected = 0.7 * sum(update * (max(means) / mean) for update, mean in zip(filtered, means, strict=True))
    found = dict(fr_merging.fr(whole(updates), ["x"], fr_merging.FROptions()))["x"].delta().double()
    assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_fr_of_nsc_is_its_code(shape):
    """The bins nearer to the middle than a tenth of the smaller side, rounded down but at least 1, are left out."""
    updates = matrices(shape)
    weight = (distances(shape) >= max(1, int(0.1 * min(shape)))).double()
    expected = 0.3 * sum(torch.fft.ifft2(torch.fft.fft2(update) * weight).real for update in updates.values())
    options = fr_merging.FROptions(preset="nsc")
    found = dict(fr_merging.fr(whole(updates), ["x"], options))["x"].delta().double()
    assert relative(found, expected) < 1e-6


@pytest.mark.parametrize(
    ("scope", "first", "second"),
    [
        # x votes 0 and +, y votes 0 and twice -, so that all together have a majority of -.
        ("global", -1.0, -1.0),
        ("tensor", 1.0, -1.0),
    ],
)
def test_a_cancelled_entry_takes_the_majority_of_what_is_counted_together(scope, first, second):
    a = {"x": torch.tensor([1.0, 2.0, 0.0]), "y": torch.tensor([1.0, -2.0, -2.0])}
    b = {"x": torch.tensor([-1.0, 2.0, 0.0]), "y": torch.tensor([-1.0, -2.0, -2.0])}
    steps = Ties(1.0, scope, "next", "sum", "majority", "mean")
    tensors = {"a": a, "b": b}
    found = dict(ties_merge(lambda path, task: tensors[task][path], {"x": ["a", "b"], "y": ["a", "b"]}, steps))
    assert found["x"].tolist() == [first, 2.0, 0.0]
    assert found["y"].tolist() == [second, -2.0, -2.0]


def test_a_cancelled_entry_without_a_majority_is_negative():
    """As in the authors' code, whose sign of it is 0 and so not above 0."""
    tensors = {"a": torch.tensor([1.0]), "b": torch.tensor([-1.0])}
    steps = Ties(1.0, "global", "next", "sum", "majority", "mean")
    assert dict(ties_merge(lambda _, task: tensors[task], {"": ["a", "b"]}, steps))[""].tolist() == [-1.0]


def untrained(place):
    """Three adapters of unit scaling, one of them with B = 0, and the other two alone."""
    adapters = random_adapters(scalings=(1.0, 1.0, 1.0))
    for one in adapters[place].factors.values():
        one.B.zero_()
    return adapters, {task: adapter for task, adapter in adapters.items() if task != place}


@pytest.mark.parametrize("place", ["0", "1", "2"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("knots_ties", {}),
        ("knots_ties", {"density": 1.0, "vectors": "plain"}),
        ("knots_dare_ties", {}),
        ("core_space", {"bases": "updates"}),
        ("core_space", {"bases": "updates", "density": 1.0}),
        ("svd_cur", {"columns": 8}),
    ],
)
def test_an_untrained_adapter_has_no_vote(method, options, place):
    """Its update is exactly zero in any basis: the mean of those that agree is not divided by it."""
    three, two = untrained(place)
    found, expected = merged(method, three, **options), merged(method, two, **options)
    for path in "xy":
        assert relative(found[path], expected[path]) < 1e-9


def core_of_authors(adapters, density, isotropise):
    """Core Space with all singular vectors of the stacks, also those of values that are zero."""
    factors = [adapter.factors["x"] for adapter in adapters.values()]
    left = torch.linalg.svd(torch.cat([f.scaling * f.B for f in factors], 1), full_matrices=False).U
    right = torch.linalg.svd(torch.cat([f.A for f in factors]), full_matrices=False).Vh
    parts = torch.stack([left.t() @ f.delta() @ right.t() for f in factors])
    size = parts[0].numel()
    least = parts.abs().flatten(1).kthvalue(size - int(size * density), dim=1).values
    kept = torch.where(parts.abs() >= least[:, None, None], parts, 0.0)
    agrees = kept.sign() == kept.sum(0).sign()
    core = (kept * agrees).sum(0) / (agrees & (kept != 0)).sum(0).clamp(min=1)
    if isotropise:
        u, sigma, v = torch.linalg.svd(core)
        core = sigma.mean() * u @ v
    return left @ core @ right


def deficient():
    adapters = random_adapters()
    for adapter in adapters.values():
        adapter.factors["x"].A[3] = adapter.factors["x"].A[0]
    return adapters


def test_core_space_with_null_directions_is_the_authors_code():
    """Nine directions of twelve: a core of 12 by 12, of which trimming keeps 0.3 of 144 entries and not of 108."""
    adapters = deficient()
    found = factor("core_space", adapters, null_directions=True)
    assert relative(found.delta(), core_of_authors(adapters, 0.3, isotropise=False)) < 1e-9
    assert found.rank == 12
    without = factor("core_space", adapters)
    assert relative(without.delta(), found.delta()) > 0.05
    assert without.rank == 9


def test_core_space_isotropises_what_is_zero_with_null_directions_only():
    adapters = deficient()
    expected = torch.linalg.svdvals(core_of_authors(adapters, 0.3, isotropise=True))[:12]
    theirs = factor("core_space", adapters, isotropise=True, null_directions=True).delta()
    torch.testing.assert_close(torch.linalg.svdvals(theirs)[:12], expected, rtol=1e-9, atol=0)
    assert float(expected.max() / expected.min()) == pytest.approx(1, abs=1e-9)
    ours = torch.linalg.svdvals(factor("core_space", adapters, isotropise=True).delta())
    assert float(ours[8]) == pytest.approx(float(ours[0]))
    assert float(ours[9]) < 1e-9


def batch_fisher(problem, task, batches, paths):
    """In float64: the squared gradient of sqrt(p) log p, summed over labels and a batch, by all examples."""
    weights = {name: value.double() for name, value in alone(problem, task).items()}
    held = {f"{path}.weight": weights[f"{path}.weight"].clone().requires_grad_() for path in paths}
    sums, count = {name: torch.zeros_like(value) for name, value in held.items()}, 0
    for batch in batches:
        one = Dense(problem.model, {**weights, **held})
        logits = pooled(one, {name: value.double() for name, value in batch.items()}) @ heads()[task].double()
        log_p = logits.log_softmax(-1)
        found = torch.autograd.grad((log_p.exp().sqrt().detach() * log_p).sum(), list(held.values()))
        for name, value in zip(held, found, strict=True):
            sums[name] += value.square()
        count += len(logits)
    return {path: sums[f"{path}.weight"] / count for path in paths}


@pytest.mark.parametrize("normalise", [True, False])
def test_fisher_of_mergelm_is_its_code(model, folders, calibration, outputs, normalise):
    """Batch gradients; 1e-6 added to every entry and to each task's norm; the average of whole weights."""
    problem = problem_of(model, folders, calibration)
    options = {"preset": "mergelm", "batches": 2, "outputs": outputs, "normalise": normalise}
    result = nsc_merge.merge(model, folders, calibration, "fisher", **options)
    fishers = {task: batch_fisher(problem, task, calibration[task], result.paths) for task in folders}
    norms = {task: torch.cat([part.flatten() for part in parts.values()]).norm() for task, parts in fishers.items()}
    for path in result.paths:
        above, below = 0, 0
        for task, parts in fishers.items():
            weight = (parts[path] + 1e-6) / (norms[task] + 1e-6 if normalise else 1.0)
            above, below = above + weight * alone(problem, task)[f"{path}.weight"].double(), below + weight
        expected = above / below - model.get_submodule(path).weight.double()
        assert relative(result.delta(path), expected.detach()) < 1e-3


def test_fisher_of_mergelm_is_for_classes(model, folders, calibration, outputs):
    with pytest.raises(ValueError, match=r"likelihood: expected 'categorical' with gradients='batch'.* 'gaussian'"):
        fisher.FisherOptions(preset="mergelm", likelihood="gaussian")
    many = {task: lambda model, batch: model(**batch).last_hidden_state for task in folders}
    with pytest.raises(ValueError, match=r"outputs\['.*'\]: expected logits \[N, C\] with gradients='batch', found"):
        nsc_merge.merge(model, folders, calibration, "fisher", preset="mergelm", outputs=many, batches=1)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fisher", {"preset": "mmatena"}, r"preset: expected one of \['canonical', 'mergelm'\], found 'mmatena'"),
        ("fisher", {"gradients": "label"}, "gradients: expected one of"),
        ("fisher", {"floor_is": "most"}, "floor_is: expected one of"),
        ("core_space", {"null_directions": 1}, "null_directions: expected one of"),
        (
            "core_space",
            {"null_directions": True, "bases": "updates"},
            "null_directions: expected bases='factors' with it, found bases='updates'",
        ),
    ],
)
def test_bad_options_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method].options(**options)
