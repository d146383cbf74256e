"""A decoder with adapters, and what its linears see."""

from __future__ import annotations

import torch
from zoo import KINDS, build, write_adapter


def decoder(tmp_path):
    """A decoder with two adapters, one of which touches fewer modules, and inputs with padding."""
    model = build("llama")
    write_adapter(model, tmp_path / "a", 1, r=4, target_modules=["q_proj", "v_proj"])
    write_adapter(model, tmp_path / "b", 2, r=2, target_modules=["v_proj"])
    return model, {name: tmp_path / name for name in "ab"}, [KINDS["llama"].inputs(seed) for seed in (3, 4)]


def seen(model, path, batches):
    """What a linear of ``model`` is given, batch by batch."""
    inputs = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda _, given: inputs.append(given[0].detach())
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return inputs


def projected(factor, z):
    """Eq. 3 by an explicit projector, in float64."""
    basis = torch.linalg.qr(factor.A.double().t()).Q
    inside = z.double() @ basis @ basis.t()
    return (z.double() - inside).norm(dim=-1) / z.double().norm(dim=-1)
