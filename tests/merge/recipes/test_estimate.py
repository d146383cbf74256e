"""What a step takes by formula, against what it takes: bytes that PyTorch's allocator was asked for, operations that
its counter counts, and bytes that its collectives and accelerate's hooks move.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import accelerate
import pytest
import torch
import torch.distributed as dist
from step_cases import ALL, QV, ROWS, Gathered, adapters_for, costs, decoder, encoder, images, options_for, peak, texts
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from nsc_merge.recipes.forecast.estimate import as_run, bytes_per_step, memory
from nsc_merge.recipes.forecast.shapes import NoFormula, work_of

WIDTH, LENGTH = 128, 32


@pytest.mark.parametrize(
    ("build", "names", "K", "padded", "given"),
    [
        (decoder, QV, 2, False, {}),
        (decoder, QV, 6, False, {"batch_tasks": True}),
        (decoder, QV, 2, False, {"checkpointing": True}),
        (decoder, QV, 6, False, {"checkpointing": True, "batch_tasks": True}),
        (decoder, ALL, 2, True, {"score_blocks": 2}),
        (decoder, ALL, 2, False, {"score_modules": ["down_proj"], "checkpointing": True}),
        (encoder, ALL, 2, False, {}),
        (encoder, ALL, 6, False, {"batch_tasks": True}),
        (encoder, ALL, 2, False, {"checkpointing": True}),
    ],
)
def test_memory_and_operations_of_a_step(build, names, K, padded, given):
    model = build()
    found = costs(model, texts(K, padded=padded) if build is decoder else images(K), names, **given)
    assert found.bytes == pytest.approx(found.bytes_measured, rel=0.25)
    assert found.operations == pytest.approx(found.operations_measured, rel=0.03)
    assert found.held.adapters == found.bank_bytes
    assert found.held.weights == sum(value.nbytes for value in model.parameters())


def test_memory_in_bfloat16():
    """Norms of a decoder compute, and so keep, in float32."""
    found = costs(decoder(dtype=torch.bfloat16), texts(2), QV)
    assert found.bytes == pytest.approx(found.bytes_measured, rel=0.25)


def test_batches_of_all_tasks_run_as_one_where_memory_allows():
    model, batches = decoder(), texts(3)
    adapters = adapters_for(model, 3, QV)
    options = options_for(model, adapters)
    work = work_of(model, adapters, dict(zip(adapters, batches, strict=True)), options)
    assert work.passes == ((ROWS, LENGTH),) * 3
    together = ((3 * ROWS, LENGTH),)
    needed = 2 * memory(replace(work, passes=together)).activations
    assert as_run(work, None, needed).passes == together
    assert as_run(work, None, needed - 1) == as_run(work, False, needed) == work
    # A process with a share of the rows keeps a share of the graph.
    assert as_run(work, None, needed / 2, ranks=2).passes == together
    assert memory(as_run(work, True, 0), ranks=2).activations == memory(as_run(work, True, 0)).activations / 2


def test_other_models_have_no_formula():
    model = decoder()
    model.model.layers[1].mlp.router = torch.nn.Linear(WIDTH, 4)
    adapters = adapters_for(model, 1, QV)
    options = options_for(model, adapters)
    with pytest.raises(NoFormula, match="model.layers.1.mlp.router is no linear of a block that the formula knows"):
        work_of(model, adapters, {"task0": texts(1)[0]}, options)
    with pytest.raises(NoFormula, match="a batch of .'other'. has"):
        work_of(decoder(), adapters, {"task0": {"other": torch.ones(2, 2)}}, options)


@pytest.fixture
def ranks():
    """Four processes, of which only this one is there: what it gathers from the others is nothing in particular."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield 4
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_and_bytes_of_shards(ranks, checkpointing):
    """Of FSDP2 itself, on a decoder of which all blocks run and learn."""
    model = decoder().requires_grad_(False)
    adapters = adapters_for(model, 1, QV)
    options = options_for(model, adapters, early_exit=False)
    work = work_of(model, adapters, {"task0": texts(1)[0]}, options)
    blocks = [replace(one, kept=one.kept - 8, bank=0, recomputed=checkpointing) for one in work.blocks]
    # The first block has an input that learns, and the rows of this process are all in its batch.
    blocks[0] = replace(blocks[0], kept=blocks[1].kept, wide=blocks[1].wide)
    work = replace(work, blocks=tuple(blocks), passes=((ranks * ROWS, LENGTH),))
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
    for layer in model.model.layers:
        if checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def step():
        inputs = torch.zeros(ROWS, LENGTH, WIDTH, requires_grad=True)
        model(inputs_embeds=inputs, use_cache=False).logits.sum().backward()

    step()
    with Gathered() as gathered:
        step()
    others = (ranks - 1) / ranks
    assert bytes_per_step(work, ranks=ranks).received == others * gathered.bytes
    held = memory(work, ranks=ranks)
    shards = sum(one.to_local().nbytes for one in model.parameters())
    assert held.total == pytest.approx(shards + peak(step), rel=0.25)


def test_bytes_of_weights_that_come_from_the_host():
    """Of accelerate's hooks, which bring a module's weights whenever it runs: in the forward, and where a block is
    computed again.
    """
    model = decoder().requires_grad_(False)
    adapters = adapters_for(model, 1, QV)
    options = options_for(model, adapters, early_exit=False)
    work = work_of(model, adapters, {"task0": texts(1)[0]}, options)
    loaded = []

    def bring(module, name, device, value=None, **settings):
        if value is not None:
            loaded.append(value.nbytes)
        return own(module, name, device, value=value, **settings)

    own = accelerate.hooks.set_module_tensor_to_device
    layers = model.model.layers
    accelerate.cpu_offload(layers, execution_device="cpu")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate.hooks, "set_module_tensor_to_device", bring)
        inputs = torch.zeros(ROWS, LENGTH, WIDTH, requires_grad=True)
        model(inputs_embeds=inputs, use_cache=False).logits.sum().backward()
    assert sum(loaded) == bytes_per_step(work, offloaded=True).loaded
