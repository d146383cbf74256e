"""Several processes that share a merge find what one process finds, whatever their number; the base is in shards."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import zoo
from loop_cases import adapters_for, values
from torch import Tensor

from nsc_merge import merge
from nsc_merge.models.loading import load_model
from nsc_merge.models.placement import Placement
from nsc_merge.models.sharded import is_unit
from nsc_merge.processes.group import together

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

OPTIONS = {"steps": 20, "lr": 1e-2, "recipe": "vision", "progress": False}
# Rows of every task's batches: as many as processes and more, and fewer.
ROWS = {"a": 5, "b": 3, "c": 1}


def text(seed: int, rows: int, tokens: int) -> dict[str, Tensor]:
    """Prompts of which the first is whole and the others are padded, each by one more."""
    ids = torch.randint(6, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, tokens - row :], mask[row, tokens - row :] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def pixels(seed: int, rows: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


def batches(kind: str) -> dict[str, list[dict[str, Tensor]]]:
    made = {}
    for number, (task, rows) in enumerate(ROWS.items()):
        seeds = (10 * number, 10 * number + 1)
        made[task] = [pixels(seed, rows) if kind == "vit" else text(seed, rows, 7 + number) for seed in seeds]
    return made


# Kind of model -> options of the merges of it.
CASES = {
    "llama": [{"batch_tasks": False}, {"include_pad": True, "compile": "eager"}],
    "vit": [{}, {"score_blocks": [1], "early_exit": False}],
}


def test_two_processes(tmp_path):
    run(2, tmp_path)


def test_three_processes(tmp_path):
    run(3, tmp_path)


def run(world: int, folder: Path) -> None:
    """In as many processes, of which this one is the first."""
    for kind in CASES:
        zoo.build(kind).save_pretrained(folder / kind)
    others = torch.multiprocessing.spawn(other, (world, folder), nprocs=world - 1, join=False)
    share(0, world, folder)
    while not others.join():
        pass


def other(number: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    share(number + 1, world, folder)


def share(rank: int, world: int, folder: Path) -> None:
    limit = datetime.timedelta(seconds=60)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    try:
        for kind, cases in CASES.items():
            with together(dist.group.WORLD):
                sharded = load_model(str(folder / kind), local=True, placement=Placement(shards=True))
            plain = load_model(str(folder / kind), local=True)
            check_shards(sharded, plain, rank, world)
            adapters = adapters_for(plain)
            for options in cases:
                found = merge(sharded, adapters, batches(kind), **OPTIONS, **options, process_group=dist.group.WORLD)
                same = merge(plain, adapters, batches(kind), **OPTIONS, **options, process_group=dist.group.WORLD)
                alone = merge(plain, adapters, batches(kind), **OPTIONS, **options)
                for result in (found, same):
                    print(kind, options, rank, (values(result)-values(alone)).abs().max(), flush=True)
                    torch.testing.assert_close(values(result), values(alone), rtol=0, atol=1e-6)
                    for one, entry in zip(result.history, alone.history, strict=True):
                        assert one["omega"] == pytest.approx(entry["omega"], abs=1e-6)
                    assert result.dead == alone.dead
                assert (values(alone) - 0.4).abs().max() > 1e-2
    finally:
        dist.destroy_process_group()


def check_shards(sharded, plain, rank: int, world: int) -> None:
    for name, value in sharded.named_parameters():
        parts = plain.get_parameter(name).chunk(world)
        assert value.to_local().numel() == (parts[rank].numel() if rank < len(parts) else 0), name
        assert value.to_local().untyped_storage().nbytes() <= parts[0].numel() * 4
    assert sum(map(is_unit, sharded.modules())) >= 4
    for name, value in sharded.named_buffers():
        assert torch.equal(value, plain.get_buffer(name))
