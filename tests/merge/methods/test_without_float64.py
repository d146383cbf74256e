"""Every method on a device without float64, as Apple's GPUs: what it computes on a CPU."""

from __future__ import annotations

import pytest

from small_device import run

IMPORTS = """
import sys, tempfile
from pathlib import Path
from device_without_float64 import NAME, plain
import torch
import nsc_merge
from nsc_merge.methods import METHODS
from nsc_merge.models.bases import quantised, stored_weights
from nsc_merge.models.bases.unloaded import leave_in_files
from transformers import LlamaForCausalLM
sys.path.append("merge")
from loop_cases import adapters_for, llama, text_batches

TASKS = ("a", "c")  # of unequal ranks, and c leaves out the first block
plain(quantised, stored_weights)
"""


MERGES = """
def logits(model, batch):
    return model(**batch).logits[:, -1]

def merged(device, method):
    model = llama().to(device)
    options = {"steps": 2} if "steps" in method.option_names else {}
    if "progress" in method.option_names:
        options["progress"] = False
    if "outputs" in method.needs:
        options["outputs"] = dict.fromkeys(TASKS, logits)
    if method.name == "match":
        options["init"] = "match"
    every = adapters_for(model, ["q_proj"])
    adapters = {task: every[task] for task in TASKS}
    if method.name in ("linear", "robustmerge"):
        adapters = {task: adapters["a"] for task in TASKS}
    given = text_batches()
    calibration = [{task: given[task] for task in TASKS}] if method.needs else []
    result = nsc_merge.merge(model, adapters, *calibration, method=method.name, **options)
    (result.for_task("a") if result.per_task else result).apply(model)
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])

# Against the size of the update: single entries of what is computed from gradients, as Fisher's averages, differ by
# more between two runs in float32.
base = torch.cat([p.detach().flatten() for p in llama().parameters()])
for method in METHODS.values():
    expected = merged("cpu", method)
    assert (merged(NAME, method) - expected).norm() <= 1e-5 * (expected - base).norm(), method.name
    print(method.name)
"""


IN_FILES = """
base = llama()
folder = Path(tempfile.mkdtemp())
base.save_pretrained(folder)

def merged(device):
    with torch.device("meta"):
        model = LlamaForCausalLM(base.config)
    leave_in_files(model, folder, torch.device(device))
    result = nsc_merge.merge(model, adapters_for(base), method="task_arithmetic", scale=0.3)
    return {name: value.cpu() for name, value in result.merged(model).items()}

expected = merged("cpu")
for name, found in merged(NAME).items():
    torch.testing.assert_close(found, expected[name])
print(len(expected), "the same")
"""


@pytest.fixture(scope="module")
def printed():
    """By one process, as it takes seconds to begin one."""
    return run(IMPORTS + MERGES + IN_FILES).splitlines()


def test_every_method_on_a_device_without_float64(printed):
    assert len(printed[:-1]) > 20


def test_weights_that_are_left_in_files_for_a_device_without_float64(printed):
    assert printed[-1] == "8 the same"
