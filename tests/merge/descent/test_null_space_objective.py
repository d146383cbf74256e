"""Everything that the loop leaves out changes nothing: the same coefficients with and without it."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import transformers as tf
from loop_cases import (
    TASKS,
    Around,
    adapters_for,
    image_batches,
    llama,
    llava,
    text_batches,
    trajectory,
    values,
)
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import write_adapter

from nsc_merge import Adapter, merge
from nsc_merge.calibration.forward_passes import one_by_one
from nsc_merge.descent.optimisation import Optimisation
from nsc_merge.descent.options import DescentOptions
from nsc_merge.methods.gradient.nsc import objective_of
from nsc_merge.methods.gradient.nsc_options import resolve_options
from nsc_merge.models.families import family_of, scored_paths


def calls_of(module):
    seen = []
    module.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


def same_course(first, second):
    torch.testing.assert_close(values(first), values(second), rtol=0, atol=1e-5)
    for one, other in zip(first.history, second.history, strict=True):
        assert one["omega"] == pytest.approx(other["omega"], abs=1e-5)
    assert (values(first) - 0.4).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"batch_tasks": True}])
def test_of_a_block_that_is_looped_the_first_run_counts_wherever_the_forward_ends(options):
    model = llama()
    model.model.layers[3] = model.model.layers[2]
    adapters, batches = adapters_for(model), text_batches()
    settings = {"score_blocks": [2], **options}
    whole, ended = (trajectory(model, adapters, batches, early_exit=early, **settings) for early in (False, True))
    same_course(whole, ended)
    assert all(0 <= value <= 1 for step in whole.history for value in step["omega"].values())


@pytest.mark.parametrize(
    "options",
    [
        {"early_exit": False},
        {"checkpointing": True},
        {"batch_tasks": True},
        {"batch_tasks": None},
        {"batch_tasks": True, "checkpointing": True, "early_exit": False},
    ],
)
def test_each_saving_gives_the_course_of_the_plain_loop_on_a_decoder(options):
    model = llama()
    adapters, batches = adapters_for(model), text_batches()
    plain = trajectory(model, adapters, batches, early_exit=False, cache_prefix=False)
    same_course(trajectory(model, adapters, batches, **options), plain)


@pytest.mark.parametrize(
    "options", [{}, {"cache_prefix": False}, {"batch_tasks": True}, {"checkpointing": True}]
)
def test_each_saving_gives_the_course_of_the_plain_loop_on_llava(options):
    model = llava()
    adapters, batches = adapters_for(model), image_batches()
    plain = trajectory(model, adapters, batches, early_exit=False, cache_prefix=False)
    same_course(trajectory(model, adapters, batches, **options), plain)


@pytest.mark.parametrize(("options", "blocks"), [({}, 4), ({"score_blocks": [1]}, 2)])
def test_nothing_after_the_last_measurement_runs_from_the_first_step_on(options, blocks):
    model = llama()
    runs = [calls_of(layer) for layer in model.model.layers]
    head, norm, last = (
        calls_of(model.lm_head),
        calls_of(model.model.norm),
        calls_of(model.model.layers[-1].mlp),
    )
    attention = model.model.layers[blocks - 1].self_attn
    measured, beside, unadapted = (calls_of(getattr(attention, f"{name}_proj")) for name in "vqk")
    trajectory(model, adapters_for(model), text_batches(), steps=2, **options)
    # Six passes of steps, and as many at either end of the comparison.
    assert [len(seen) for seen in runs] == [18] * blocks + [0] * (4 - blocks)
    assert not head
    assert not norm
    assert not last
    # The last measured linear is not applied: only its input counts. Those that share the input run once, to show it.
    assert not measured
    assert len(beside) == len(unadapted) == 1


@pytest.mark.parametrize(("batched", "distinct"), [(False, 6), (True, 2)])
def test_the_frozen_tower_runs_once_per_batch(batched, distinct):
    model = llava()
    tower = model.model.vision_tower
    seen = calls_of(tower.encoder.layers[0])
    adapters, batches = adapters_for(model), image_batches()
    trajectory(model, adapters, batches, steps=6, batch_tasks=batched)
    assert len(seen) == distinct
    assert "forward" not in vars(tower)
    seen.clear()
    trajectory(model, adapters, batches, steps=6, batch_tasks=batched, cache_prefix=False)
    assert len(seen) == (6 if batched else 18) + 2 * distinct


def test_a_kept_tower_has_no_graph_also_where_a_hook_has_its_inputs_require_gradients():
    """As PEFT does for training with gradient checkpointing."""
    model = llava()
    adapters, batches = adapters_for(model), image_batches()
    plain = trajectory(model, adapters, batches)
    model.model.vision_tower.get_input_embeddings().register_forward_hook(lambda _, __, y: y.requires_grad_(True))
    same_course(trajectory(model, adapters, batches), plain)


def test_around_a_model_the_batches_say_what_is_padding():
    model = llama()
    adapters = adapters_for(model)
    masked = {
        task: [
            {
                "input_ids": torch.cat([batch["input_ids"], torch.zeros(2, 5, dtype=torch.long)], 1),
                "attention_mask": torch.tensor([7 * [1] + 5 * [0]] * 2),
            }
            for batch in batches
        ]
        for task, batches in text_batches().items()
    }
    around = {
        task: Adapter(task, {f"inside.{path}": factor for path, factor in adapter.factors.items()})
        for task, adapter in adapters.items()
    }
    found = trajectory(Around(model), around, masked, score_modules=["v_proj"])
    same_course(found, trajectory(model, adapters, masked))


@pytest.mark.parametrize("method", ["nsc", "match"])
def test_embeddings_may_come_with_the_graph_of_their_table(method):
    model = llama()
    adapters, batches = adapters_for(model), text_batches()
    table = model.get_input_embeddings()
    looked_up = {task: [{"inputs_embeds": table(batch["input_ids"])} for batch in row] for task, row in batches.items()}
    settings = {"steps": 3, "lr": 1e-2, "progress": False, "method": method}
    found, wanted = (merge(model, adapters, data, **settings) for data in (looked_up, batches))
    torch.testing.assert_close(values(found), values(wanted), rtol=0, atol=1e-5)
    assert table.weight.grad is None


def test_an_adapted_tower_is_not_cached():
    model = llava()
    adapters = adapters_for(model)
    inside = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    factors = adapters["a"].factors
    path = next(iter(factors))
    factors[inside] = type(factors[path])(torch.randn(2, 16), torch.randn(16, 2), 1.0)
    seen = calls_of(model.model.vision_tower.encoder.layers[0])
    result = trajectory(model, adapters, image_batches(), steps=4)
    assert len(seen) == 12 + 2 * 6
    assert abs(result.coefficients[inside]["a"] - 0.4) > 1e-4


def test_tasks_run_together_where_shapes_agree_and_apart_where_not():
    model = llama()
    adapters = adapters_for(model)
    seen = calls_of(model)
    equal = text_batches()
    trajectory(model, adapters, equal, steps=2, batch_tasks=True)
    # As many passes in the steps as at either end of the comparison.
    assert len(seen) == 3 * 2
    seen.clear()
    # Padding two tokens of seven would add more than a quarter.
    mixed = {**equal, "c": text_batches(tokens=2)["c"]}
    together = trajectory(model, adapters, mixed, steps=2, batch_tasks=True)
    assert len(seen) == 3 * 4
    same_course(together, trajectory(model, adapters, mixed, steps=2))
    # Other numbers of rows still concatenate, and every task counts the same.
    uneven = {**equal, "b": text_batches(rows=5)["b"]}
    seen.clear()
    together = trajectory(model, adapters, uneven, steps=2, batch_tasks=True)
    assert len(seen) == 3 * 2
    same_course(together, trajectory(model, adapters, uneven, steps=2))


def objective(model, adapters, **options):
    family = family_of(model)
    chosen = resolve_options(family, TASKS, {"batch_tasks": False, **options})
    paths = list(adapters["a"].factors)
    scored = scored_paths(family, model, paths, None, "last_quarter")
    return objective_of(model, adapters, family, scored, chosen), scored


def dense_objective(model, adapters, scored, lams, batches, masked):
    """Eq. 5 on weights merged in float64, with projectors: the definition, spelled out."""
    weights = {}
    for path, lam in lams.items():
        weight = model.get_submodule(path).weight.detach()
        for coefficient, task in zip(lam, TASKS, strict=True):
            if path in adapters[task].factors:
                weight = weight + coefficient * adapters[task].factors[path].delta()
        weights[f"{path}.weight"] = weight
    omegas = []
    for task in TASKS:
        inputs = {}
        handles = [
            model.get_submodule(path).register_forward_pre_hook(
                lambda _, args, path=path, inputs=inputs: inputs.update({path: args[0]})
            )
            for path in scored
        ]
        functional_call(model, weights, (), batches[task][0])
        for handle in handles:
            handle.remove()
        means = []
        for path, z in inputs.items():
            A = adapters[task].factors[path].A.double()
            null = torch.eye(A.shape[1], dtype=torch.float64) - torch.linalg.pinv(A) @ A
            ratio = (z @ null).norm(dim=-1) / z.norm(dim=-1)
            means.append(ratio[batches[task][0]["attention_mask"] != 0].mean() if masked else ratio.mean())
        omegas.append(torch.stack(means).mean())
    return torch.stack(omegas)


@pytest.mark.parametrize("include_pad", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_objective_and_gradient_are_those_of_a_dense_float64_merge(include_pad, together):
    model = llama().double()
    adapters, batches = adapters_for(model), text_batches(1)
    for number, task in enumerate(TASKS):
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[1, 7 - number :] = 0
        batches[task][0]["attention_mask"] = mask
    context, scored = objective(model, adapters, include_pad=include_pad, batch_tasks=together)
    generator = torch.Generator().manual_seed(4)
    with context as measured:
        flat = measured.coefficients.flat
        with torch.no_grad():
            flat += 0.3 * torch.randn(flat.shape, generator=generator, dtype=flat.dtype) * (flat != 0)
        omega = measured.accumulate([batches[task][0] for task in TASKS])
        start, gradient = flat.detach().clone(), flat.grad.clone()
        # Of the same shapes, and other positions that count.
        turned = {
            task: [{**one, "attention_mask": one["attention_mask"].flip(0, 1)}] for task, (one,) in batches.items()
        }
        later = measured.accumulate([turned[task][0] for task in TASKS])
    paths = list(adapters["a"].factors)
    lams = {path: row.clone().requires_grad_() for path, row in zip(paths, start, strict=True)}
    expected = dense_objective(model, adapters, scored, lams, batches, not include_pad)
    torch.testing.assert_close(omega, expected, rtol=1e-10, atol=0)
    of_turned = dense_objective(model, adapters, scored, lams, turned, not include_pad)
    torch.testing.assert_close(later, of_turned, rtol=1e-10, atol=0)
    expected.mean().backward()
    wanted = [torch.zeros(3) if lam.grad is None else lam.grad for lam in lams.values()]
    torch.testing.assert_close(gradient, torch.stack(wanted).to(gradient), rtol=1e-8, atol=1e-12)


def test_padding_does_not_count_unless_asked():
    model = llama()
    adapters, batches = adapters_for(model), text_batches(1)
    padded = {}
    for task in TASKS:
        ids = batches[task][0]["input_ids"]
        mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 3, dtype=torch.long)], 1)
        padded[task] = [{"input_ids": torch.cat([ids, ids[:, :3]], 1), "attention_mask": mask}]
    bare = trajectory(model, adapters, batches)
    same_course(trajectory(model, adapters, padded), bare)
    counted = trajectory(model, adapters, padded, include_pad=True)
    assert abs(counted.history[0]["objective"] - bare.history[0]["objective"]) > 1e-4


def test_a_mask_that_does_not_fit_is_refused():
    model = llama()
    batches = text_batches(1)
    for task in TASKS:
        batches[task][0]["attention_mask"] = torch.zeros(2, 1, 7, 7)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[2, 7\].*found \[2, 1, 7, 7\]"):
        trajectory(model, adapters_for(model), batches)


def test_the_model_is_left_as_it_was():
    model = llava()
    objects = {name: id(module) for name, module in model.named_modules()}
    caching = model.config.text_config.use_cache
    trajectory(model, adapters_for(model), image_batches(), checkpointing=True)
    assert {name: id(module) for name, module in model.named_modules()} == objects
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.config.text_config.use_cache is caching


def test_checkpointing_keeps_less():
    model = llama()
    adapters, batches = adapters_for(model), text_batches(1, rows=8)
    drawn = [batches[task][0] for task in TASKS]

    def held(**options) -> int:
        kept: dict[int, int] = {}
        context, _ = objective(model, adapters, **options)

        def count(value):
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with context as measured:
            with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
                omega = measured._forward(measured_pass(drawn[0]))
            assert omega.isfinite().all()
        return sum(kept.values())

    assert held(checkpointing=True) < 0.6 * held()


def measured_pass(batch):
    return one_by_one([batch], torch.device("cpu"))[0]


class HostReads(TorchDispatchMode):
    """Notes every operation whose result the host must wait for on a GPU, by the package that asked for it."""

    KINDS = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
        torch.ops.aten.equal,
    )

    def __init__(self) -> None:
        super().__init__()
        self.askers: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket is torch.ops.aten.index and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if func.overloadpacket in self.KINDS or by_mask:
            frame = sys._getframe(1)
            while frame.f_globals["__name__"].partition(".")[0] in ("torch", "typing"):
                frame = frame.f_back
            self.askers.append(frame.f_globals["__name__"].partition(".")[0])
        return func(*args, **(kwargs or {}))


def host_reads_of_a_step(context, drawn):
    with context as measured:
        present = torch.ones_like(measured.coefficients.flat, dtype=torch.bool)
        options = DescentOptions(schedule="cosine", progress=False)
        streams = [itertools.repeat(batch) for batch in drawn]
        loop = Optimisation(measured, TASKS, present, streams, options, {})
        loop._step(0, lambda: None)
        with HostReads() as reads:
            loop._step(1, lambda: None)
        assert loop._pending == 2
    return reads.askers


SAVINGS = [{}, {"batch_tasks": True}, {"checkpointing": True}]


@pytest.mark.parametrize("options", SAVINGS)
def test_a_step_never_waits_for_the_device(options, model):
    context, _ = objective(model, adapters_for(model, ["v_proj", "o_proj"]), **options)
    assert not host_reads_of_a_step(context, [{"pixel_values": torch.randn(2, 1, 8, 8)} for _ in TASKS])


@pytest.mark.parametrize("options", [*SAVINGS, {"include_pad": True}])
@pytest.mark.parametrize(("make", "per_pass"), [(llama, 2), (llava, 4)])
def test_only_transformers_asks_for_masks_and_image_tokens_as_a_pass_starts(make, per_pass, options):
    model = make()
    context, _ = objective(model, adapters_for(model), **options)
    batches = image_batches(1) if make is llava else text_batches(1)
    # Unequal lengths, which one pass pads.
    drawn = [batches["a"][0], batches["b"][0], dict(batches["c"][0])]
    mask = torch.ones_like(drawn[2]["input_ids"])
    drawn[2] |= {"input_ids": drawn[2]["input_ids"][:, :-1], "attention_mask": mask[:, :-1]}
    askers = host_reads_of_a_step(context, drawn)
    assert set(askers) <= {"transformers"}
    assert len(askers) <= per_pass * (1 if options.get("batch_tasks") else len(TASKS))


def test_reads_are_noticed():
    with HostReads() as reads:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
        torch.ones(3)[torch.ones(3) > 0]
        bool(torch.ones(()))
    assert reads.askers == [__name__] * 4


@pytest.mark.parametrize("together", [True, False])
def test_padding_does_not_count_where_linears_see_positions_before_rows(together, tmp_path):
    """As XLNet's: the mean is that of the positions that the mask speaks of, whichever way round they lie."""
    sizes = {"vocab_size": 64, "d_model": 16, "n_layer": 4, "n_head": 2, "d_inner": 24, "pad_token_id": 0}
    model = tf.XLNetForSequenceClassification(tf.XLNetConfig(**sizes, initializer_range=0.3)).eval()
    settings = {"r": 4, "target_modules": ["layer_1", "layer_2"]}
    folders = {task: write_adapter(model, tmp_path / task, seed, **settings) for seed, task in enumerate("ab")}
    generator, mask = torch.Generator().manual_seed(0), torch.tensor([[1, 1, 0, 0, 0], [1] * 5, [0, 1, 1, 1, 1]])
    ids = {task: torch.randint(1, 64, mask.shape, generator=generator) for task in folders}
    batches = {task: [{"input_ids": one, "attention_mask": mask}] for task, one in ids.items()}
    settings = {"steps": 1, "init": 0.4, "progress": False}
    result = merge(model, folders, batches, "nsc", batch_tasks=together, **settings)
    matched = [merge(model, folders, batches, "match", ratio_weight=weight, **settings) for weight in (0.0, 1.0)]
    (path,) = result.options["scored"]
    merged, inputs, wanted = merge(model, folders, method="task_arithmetic", scale=0.4).apply(model), [], []
    merged.get_submodule(path).register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    for task, (batch,) in batches.items():
        with torch.no_grad():
            merged(**batch)
        z, A = inputs.pop().transpose(0, 1)[mask.bool()].double(), result.adapters[task].factors[path].A.double()
        wanted.append(float(((z - z @ torch.linalg.pinv(A) @ A).norm(dim=1) / z.norm(dim=1)).mean()))
    assert list(result.history[0]["omega"].values()) == pytest.approx(wanted, rel=1e-5)
    without, ratios = (one.history[0]["objective"] for one in matched)
    assert ratios - without == pytest.approx(sum(wanted) / 2, rel=1e-5)
