"""What a step takes by formula, against what it takes: bytes that PyTorch's allocator was asked for, operations that
its counter counts, and bytes that its collectives move.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import accelerate
import pytest
import torch
import torch.distributed as dist
import transformers as tf
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import nsc_kernels.flops  # noqa: F401  (registers the formulas of the operator)
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient.nsc import objective_of
from nsc_merge.methods.gradient.nsc_options import resolve_options
from nsc_merge.models.attachment import MeasuredLoRALinear, adapted_linears
from nsc_merge.models.families import family_of, scored_paths
from nsc_merge.recipes.estimate import as_run, bytes_per_step, memory, operations
from nsc_merge.recipes.shapes import NoFormula, work_of

WIDTH, INNER, BLOCKS, ROWS, LENGTH = 128, 352, 4, 8, 32
aten = torch.ops.aten


def decoder(dtype=torch.float32):
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": BLOCKS}
    config = tf.LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, vocab_size=256)
    return tf.LlamaForCausalLM(config).to(dtype).eval()


def encoder():
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": BLOCKS}
    config = tf.ViTConfig(**shape, num_attention_heads=4, image_size=48, patch_size=8)
    return tf.ViTForImageClassification(config).eval()


def texts(K, padded=False):
    ids = [torch.randint(6, 256, (ROWS, LENGTH)) for _ in range(K)]
    masks = [torch.ones_like(one) for one in ids]
    for mask in masks if padded else []:
        mask[0, LENGTH // 2 :] = 0
    return [{"input_ids": one, "attention_mask": mask} for one, mask in zip(ids, masks, strict=True)]


def images(K):
    return [{"pixel_values": torch.randn(ROWS, 3, 48, 48)} for _ in range(K)]


def adapters_for(model, K, names, rank=4):
    linears = {path: one for path, one in model.named_modules() if path.rpartition(".")[2] in names}
    return {
        f"task{k}": Adapter(
            f"task{k}",
            {
                path: Factor(torch.randn(rank, one.in_features), 0.01 * torch.randn(one.out_features, rank), 1.0)
                for path, one in linears.items()
            },
        )
        for k in range(K)
    }


@contextmanager
def attached(model, adapters, options):
    family = family_of(model)
    paths = list(adapted_linears(model, adapters))
    scored = scored_paths(family, model, paths, options.score_modules, options.score_blocks)
    with objective_of(model, adapters, family, scored, options) as objective:
        objective.coefficients.flat.grad = torch.zeros_like(objective.coefficients.flat)
        yield objective


def peak(call):
    """Bytes allocated at most beside those that there were."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [one for one in found.profiler.kineto_results.events() if one.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def forward_attention(q, k, *_, out_shape=None, **__):
    return 4 * torch.Size(q).numel() * k[2]


def backward_attention(dy, q, k, *_, out_shape=None, **__):
    return 10 * torch.Size(q).numel() * k[2]


# The counter knows the attention of GPUs only.
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: forward_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_attention,
}
QV, ALL = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
    adapters = adapters_for(model, K, names)
    options = resolve_options(family_of(model), list(adapters), {"batch_tasks": False, "fold": False, **given})
    batches = texts(K, padded) if build is decoder else images(K)
    work = as_run(work_of(model, adapters, dict(zip(adapters, batches, strict=True)), options), options.batch_tasks, 0)
    with attached(model, adapters, options) as objective:
        objective.accumulate(batches)
        took = peak(lambda: objective.accumulate(batches))
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            objective.accumulate(batches)
        banks = [one.bank for one in model.modules() if isinstance(one, MeasuredLoRALinear)]
    held = memory(work)
    assert held.activations + held.working == pytest.approx(took, rel=0.25)
    assert operations(work) == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert held.adapters == sum(4 * (bank.A.numel() + bank.Bt.numel()) for bank in banks)
    assert held.weights == sum(4 * value.numel() for value in model.parameters())


def test_batches_of_all_tasks_run_as_one_where_memory_allows():
    model, batches = decoder(), texts(3)
    adapters = adapters_for(model, 3, QV)
    options = resolve_options(family_of(model), list(adapters), {})
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
    options = resolve_options(family_of(model), list(adapters), {})
    with pytest.raises(NoFormula, match="model.layers.1.mlp.router is no linear of a block that the formula knows"):
        work_of(model, adapters, {"task0": texts(1)[0]}, options)
    with pytest.raises(NoFormula, match="a batch of .'other'. has"):
        work_of(decoder(), adapters, {"task0": {"other": torch.ones(2, 2)}}, options)


class Gathered(TorchDispatchMode):
    """Counts the bytes of gathered weights, this process's own share among them."""

    bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.c10d._allgather_base_.default:
            self.bytes += args[0].nbytes
        return operator(*args, **(kwargs or {}))


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
    options = resolve_options(family_of(model), list(adapters), {"early_exit": False})
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
    options = resolve_options(family_of(model), list(adapters), {"early_exit": False})
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
