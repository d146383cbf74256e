"""MergedLoRALinear."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import nsc_kernels as nk
import operator_cases as oc


def make(lam: object = (0.3, 0.6)) -> nk.MergedLoRALinear:
    return nk.MergedLoRALinear(nn.Linear(48, 40), oc.make_bank(oc.Case("module"), torch.float32), lam)  # type: ignore[arg-type]


def test_is_the_linear_plus_the_merged_update() -> None:
    layer = make()
    z = torch.randn(2, 5, 48)
    dense = nn.functional.linear(z, layer.linear.weight + layer.bank.delta(layer.lam), layer.linear.bias)
    assert torch.allclose(layer(z), dense, atol=1e-5)
    y, quad, sqnorm = layer.nsc(z)
    assert torch.equal(y, layer(z))
    assert (quad.shape, sqnorm.shape) == ((2, 5, 2), (2, 5))


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_gradients_are_those_of_the_composition(stats: bool, bias: bool, hooked: bool) -> None:
    """One node of the graph, or the linear called as a module where something hangs on it: the same numbers."""
    bank = oc.make_bank(oc.Case("module"), torch.float64)
    lam = nn.Parameter(torch.tensor([0.3, 0.6], dtype=torch.float64))
    layer = nk.MergedLoRALinear(nn.Linear(48, 40, bias=bias).double(), bank, lam)
    calls: list[int] = []
    if hooked:
        layer.linear.register_forward_hook(lambda *a: calls.append(1))
    z = torch.randn(5, 48, dtype=torch.float64, requires_grad=True)

    def gradients(out: object) -> tuple[torch.Tensor, ...]:
        y, quad, sqnorm = out if isinstance(out, tuple) else (out, torch.zeros(()), torch.zeros(()))
        return torch.autograd.grad(y.square().sum() + quad.sum() + sqnorm.square().sum(), (z, lam))

    found = gradients(layer.nsc(z) if stats else layer(z))
    assert len(calls) == int(hooked)
    base = nn.functional.linear(z, layer.linear.weight, layer.linear.bias)
    function = nk.merged_lora_nsc if stats else nk.merged_lora
    for a, b in zip(found, gradients(function(z, bank, lam, base)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10)
    assert torch.autograd.gradcheck(lambda z: layer.nsc(z)[1:] if stats else layer(z), (z,))


def test_the_layer_and_its_adapters_are_one_node() -> None:
    layer = make(nn.Parameter(torch.tensor([0.3, 0.6])))
    y = layer(torch.randn(3, 48, requires_grad=True))
    assert type(y.grad_fn).__name__ == "MergedLoRAFunctionBackward"
    sources = [type(node).__name__ for node, _ in y.grad_fn.next_functions if node is not None]
    assert sources == ["AccumulateGrad", "AccumulateGrad"]


def test_a_linear_that_is_still_trained_keeps_its_gradient() -> None:
    layer = make()
    layer.linear.requires_grad_(True)
    layer(torch.randn(3, 48)).sum().backward()
    assert layer.linear.weight.grad is not None
    assert layer.linear.bias.grad is not None


def test_shares_and_freezes_the_linear() -> None:
    linear = nn.Linear(48, 40)
    layer = nk.MergedLoRALinear(linear, oc.make_bank(oc.Case("module"), torch.float32), [0.3, 0.6])
    assert layer.linear is linear
    assert not any(p.requires_grad for p in layer.parameters())


def test_lam_is_learnt_when_it_is_a_parameter() -> None:
    lam = nn.Parameter(torch.tensor([0.3, 0.6]))
    layer = make(lam)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lam"]
    optimizer = torch.optim.AdamW([lam], lr=0.05)
    z, target = torch.randn(64, 48), torch.randn(64, 40)
    losses = []
    for _ in range(20):
        loss = (layer(z) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("learnt", [False, True])
def test_lam_stays_wide_when_the_module_is_narrowed(learnt: bool) -> None:
    lam = torch.tensor([0.3001, 0.6])
    layer = make(nn.Parameter(lam.clone()) if learnt else lam.clone()).to(torch.bfloat16)
    assert layer.bank.dtype is layer.linear.weight.dtype is torch.bfloat16
    assert layer.lam.dtype is torch.float32
    assert torch.equal(layer.lam.detach(), lam)
    assert layer(torch.randn(3, 48, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_a_pending_gradient_of_lam_stays_wide_too() -> None:
    lam = nn.Parameter(torch.tensor([0.3001, 0.6]))
    layer = make(lam)
    layer(torch.randn(3, 48)).sum().backward()
    assert lam.grad is not None
    grad = lam.grad.clone()
    layer.to(torch.bfloat16)
    assert layer.lam is lam
    assert lam.grad.dtype is torch.float32
    assert torch.equal(lam.grad, grad)
    torch.optim.AdamW([lam], lr=0.1).step()
    layer.double()
    assert lam.dtype is lam.grad.dtype is torch.float64


def test_a_parametrized_lam_stays_wide_too() -> None:
    """In [0, 1], say; a step of it is less than half a unit in bfloat16's last place."""
    layer = make(nn.Parameter(torch.tensor([0.3001, 0.6])))
    nn.utils.parametrize.register_parametrization(layer, "lam", nn.Sigmoid())
    lam = layer.lam.detach()
    layer.to(torch.bfloat16)
    assert layer.linear.weight.dtype is layer.bank.dtype is torch.bfloat16
    assert torch.equal(layer.lam.detach(), lam)
    layer.double()
    assert layer.lam.dtype is torch.float64


@pytest.mark.parametrize("name", ["linear1", "linear2"])
def test_a_transformer_layer_calls_it_where_it_would_read_its_weight(name: str) -> None:
    encoder = nn.TransformerEncoderLayer(48, 2, 40 if name == "linear1" else 48, batch_first=True).eval()
    merged, z = copy.deepcopy(encoder), torch.randn(2, 5, 48)
    linear = encoder.get_submodule(name)
    bank = oc.make_bank(oc.Case("module", d_out=linear.out_features), torch.float32)
    setattr(encoder, name, nk.MergedLoRALinear(linear, bank, [0.3, 0.6]))
    merged.get_submodule(name).weight.data += bank.delta([0.3, 0.6])
    for layer in (encoder, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        with torch.no_grad():
            assert torch.allclose(layer(z), merged(z), atol=1e-5)
    # A bank may be put in the place of another.
    encoder.get_submodule(name).bank = nk.AdapterBank(bank.A, bank.Bt, bank.offsets)
    with torch.no_grad():
        assert torch.allclose(encoder(z), merged(z), atol=1e-5)


def test_attention_that_would_read_its_weight_is_refused() -> None:
    attention = nn.MultiheadAttention(48, 2)
    bank = oc.make_bank(oc.Case("module", d_out=48), torch.float32)
    with pytest.raises(TypeError, match="out_proj of nn.MultiheadAttention.*adapters would have no effect"):
        nk.MergedLoRALinear(attention.out_proj, bank, [0.3, 0.6])


def test_copies_pickles_and_loads() -> None:
    layer, z = make(), torch.randn(3, 48)
    y = layer(z)
    assert torch.equal(copy.deepcopy(layer)(z), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(z), y)
    other = make([0.0, 0.0])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(z), y)


@pytest.mark.parametrize("bias", [False, True])
def test_is_asked_for_the_weight_of_its_linear(bias: bool) -> None:
    linear = nn.Linear(48, 40, bias=bias)
    layer = nk.MergedLoRALinear(linear, oc.make_bank(oc.Case("module"), torch.float32), [0.3, 0.6])
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (48, 40)
    assert layer.bfloat16().weight.dtype is torch.bfloat16
    names = ["linear.weight", *["linear.bias"][: int(bias)], "bank.A", "bank.Bt", "bank._extra_state"]
    assert sorted(layer.state_dict()) == sorted(["lam", *names])
    assert [name for name, _ in layer.named_parameters()] == names[: 1 + bias]
    with pytest.raises(KeyError, match="attribute 'weight' already exists"):
        layer.weight = nn.Parameter(torch.zeros(40, 48))
    with pytest.raises(AttributeError, match="weight"):
        layer.weight = torch.zeros(40, 48)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((nn.Conv1d(1, 1, 1), None, [0.1, 0.2]), TypeError, "linear must be an nn.Linear, or .*, found Conv1d"),
        ((nn.Linear(40, 48), None, [0.1, 0.2]), ValueError, "adapts a 48 -> 40 layer, but linear is 40 -> 48"),
        ((nn.Linear(48, 40), None, [0.1]), ValueError, r"lam must have shape \(2,\), one per adapter, found \(1,\)"),
        ((nn.Linear(48, 40, device="meta"), None, [0.1, 0.2]), ValueError, "linear is on meta, but the bank is on cpu"),
    ],
)
def test_bad_arguments(arguments: tuple, error: type[Exception], words: str) -> None:
    linear, _, lam = arguments
    with pytest.raises(error, match=words):
        nk.MergedLoRALinear(linear, oc.make_bank(oc.Case("module"), torch.float32), lam)


class Codes(torch.Tensor):
    """A quantised weight: what multiplies by it is told so, and reads codes as eighths."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is nn.functional.linear:
            z, weight, bias = args
            return nn.functional.linear(z, weight.as_subclass(torch.Tensor) / 8, bias)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("grad", [False, True])
def test_a_weight_that_is_no_plain_tensor_multiplies_in_its_own_way(grad: bool) -> None:
    layer = make(nn.Parameter(torch.tensor([0.3, 0.6])))
    codes = (8 * layer.linear.weight.detach()).round()
    layer.linear.weight = nn.Parameter(codes.as_subclass(Codes), requires_grad=False)
    z = torch.randn(3, 48, requires_grad=grad)
    plain = make(layer.lam)
    plain.linear.weight = nn.Parameter(codes / 8, requires_grad=False)
    plain.linear.bias, plain.bank = layer.linear.bias, layer.bank
    with torch.set_grad_enabled(grad):
        found, expected = layer(z), plain(z)
    assert torch.allclose(found, expected, atol=1e-5)
    if grad:
        for a, b in zip(*(torch.autograd.grad(y.sum(), (z, layer.lam)) for y in (found, expected)), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_layer_that_is_offloaded_computes_where_the_bank_is() -> None:
    hooks = pytest.importorskip("accelerate")
    layer = make()
    z = torch.randn(3, 48, requires_grad=True)
    expected = layer(z)
    (gradient,) = torch.autograd.grad(expected.sum(), z)
    linear = hooks.cpu_offload(layer.linear, torch.device("cpu"))
    assert linear.weight.device.type == "meta"
    found = nk.MergedLoRALinear(linear, layer.bank, layer.lam)(z)
    assert torch.equal(found, expected)
    assert torch.allclose(torch.autograd.grad(found.sum(), z)[0], gradient, atol=1e-5)


def test_a_layer_in_shards_is_the_whole_one() -> None:
    whole = make(nn.Parameter(torch.tensor([0.3, -0.5])))
    sharded, z = copy.deepcopy(whole), torch.randn(5, 48)

    def run(layer: nk.MergedLoRALinear) -> None:
        y, quad, sqnorm = layer.nsc(z + layer(z)[:, :1])
        (y.square().mean() + nk.null_space_ratio(quad, sqnorm).mean()).backward()

    run(whole)
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        register_fsdp_forward_method(sharded, "nsc")
        run(sharded)
        assert torch.allclose(sharded.lam.grad.full_tensor(), whole.lam.grad)
    finally:
        distributed.destroy_process_group()
