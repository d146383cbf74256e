"""Bases of which transformers reads, gathers or calls something else than of a plain decoder, in shards."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from architectures import ARCHITECTURES, Architecture, pixels, write_adapter
from forked import start
from loop_cases import values

from nsc_merge import merge
from nsc_merge.models.bases.loading import load_model
from nsc_merge.models.bases.placement import Placement
from nsc_merge.processes.group import together

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORLD = 2
# Its files hold the two projections in front of the product as one tensor.
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "use_swiglu_ffn": True}
KINDS = {
    **ARCHITECTURES,
    "DINOv2 giant": Architecture("Dinov2Model", {**WIDE, "image_size": 8, "patch_size": 4}, pixels(), ["v_proj"]),
}
# Two towers end a backward in two places; OPT does not call what ends before its head; features lie inside of blocks.
SAME = {
    "SigLIP": ("nsc", {"lr": 0.05}),
    "OPT": ("match", {"warm_up": 0}),
    "LLaMA": ("match", {"warm_up": 0, "features": ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]}),
}
REFUSED = {
    "DINOv2 giant": ("nsc", "weights_in.* reads wrongly in several processes .Chunk.; expected one process"),
    "OLMo Hybrid": ("nsc", "v_conv1d.weight in the place of .*conv1d.weight.* wrongly in several processes"),
    "CLIP": ("nsc", r"CLIPModel has parameters that are one number .logit_scale.*expected one process"),
    "GPT-2": ("nsc", "c_attn: expected a Conv1D in memory, found it in shards; load the model in one process"),
    "SigLIP": ("match", "'final' of SiglipModel are logits of every image or sound with every text.*expected paths"),
}


def test_two_processes(tmp_path):
    for name in {**SAME, **REFUSED}:
        model = KINDS[name].build()
        model.save_pretrained(tmp_path / name / "base")
        for seed, task in enumerate("ab"):
            write_adapter(model, tmp_path / name / task, seed, target_modules=KINDS[name].targets)
    others = start(other, (tmp_path,), WORLD - 1)
    share(0, tmp_path)
    while not others.join():
        pass


def other(number: int, folder: Path) -> None:
    torch.set_num_threads(1)
    share(number + 1, folder)


def share(rank: int, folder: Path) -> None:
    tf.utils.logging.set_verbosity_error()
    limit = datetime.timedelta(seconds=100)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=limit)
    try:
        for name, (method, options) in SAME.items():
            found = merged(folder / name, name, method, options, dist.group.WORLD)
            with together(dist.group.WORLD) as group:
                assert all(one == found.coefficients for one in group.share([found.coefficients]))
            if rank == 0:
                alone = merged(folder / name, name, method, options, None)
                torch.testing.assert_close(values(found), values(alone), rtol=0, atol=1e-6)
                assert found.objective["after"] == pytest.approx(alone.objective["after"], rel=1e-5)
                assert (values(alone) - values(alone)[0, 0]).abs().max() > 1e-3
        for name, (method, text) in REFUSED.items():
            with pytest.raises(ValueError, match=text):
                merged(folder / name, name, method, {}, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def merged(folder: Path, name: str, method: str, options, group):
    with together(group):
        model = load_model(str(folder / "base"), local=True, placement=Placement(shards=True))
    adapters = {task: str(folder / task) for task in "ab"}
    data = {task: [KINDS[name].inputs()] for task in "ab"}
    return merge(model, adapters, data, method, process_group=group, steps=3, progress=False, **options)
