"""Methods with data find in several processes what they find in one, on a base in shards and on a whole one."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from forked import start
from loop_cases import adapters_for, values
from test_ranks import batches

from nsc_merge import merge
from nsc_merge.adapters.adapter import factors_digest
from nsc_merge.methods.gradient import feature_matching
from nsc_merge.models.bases.loading import load_model
from nsc_merge.models.bases.placement import Placement
from nsc_merge.processes.group import together

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

LEARNING = {"steps": 2, "progress": False}
# Of more steps, so that what processes did not share would grow; also on a base that each has whole.
LONGER = {**LEARNING, "steps": 5}


def logits(model, batch):
    return model(**batch).logits


# Kind of model -> method and options of merges of it.
CASES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "llama": [
        ("match", LONGER),
        ("match", {**LEARNING, "normalise": "task", "init": "match", "positions": "all", "hold_out": 1}),
        ("match", {**LEARNING, "normalise": "scale", "pull": 0.1, "ratio_weight": 1.0, "ratio_target": "own"}),
        ("match", {**LEARNING, "steps": 2, "features": ["model.layers.2.mlp.down_proj"], "ratio_weight": 0.5}),
        ("distill", {**LEARNING, "positions": "all", "normalise": "task"}),
        ("distill", {**LEARNING, "positions": "all", "likelihood": "gaussian", "share": "task"}),
        ("distill", {**LEARNING, "positions": "all", "likelihood": "gaussian", "distance": "bounded"}),
        ("distill", {**LEARNING, "distance": "bounded"}),
        ("distill", {**LONGER, "new_tokens": {"a": 4, "c": 2}, "normalise": "task"}),
        ("distill", {**LEARNING, "steps": 4, "regmean": {"batches": 3}}),
        ("adamerging", LONGER),
        ("adamerging", {**LEARNING, "tokens": "full", "new_tokens": 3}),
        ("adamerging", {**LEARNING, "outputs": {"a": logits, "c": logits}}),
        ("regmean", {"batches": 3}),
        ("fisher", {"batches": 3, "exact": 0}),
    ],
    "vit": [
        ("distill", {**LEARNING, "likelihood": {"a": "gaussian", "b": "categorical", "c": "categorical"}}),
        ("fisher", {"batches": 2, "preset": "mergelm"}),
    ],
}


def test_three_processes(tmp_path):
    world = 3
    for kind in CASES:
        zoo.build(kind).save_pretrained(tmp_path / kind)
    others = start(other, (world, tmp_path), world - 1)
    share(0, world, tmp_path)
    while not others.join():
        pass


def other(number: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    share(number + 1, world, folder)


def share(rank: int, world: int, folder: Path) -> None:
    limit = datetime.timedelta(seconds=100)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    group = dist.group.WORLD
    scales = feature_matching.SCALES
    feature_matching.SCALES = scales[::4]  # each takes a run of the model
    try:
        for kind, cases in CASES.items():
            with together(group):
                sharded = load_model(str(folder / kind), local=True, placement=Placement(shards=True))
            plain = load_model(str(folder / kind), local=True)
            adapters = adapters_for(plain)
            for method, options in cases:
                found = [merge(sharded, adapters, batches(kind), method, **options, process_group=group)]
                if kind == "vit" or options.get("steps") == LONGER["steps"]:
                    found.append(merge(plain, adapters, batches(kind), method, **options, process_group=group))
                mine = [factors_digest(one.factors) if one.factors else one.coefficients for one in found]
                with together(group) as processes:
                    every = processes.share([mine])
                assert all(one == mine for one in every), "processes differ"
                if rank == 0:
                    alone = merge(plain, adapters, batches(kind), method, **options)
                    for one in found:
                        check(one, alone, f"{method} {options}")
            if kind == "llama":
                check_dora(sharded, plain, group)
    finally:
        feature_matching.SCALES = scales
        dist.destroy_process_group()


def check_dora(sharded, plain, group) -> None:
    """The norms of DoRA are those of weights in shards, and the base's product is gained wherever it is computed."""
    adapters = adapters_for(plain)
    factors = {
        path: replace(factor, magnitude=plain.get_submodule(path).weight.detach().norm(dim=1) * 1.3)
        for path, factor in adapters["a"].factors.items()
    }
    adapters["a"] = replace(adapters["a"], factors=factors)
    options = LONGER
    found = merge(sharded, adapters, batches("llama"), **options, process_group=group)
    with together(group) as processes:
        assert all(one == found.coefficients for one in processes.share([found.coefficients]))
    if dist.get_rank(group) == 0:
        alone = merge(plain, adapters, batches("llama"), **options)
        torch.testing.assert_close(values(found), values(alone), rtol=0, atol=1e-6)
        assert (values(alone) - 0.4).abs().max() > 1e-3
        for path in factors:
            gain = found.adapters["a"].factors[path].gain
            assert torch.equal(gain, alone.adapters["a"].factors[path].gain)
            assert gain.abs().max() > 0.2


def check(found, alone, what: str) -> None:
    if alone.coefficients:
        torch.testing.assert_close(values(found), values(alone), rtol=0, atol=1e-6, msg=lambda text: f"{what}: {text}")
        for one, entry in zip(found.history, alone.history, strict=True):
            assert one["loss"] == pytest.approx(entry["loss"], rel=1e-4), what
        assert (values(alone) - values(alone).flatten()[0]).abs().max() > 1e-3, what
    for path, factor in alone.factors.items():
        wanted = factor.delta()
        apart = (found.factors[path].delta() - wanted).norm() / wanted.norm()
        assert apart < 1e-5, f"{what}: {path}: {apart}"
