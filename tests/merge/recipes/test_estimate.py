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
from step_cases import (
    ALL,
    QV,
    ROWS,
    VOCABULARY,
    Gathered,
    adapters_for,
    costs,
    decoder,
    encoder,
    images,
    options_for,
    peak,
    texts,
)
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from nsc_merge.recipes.forecast import prospect
from nsc_merge.recipes.forecast.estimate import (
    Block,
    Memory,
    Moved,
    Work,
    as_run,
    block,
    bytes_per_step,
    memory,
    operations,
)
from nsc_merge.recipes.forecast.shapes import NoFormula, work_of

WIDTH, LENGTH = 128, 32
# Queries of 8 numbers, keys and values of 4, a gated network of 10 on a stream of 6: 324 multiplications a token.
GATED = {"q": (6, 8), "k": (6, 4), "v": (6, 4), "o": (8, 6), "gate": (6, 10), "up": (6, 10), "down": (10, 6)}
PLAIN = {"q": (6, 40), "k": (6, 40), "v": (6, 40), "o": (40, 6), "up": (6, 9), "down": (9, 6)}


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
    # Of offloaded weights blocks are recomputed, which keeps less.
    offloaded = 2 * memory(replace(work, passes=together), offloaded=True).activations
    assert offloaded < needed
    assert as_run(work, None, offloaded, offloaded=True).passes == together
    # Batches of several lengths are filled up only where the option says so.
    uneven = replace(work, passes=((4, 5), (3, 7)))
    assert as_run(uneven, None, float("inf")) == uneven
    assert as_run(uneven, True, 0).passes == ((7, 7),)


def test_a_block_counted_by_hand():
    """To the number, where the measured steps above leave some room."""
    ranks = {"q": 3, "v": 2, "down": 5}
    whole = block(GATED, ranks, element=4)
    # Of a token: q, k, v and what attention gives (24), gate, up and their product (30), projections on adapters (10),
    # the inputs of two norms (12).
    assert whole == Block(
        weights=324 * 4,
        bank=(3 * 14 + 2 * 10 + 5 * 16) * 4,
        width=6,
        kept=24 + 30 + 10 + 12,
        wide=0,
        working=2 * 10 + 2 * 6,
        forward=324,
        backward=324,
        again=324,
        low_rank=3 * 14 + 2 * 10 + 5 * 16,
        attention=8,
    )
    # The input of down is measured, and its adapters only project; keys and values are repeated under a mask of 7.
    ended = block(GATED, ranks, element=4, wide_norms=True, measured=("v", "down"), until="down", masked=7)
    assert ended == replace(
        whole,
        kept=4 * 8 + 7 + 30 + 6 + 10 + 10,
        wide=12,
        forward=264,
        backward=264,
        again=264,
        low_rank=3 * 14 + 2 * 10 + 5 * 10,
        ends=True,
    )
    # Ends at the input of its first linears, in front of which nothing learns.
    start = block(GATED, ranks, element=2, weights=9.0, measured=("v",), until="v", first=True, checkpointing=True)
    assert start == Block(
        9.0, 142 * 2, 6, 6 + 2, 0, 2 * 6, 0, 0, 0, low_rank=2 * 6, attention=0, recomputed=True, ends=True
    )
    # Without a gate, and without an adapter on the last linear, which is not computed again.
    first = block(PLAIN, {"q": 3}, element=4, first=True)
    assert first == Block(
        weights=4 * (4 * 240 + 2 * 54),
        bank=4 * 3 * 46,
        width=6,
        kept=160 + 9 + 3 + 6,
        wide=0,
        working=2 * 80,
        forward=4 * 240 + 2 * 54,
        backward=240 + 2 * 54,
        again=4 * 240 + 54,
        low_rank=3 * 46,
        attention=40,
    )
    assert block(PLAIN, {"q": 3}, element=4, first=True, measured=("up",)) == replace(first, kept=first.kept + 6)


def test_a_step_counted_by_hand():
    """Of four blocks: frozen, learning, learning and the last that runs, behind it."""
    none = {"bank": 0, "width": 6, "kept": 0, "wide": 0, "working": 0}
    frozen = Block(100, **none, forward=7, backward=7, again=7, low_rank=0, attention=1, learns=False)
    middle = Block(300, 10, 6, 20, 3, 50, forward=11, backward=9, again=8, low_rank=3, attention=2)
    last = Block(200, 20, 6, 30, 0, 10, forward=13, backward=12, again=5, low_rank=4, attention=0, ends=True)
    never = {"forward": 1000, "backward": 1000, "again": 1000, "low_rank": 9, "attention": 9}
    behind = Block(50, 0, 6, kept=1000, wide=1000, working=1000, **never, runs=False)
    work = Work((frozen, middle, last, behind), 40, 30, 2, ((4, 5), (3, 7)), fold=11)
    assert work.tokens == 21
    # Most when the gradient goes through the middle: 20 numbers of 2 bytes, 3 of 4, and 50 beside them.
    assert memory(work) == Memory(690, 41, 21 * 52, 21 * 100)
    assert memory(replace(work, head=100)) == Memory(690, 41, 21 * (52 + 60), 21 * 200)
    # Of a block that is computed again, its input, and all of it while a gradient goes through it.
    assert memory(work.recomputed()) == Memory(690, 41, 21 * (12 + 52), 21 * 100)
    assert memory(replace(work, element=8)).activations == 21 * (23 * 8)
    # Halves of 4 and of 3 rows are two rows each; the two largest blocks and what runs beside blocks are gathered.
    assert memory(work, ranks=2) == Memory(345 + 300 + 200 + 30, 30, 14 * 52, 14 * 100)
    assert memory(work, offloaded=True) == Memory(40 + 300, 30, 21 * (12 + 52), 21 * 100)
    # Attention of L tokens: 4 L in the forward and 10 L in the backward, which multiplies five times.
    a = 2 * 7 + 4 * 5
    b = 2 * 14 + 2 * 20 + 2 * 12 + 5 * 20
    c = 2 * 17 + 2 * 16
    assert operations(replace(work, passes=((4, 5),))) == 20 * (a + b + c)
    # Again: all of the forward but the linears whose output nobody asks for.
    again = 2 * 14 + 2 * 20 - 2 * 3 + 2 * 17 - 2 * 8
    assert operations(replace(work, passes=((4, 5),)).recomputed()) == 20 * (a + b + c + again)
    assert operations(replace(work, head=50)) - operations(work) == (20 + 21) * 2 * 6 * 50
    # In either of two passes, there and back but for the frozen one and, of what is gathered, the last.
    assert bytes_per_step(work, offloaded=True).loaded == 2 * (100 + 2 * 300 + 2 * 200)
    gathered = 2 * (30 + 100 + 2 * 300 + 200)
    assert bytes_per_step(work, coefficients=5, ranks=4) == Moved((gathered + 2 * 4 * 5) * 3 / 4)


@pytest.mark.parametrize(("kind", "sharing"), [("cpu", 1), ("cpu", 2), ("cuda", 1)])
def test_batches_run_as_one_in_half_of_what_is_free_beside_the_base(monkeypatch, kind, sharing):
    """On a CPU no more than is taken for granted, of which every process has its share."""
    work = Work((block(GATED, {"q": 3}, element=4),), 40, 30, 4, ((4, 5), (4, 5)))
    held = memory(replace(work, passes=((8, 5),)))
    beside = 0 if kind == "cpu" else held.weights + held.adapters
    total, free = (beside + 2 * held.activations) * sharing, 2 * held.activations * sharing
    for there, available, passes in ((total, free, 1), (total - sharing, free, 2), (total, free - sharing, 2)):
        monkeypatch.setattr(prospect, "total_memory", lambda device, there=there: int(there))
        monkeypatch.setattr(prospect, "free_memory", lambda device, available=available: available)
        assert len(prospect.as_run_on(torch.device(kind), work, None, sharing).passes) == passes


def test_what_is_read_off_a_model():
    model = decoder()
    (adapter,) = adapters_for(model, 1, QV).values()
    adapter = replace(adapter, factors={path: one for path, one in adapter.factors.items() if ".layers.0." not in path})
    adapters = {"task0": adapter}

    def read(padded=False, stored=None, **given):
        drawn = {"task0": texts(1, padded=padded)[0]}
        return work_of(model, adapters, drawn, options_for(model, adapters, **given), stored)

    numbers, norms = 3 * WIDTH * WIDTH + 3 * WIDTH * 352, 2 * WIDTH
    outside, head = 4 * (2 * VOCABULARY * WIDTH + WIDTH), 4 * VOCABULARY * WIDTH
    work = read()
    assert (work.outside, work.front, work.element, work.head) == (outside, outside - head, 4, 0)
    assert work.passes == ((ROWS, LENGTH),)
    assert [one.weights for one in work.blocks] == [4 * (numbers + norms)] * 4
    assert [one.bank for one in work.blocks] == [0, *[4 * 4 * (256 + 192)] * 3]
    assert [one.learns for one in work.blocks] == [False, True, True, True]
    # In front of the first linears that learn nothing is kept; the last block's values are measured, where all ends.
    assert [one.wide for one in work.blocks] == [2 * WIDTH, WIDTH, 2 * WIDTH, WIDTH]
    assert [one.ends for one in work.blocks] == [False, False, False, True]
    early = read(score_blocks=[1], score_modules=["q_proj", "v_proj"], checkpointing=True)
    assert [one.runs for one in early.blocks] == [True, True, False, False]
    assert all(one.recomputed for one in early.blocks)
    assert all(one.runs for one in read(score_blocks=[1], early_exit=False).blocks)
    late = read(early_exit=False)
    assert (late.front, late.head, late.blocks[3].ends) == (outside, VOCABULARY, False)
    # Stored otherwise, linears take less, norms as much, and there is nothing to fold.
    packed = read(stored=0.5625)
    assert packed.blocks[0].weights == 0.5625 * numbers + 4 * norms
    assert (packed.fold, work.fold) == (0, 4 * (3 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2))
    # Where there is padding the mask is kept, as long as a row, and keys and values for all heads.
    plain, masked = ([one.kept for one in found.blocks] for found in (work, read(padded=True)))
    assert masked == [*(one + 2 * (WIDTH - WIDTH // 2) + LENGTH for one in plain[:3]), plain[3]]
    # As long as the longest, where they differ: rows of several lengths may run together. The other task's adapter
    # keeps eight numbers more.
    drawn = {"task0": texts(1, LENGTH // 2)[0], "other": texts(1)[0]}
    mixed = work_of(model, {**adapters, "other": adapter}, drawn, options_for(model, adapters))
    assert [one.kept - 8 for one in mixed.blocks[1:3]] == masked[1:3]
    assert mixed.passes == ((ROWS, LENGTH // 2), (ROWS, LENGTH))
    # A forward ends at the last of what is measured.
    adapters = adapters_for(model, 1, ALL)
    assert read(score_modules=["v_proj", "down_proj"]).blocks[3].forward == numbers - WIDTH * 352
    model.lm_head.weight = model.model.embed_tokens.weight
    assert read().front == read().outside == outside - head


def test_tokens_of_images():
    model = encoder()
    adapters = adapters_for(model, 1, QV)
    drawn = {"task0": {"pixel_values": torch.zeros(5, 3, 48, 32)}}
    # 6 x 4 patches of 8, and the class.
    assert work_of(model, adapters, drawn, options_for(model, adapters)).passes == ((5, 25),)


@pytest.mark.parametrize(
    ("dtype", "given", "device", "folds"),
    [
        (torch.float32, {}, "cpu", True),
        (torch.float32, {"fold": False}, "cpu", False),
        (torch.float32, {}, "cuda", False),
        (torch.float32, {"fold": True}, "cuda", True),
        (torch.bfloat16, {}, "cpu", False),
        (torch.bfloat16, {}, "cuda", False),
    ],
)
def test_merged_weights_count_where_there_will_be_some(dtype, given, device, folds):
    """Of a model without numbers: all that is adapted and not measured."""
    model = decoder(dtype=dtype).to("meta")
    adapters = adapters_for(model, 2, ALL)
    drawn = dict(zip(adapters, texts(2), strict=True))
    work = work_of(model, adapters, drawn, options_for(model, adapters, **given), device=torch.device(device))
    # Queries, outputs, keys and values, the three of the feed-forward network; the last block's values are measured.
    adapted = 4 * (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * 352) - WIDTH * WIDTH // 2
    assert work.fold == (4 * adapted if folds else 0)
    packed = sum(one.bank for one in work.blocks)
    assert memory(work).adapters == packed + work.fold
    assert memory(work, ranks=2).adapters == memory(work, offloaded=True).adapters == packed


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
