"""Every method on a device without float64, as Apple's GPUs: what it computes on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2]

MERGES = """
import sys
from device_without_float64 import NAME, plain
import torch
import nsc_merge
from nsc_merge.methods import METHODS
from nsc_merge.models.bases import quantised, stored_weights
sys.path.append("merge")
from loop_cases import TASKS, adapters_for, llama, text_batches

plain(quantised, stored_weights)

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
    adapters = adapters_for(model, ["q_proj"])
    if method.name in ("linear", "robustmerge"):
        adapters = {task: adapters["a"] for task in TASKS}
    calibration = [text_batches()] if method.needs else []
    result = nsc_merge.merge(model, adapters, *calibration, method=method.name, **options)
    (result.for_task("a") if result.per_task else result).apply(model)
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])

for method in METHODS.values():
    torch.testing.assert_close(merged(NAME, method), merged("cpu", method), rtol=1e-5, atol=1e-6)
    print(method.name)
"""


def test_every_method_on_a_device_without_float64():
    pytest.importorskip("torch.utils.backend_registration")
    command = [sys.executable, "-c", MERGES]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(done.stdout.split()) > 20
