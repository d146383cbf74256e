"""Two CUDA devices that are none, by the library that two_gpus.cpp makes: to be imported before torch, in a process of
its own, with the library's folder on the path.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

assert "torch" not in sys.modules, "torch asks once what devices there are"
_torch = importlib.util.find_spec("torch")
_ours = importlib.util.find_spec("two_gpus_library")
assert _torch is not None
assert _torch.origin is not None
assert _ours is not None
assert _ours.origin is not None
for _name in ("libc10.so", "libtorch_cpu.so", "libtorch.so", "libtorch_python.so"):
    ctypes.CDLL(str(Path(_torch.origin).parent / "lib" / _name), mode=ctypes.RTLD_GLOBAL)
library = ctypes.PyDLL(_ours.origin)
library.generator_of_gpu.restype = ctypes.py_object

import torch  # noqa: E402

MEMORY = 8 << 30
PROPERTIES = {"name": "a stand-in", "total_memory": MEMORY, "major": 7, "minor": 0, "multi_processor_count": 1}


def _index(device: Any = None) -> int:
    found = device if device is None or isinstance(device, int) else torch.device(device).index
    return library.current_gpu() if found is None else found


class _Device(contextlib.AbstractContextManager[None]):
    def __init__(self, device: Any):
        self.index = _index(device)

    def __enter__(self) -> None:
        self.before = library.current_gpu()
        library.set_current_gpu(self.index)

    def __exit__(self, *_: object) -> None:
        library.set_current_gpu(self.before)


class _Stream(contextlib.AbstractContextManager[None]):
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any):
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    synchronize = wait_stream


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    copy = torch.empty(storage.nbytes(), dtype=torch.uint8, device=storage.device).untyped_storage()
    copy.copy_(storage)
    return copy


# What torch's module asks of the driver.
for _name, _value in {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 2,
    "current_device": lambda: _index(),
    "set_device": lambda device: library.set_current_gpu(_index(device)),
    "device": _Device,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "mem_get_info": lambda device=None: (MEMORY, MEMORY),
    "memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "get_device_name": lambda device=None: "a stand-in",
    "get_device_capability": lambda device=None: (7, 0),
    "get_device_properties": lambda device=None: SimpleNamespace(**PROPERTIES, shared_memory_per_block_optin=0),
    "is_bf16_supported": lambda *_, **__: True,
    "get_rng_state": lambda device=None: library.generator_of_gpu(_index(device)).get_state(),
    "set_rng_state": lambda state, device=None: library.generator_of_gpu(_index(device)).set_state(state),
    "manual_seed_all": lambda seed: [library.generator_of_gpu(index).manual_seed(seed) for index in range(2)],
    "Stream": _Stream,
    "current_stream": _Stream,
    "default_stream": _Stream,
    "stream": lambda stream: contextlib.nullcontext(),
}.items():
    setattr(torch.cuda, _name, _value)
_clone_on_cpu = torch.UntypedStorage.clone
torch.UntypedStorage.clone = lambda self: _clone_on_cpu(self) if self.device.type == "cpu" else _clone(self)  # type: ignore[method-assign]
