"""Several processes that share a merge find what one process finds, whatever their number; the base is in shards."""

from __future__ import annotations

import datetime
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import zoo
from forked import start
from loop_cases import TASKS, adapters_for, values
from torch import Tensor

from nsc_merge import merge
from nsc_merge.descent.null_space_objective import Objective
from nsc_merge.models.bases.loading import load_model
from nsc_merge.models.bases.placement import Placement
from nsc_merge.models.bases.sharded import is_unit, output_of
from nsc_merge.processes.group import current, together
from nsc_merge.utils.errors import FoundByAll

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORLD = 3
OPTIONS = {"steps": 8, "lr": 1e-2, "recipe": "vision", "progress": False}
# Kind of model -> options of the merges of it.
CASES = {
    "llama": [{"batch_tasks": False, "steps": 20}, {"checkpointing": True}],
    "vit": [{}, {"score_blocks": [1], "early_exit": False}],
    "llava": [{}],
}
# Rows of the tasks' batches: more than processes, as many, and fewer.
ROWS = (5, 3, 1)


def batches(kind: str) -> dict[str, list[dict[str, Tensor]]]:
    """Two of every task; of text, rows are padded at their end and tasks differ in length."""
    made = {}
    for number, (task, rows) in enumerate(zip(TASKS, ROWS, strict=True)):
        made[task] = []
        for seed in (10 * number, 10 * number + 1):
            generator = torch.Generator().manual_seed(seed)
            batch = {} if kind == "llama" else {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
            if kind != "vit":
                ids = torch.randint(6, 64, (rows, 8 + number), generator=generator)
                mask = torch.ones_like(ids)
                for row in range(rows):
                    ids[row, len(ids[row]) - row :], mask[row, len(ids[row]) - row :] = 0, 0
                batch |= {"input_ids": ids, "attention_mask": mask}
            if kind == "llava":
                batch["input_ids"][:, :4] = zoo.IMAGE_TOKEN
                batch["attention_mask"][:, :4] = 1
                batch["input_ids"][batch["input_ids"] == 0] = 6
                if rows > 1 and seed % 10:
                    # Two images in the first row, and none in the last, which another process would run.
                    batch["input_ids"][0, 4:8], batch["input_ids"][-1, :4] = zoo.IMAGE_TOKEN, 6
            made[task].append(batch)
    return made


def test_as_one_process(tmp_path):
    """This process is the first of them."""
    for kind in CASES:
        zoo.build(kind).save_pretrained(tmp_path / kind)
    others = start(other, (tmp_path,), WORLD - 1)
    try:
        share(0, tmp_path)
        # Of those that ended, one was killed.
        with pytest.raises(torch.multiprocessing.ProcessExitedException, match="signal SIGKILL"):
            while not others.join():
                pass
    finally:
        for process in others.processes:
            process.kill()


def other(number: int, folder: Path) -> None:
    torch.set_num_threads(1)
    share(number + 1, folder)


def share(rank: int, folder: Path) -> None:
    limit = datetime.timedelta(minutes=5)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=limit)
    two = dist.new_group([0, 1])
    try:
        with together(dist.group.WORLD) as group:
            check_agreement(group)
        for kind, cases in CASES.items():
            with together(dist.group.WORLD) as group:
                sharded = load_model(str(folder / kind), local=True, placement=Placement(shards=True))
            plain = load_model(str(folder / kind), local=True)
            check_shards(sharded, plain, rank)
            adapters = adapters_for(plain)
            for options in cases:
                shared = {**OPTIONS, **options, "process_group": dist.group.WORLD}
                found = merge(sharded, adapters, batches(kind), **shared)
                check_same(group, found, plain, adapters, kind, options)
            if kind == "llama" and rank < 2:
                with together(two) as pair:
                    found = merge(plain, adapters, batches(kind), **OPTIONS)
                check_same(pair, found, plain, adapters, kind, {})
        check_other_data(rank, folder)
        check_not_finite(folder)
        check_resumed(folder)
        check_lost(rank, folder)
    finally:
        dist.destroy_process_group()


def check_agreement(group) -> None:
    """What fails in some ends all with one status; the first that failed says why."""
    for failing in ({1}, {0, 2}):
        error = ValueError if group.rank == min(failing) else SystemExit
        with pytest.raises(error, match="here" if error is ValueError else "1"), group.agreeing():
            if group.rank in failing:
                raise ValueError("here")
    with group.agreeing():
        pass


def check_shards(sharded, plain, rank: int) -> None:
    """Of every weight this process holds its part, alone in its memory; run, they make what the whole ones do."""
    for name, value in sharded.named_parameters():
        parts = plain.get_parameter(name).chunk(WORLD)
        assert value.to_local().numel() == (parts[rank].numel() if rank < len(parts) else 0), name
        assert value.to_local().untyped_storage().nbytes() <= parts[0].numel() * 4
    assert sum(map(is_unit, sharded.modules())) >= 4
    for name, value in sharded.named_buffers():
        assert torch.equal(value, plain.get_buffer(name))
    inputs = batches("vit")["a"][0] if hasattr(plain, "vit") else None
    if inputs is not None:
        with torch.no_grad():
            whole, parts = plain.vit(**inputs), output_of(sharded, sharded.vit, inputs)
        assert torch.equal(parts.last_hidden_state, whole.last_hidden_state)


def check_same(group, found, plain, adapters, kind: str, options) -> None:
    """All processes found the same, and the first compares it with what one finds alone."""
    assert all(one == found.coefficients for one in group.share([found.coefficients]))
    if not group.is_main:
        return
    alone = merge(plain, adapters, batches(kind), **{**OPTIONS, **options})
    torch.testing.assert_close(values(found), values(alone), rtol=0, atol=1e-6)
    for one, entry in zip(found.history, alone.history, strict=True):
        assert one["omega"] == pytest.approx(entry["omega"], abs=1e-6)
    assert found.objective["after"] == pytest.approx(alone.objective["after"], abs=1e-6)
    assert found.dead == alone.dead
    assert (values(alone) - 0.4).abs().max() > 1e-2


class Stopped(Exception):
    """What the machines say as they go down."""


class Down:
    """Batches of a machine that goes down when the third is asked for in a turn."""

    def __init__(self, given) -> None:
        self.given = given

    def __iter__(self):
        yield from self.given
        raise Stopped


def first_logits(model, batch):
    """Values, whose variance over all processes matters."""
    return model(**batch).logits[:, -1, :3]


def check_other_data(rank: int, folder: Path) -> None:
    """Data of each process's own, as a DistributedSampler deals them out, are none that their rows can be taken of."""
    plain = load_model(str(folder / "llama"), local=True)
    own = batches("llama")
    if rank % 2:
        # Of what is wrong with one process's own batches, it would tell alone, and the others would wait for it.
        own["b"] = [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])} for batch in own["b"]]
    with pytest.raises(ValueError, match=r"\['b'\]: expected the same batches in all 3 .* in process 1 than"):
        merge(plain, adapters_for(plain), own, **OPTIONS, process_group=dist.group.WORLD)


def check_not_finite(folder: Path) -> None:
    """What all find alike is of no process."""
    plain = load_model(str(folder / "vit"), local=True)
    own = batches("vit")
    own["a"][0]["pixel_values"][0, 0, 0, 0] = torch.nan
    with pytest.raises(FoundByAll, match=r"^calibration: at step 0, the objective of task 'a' is nan"):
        merge(plain, adapters_for(plain), own, **OPTIONS, process_group=dist.group.WORLD)


def check_resumed(folder: Path) -> None:
    """All processes go down, and all go on from the state that the first saved, or one does alone."""
    plain = load_model(str(folder / "llama"), local=True)
    adapters, state = adapters_for(plain), folder / "stopped.safetensors"
    # A variance takes more than the one row that the batches of the last task have.
    kinds = dict(zip(TASKS, ("gaussian", "gaussian", "categorical"), strict=True))
    outputs = {"outputs": dict.fromkeys(TASKS, first_logits), "likelihood": kinds}
    options = {"steps": 8, "lr": 1e-2, "progress": False, "method": "distill", **outputs}
    shared = {**options, "process_group": dist.group.WORLD}
    whole = merge(plain, adapters, batches("llama"), **shared)
    with pytest.raises(Stopped):
        stopping = {task: Down(given) for task, given in batches("llama").items()}
        merge(plain, adapters, stopping, **shared, state_to=state, state_every=1)
    dist.barrier()
    resumed = merge(plain, adapters, batches("llama"), **shared, resume_from=state)
    assert (resumed.coefficients, resumed.objective) == (whole.coefficients, whole.objective)
    alone = merge(plain, adapters, batches("llama"), **options, resume_from=state)
    torch.testing.assert_close(values(alone), values(whole), rtol=0, atol=1e-6)
    assert len(alone.history) == len(resumed.history) == 8


def check_lost(rank: int, folder: Path) -> None:
    """The last process is killed in a step: the first saves the state, from which one process goes on."""
    model = load_model(str(folder / "llama"), local=True)
    adapters, calibration, state = adapters_for(model), batches("llama"), folder / "state.safetensors"
    accumulate, steps = Objective.accumulate, []

    def until(self, drawn):
        steps.append(drawn)
        if rank == WORLD - 1 and len(steps) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return accumulate(self, drawn)

    Objective.accumulate = until
    try:
        with pytest.raises(RuntimeError, match=f"in process {rank} of {WORLD}: .*[Cc]onnection"):
            merge(model, adapters, calibration, **OPTIONS, state_to=state, process_group=dist.group.WORLD)
    finally:
        Objective.accumulate = accumulate
    assert current().size == 1
    if rank == 0:
        resumed = merge(model, adapters, calibration, **OPTIONS, resume_from=state)
        assert len(steps) == 6
        whole = merge(model, adapters, calibration, **OPTIONS)
        torch.testing.assert_close(values(resumed), values(whole), rtol=0, atol=1e-6)
        assert len(resumed.history) == 8
