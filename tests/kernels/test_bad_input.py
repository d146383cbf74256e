"""Bad input: the right error, naming what was found and what was expected, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_operator import require
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

import nsc_kernels as nk
import operator_cases as oc
from nsc_kernels import autograd, functional

BANK = nk.AdapterBank.from_factors([torch.ones(2, 6), torch.ones(1, 6)], [torch.ones(4, 2), torch.ones(4, 1)])
NESTED = torch.nested.nested_tensor([torch.ones(3, 6), torch.ones(2, 6)])
RAGGED = torch.nested.nested_tensor([torch.ones(3, 6), torch.ones(2, 6)], layout=torch.jagged)
GOOD: dict[str, Any] = {"z": torch.ones(3, 6), "bank": BANK, "lam": torch.ones(2), "base": torch.ones(3, 4)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"z": [1.0]}, TypeError, "z must be a tensor, found list"),
        ({"z": torch.tensor(1.0)}, ValueError, r"z must have shape \[..., d_in=6\], found \(\)"),
        ({"z": torch.ones(3, 5)}, ValueError, r"z must have shape \[..., d_in=6\], found \(3, 5\)"),
        ({"z": torch.ones(3, 6).double()}, TypeError, "z is torch.float64, but the bank is torch.float32"),
        ({"z": torch.ones(3, 6).int()}, TypeError, "z is torch.int32"),
        ({"z": torch.ones(3, 6).to_sparse()}, TypeError, "z must be dense .*found torch.sparse_coo"),
        ({"lam": torch.ones(2).to_sparse()}, TypeError, r"lam must be dense .*found .*; take lam.to_dense"),
        ({"lam": torch.ones(2).to_mkldnn()}, TypeError, "lam must be dense .*found torch._mkldnn"),
        ({"base": torch.ones(3, 4).to_sparse_csr()}, TypeError, "base must be dense .*found torch.sparse_csr"),
        ({"z": RAGGED}, TypeError, r"z must be dense, found a nested tensor; take .* z.values\(\) of a jagged one"),
        ({"z": NESTED}, TypeError, r"z must be dense, found a nested tensor; take torch.cat\(z.unbind\(\)\)"),
        ({"lam": RAGGED}, TypeError, r"lam must be dense, found a nested tensor; take .*lam.values\(\) of a j"),
        ({"lam": NESTED}, TypeError, r"lam must be dense, found a nested tensor; take torch.cat\(lam.unbind\(\)\)"),
        ({"base": RAGGED}, TypeError, r"base must be dense, found a nested tensor; take .*base.values\(\)"),
        ({"base": NESTED}, TypeError, r"base must be dense, found a nested tensor; take torch.cat\(base.unbind\(\)\)"),
        ({"z": torch.ones(3, 6, device="meta")}, ValueError, "z is on meta, but the bank is on cpu"),
        ({"bank": torch.ones(2)}, TypeError, "bank must be an AdapterBank, found Tensor"),
        ({"lam": 0.4}, TypeError, "lam must be a tensor, found float"),
        ({"lam": torch.ones(3)}, ValueError, r"lam must have shape \(2,\) or \(3, 2\), found \(3,\)"),
        ({"lam": torch.ones(1, 2)}, ValueError, r"lam must have shape .*found \(1, 2\)"),
        ({"lam": torch.ones(2, 1)}, ValueError, r"lam must have shape .*found \(2, 1\)"),
        (
            {"z": torch.ones(3, 5, 6), "lam": torch.ones(3, 2), "base": None},
            ValueError,
            r"lam must have shape \(2,\) or \(3, 5, 2\), found \(3, 2\)",
        ),
        ({"lam": torch.ones(2).double()}, TypeError, "lam must be torch.float32 or narrower.*found torch.float64"),
        ({"lam": torch.ones(2).int()}, TypeError, "lam must be torch.float32 or narrower.*found torch.int32"),
        ({"lam": torch.ones(2, device="meta")}, ValueError, "lam is on meta, but z is on cpu"),
        ({"base": torch.ones(3, 6)}, ValueError, r"base must have shape \(3, 4\), found \(3, 6\)"),
        ({"base": torch.ones(1, 4)}, ValueError, r"base must have shape \(3, 4\), found \(1, 4\)"),
        ({"base": torch.ones(4)}, ValueError, r"base must have shape \(3, 4\), found \(4,\)"),
        ({"base": torch.ones(3, 4).half()}, TypeError, "base is torch.float16, but z is torch.float32"),
        ({"base": torch.ones(3, 4, device="meta")}, ValueError, "base is on meta, but z is on cpu"),
        ({"base": 0.0}, TypeError, "base must be a tensor, found float"),
    ],
)
@pytest.mark.parametrize("function", [nk.merged_lora, nk.merged_lora_nsc])
def test_refused_in_words_before_anything_runs(
    change: dict[str, Any], error: type[Exception], words: str, function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*args: Any) -> None:
        raise AssertionError("a backend was asked to run")

    for module in (functional, autograd):
        monkeypatch.setattr(module, "run_forward", must_not_run)
    with pytest.raises(error, match=words):
        function(**{**GOOD, **change})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 40),
    d_in=st.integers(1, 70),
    d_out=st.integers(1, 70),
    ranks=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    dtype=st.sampled_from(list(oc.DTYPES)),
    per_row=st.booleans(),
    base=st.booleans(),
    layout=st.sampled_from(["random", "strided_rows", "transposed"]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_matches_the_oracle(
    T: int,
    d_in: int,
    d_out: int,
    ranks: list[int],
    dtype: str,
    per_row: bool,
    base: bool,
    layout: str,
    seed: int,
) -> None:
    require("cpu")
    torch.manual_seed(seed)
    case = oc.Case("any", T, d_in, d_out, tuple(ranks), per_row, base, z=layout)
    oc.check_against_oracle("cpu", oc.make_inputs(case, oc.DTYPES[dtype]))


FORWARD = {
    "z": torch.ones(3, 6),
    "A": torch.ones(2, 6),
    "Bt": torch.ones(2, 4),
    "offsets": [0, 2],
    "lam": torch.ones(1),
    "base": None,
    "stats": True,
    "save_u": True,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"z": torch.ones(3, 5)}, r"z must have shape \[3, 6\]"),
        ({"z": torch.ones(6, 3).t()}, "z must have contiguous rows"),
        ({"z": torch.ones(3, 6).double()}, "z has the wrong dtype"),
        ({"Bt": torch.ones(3, 4)}, r"Bt must have shape \[2, 4\]"),
        ({"A": torch.ones(6, 2).t()}, "A must be contiguous"),
        ({"offsets": [0, 3]}, "offsets must rise from 0 to 2"),
        ({"offsets": [0, 2, 1, 2], "lam": torch.ones(3)}, "offsets must not fall"),
        ({"offsets": [0]}, "offsets must rise"),
        ({"Bt": torch.ones(2, 0)}, "A and Bt must have columns"),
        ({"lam": torch.ones(2)}, r"lam must have shape \[1\] or \[3, 1\]"),
        ({"lam": torch.ones(1).double()}, "lam must be float32"),
        ({"base": torch.ones(3, 5)}, r"base must have shape \[3, 4\]"),
    ],
)
def test_the_native_op_checks_for_itself(change: dict[str, Any], words: str) -> None:
    require("cpu")
    with pytest.raises(RuntimeError, match=words):
        torch.ops.nsc.cpu_forward(**{**FORWARD, **change})


def scaled_by(scaling: Any) -> nk.AdapterBank:
    return nk.AdapterBank.from_factors([torch.ones(1, 2)], [torch.ones(3, 1)], scaling)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scaled_by(2.0), "scaling must hold one"),
        (lambda: scaled_by(torch.tensor(2.0)), "scaling must hold one"),
        (lambda: scaled_by("2"), "scaling must hold one"),
        (lambda: scaled_by([None]), "scaling must hold numbers, found"),
        (lambda: nk.AdapterBank.from_factors(None, [torch.ones(3, 1)]), "one factor per adapter, found NoneType"),
        (lambda: nk.AdapterBank(torch.ones(1, 2), torch.ones(1, 3), 1), "offsets must be ints"),
        (lambda: nk.AdapterBank([1.0], torch.ones(1, 3), (0, 1)), "A must be a tensor, found list"),
        (lambda: nk.MergedLoRALinear(torch.nn.Linear(6, 4), "x", [1.0]), "bank must be an AdapterBank, found str"),
        (lambda: nk.MergedLoRALinear(torch.nn.Linear(6, 4), BANK, 0.3), "lam must be a tensor or a list of floats"),
        (lambda: nk.MergedLoRALinear(torch.nn.Linear(6, 4), BANK, torch.ones(2).int()), "lam must be of a floating"),
        (lambda: nk.null_space_ratio([1.0], torch.ones(1)), "quad must be a tensor, found list"),
        (lambda: nk.null_space_ratio(torch.ones(1, 1), 1.0), "sqnorm must be a tensor, found float"),
    ],
)
def test_what_is_of_another_type_is_named(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("shape", [(), (1,), (1, 3, 2)])
def test_a_factor_that_is_no_matrix_is_named(shape: tuple[int, ...]) -> None:
    for A, Bt in ((torch.ones(shape), torch.ones(1, 3)), (torch.ones(1, 3), torch.ones(shape))):
        with pytest.raises(ValueError, match=r"A and Bt must be \[R, d_in\] and \[R, d_out\], found \("):
            nk.AdapterBank(A, Bt, (0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_large_scaling_is_finite_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        A, B = torch.ones(1, 2, dtype=torch.float32), torch.ones(3, 1, dtype=torch.float32)
        bank = nk.AdapterBank.from_factors([A], [B], [1e5])
        assert bank.delta([1.0]).max() == 1e5
        with torch.device("meta"):
            lam = nk.MergedLoRALinear(torch.nn.Linear(2, 3, device="cpu"), bank, [1e5]).lam
        assert (lam.dtype, lam.tolist()) == (torch.float32, [1e5])
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", ["z", "bank.A", "lam", "base"])
def test_what_is_distributed_is_named(name: str) -> None:
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        i = oc.make_inputs(oc.Case("spread", T=4, d_in=8, d_out=6, ranks=(2, 2)), torch.float32)
        owner, attribute = (i.bank, "A") if name == "bank.A" else (i, name)
        setattr(owner, attribute, DTensor.from_local(getattr(owner, attribute), mesh, [Replicate()]))
        with pytest.raises(TypeError, match=rf"{name} must be a plain tensor, found a DTensor .*to_local\(\)"):
            nk.merged_lora(i.z, i.bank, i.lam, i.base)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("how", ["made", "moved", "lam"])
def test_what_inference_mode_made_is_named_where_there_is_a_gradient(how: str) -> None:
    i = oc.make_inputs(oc.Case("inference", T=4, d_in=8, d_out=6, ranks=(2, 2)), torch.float32)
    bank, lam, z = i.bank, i.lam, i.z.requires_grad_()
    with torch.inference_mode():
        if how == "made":
            bank = nk.AdapterBank(bank.A.clone(), bank.Bt.clone(), bank.offsets)
        elif how == "moved":
            bank = bank.double().float()
        else:
            lam = lam.clone()
    with pytest.raises(RuntimeError, match=f"{'lam' if how == 'lam' else 'bank'} was made or moved under torch.infer"):
        nk.merged_lora(z, bank, lam)
    assert i.base is not None
    nk.merged_lora(z.detach(), bank, lam, i.base.requires_grad_()).sum().backward()
    copied = nk.AdapterBank(bank.A.clone(), bank.Bt.clone(), bank.offsets)
    nk.merged_lora(z, copied, lam.clone()).sum().backward()
    assert z.grad is not None
