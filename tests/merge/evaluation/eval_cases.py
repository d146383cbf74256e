"""An evaluation recipe with all that it reads, and what it finds."""

from __future__ import annotations

import torch
import yaml
from safetensors.torch import load_file, save_file
from zoo import KINDS, build, write_adapter

import nsc_merge


def two_tasks(tmp_path):
    """A folder with two classification tasks with heads of their own, their data, and a recipe."""
    base = build("llama-cls")
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "data").mkdir()
    tasks = {}
    for seed, task in enumerate(("nli", "topic"), 1):
        write_adapter(
            base,
            tmp_path / "adapters" / task,
            seed,
            r=4,
            target_modules=["q_proj", "v_proj"],
            task_type="SEQ_CLS",
        )
        for split, first in (("test", 10), ("val", 50)):
            inputs = [KINDS["llama-cls"].inputs(first * seed + i) for i in range(4)]
            stacked = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
            generator = torch.Generator().manual_seed(seed)
            stacked["labels"] = torch.randint(0, 3, (12,), generator=generator)
            save_file(stacked, tmp_path / "data" / f"{task}-{split}.safetensors")
        tasks[task] = {
            "adapter": f"adapters/{task}",
            "test": f"data/{task}-test.safetensors",
            "validation": f"data/{task}-val.safetensors",
            "metric": "accuracy",
        }
    recipe = {
        "model": "base",
        "tasks": tasks,
        "methods": [
            {"method": "task_arithmetic", "name": "TA 0.4", "options": {"scale": "4e-1"}},
            {"method": "task_arithmetic", "name": "TA", "tune": {"by": "loss", "fine_step": None}},
            {"method": "nsc", "options": {"steps": 3, "lr": 0.05}},
            "ensemble",
        ],
        "joint": "logits",
        "batch_size": 5,
        "output": {"dir": "out"},
    }
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def reference(place, candidate, task, split="test"):
    """Logits and labels of a task, put together from public pieces alone."""
    model = type(build("llama-cls")).from_pretrained(place / "base").eval()
    adapters = {name: place / "adapters" / name for name in ("nli", "topic")}
    if candidate == "finetuned":
        adapters, candidate = {task: adapters[task]}, 1.0
    nsc_merge.merge(model, adapters, method="task_arithmetic", scale=candidate).apply(model)
    weights = load_file(place / "adapters" / task / "adapter_model.safetensors")
    with torch.no_grad():
        model.score.weight.copy_(weights["base_model.model.score.weight"])
        data = load_file(place / "data" / f"{task}-{split}.safetensors")
        labels = data.pop("labels")
        return model(**data).logits, labels


def rows(document):
    return {row["row"]: row["runs"] for row in document["rows"]}


def change(place, **values):
    recipe = yaml.safe_load((place / "eval.yaml").read_text())
    (place / "eval.yaml").write_text(yaml.safe_dump({**recipe, **values}))
