"""This package as a kernel for Hugging Face ``kernels``, and its layers in a model.

    python -m nsc_kernels.integrations.hf_kernels nsc-kernel        # a folder; nothing has to be installed to load it

    from kernels import Mode, get_local_kernel, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

    kernel = get_local_kernel(Path("nsc-kernel"))                   # kernel.merged_lora_nsc, kernel.AdapterBank, ...

    replace_kernel_forward_from_hub(MyLayer, "MergedLoRALinear")    # has linear, bank and lam
    with use_kernel_mapping(layer_mapping("nsc-kernel")):
        kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .layout import VARIANT, build_layout, source_layout, write

__all__ = ["build_layout", "layer_mapping", "source_layout", "write"]

LAYERS = ("MergedLoRALinear", "MergedLoRALinearNSC")
# The device types of kernelize that the operator knows; ROCm's is "cuda" to torch.
DEVICES = ("cpu", "cuda", "rocm", "mps", "xpu")


def layer_mapping(folder: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """For ``kernels.register_kernel_mapping`` or ``use_kernel_mapping``: the layers of a folder that was written here.

    Args:
        folder: what ``python -m nsc_kernels.integrations.hf_kernels`` wrote.

    Returns:
        ``{"MergedLoRALinear": {"cpu": LocalLayerRepository, "cuda": ...}, "MergedLoRALinearNSC": ...}``. The names are
        those to give to ``use_kernel_forward_from_hub`` or ``replace_kernel_forward_from_hub``; what a class needs to
        have is in :mod:`nsc_kernels.integrations.hf_kernels.layers`.

    Raises:
        ImportError: without ``kernels``.
        FileNotFoundError: if ``folder`` holds no build.
    """
    from kernels import LocalLayerRepository

    # One path for one folder: kernels loads a build once per way of writing its path.
    path = Path(folder).resolve()
    if not (path / VARIANT / "metadata.json").is_file():
        raise FileNotFoundError(
            f"folder: expected {VARIANT}/metadata.json in {path}, found none; "
            f"python -m nsc_kernels.integrations.hf_kernels {path} writes it"
        )
    return {name: {device: LocalLayerRepository(path, layer_name=name) for device in DEVICES} for name in LAYERS}
