"""Problems on small models of several kinds, and merges of them without a bar."""

from __future__ import annotations

import copy

import zoo

import nsc_merge
from nsc_merge.methods import METHODS, Problem
from nsc_merge.models.fitting import fit

QUIET = {"progress": False}


def problem_of(kind, tmp_path, shared="lambda", count=1, **config):
    """Two tasks on a model of the zoo, ``count`` batches each."""
    model = zoo.build(kind)
    config = {"r": 4, "lora_alpha": 6, "target_modules": zoo.KINDS[kind].targets, **config}
    folders = {task: zoo.write_adapter(model, tmp_path / task, n, **config) for n, task in enumerate(("a", "b"), 1)}
    adapters = fit({task: nsc_merge.load_adapter(folder, task) for task, folder in folders.items()}, model, shared)
    batches = {task: [zoo.KINDS[kind].inputs(10 * n + i) for i in range(count)] for n, task in enumerate(adapters)}
    return Problem(model, adapters, batches)


def merged(problem, scales):
    """A copy of the model with every task's update times its scale."""
    result = METHODS["task_arithmetic"].run(problem, {"scale": scales})
    return result.apply(copy.deepcopy(problem.model)).eval()


def merge(problem, method, **options):
    return METHODS[method].run(problem, {**QUIET, **options})
