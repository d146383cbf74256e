"""Several LoRA adapters of a diffusers pipeline: in one fused call per layer while it runs, or merged into one.

    from nsc_merge.integrations.diffusers import accelerate, calibration_data, merge, save

    pipe.set_adapters(["ink", "toy"], [0.7, 0.5])
    with accelerate(pipe):
        image = pipe("a lighthouse").images[0]

    merge(pipe, ["ink", "toy"], [0.7, 0.5], "both")           # or method="ties", "knots_ties", ..., with its options
    pipe.set_adapters("both")
    save(pipe, "both", "folder")                              # for pipe.load_lora_weights

    data = calibration_data(pipe, {"ink": ["a lighthouse, ink"], "toy": ["a toy lighthouse"]})
    merge(pipe, ["ink", "toy"], adapter_name="found", method="nsc", data=data)
"""

from __future__ import annotations

from nsc_merge.integrations.diffusers.fused import Accelerated, accelerate
from nsc_merge.integrations.diffusers.merging import merge
from nsc_merge.integrations.diffusers.recording import calibration_data
from nsc_merge.integrations.diffusers.saving import save

__all__ = ["Accelerated", "accelerate", "calibration_data", "merge", "save"]
