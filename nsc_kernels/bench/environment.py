"""What a report says of the machine and the software that it was measured with."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

import nsc_kernels
from nsc_kernels import native, verified_hardware

PACKAGES = ("triton", "peft", "transformers", "liger-kernel", "unsloth", "vllm", "lorafusion")
CPU_SOURCE = Path(__file__).parents[2] / "csrc" / "cpu"


def cpu_source() -> str | None:
    """Of csrc/cpu in a checkout; of the library that is installed without one; None without either."""
    library = native.LIBRARY_DIR / "libnsc_cpu.so"
    files = sorted(path for path in CPU_SOURCE.glob("*") if path.is_file()) or [p for p in [library] if p.is_file()]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest() if files else None


def source_of(backend: str | None) -> str | None:
    """The digest of the kernels that a row is about: Triton's where it is about no backend of ours.

    ``gpu``: those of both GPU backends.
    """
    if backend == "cpu":
        return cpu_source()
    if backend == "gpu":
        both = [verified_hardware.source(name) or "none" for name in verified_hardware.BACKENDS]
        return hashlib.sha256(" ".join(both).encode()).hexdigest()
    return verified_hardware.source(backend if backend in verified_hardware.BACKENDS else "triton")


def nvidia_smi() -> str | None:
    fields = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    return f"{fields.get('model name')} family {fields.get('cpu family')} model {fields.get('model')}"


# What torch calls the precisions that float32 products may be rounded to, in its older words.
_OLDER = {"none": "highest", "ieee": "highest", "tf32": "high", "bf16": "medium"}


def float32_products() -> str:
    """``ieee``, or what torch was told that products of float32 may be: on GPUs/on CPUs where they differ."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return "/".join(dict.fromkeys(one.fp32_precision.replace("none", "ieee") for one in backends))


@contextmanager
def settings_kept() -> Iterator[None]:
    """What the block sets of torch is set for everyone who comes after: put it back.

    Raises:
        RuntimeError: if the block has set something.
    """
    products, dtype, threads = float32_products(), torch.get_default_dtype(), torch.get_num_threads()
    try:
        yield
    finally:
        changed = []
        if float32_products() != products:
            changed.append(f"the precision of float32 products to {float32_products()}")
            # In torch's older words, which set both: the newer ones would leave these without an answer.
            torch.set_float32_matmul_precision(_OLDER[products.rpartition("/")[2]])
            torch.backends.cuda.matmul.fp32_precision = products.partition("/")[0]
        if torch.get_default_dtype() != dtype:
            changed.append(f"the default dtype to {torch.get_default_dtype()}")
            torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            changed.append(f"the number of threads to {torch.get_num_threads()}")
            torch.set_num_threads(threads)
    if changed:
        raise RuntimeError(f"it sets {' and '.join(changed)}, for all contenders: put it back before returning")


def packages() -> dict[str, str]:
    """Those that are installed, and their versions."""
    return {name: found.version for name in PACKAGES for found in distributions(name=name)}


def facts(on: torch.device) -> dict[str, Any]:
    """Device, versions, digests of the kernels' sources, and how busy the machine is."""
    found: dict[str, Any] = {
        "what": "environment",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nsc_kernels": nsc_kernels.__version__,
        "triton": None,
        **packages(),
        "backends": nsc_kernels.available_backends(),
        "sources": {name: source_of(name) for name in ("cpu", *verified_hardware.BACKENDS)},
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_set": [*native.cpu_instruction_sets()[:1]],
        "cpu_isa": os.environ.get("NSC_CPU_ISA"),
        "float32_products": float32_products(),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
        "device": processor(),
    }
    if on.type == "cuda":
        properties = torch.cuda.get_device_properties(on)
        found |= {
            "nvidia_smi": nvidia_smi(),
            "device": properties.name,
            "arch": f"sm_{10 * properties.major + properties.minor}",
            "processors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return found
