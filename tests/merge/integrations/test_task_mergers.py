"""The merge handlers of KnOTS and Core Space: against their own code where a checkout is at hand (KNOTS_REPO and
CORE_SPACE_REPO name its folder), and by what their methods are defined to be.
"""

from __future__ import annotations

import contextlib
import copy
import io
import re
import runpy
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import nsc_merge
from bench.swaps.checkouts import checkout, imported_from
from nsc_merge.integrations.task_mergers import get_merge_handler

LAYERS = {"layers.0.q": (24, 24), "layers.0.v": (24, 24), "layers.1.q": (24, 24)}
RANK, TASKS = 3, 3
DRAWS = 12
# Their coefficient, and what floats in another order of the same sums may differ by.
SCALE, ROUNDING = 0.3, 1e-6
EXAMPLE = Path(__file__).parents[3] / "examples" / "integrations" / "task_mergers.py"


class Adapted(nn.Linear):
    """A linear with an adapter inside, as PEFT had them when KnOTS was written: its weight is not wrapped."""

    def __init__(self, d_out, d_in):
        super().__init__(d_in, d_out, bias=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(d_in, RANK, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, d_out, bias=False)})


def model(seed, layers=LAYERS, up=0.3):
    torch.manual_seed(seed)
    found = nn.Module()
    found.layers = nn.ModuleList(nn.Module() for _ in range(2))
    for path, shape in layers.items():
        parent, _, name = path.rpartition(".")
        layer = Adapted(*shape)
        setattr(found.get_submodule(parent), name, layer)
        nn.init.normal_(layer.lora_A["default"].weight, std=shape[1] ** -0.5)
        nn.init.normal_(layer.lora_B["default"].weight, std=up)
    return found.requires_grad_(False)


def models(**settings):
    """The tasks' models, and the pretrained one."""
    return [model(seed, **settings) for seed in range(1, TASKS + 1)], model(0, **{**settings, "up": 0.0})


class Handler:
    """What a codebase's ``LoRAHandler`` is, as far as ours looks at it."""

    def __init__(self, base_model):
        self.base_model = base_model

    def get_ft_parameters(self):
        return {}


def merged(get_handler, representation, config, handler=Handler, scale=SCALE, **settings):
    """Name of a weight -> merged update."""
    tasks, base = models(**settings)
    merger = get_handler(representation)(
        copy.deepcopy(tasks), pretrained_model=base, param_handler=handler, device="cpu", merge_config=config
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        merger.transform(config)
        merger.set_scaling_coeffs(scale)
        found = merger.merge(config).state_dict()
    return {name: found[f"{name}.weight"] - base.state_dict()[f"{name}.weight"] for name in LAYERS}


def distance(found, expected):
    """Relative, of all updates together (Frobenius)."""
    stacked = [torch.cat([updates[name].flatten().double() for name in LAYERS]) for updates in (found, expected)]
    return float((stacked[0] - stacked[1]).norm() / stacked[1].norm())


VECTOR = [{"merge_method": "tv", "merging_type": kind} for kind in ("mean", "sum")] + [
    {"merge_method": "ties", "merging_type": kind, "topK": top} for kind in ("mean", "sum") for top in (20, 0.5, 100)
]
SVD = [{"merge_method": "tv", "merging_type": kind} for kind in ("mean", "sum")] + [
    {"merge_method": "ties", "merging_type": kind, "topK": top, "concat_across_output": across}
    for kind in ("mean", "sum")
    for top, across in ((20, True), (100, True), (30, False))
]
# An odd number of untrimmed votes is never a draw; of a draw the turn of a singular vector decides.
SVD.append({"merge_method": "ties", "merging_type": "mean", "topK": 100, "sign_resolve_mode": "sum_of_signs"})
# DARE that drops nothing: which entries go is a matter of the generator.
DARE = {"dare": True, "dare_pruning_coeffs": 0.0, "dare_seed": 1, "topK": 20, "merging_type": "mean"}
PER_LAYER = [
    {"merge_space": space, "merge_method": method, "topK": 20, "dare_pruning_coeffs": 0.0}
    for space in ("full", "knots", "core")
    for method in ("mean", "sum", "tv", "ties", "dare-ties")
] + [
    {"merge_space": "core", "merge_method": "sum", "isotropize": True},
    {"merge_space": "core", "merge_method": "ties", "topK": 100, "isotropize": True},
    {"merge_space": "core", "merge_method": "tsv"},
]


def named(config):
    return "-".join(f"{value}" for value in config.values())


@pytest.fixture(scope="module", params=["KNOTS_REPO", "CORE_SPACE_REPO"])
def theirs(request):
    """A codebase's ``get_merge_handler`` and ``LoRAHandler``, and whether it is Core Space's."""
    repository = checkout(request.param)
    if repository is None:
        pytest.skip(f"{request.param} names no checkout")
    core = request.param == "CORE_SPACE_REPO"
    if core:
        pytest.importorskip("einops")
    # Of what is absent they draw data and log; a debugger stands in for errors, which are to be seen.
    with imported_from([repository], absent=["clip", "wandb"]), pytest.MonkeyPatch.context() as patch:
        import pdb

        import ft_handlers
        import task_merger

        def raised():
            raise sys.exc_info()[1] or RuntimeError("pdb.set_trace")

        patch.setattr(pdb, "set_trace", raised)
        yield task_merger.get_merge_handler, ft_handlers.LoRAHandler, core


@pytest.mark.parametrize("config", VECTOR + [{**DARE, "merge_method": "ties"}], ids=named)
def test_vector_is_theirs(theirs, config):
    handler, lora, _ = theirs
    expected = merged(handler, "vector", config, lora)
    assert distance(merged(get_merge_handler, "vector", config, lora), expected) < ROUNDING


@pytest.mark.parametrize("config", SVD + [{**DARE, "merge_method": "ties"}], ids=named)
def test_aligned_by_svd_is_theirs(theirs, config):
    handler, lora, core = theirs
    representation = "svd" if core else "svd-vector"
    expected = merged(handler, representation, config, lora)
    assert distance(merged(get_merge_handler, representation, config, lora), expected) < ROUNDING


@pytest.mark.parametrize("config", PER_LAYER, ids=named)
def test_each_layer_by_itself_is_theirs(theirs, config):
    handler, lora, core = theirs
    if not core:
        pytest.skip("KnOTS has no such representation")

    def held(base_model):
        # As its scripts give it adapters: their state dictionaries.
        return lora(base_model.state_dict() if isinstance(base_model, nn.Module) else base_model)

    expected = merged(handler, "matrix_per_layer", config, held)
    assert distance(merged(get_merge_handler, "matrix_per_layer", config, held), expected) < ROUNDING


def test_dropping_is_theirs_on_average(theirs):
    handler, lora, _ = theirs
    config = {"merge_method": "tv", "merging_type": "sum", "dare": True, "dare_pruning_coeffs": 0.5}
    everything = merged(get_merge_handler, "vector", {"merge_method": "tv"}, lora)
    moments = []
    for get in (handler, get_merge_handler):
        drawn = [merged(get, "vector", {**config, "dare_seed": seed}, lora) for seed in range(DRAWS)]
        mean = {name: torch.stack([one[name] for one in drawn]).mean(0) for name in LAYERS}
        spread = torch.stack([torch.cat([one[name].flatten() for name in LAYERS]) for one in drawn]).std(0).mean()
        moments.append((distance(mean, everything), float(spread)))
    (off, spread), (own_off, own_spread) = moments
    # Half dropped and the other half doubled: what a draw is off by has the update's own norm, a mean's is less by the
    # root of their number. Some 1,700 entries tell it to a few percent.
    assert own_off == pytest.approx(DRAWS**-0.5, rel=0.1)
    assert off == pytest.approx(DRAWS**-0.5, rel=0.1)
    assert own_spread == pytest.approx(spread, rel=0.05)


def dense(path):
    """The tasks' updates of a layer."""
    layers = [task.get_submodule(path) for task in models()[0]]
    return [layer.lora_B["default"].weight @ layer.lora_A["default"].weight for layer in layers]


def test_task_vectors_add_up_in_every_representation():
    expected = {path: SCALE * sum(dense(path)) for path in LAYERS}
    config = {"merge_method": "tv", "merging_type": "sum"}
    for representation, more in [("vector", {}), ("svd-vector", {}), ("svd", {})]:
        assert distance(merged(get_merge_handler, representation, {**config, **more}), expected) < ROUNDING
    for space in ("full", "knots", "core"):
        found = merged(get_merge_handler, "matrix_per_layer", {**config, "merge_space": space})
        assert distance(found, expected) < ROUNDING


@pytest.mark.parametrize("representation", ["vector", "matrix_per_layer"])
def test_ties_trims_over_all_layers_or_in_each(representation):
    stacks = {path: torch.stack(dense(path)).flatten(1) for path in LAYERS}
    whole = torch.cat(list(stacks.values()), 1)
    expected = {}
    for path, stack in stacks.items():
        counted = whole if representation == "vector" else stack
        least = counted.abs().sort(1, descending=True).values[:, int(0.2 * counted.shape[1])][:, None]
        stack = torch.where(stack.abs() >= least, stack, 0.0)
        agrees = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
        expected[path] = (SCALE * (stack * agrees).sum(0) / agrees.sum(0).clamp(min=1)).view(LAYERS[path])
    config = {"merge_method": "ties", "merging_type": "mean", "topK": 20, "merge_space": "full"}
    assert distance(merged(get_merge_handler, representation, config), expected) < ROUNDING


def test_a_search_for_the_scale_merges_once(monkeypatch):
    calls = []
    original = nsc_merge.merge_factors
    monkeypatch.setattr(nsc_merge, "merge_factors", lambda *a, **o: calls.append(o) or original(*a, **o))
    tasks, base = models()
    before = copy.deepcopy(base.state_dict())
    merger = get_merge_handler("svd-vector")(tasks, base, Handler)
    config = {"merge_method": "ties", "merging_type": "mean", "topK": 20}
    found = []
    for scale in (0.1, [0.2], torch.full((TASKS,), 0.4)):
        merger.set_scaling_coeffs(scale)
        weight = merger.merge({**config, "scaling_coeffs": scale}).layers[0].q.weight
        found.append(weight - before["layers.0.q.weight"])
    assert len(calls) == 1
    torch.testing.assert_close(found[1], 2 * found[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[2], 4 * found[0], rtol=1e-4, atol=1e-6)
    merger.merge({**config, "topK": 30})
    assert len(calls) == 2
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_names_of_newer_peft_and_of_saved_adapters():
    peft = pytest.importorskip("peft")
    tasks = models()[0]
    plain = nn.Module()
    plain.q, plain.v = nn.Linear(24, 24), nn.Linear(24, 24)
    wrapped = peft.get_peft_model(plain, peft.LoraConfig(r=RANK, target_modules=["q", "v"]))
    adapters = [
        {
            f"base_model.model.{name}.lora_{part}.weight": getattr(
                task.get_submodule(f"layers.0.{name}"), f"lora_{part}"
            )["default"].weight
            for name in "qv"
            for part in "AB"
        }
        for task in tasks
    ]

    class Saved:
        def __init__(self, held):
            self.state_dict = held

        def get_ft_parameters(self):
            return {}

    merger = get_merge_handler("matrix_per_layer")(adapters, wrapped, Saved)
    found = merger.merge({"merge_space": "core", "merge_method": "sum"}).base_model.model
    for name in "qv":
        update = getattr(found, name).base_layer.weight - getattr(wrapped.base_model.model, name).base_layer.weight
        torch.testing.assert_close(update, sum(dense(f"layers.0.{name}")), rtol=1e-4, atol=1e-5)


def test_what_was_trained_in_full_is_merged_less_the_base():
    class Full:
        def __init__(self, held):
            self.held = held

        def get_ft_parameters(self):
            return OrderedDict(sorted(self.held.state_dict().items()))

    torch.manual_seed(0)
    tasks, base = [nn.Linear(6, 4) for _ in range(2)], nn.Linear(6, 4)
    merger = get_merge_handler("vector")(tasks, base, Full)
    found = merger.merge({"merge_method": "tv", "merging_type": "mean"})
    for name in ("weight", "bias"):
        mean = torch.stack([task.state_dict()[name] for task in tasks]).mean(0)
        torch.testing.assert_close(found.state_dict()[name], mean)
    with pytest.raises(ValueError, match=r"bias: expected a matrix or factors of LoRA, found \[4\] trained in full"):
        get_merge_handler("svd")(tasks, base, Full).merge({"merge_method": "tv", "merging_type": "mean"})


@pytest.mark.parametrize(
    ("representation", "config", "message"),
    [
        ("vector", {"merge_method": "tsv"}, "merge_method: expected one of .* found 'tsv'; task_merger's own"),
        ("vector", {"merge_method": "ties", "merging_type": "max"}, "merging_type: .* found 'max'; task_merger's own"),
        ("vector", {"merge_method": "dare-ties"}, "dare_pruning_coeffs: expected a probability, found none"),
        ("vector", {"merge_method": "tv", "isotropize": True}, "isotropize: expected False but with merge_space"),
        ("svd", {"merge_method": "ties"}, "merging_type: expected one of .* found None"),
        ("svd", {"merge_method": "tv", "merging_type": "sum", "topK": 20}, "found 'tv': trimming and dropping"),
        ("svd", {"merge_method": "ties", "merging_type": "mean", "merge_other_params": True}, "merge_other_params"),
        ("matrix_per_layer", {"merge_space": "core", "merge_method": "cart"}, "found 'cart'; task_merger's own"),
        ("matrix_per_layer", {"merge_space": "full", "merge_method": "tsv"}, "found 'tsv'; task_merger's own"),
        ("matrix_per_layer", {"merge_space": "core", "merge_method": "tsv", "isotropize": True}, "isotropize.*own"),
        ("matrix_per_layer", {"merge_space": "core-vector", "merge_method": "sum"}, "merge_space: .*'core-vector'"),
        ("matrix_per_layer", {"merge_space": "knots", "merge_method": "dare"}, "merge_space 'full' and 'core' have it"),
    ],
)
def test_what_there_is_not_is_refused_by_name(representation, config, message):
    tasks, base = models()
    merger = get_merge_handler(representation)(tasks, base, Handler)
    with pytest.raises(ValueError, match=message):
        merger.merge(config)


def test_wrong_arguments_are_named():
    tasks, base = models()
    merger = get_merge_handler("vector")(tasks, base, Handler)
    with pytest.raises(ValueError, match=r"scaling_coeffs: expected one .* for all 3 tasks, found \[0.1, 0."):
        merger.set_scaling_coeffs([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="representation: expected one of .* found 'tangent'"):
        get_merge_handler("tangent")
    with pytest.raises(ValueError, match="finetuned_models: expected at least one"):
        get_merge_handler("vector")([], base, Handler)
    with pytest.raises(ValueError, match=re.escape("pretrained_model: expected a parameter 'layers.0.q.weight'")):
        get_merge_handler("vector")(tasks, nn.Linear(2, 2), Handler).merge({"merge_method": "tv"})


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert re.search(r"scale 0.3: .* of the parameters moved", capsys.readouterr().out)
