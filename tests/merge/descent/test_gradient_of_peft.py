"""The gradient of the coefficients against PEFT's own multi-adapter forward with tensor-valued scaling."""

from __future__ import annotations

import copy

import pytest
import torch
from loop_cases import TASKS, adapters_for, llama, text_batches
from peft import LoraConfig
from peft.tuners.lora import Linear

from nsc_merge.methods.gradient.nsc import objective_of
from nsc_merge.methods.gradient.nsc_options import resolve_options
from nsc_merge.models.families import family_of, scored_paths


def peft_layers(model, adapters):
    """PEFT layers in place of the adapted linears; path -> layer."""
    layers = {}
    for path in adapters["a"].factors:
        names = [task for task in TASKS if path in adapters[task].factors]
        ranks = {task: adapters[task].factors[path].rank for task in names}
        config = LoraConfig(r=ranks[names[0]])
        layer = Linear(model.get_submodule(path), names[0], config=config, r=config.r, lora_alpha=1)
        for task in names[1:]:
            layer.update_layer(task, ranks[task], lora_alpha=1, config=config)
        layer.set_adapter(names)
        layer.requires_grad_(False).double()
        for task in names:
            layer.lora_A[task].weight.copy_(adapters[task].factors[path].A)
            layer.lora_B[task].weight.copy_(adapters[task].factors[path].B)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.eval())
        layers[path] = layer
    return layers


@pytest.mark.parametrize("options", [{}, {"batch_tasks": True}, {"checkpointing": True}])
def test_gradient_equals_that_of_peft(options):
    model = llama().double().requires_grad_(False)
    adapters, batches = adapters_for(model), text_batches(1)
    drawn = [batches[task][0] for task in TASKS]
    oracle = copy.deepcopy(model)
    family, paths = family_of(model), list(adapters["a"].factors)
    scored = scored_paths(family, model, paths, None, 2)
    chosen = resolve_options(family, TASKS, {"batch_tasks": False, **options})
    generator = torch.Generator().manual_seed(6)
    with objective_of(model, adapters, family, scored, chosen) as objective:
        flat = objective.coefficients.flat
        with torch.no_grad():
            flat += 0.2 * torch.randn(flat.shape, generator=generator, dtype=flat.dtype)
        omega = objective.accumulate(drawn)
        lam, gradient = flat.detach().clone().requires_grad_(), flat.grad.clone()

    layers = peft_layers(oracle, adapters)
    for row, layer in enumerate(layers.values()):
        layer.scaling = {task: 1.5 * lam[row, TASKS.index(task)] for task in layer.scaling}
    expected = []
    for task, batch in zip(TASKS, drawn, strict=True):
        seen = []
        handles = [layers[path].register_forward_pre_hook(lambda _, z, seen=seen: seen.append(z[0])) for path in scored]
        oracle(**batch)
        for handle in handles:
            handle.remove()
        ratios = []
        for path, z in zip(scored, seen, strict=True):
            rows = torch.linalg.qr(adapters[task].factors[path].A.double().t())[0]
            ratios.append((1 - (z @ rows).square().sum(-1) / z.square().sum(-1)).sqrt().mean())
        expected.append(torch.stack(ratios).mean())
    torch.testing.assert_close(omega, torch.stack(expected), rtol=1e-10, atol=0)
    torch.stack(expected).mean().backward()
    torch.testing.assert_close(gradient, lam.grad, rtol=1e-8, atol=1e-12)
