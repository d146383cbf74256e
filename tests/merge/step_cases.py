"""A step of NSC on small models of usual shape, what it takes by formula, and what it takes: bytes that PyTorch's
allocator was asked for, and operations that its counter counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import nsc_kernels.flops  # noqa: F401  (registers the formulas of the operator)
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.descent.null_space_objective import Objective
from nsc_merge.methods.gradient.nsc import objective_of
from nsc_merge.methods.gradient.nsc_options import NSCOptions, resolve_options
from nsc_merge.models.attachment import adapted_linears
from nsc_merge.models.families import family_of, scored_paths
from nsc_merge.recipes.forecast.estimate import Memory, Work, as_run, memory, operations
from nsc_merge.recipes.forecast.shapes import work_of

ROWS, VOCABULARY, IMAGE, PATCH = 8, 256, 48, 8
QV, ALL = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
aten = torch.ops.aten


def decoder(width: int = 128, blocks: int = 4, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": blocks}
    config = tf.LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY)
    return tf.LlamaForCausalLM(config).to(dtype).eval()


def encoder(width: int = 128, blocks: int = 4) -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": blocks}
    config = tf.ViTConfig(**shape, num_attention_heads=4, image_size=IMAGE, patch_size=PATCH)
    return tf.ViTForImageClassification(config).eval()


def texts(K: int, length: int = 32, padded: bool = False) -> list[dict[str, Any]]:
    ids = [torch.randint(6, VOCABULARY, (ROWS, length)) for _ in range(K)]
    masks = [torch.ones_like(one) for one in ids]
    for mask in masks if padded else []:
        mask[0, length // 2 :] = 0
    return [{"input_ids": one, "attention_mask": mask} for one, mask in zip(ids, masks, strict=True)]


def images(K: int) -> list[dict[str, Any]]:
    return [{"pixel_values": torch.randn(ROWS, 3, IMAGE, IMAGE)} for _ in range(K)]


def adapters_for(model: nn.Module, K: int, names: Sequence[str], rank: int = 4) -> dict[str, Adapter]:
    linears = {
        path: one
        for path, one in model.named_modules()
        if path.rpartition(".")[2] in names and isinstance(one, nn.Linear)
    }
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


def options_for(model: nn.Module, adapters: Mapping[str, Adapter], **given: Any) -> NSCOptions:
    return resolve_options(family_of(model), list(adapters), given)


@contextmanager
def attached(model: nn.Module, adapters: Mapping[str, Adapter], options: NSCOptions) -> Iterator[Objective]:
    family = family_of(model)
    paths = list(adapted_linears(model, adapters))
    scored = scored_paths(family, model, paths, options.score_modules, options.score_blocks)
    with objective_of(model, adapters, family, scored, options) as objective:
        objective.coefficients.flat.grad = torch.zeros_like(objective.coefficients.flat)
        yield objective


def peak(call: Any) -> int:
    """Bytes allocated at most beside those that there were."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    results: Any = found.profiler
    events = [one for one in results.kineto_results.events() if one.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def forward_attention(q: Any, k: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 4 * torch.Size(q).numel() * k[2]


def backward_attention(dy: Any, q: Any, k: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 10 * torch.Size(q).numel() * k[2]


class Gathered(TorchDispatchMode):
    """Counts the bytes of gathered weights, this process's own share among them."""

    bytes = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.c10d._allgather_base_.default:
            self.bytes += args[0].nbytes
        return operator(*args, **(kwargs or {}))


# The counter knows the attention of GPUs only.
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: forward_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_attention,
}


class Costs(NamedTuple):
    """By formula, and measured beside the base and the packed adapters."""

    work: Work
    held: Memory
    operations: float
    bytes_measured: int
    operations_measured: int
    bank_bytes: int

    @property
    def bytes(self) -> float:
        return self.held.activations + self.held.working


def costs(model: nn.Module, batches: Sequence[Mapping[str, Any]], names: Sequence[str], **given: Any) -> Costs:
    """Of a step with one batch for each task, unfolded, one batch after another unless ``given`` says otherwise."""
    adapters = adapters_for(model, len(batches), names)
    options = options_for(model, adapters, **{"batch_tasks": False, "fold": False, **given})
    drawn = dict(zip(adapters, batches, strict=True))
    work = as_run(work_of(model, adapters, drawn, options), options.batch_tasks, 0)
    with attached(model, adapters, options) as objective:
        objective.accumulate(batches)
        took = peak(lambda: objective.accumulate(batches))
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            objective.accumulate(batches)
        banks = [one.bank for one in model.modules() if hasattr(one, "bank")]
        packed = sum(part.nbytes for bank in banks for part in (bank.A, bank.Bt))
    return Costs(work, memory(work), operations(work), took, counter.get_total_flops(), packed)
