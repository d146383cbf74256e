"""accelerate() under torch.compile: one graph, the operator in it, PEFT's own numbers."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from torch import nn

from nsc_kernels.integrations import peft as integration
from nsc_kernels.integrations.peft import accelerate


@pytest.fixture(autouse=True)
def said(caplog):
    integration._say_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="nsc_kernels")
    return caplog


def build(dtype=torch.float32):
    """Two linears under two adapters."""
    linears = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 16))
    model = get_peft_model(linears, LoraConfig(r=4, target_modules=["0", "2"]), "one")
    model.add_adapter("two", LoraConfig(r=3, target_modules=["2"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.base_model.set_adapter(["one", "two"])
    model = model.requires_grad_(False).eval().to(dtype)
    return model, [model.base_model.model[0], model.base_model.model[2]]


def test_one_graph_for_every_length_holds_the_operator(said):
    model, layers = build()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        inputs = [torch.randn(2, T, 32) for T in (7, 9, 13)]
        expected = [model(x) for x in inputs]
        with accelerate(model) as handle:
            compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=keep)
            for x, wanted in zip(inputs, expected, strict=True):
                torch.testing.assert_close(compiled(x), wanted, rtol=2e-5, atol=2e-5)
    assert len(graphs) == 1
    operators = [node for node in graphs[0].graph.nodes if "nsc.merged_lora" in str(node.target)]
    assert len(operators) == handle.layers == len(layers)
    assert not said.records


def test_gradients_and_a_learnable_scaling_in_one_graph():
    model, layers = build(torch.float64)
    lam = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    for layer in layers:
        layer.scaling["one"] = lam
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)

    def gradients(run):
        return torch.autograd.grad(run(x).square().mean(), (x, lam))

    expected = gradients(model)
    with accelerate(model):
        found = gradients(torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager"))
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-12)


def test_changes_after_the_compilation_are_seen():
    model, layers = build()
    x = torch.randn(7, 32)

    def weights():
        layers[0].lora_B["one"].weight.mul_(3)

    def fewer():
        model.base_model.set_adapter(["two"])

    def scaling():
        layers[1].scaling["two"] *= 2

    with torch.no_grad(), accelerate(model):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        before = compiled(x)
        for change in (weights, fewer, scaling):
            change()
            after = compiled(x)
            torch.testing.assert_close(after, model(x), rtol=2e-5, atol=2e-5)
            assert (after - before).abs().max() > 1e-3
            before = after


def test_what_goes_to_peft_breaks_no_graph_and_is_said(said):
    model, layers = build()
    layers[1].lora_A["one"].weight.requires_grad_(True)
    x = torch.randn(7, 32)
    expected = model(x)
    with accelerate(model):
        found = torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert [record.message for record in said.records] == [
        "PEFT's own forward serves some calls: the adapters are being trained (frozen are those of "
        "set_adapter(..., inference_mode=True))"
    ]
