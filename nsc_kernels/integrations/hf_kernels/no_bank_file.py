"""In the place of ``bank_file`` in a build: a kernel for ``kernels`` may import torch alone, and not safetensors."""

from __future__ import annotations

from typing import Any, NoReturn


def write_bank(path: Any, A: Any, Bt: Any, offsets: Any) -> NoReturn:
    raise NotImplementedError(
        f"{path}: a build for kernels writes no files. Write bank.state_dict(), which holds A, Bt and the offsets, "
        "with safetensors.torch.save_file, or use AdapterBank.save of an installed nsc_kernels"
    )


def read_bank(path: Any, device: Any) -> NoReturn:
    raise NotImplementedError(
        f"{path}: a build for kernels reads no files. Read A, Bt and the offsets with safetensors.torch.load_file and "
        "call AdapterBank(A, Bt, offsets), or use AdapterBank.load of an installed nsc_kernels"
    )
