"""Models that look at an adapted linear's attributes, or compute with its weight without calling it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import zoo
from accelerate import cpu_offload
from torch import nn
from torch.func import functional_call
from transformers import SiglipVisionConfig, SiglipVisionModel, T5Config, T5ForConditionalGeneration

import nsc_merge
from nsc_merge import Adapter, Factor


def siglip():
    """With its pooling head, an nn.MultiheadAttention."""
    return SiglipVisionModel(SiglipVisionConfig(**zoo.WIDTH, intermediate_size=48, **zoo.IMAGE))


def t5():
    """Gated, so that the feed-forward part asks for the dtype of the weight of ``wo``."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    return T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0))


def encoder():
    """torch's own, which in evaluation takes all weights and calls no linear."""
    return nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)


def words(seed):
    return {**zoo.text(seed), "decoder_input_ids": zoo.text(seed + 50)["input_ids"]}


def hidden(seed):
    return {"src": torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(seed))}


CASES = {
    "siglip": (siglip, zoo.pixels, ("q_proj", "out_proj", "fc1"), lambda out: out.pooler_output),
    "t5": (t5, words, (".q", ".wo", ".wi_0"), lambda out: out.logits),
    "encoder": (encoder, hidden, ("out_proj", "linear1", "linear2"), lambda out: out),
}


@pytest.fixture(params=CASES)
def case(request):
    """Model, adapters, inputs by seed, and what is its output."""
    build, inputs, names, output = CASES[request.param]
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    generator = torch.Generator().manual_seed(1)
    linears = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear) and p.endswith(names)}

    def factor(linear, rank):
        A, B = torch.randn(rank, linear.in_features), torch.randn(linear.out_features, rank)
        bias = torch.randn(linear.out_features, generator=generator) if linear.bias is not None else None
        return Factor(A, 0.1 * B, 1.5, bias)

    adapters = {
        task: Adapter(task, {path: factor(linear, rank) for path, linear in linears.items()})
        for task, rank in (("a", 2), ("b", 3))
    }
    whole = list(linears)[-1]
    dense = 0.1 * torch.randn(linears[whole].weight.shape)
    adapters["c"] = Adapter("c", {whole: dataclasses.replace(factor(linears[whole], 0), dense=dense)})
    return model, adapters, inputs, lambda model, batch: output(model(**batch))


def test_outputs_and_gradients_are_those_of_the_dense_merge(case):
    model, adapters, inputs, output = case
    batch = inputs(1)
    with nsc_merge.attach(model, adapters, 0.4) as merged:
        with torch.no_grad():
            unwatched = output(model, batch)
        out = output(model, batch)
        out.square().sum().backward()
        gradients = {path: module.lam.grad for path, module in merged.items()}
    lams = {path: torch.full((3,), 0.4, requires_grad=True) for path in merged}
    dense = {}
    for path, lam in lams.items():
        # Where task c has nothing.
        absent = Factor(torch.zeros(0, 1), torch.zeros(1, 0), 1.0, bias=torch.zeros(1))
        factors = [adapter.factors.get(path, absent) for adapter in adapters.values()]
        linear = model.get_submodule(path)
        deltas = torch.stack([factor.delta().float().expand_as(linear.weight) for factor in factors])
        dense[f"{path}.weight"] = linear.weight.detach() + torch.tensordot(lam, deltas, 1)
        if linear.bias is not None:
            dense[f"{path}.bias"] = linear.bias.detach() + lam @ torch.stack(
                [factor.bias_delta().float().expand_as(linear.bias) for factor in factors]
            )
    expected = output(lambda **batch: functional_call(model, dense, (), batch), batch)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(unwatched, expected.detach(), rtol=2e-5, atol=2e-5)
    largest = max(float(lam.grad.abs().max()) for lam in lams.values())
    assert min(float(lam.grad.abs().max()) for lam in lams.values()) > 0
    for path, lam in lams.items():
        torch.testing.assert_close(gradients[path], lam.grad, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("method", ["distill", "adamerging", "match", "regmean", "fisher"])
def test_every_method_takes_t5(method):
    torch.manual_seed(0)
    model = t5().eval()
    path = "encoder.block.0.layer.1.DenseReluDense.wo"
    factors = {path: Factor(torch.randn(2, 48), torch.randn(32, 2), 1.0)}
    adapters = {task: Adapter(task, factors) for task in ("a", "b")}
    options = {"progress": False, "steps": 1} if method in ("distill", "adamerging", "match") else {"batches": 1}
    if method == "match":
        options["features"] = ["decoder.final_layer_norm"]
    batches = {task: [words(seed)] for seed, task in enumerate(adapters)}
    result = nsc_merge.merge(model, adapters, batches, method, **options)
    assert result.delta(path).norm() > 0


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_methods_that_must_see_inputs_refuse_weights_taken_without_a_call(method):
    model = nn.ModuleDict({"head": nn.MultiheadAttention(8, 2, batch_first=True)})
    model.forward = lambda z: model["head"](z, z, z)[0]
    factors = {"head.out_proj": Factor(torch.randn(2, 8), torch.randn(8, 2), 1.0)}
    adapters = {task: Adapter(task, factors) for task in ("a", "b")}
    batches = {task: [{"z": torch.randn(2, 3, 8)}] for task in adapters}
    options = {"outputs": {task: lambda model, batch: model(**batch).mean(1) for task in adapters}}
    with pytest.raises(RuntimeError, match=r"with the weights of head\.out_proj by itself, .* adapters without these"):
        nsc_merge.merge(model, adapters, batches, method, batches=1, **(options if method == "fisher" else {}))


@pytest.mark.parametrize(
    ("names", "way_out"),
    [(["out_proj"], "adapters of other modules"), (["out_proj", "dense"], r"score_modules of others .*\['dense'\]")],
)
def test_nsc_says_what_to_measure_where_weights_are_taken_without_a_call(names, way_out):
    """As in WavLM, whose attention takes the weights of all its projections."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.dense = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

        def forward(self, z):
            return self.dense(self.attention(z, z, z)[0])

    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()])})
    model.forward = lambda z: model["blocks"][1](model["blocks"][0](z))
    paths = [path for path, module in model.named_modules() if path.rpartition(".")[2] in names]
    factors = {path: Factor(torch.randn(2, 8), torch.randn(8, 2), 1.0) for path in paths}
    adapters = {task: Adapter(task, factors) for task in ("a", "b")}
    batches = {task: [{"z": torch.randn(2, 3, 8)}] for task in adapters}
    options = {"score_modules": ["out_proj"], "steps": 1, "progress": False}
    with pytest.raises(RuntimeError, match=rf"weights of blocks\.1\.attention\.out_proj by itself, .*{way_out}"):
        nsc_merge.merge(model, adapters, batches, **options)
    if "dense" in names:
        found = nsc_merge.merge(model, adapters, batches, **{**options, "score_modules": ["dense"]})
        assert found.objective["batches"] == 1


def test_computing_with_a_weight_that_is_not_at_hand_is_refused():
    model = cpu_offload(nn.Sequential(nn.Linear(4, 3)), torch.device("cpu"))
    adapters = {"a": Adapter("a", {"0": Factor(torch.randn(2, 4), torch.randn(3, 2), 1.0)})}
    z = torch.randn(2, 4)
    with nsc_merge.attach(model, adapters, 1.0) as merged:
        weight = merged["0"].weight
        assert (weight.shape, weight.dtype) == ((3, 4), torch.float32)
        for compute in (lambda: nn.functional.linear(z, weight), lambda: z @ weight.T, lambda: weight.float() + 1):
            with pytest.raises(RuntimeError, match="^0: the model computes with its weight by itself, which is offl"):
                compute()


def test_t5_takes_an_offloaded_base():
    """It asks for the dtype of a weight that is not there."""
    torch.manual_seed(0)
    model = t5().eval()
    factors = {"encoder.block.0.layer.1.DenseReluDense.wo": Factor(torch.randn(2, 48), torch.randn(32, 2), 1.0)}
    dense = nsc_merge.merge(model, {"a": Adapter("a", factors)}, method="task_arithmetic", scale=0.5)
    expected = dense.apply(copy.deepcopy(model))(**words(1)).logits
    with nsc_merge.attach(cpu_offload(model, torch.device("cpu")), dense.adapters, 0.5):
        found = model(**words(1)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_linear_within_a_module_with_an_adapted_parameter_is_itself_afterwards():
    """An attention of torch, whose in_proj_weight is a parameter (``target_parameters``) and out_proj a linear."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"head": nn.MultiheadAttention(8, 2, batch_first=True)}).double()
    model.forward = lambda z: model["head"](z, z, z)[0]
    factors = {
        "head.out_proj": Factor(torch.randn(2, 8), torch.randn(8, 2), 1.0),
        "head.in_proj_weight": Factor(torch.randn(2, 8), torch.randn(24, 2), 1.0),
    }
    z, before = torch.randn(2, 3, 8).double(), dict(model.named_modules())
    whole = copy.deepcopy(model["head"])
    with torch.no_grad():
        whole.in_proj_weight += factors["head.in_proj_weight"].delta()
        whole.out_proj.weight += factors["head.out_proj"].delta()
    for _ in range(2):
        with nsc_merge.attach(model, {"a": Adapter("a", factors)}, 1.0):
            torch.testing.assert_close(model(z), whole(z, z, z)[0])
        assert dict(model.named_modules()) == before
