"""Every method on a model that lies on two GPUs, or on both and beside them, held to what a CPU makes of it.

    python -c 'import two_gpus, merges; merges.main("two", "llama")'
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from loop_cases import adapters_for, image_batches, llama, llava, text_batches
from torch import Tensor, nn

import nsc_merge
from nsc_merge.methods import METHODS
from nsc_merge.methods.gradient import feature_matching
from nsc_merge.models.bases.loading import load_model
from nsc_merge.models.bases.placement import Placement

TASKS = ("a", "c")  # of unequal ranks, and c leaves out the first block
# Where the embeddings, the four blocks, what follows, the head, and of LLaVA the tower are.
PLACES: dict[str, tuple[Any, ...]] = {
    "two": (0, 0, 0, 1, 1, 1, 0, 1),
    "beside": ("cpu", 0, "cpu", "disk", 1, 1, "cpu", "disk"),
}
feature_matching.SCALES = feature_matching.SCALES[::4]  # each takes a run of the model
ONE_ADAPTER = ("linear", "robustmerge")  # of equal ranks
MORE: dict[str, list[dict[str, Any]]] = {
    "nsc": [
        {"checkpointing": True},
        {"batch_tasks": True},
        {"batch_tasks": False},
        {"cache_prefix": False, "early_exit": False},
    ],
    "match": [{"init": "match"}],
    "distill": [{"regmean": True}, {"outputs": None, "new_tokens": 3}],
}


def placed(folder: Path, kind: str, placement: str) -> nn.Module:
    embeddings, *blocks, norm, head, tower = PLACES[placement]
    inside = "model." if kind == "llama" else "model.language_model."
    places = {f"{inside}embed_tokens": embeddings, f"{inside}norm": norm, f"{inside}rotary_emb": norm, "lm_head": head}
    places |= {f"{inside}layers.{number}": place for number, place in enumerate(blocks)}
    if kind == "llava":
        places |= {"model.vision_tower": tower, "model.multi_modal_projector": embeddings}
    return load_model(str(folder), local=True, placement=Placement(device_map=places))


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits[:, -1]


def merged(model: nn.Module, method: Any, adapters: Any, batches: Any, options: dict[str, Any]) -> Any:
    given = {"steps": 2, "progress": False, "outputs": dict.fromkeys(TASKS, logits)} | options
    known = {*method.option_names, *(["outputs"] if "outputs" in method.needs else [])}
    given = {name: value for name, value in given.items() if name in known and value is not None}
    data = [batches] if method.needs else []
    result = nsc_merge.merge(model, adapters, *data, method=method.name, **given)
    return result.for_task(TASKS[0]) if result.per_task else result


def main(placement: str, kind: str) -> None:
    base, batches = (llama(), text_batches()) if kind == "llama" else (llava(), image_batches())
    batches, adapters = ({task: given[task] for task in TASKS} for given in (batches, adapters_for(base)))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base.save_pretrained(folder / "base")
        # Some set it for all of a notebook.
        torch.set_default_device("cuda" if placement == "two" else None)
        saved: set[str] = set()
        for method in METHODS.values():
            mine = dict.fromkeys(TASKS, adapters["a"]) if method.name in ONE_ADAPTER else adapters
            for options in [{}, *MORE.get(method.name, [])]:
                expected = merged(base, method, mine, batches, options)
                model = placed(folder / "base", kind, placement)
                found = merged(model, method, mine, batches, options)
                assert found.paths == expected.paths
                for path in expected.paths:
                    wanted = expected.delta(path)
                    off = float((found.delta(path).cpu() - wanted).norm())
                    assert off <= 1e-4 * float(wanted.norm()), (method.name, options, path, off)
                # What is written depends on what a method gives, and on nothing else of it.
                if method.gives not in saved:
                    found.save(folder / "merged" / method.name, "model")
                    saved.add(method.gives)
                found.apply(model)
                print(placement, method.name, options)
        torch.set_default_device(None)

