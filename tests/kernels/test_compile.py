"""The registered ops: opcheck, torch.compile, export, FLOP counts, profiler names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_operator import require
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import nsc_kernels as nk
import operator_cases as oc
from nsc_kernels import decompositions
from nsc_kernels.backends import reference
from nsc_kernels.contract import ForwardCall


def inputs_for(dtype: torch.dtype, per_row: bool = False) -> oc.Inputs:
    return oc.make_inputs(oc.Case("op", T=6, d_in=16, d_out=12, ranks=(2, 3), per_row=per_row), dtype)


@pytest.mark.parametrize("op", ["merged_lora", "cpu_forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stats", [False, True])
def test_opcheck_forward(op: str, dtype: torch.dtype, stats: bool) -> None:
    require("cpu")
    i = inputs_for(dtype)
    grad = op == "merged_lora"
    z, lam = i.z.requires_grad_(grad), i.lam.requires_grad_(grad)
    offsets = list(i.bank.offsets)
    opcheck(getattr(torch.ops.nsc, op).default, (z, i.bank.A, i.bank.Bt, offsets, lam, i.base, stats, True))
    with torch.no_grad():
        args = (i.z.detach(), i.bank.A, i.bank.Bt, offsets, i.lam.detach(), None, stats, False)
        opcheck(getattr(torch.ops.nsc, op).default, args)


@pytest.mark.parametrize("op", ["merged_lora_backward", "cpu_backward"])
@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("per_row", [False, True])
def test_opcheck_backward(op: str, needs: tuple[bool, bool], per_row: bool) -> None:
    require("cpu")
    i = inputs_for(torch.float32, per_row)
    u = torch.randn(6, i.bank.R)
    upstream = (i.dy, i.dquad, i.dsqnorm, u, i.z)
    args = (*upstream, i.bank.A, i.bank.Bt, list(i.bank.offsets), i.lam, torch.randn(6, 16), *needs)
    opcheck(getattr(torch.ops.nsc, op).default, args)


def objective(bank: nk.AdapterBank, z: Tensor, lam: Tensor, base: Tensor) -> Tensor:
    y, quad, sqnorm = nk.merged_lora_nsc(torch.tanh(z), bank, lam, base)
    return y.square().mean() + nk.null_space_ratio(quad, sqnorm).mean()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_and_agrees_with_eager(backend: str, dynamic: bool) -> None:
    bank = oc.make_bank(oc.Case("compiled"), torch.float32)
    compiled = torch.compile(lambda *a: objective(bank, *a), fullgraph=True, backend=backend, dynamic=dynamic)
    for T in (5, 8):
        z, base = torch.randn(T, 48, requires_grad=True), torch.randn(T, 40, requires_grad=True)
        lam = torch.rand(2, requires_grad=True)
        want, got = objective(bank, z, lam, base), compiled(z, lam, base)
        assert torch.allclose(want, got, rtol=1e-5)
        for w, g in zip(*(torch.autograd.grad(t, (z, lam, base)) for t in (want, got)), strict=True):
            assert torch.allclose(w, g, rtol=1e-4, atol=1e-6)


def test_a_backend_chosen_within_what_is_compiled_serves_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[ForwardCall] = []
    forward = reference.forward

    def counted(call: ForwardCall) -> Any:
        calls.append(call)
        return forward(call)

    monkeypatch.setattr(reference, "forward", counted)
    i = inputs_for(torch.float32)

    def chosen(z: Tensor) -> Tensor:
        with nk.use_backend("reference"):
            return nk.merged_lora(z, i.bank, i.lam)

    with pytest.raises(Exception, match=r"use_backend\('reference'\) is within what torch.compile"):
        torch.compile(chosen, backend="aot_eager", fullgraph=True)(i.z)
    assert not calls
    torch.compile(chosen, backend="aot_eager")(i.z)
    assert len(calls) == 1


def test_a_new_token_count_does_not_recompile() -> None:
    bank = oc.make_bank(oc.Case("dynamic"), torch.float32)
    counter = CompileCounter()
    compiled = torch.compile(lambda z, lam: nk.merged_lora(z, bank, lam), fullgraph=True, backend=counter, dynamic=True)
    for T in (5, 7, 11, 64, 513):
        z = torch.randn(T, 48)
        assert torch.allclose(compiled(z, torch.ones(2)), nk.merged_lora(z, bank, torch.ones(2)), atol=1e-5)
    assert counter.frame_count == 1


def test_the_compiled_graph_holds_one_opaque_node() -> None:
    bank = oc.make_bank(oc.Case("node"), torch.float32)
    explain = torch._dynamo.explain(lambda z, lam: nk.merged_lora_nsc(z, bank, lam))
    explained = explain(torch.randn(4, 48), torch.ones(2))
    assert explained.graph_break_count == 0
    targets = [str(node.target) for graph in explained.graphs for node in graph.graph.nodes]
    assert sum("merged_lora" in t for t in targets) == 1


def test_compile_with_autocast() -> None:
    bank = oc.make_bank(oc.Case("autocast"), torch.float32)

    def f(z: Tensor, lam: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nk.merged_lora(z, bank, lam)

    z = torch.randn(4, 48)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(z, torch.ones(2)), f(z, torch.ones(2)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("make", ["export", "trace"])
def test_a_graph_made_without_autocast_is_not_rounded_by_it(make: str, backend: str) -> None:
    bank, z, lam = oc.make_bank(oc.Case("autocast"), torch.float32), torch.randn(4, 48), torch.ones(2)

    class Statistics(torch.nn.Module):
        def forward(self, z: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return nk.merged_lora_nsc(z, bank, lam)

    given: Any = (z, lam)
    graph: Any = torch.export.export(Statistics(), given).module() if make == "export" else None
    graph = graph or torch.jit.trace(Statistics(), given)
    with nk.use_backend(backend):
        expected = nk.merged_lora_nsc(z, bank, lam)
        with torch.autocast("cpu", torch.bfloat16):
            found = graph(z, lam)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is torch.float32
        assert torch.equal(one, other)


def test_transforms_inside_compile_are_not_silently_zero() -> None:
    bank = oc.make_bank(oc.Case("func"), torch.float64)
    z, base = torch.randn(4, 48).double(), torch.randn(4, 40).double()
    lam = torch.rand(2).double()

    def loss(lam: Tensor) -> Tensor:
        return objective(bank, z, lam, base)

    expected = torch.func.grad(loss)(lam)
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(lam), expected)
    direction = torch.ones(2).double()
    tangent = torch.compile(lambda lam: torch.func.jvp(loss, (lam,), (direction,))[1], backend="aot_eager")(lam)
    assert torch.allclose(tangent, expected.sum())


def test_forward_mode_of_what_was_compiled_or_recorded_is_refused() -> None:
    i = inputs_for(torch.float32)

    def call(z: Tensor) -> Tensor:
        return nk.merged_lora(torch.tanh(z), i.bank, i.lam)

    recorded = make_fx(call)(i.z)
    z = i.z.clone().requires_grad_()
    y = torch.compile(call, backend="aot_eager", fullgraph=True)(z)
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="no derivative in forward mode within a graph"):
            recorded(forward_ad.make_dual(i.z, i.z))
        assert torch.allclose(recorded(i.z), y, atol=1e-5)  # which has no tangent
        with pytest.raises(RuntimeError, match="no derivative in forward mode within a graph"):
            torch.autograd.grad(y, z, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


def test_export_with_a_dynamic_dimension() -> None:
    linear = torch.nn.Linear(48, 40)
    module = nk.MergedLoRALinear(linear, oc.make_bank(oc.Case("export"), torch.float32), [0.3, 0.6])
    z = torch.randn(6, 48)
    program = torch.export.export(module, (z,), dynamic_shapes={"z": {0: torch.export.Dim("tokens")}})
    assert any("nsc.merged_lora" in str(node.target) for node in program.graph.nodes)
    longer = torch.randn(9, 48)
    assert torch.allclose(program.module()(longer), module(longer), atol=1e-6)


class Statistics(torch.nn.Module):
    def __init__(self, bank: nk.AdapterBank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, z: Tensor, lam: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return nk.merged_lora_nsc(z, self.bank, lam, base)


@pytest.mark.parametrize("strict", [False, True])
def test_the_rows_of_an_export_may_be_as_many_as_adapters_or_not(strict: bool) -> None:
    bank = oc.make_bank(oc.Case("rows"), torch.float32)
    tokens = torch.export.Dim("tokens", max=99)
    shapes = {name: {0: tokens} for name in ("z", "lam", "base")}
    for T in (bank.K, 5):
        given = (torch.randn(T, 48), torch.rand(T, bank.K), torch.randn(T, 40))
        program = torch.export.export(Statistics(bank), given, dynamic_shapes=shapes, strict=strict)
        for other in (bank.K, 7):
            z, lam, base = torch.randn(other, 48), torch.rand(other, bank.K), torch.randn(other, 40)
            assert torch.equal(program.module()(z, lam, base)[0], nk.merged_lora(z, bank, lam, base))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_decomposed_it_computes_the_same_without_the_operator(dtype: torch.dtype, per_row: bool) -> None:
    i = oc.make_inputs(oc.Case("decomposed", T=6, d_in=16, d_out=12, ranks=(2, 0, 3), per_row=per_row), dtype)
    z, lam = i.z.requires_grad_(), i.lam.requires_grad_()
    model = Statistics(i.bank)
    program = torch.export.export(model, (z, lam, i.base)).run_decompositions(decompositions.table())
    assert not any("nsc" in str(node.target) for node in program.graph.nodes)
    with nk.use_backend("reference"):
        expected = model(z, lam, i.base)
    found = program.module()(z, lam, i.base)
    weights = [torch.randn_like(t) for t in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    gradients = (torch.autograd.grad(outputs, (z, lam), weights) for outputs in (found, expected))
    # Rounded where autograd does.
    near = {"rtol": 2e-2, "atol": 5e-2} if dtype is torch.bfloat16 else {}
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stats", "save_u"), [(True, True), (False, True), (True, False), (False, False)])
def test_decomposed_it_gives_what_is_asked_for_and_no_more(dtype: torch.dtype, stats: bool, save_u: bool) -> None:
    i = inputs_for(dtype, per_row=True)
    call = (i.z, i.bank.A, i.bank.Bt, list(i.bank.offsets), i.lam, i.base, stats, save_u)
    with torch.no_grad(), nk.use_backend("reference"):
        expected = torch.ops.nsc.merged_lora(*call)
        for one, other in zip(decompositions.forward(*call), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_decomposed_it_becomes_onnx() -> None:
    pytest.importorskip("onnxscript")
    module = nk.MergedLoRALinear(torch.nn.Linear(48, 40), oc.make_bank(oc.Case("onnx"), torch.float32), [0.3, 0.6])
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(6, 48),), dynamic_shapes={"z": {0: torch.export.Dim("n")}})
    found: Any = torch.onnx.export(program.run_decompositions(decompositions.table()), verbose=False)
    assert {node.domain for node in found.model.graph} == {""}
    z = torch.randn(9, 48)
    torch.testing.assert_close(found(z)[0], module(z), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("make", ["trace", "export"])
def test_what_was_traced_or_exported_has_the_gradient_of_other_inputs(make: str, grad: bool) -> None:
    linear = torch.nn.Linear(48, 40).requires_grad_(False)
    module = nk.MergedLoRALinear(linear, oc.make_bank(oc.Case("traced"), torch.float32), [0.3, 0.6])
    example, z = torch.randn(5, 48), torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(grad):
        trace, export = torch.jit.trace, torch.export.export
        traced = trace(module, example) if make == "trace" else export(module, (example,)).module()

    def run(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        given = z.clone().requires_grad_()
        # With a way around the layer: a gradient that does not come through it leaves no other trace.
        y = function(given).square().sum() + given.square().sum()
        return y, torch.autograd.grad(y, given)[0]

    if make == "export" and not grad:
        with pytest.raises(RuntimeError, match=r"an example input that requires one, or run it under torch.no_grad"):
            run(traced)
    else:
        torch.testing.assert_close(run(traced), run(module), rtol=1e-5, atol=1e-4)


def test_meta_tensors_have_shapes() -> None:
    bank = oc.make_bank(oc.Case("meta"), torch.float32).to("meta")
    y, quad, sqnorm = nk.merged_lora_nsc(torch.empty(3, 48, device="meta"), bank, torch.empty(2, device="meta"))
    assert (y.shape, quad.shape, sqnorm.shape) == ((3, 40), (3, 2), (3,))


def test_flops_are_those_of_the_products() -> None:
    require("cpu")
    import nsc_kernels.flops  # noqa: F401

    i = inputs_for(torch.float32)
    z, lam = i.z.requires_grad_(), i.lam.requires_grad_()
    forward = 2 * 6 * i.bank.R * (16 + 12)
    with FlopCounterMode(display=False) as counter:
        y = nk.merged_lora(z, i.bank, lam, i.base)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == forward
    y = nk.merged_lora(z.detach(), i.bank, lam)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 6 * i.bank.R * 12
    _, quad, _ = nk.merged_lora_nsc(z, i.bank, lam)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(quad.sum(), z)
    assert counter.get_total_flops() == 2 * 6 * i.bank.R * 16


def test_the_profiler_names_the_kernels() -> None:
    require("cpu")
    i = inputs_for(torch.float32)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        nk.merged_lora(i.z.requires_grad_(), i.bank, i.lam.requires_grad_()).sum().backward()
    names = {event.key for event in recorded.key_averages()}
    assert {"nsc::cpu_forward", "nsc::cpu_backward"} <= names


def test_the_op_refuses_gradients_it_does_not_have() -> None:
    i = inputs_for(torch.float32)
    args = (i.z, i.bank.A.requires_grad_(), i.bank.Bt, list(i.bank.offsets), i.lam, None, False, True)
    y, *_ = torch.ops.nsc.merged_lora(*args)
    with pytest.raises(RuntimeError, match="A and Bt are frozen"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="save_u=True"):
        torch.ops.nsc.merged_lora(*args[:-1], False)
