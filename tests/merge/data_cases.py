"""Problems with calibration data and heads, and explicit computations on dense weights."""

from __future__ import annotations

from pathlib import Path

import torch
import zoo
from torch.func import functional_call

import nsc_merge
from nsc_merge.methods import Problem
from nsc_merge.methods.gradient.learned_coefficients import presence
from nsc_merge.models.fitting import fit

CLASSES = {"plain": 5, "mixed": 3, "partial": 4}


def problem_of(model, folders, calibration=None) -> Problem:
    loaded = {task: nsc_merge.load_adapter(folder, task) for task, folder in folders.items()}
    return Problem(model, fit(loaded, model, "lambda"), calibration)


def heads():
    generator = torch.Generator().manual_seed(3)
    return {task: torch.randn(32, count, generator=generator) for task, count in CLASSES.items()}


def pooled(model, batch):
    return model(**batch).last_hidden_state.mean(1)


def dense_weights(problem, lam):
    """Parameters with ``lam [modules, K]`` times every update added, differentiable in lam."""
    weights = dict(problem.model.named_parameters())
    paths = sorted({path for adapter in problem.adapters.values() for path in adapter.factors})
    order = [path for path in dict(problem.model.named_modules()) if path in paths]
    for row, path in enumerate(order):
        for number, adapter in enumerate(problem.adapters.values()):
            if path in adapter.factors:
                name = f"{path}.weight"
                weights[name] = weights[name] + lam[row, number] * adapter.factors[path].delta().to(weights[name])
    return weights


class Dense:
    """Behaves as the model with other weights."""

    def __init__(self, model, weights):
        self.model, self.weights = model, weights

    def __call__(self, **batch):
        return functional_call(self.model, self.weights, (), batch)


def alone(problem, task):
    lam = torch.zeros(len(presence(problem)), len(problem.tasks))
    lam[:, problem.tasks.index(task)] = 1
    with torch.no_grad():
        return {name: value.detach() for name, value in dense_weights(problem, lam).items()}


def llama(tmp_path: Path, kind="llama"):
    model = zoo.build(kind)
    folders = {
        str(seed): zoo.write_adapter(
            model,
            tmp_path / str(seed),
            seed,
            r=2,
            lora_alpha=4,
            target_modules=["q_proj", "v_proj"],
            **({"task_type": "CAUSAL_LM"} if kind == "llama" else {}),
        )
        for seed in (1, 2)
    }
    return model, folders, {name: [zoo.text(10 + int(name))] for name in folders}
