"""Updates of DTensors: every process adds its own shard of the dense sum."""

from __future__ import annotations

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
from forked import start
from torch import nn

from nsc_merge import Adapter, Factor, attach
from nsc_merge.evaluation.scoring import applied
from nsc_merge.models.bases.stored_weights import state_of
from nsc_merge.models.fitting import fit
from nsc_merge.results.merged_update import MergedUpdate

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


class Two(nn.Module):
    """Two linears; 7 outputs do not divide by two processes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 4, bias=False)

    def forward(self, z):
        return self.second(self.first(z).tanh())


def update_of(model):
    generator = torch.Generator().manual_seed(1)
    factors = {
        path: Factor(
            torch.randn(2, linear.in_features, generator=generator),
            torch.randn(linear.out_features, 2, generator=generator),
            1.5,
            torch.randn(linear.out_features, generator=generator) if linear.bias is not None else None,
        )
        for path, linear in model.named_children()
    }
    return MergedUpdate("task_arithmetic", {}, [], {"a": Adapter("a", factors)}, {}, {}, model, factors=factors)


def check(rank, world, store):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=limit)
    plain = Two()
    update = update_of(plain)
    expected = dict(plain.named_parameters())
    for path, factor in update.factors.items():
        sums = {"weight": 1.5 * factor.B.double() @ factor.A.double()}
        if factor.bias is not None:
            sums["bias"] = 1.5 * factor.bias.double()
        expected |= {f"{path}.{part}": (expected[f"{path}.{part}"].double() + sums[part]).float() for part in sums}
    mesh = init_device_mesh("cpu", (world,))

    def distributed(placement):
        model = copy.deepcopy(plain)
        for linear in model.children():
            for part, value in list(linear.named_parameters()):
                whole = Replicate() if placement == Shard(1) and value.dim() == 1 else placement
                setattr(linear, part, nn.Parameter(distribute_tensor(value.detach(), mesh, [whole])))
        return model

    for placement in (Shard(0), Shard(1), Replicate()):
        model = distributed(placement)
        with applied(model, update):
            held = {name: value.full_tensor().clone() for name, value in model.named_parameters()}
        for name, value in model.named_parameters():
            torch.testing.assert_close(held[name], expected[name], rtol=0, atol=1e-6)
            assert torch.equal(value.full_tensor(), plain.get_parameter(name))
        update.apply(model)
        for name, value in model.named_parameters():
            assert isinstance(value, DTensor)
            assert torch.equal(value.full_tensor(), held[name])
        with pytest.raises(ValueError, match="first: expected the whole weight .* merge before the model is distr"):
            attach(model, update.adapters, 0.4).__enter__()
        with pytest.raises(ValueError, match=r"first\.weight: expected a whole tensor, found a DTensor; gather"):
            state_of(model)

    sharded = fully_shard(copy.deepcopy(plain))
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    wanted = torch.func.functional_call(plain, expected, (z,))
    torch.testing.assert_close(update.apply(sharded)(z), wanted, rtol=1e-6, atol=1e-6)

    whole = {"first.weight": plain.first.weight.detach() + 0.5}
    (shared,) = fit({"a": Adapter("a", {}, trained=whole)}, distributed(Shard(0))).values()
    torch.testing.assert_close(shared.factors["first"].dense, torch.full((7, 6), 0.5))

    partial = DTensor.from_local(torch.zeros(7, 6), mesh, [Partial()])
    model = copy.deepcopy(plain)
    model.first.weight = nn.Parameter(partial)
    with pytest.raises(ValueError, match=r"first\.weight: expected a DTensor .* with placements Shard and Replicate"):
        update.apply(model)
    dist.destroy_process_group()


def test_one_process(tmp_path):
    check(0, 1, str(tmp_path / "store"))


def test_two_processes(tmp_path):
    store = str(tmp_path / "store")
    other = start(second, (store,), 1)
    check(0, 2, store)
    other.join()


def second(_, store):
    check(1, 2, store)
