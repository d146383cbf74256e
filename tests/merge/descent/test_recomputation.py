"""Blocks that are recomputed in the backward, also those with something measured in them: the gradient of the plain
model, and of offloaded weights one block at a time.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from accelerate import cpu_offload
from loop_cases import TASKS, adapters_for, image_batches, llama, llava, text_batches, trajectory, values
from torch import nn

import nsc_merge
from nsc_merge.methods.gradient.nsc import objective_of
from nsc_merge.methods.gradient.nsc_options import resolve_options
from nsc_merge.models.families import family_of, scored_paths
from nsc_merge.models.forward_contexts import recomputed, recomputing


def objective(model, adapters, **options):
    family = family_of(model)
    chosen = resolve_options(family, TASKS, {"batch_tasks": False, "fold": False, **options})
    scored = scored_paths(family, model, list(adapters["a"].factors), chosen.score_modules, chosen.score_blocks)
    return objective_of(model, adapters, family, scored, chosen)


class Store(dict):
    """Weights that a call brings as copies of their own, as to another device: ``alive`` bytes of them are there, and
    there were ``most``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__({name: value.detach().clone() for name, value in model.state_dict().items()})
        self.alive = self.most = 0

    def __getitem__(self, name):
        copy = super().__getitem__(name).numpy().copy()
        self.alive += copy.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(copy, self._gone, copy.nbytes)
        return torch.from_numpy(copy)

    def _gone(self, nbytes: int) -> None:
        self.alive -= nbytes


def offloaded(model: nn.Module) -> tuple[nn.Module, Store]:
    store = Store(model)
    return cpu_offload(model, torch.device("cpu"), state_dict=store), store


def nbytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.parameters())


def found(model, adapters, batches, **options):
    """Objectives and gradients of two steps: the first shows where the forward may end."""
    with objective(model, adapters, **options) as measured:
        flat = measured.coefficients.flat
        results = []
        for number in range(2):
            flat.grad = torch.zeros_like(flat)
            results += [measured.accumulate([batches[task][number] for task in TASKS]), flat.grad]
    return results


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (llama, {}),
        (llama, {"early_exit": False}),
        (llama, {"batch_tasks": True, "score_blocks": [0, 2]}),
        (llava, {}),
        (llava, {"score_modules": ["q_proj", "v_proj"], "score_blocks": 4, "cache_prefix": False}),
    ],
)
def test_recomputed_blocks_give_the_gradient_of_the_plain_model(options, make):
    model = make().double()
    adapters, batches = adapters_for(model), image_batches() if make is llava else text_batches()
    for one in (row for rows in batches.values() for row in rows if make is llava):
        one["pixel_values"] = one["pixel_values"].double()
    plain = found(model, adapters, batches, checkpointing=False, **options)
    again = found(model, adapters, batches, checkpointing=True, **options)
    elsewhere = found(offloaded(make().double())[0], adapters, batches, **options)
    for one, other, third in zip(plain, again, elsewhere, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)
        assert one.any()


@pytest.mark.parametrize("options", [{}, {"early_exit": False}])
def test_every_block_runs_once_more_and_nothing_after_the_last_measurement(options):
    model = llama()
    adapters, batches = adapters_for(model), text_batches()
    mlps = [layer.mlp for layer in model.model.layers]
    runs: list[list[bool]] = [[] for _ in mlps]
    for mlp, seen in zip(mlps, runs, strict=True):
        mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(recomputing()))
    with objective(model, adapters, checkpointing=True, **options) as measured:
        measured.accumulate([batches[task][0] for task in TASKS])
    once = [False, True] * 3
    # The last block has its measured input in front of its MLP.
    assert runs == [once, once, once, [] if not options else once]


@pytest.mark.parametrize("early_exit", [True, False])
def test_of_offloaded_weights_one_block_at_a_time_is_there(early_exit):
    model = llama()
    adapters, batches = adapters_for(model), text_batches()
    block, rest = nbytes(model.model.layers[0]), nbytes(model.lm_head) + nbytes(model.model.norm)
    model, store = offloaded(model)

    def most(**options) -> int:
        store.most = 0
        with objective(model, adapters, early_exit=early_exit, **options) as measured:
            for number in range(2):
                measured.accumulate([batches[task][number] for task in TASKS])
                assert not store.alive
        assert all(value.device.type == "meta" for value in model.parameters())
        return store.most

    # Without recomputation, all up to the last measured linear.
    assert most(checkpointing=False) > 2.5 * block
    assert most() <= block + (0 if early_exit else rest)


def test_the_course_on_offloaded_weights_is_that_of_the_plain_model():
    plain = llama()
    adapters, batches = adapters_for(plain), text_batches()
    model, _ = offloaded(llama())
    settings = {"steps": 20, "fold": False}
    one, other = (trajectory(each, adapters, batches, batch_tasks=None, **settings) for each in (model, plain))
    assert torch.equal(values(one), values(other))
    assert (values(one) - 0.4).abs().max() > 1e-2


def three_classes(model, batch):
    return model(**batch).logits[:, -1, :3]


METHODS = {
    "match": {"steps": 2, "ratio_weight": 0.5, "ratio_target": "own", "normalise": "task", "hold_out": 1},
    "match of modules": {"steps": 2, "features": ["model.layers.1", "model.layers.3.mlp"]},
    "distill": {"steps": 2, "normalise": "task"},
    "adamerging": {"steps": 2},
    "adamerging of tokens": {"steps": 1, "tokens": "full", "new_tokens": 2},
    "regmean": {"batches": 1},
    "fisher": {"batches": 1},
    "fisher of classes": {"batches": 1, "outputs": dict.fromkeys(TASKS, three_classes)},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_data_takes_offloaded_weights_block_by_block(name):
    plain = llama().double()
    adapters, batches = adapters_for(plain), text_batches(3)
    block, rest = nbytes(plain.model.layers[0]), nbytes(plain.lm_head) + nbytes(plain.model.norm)
    model, store = offloaded(llama().double())
    settings = METHODS[name] | ({"progress": False} if "steps" in METHODS[name] else {})
    wanted, result = (nsc_merge.merge(one, adapters, batches, name.split()[0], **settings) for one in (plain, model))
    for path in wanted.paths:
        torch.testing.assert_close(result.delta(path), wanted.delta(path), rtol=0, atol=1e-10)
    assert not store.alive
    assert store.most <= block + rest
    assert all(value.device.type == "meta" for value in model.parameters())


def test_what_is_kept_of_one_block_counts_when_tasks_may_run_together(monkeypatch):
    """Recomputed, a block holds its activations and the weights that were brought for them."""
    model, _ = offloaded(llama())
    adapters, batches = adapters_for(llama()), text_batches()
    drawn = [batches[task][0] for task in TASKS]
    asked = []
    measured = "nsc_merge.descent.null_space_objective.free_memory"
    monkeypatch.setattr(measured, lambda device: asked.append(device) or limit[0])
    block = nbytes(llama().model.layers[0])

    def together(free: int) -> bool:
        limit[0] = free
        with objective(model, adapters, batch_tasks=None) as measured:
            measured.accumulate(drawn)
            return measured.batch_tasks

    limit = [0]
    assert not together(2 * block)
    assert together(40 * block)
    assert len(asked) == 2


def test_an_error_in_a_forward_leaves_the_model_as_it_was():
    model = llama()
    layer = model.model.layers[2]
    layer.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), recomputed(model, True):
        model(**text_batches(1)["a"][0])
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config.use_cache
    assert not recomputing()
