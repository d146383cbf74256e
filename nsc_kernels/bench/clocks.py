"""A GPU's clocks, power and temperature while something is measured. Nothing here changes a setting."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# What nvidia-smi is asked for, and the names in the rows.
CLOCKS = {"sm_mhz": "clocks.sm", "mem_mhz": "clocks.mem", "watts": "power.draw", "celsius": "temperature.gpu"}


class Clocks:
    """The GPU's clocks, power and temperature ten times a second, while the block runs; added to a JSONL file if given.

    nvidia-smi reads them in a process of its own. Where it cannot there are no samples.
    """

    def __init__(self, path: Path | None, on: torch.device):
        self._path, self._on = path, on
        self._process: subprocess.Popen[str] | None = None
        self._samples: list[tuple[float, float]] = []  # monotonic time, MHz of the processors

    def __enter__(self) -> Clocks:
        if self._on.type == "cuda":
            which = f"--id=GPU-{torch.cuda.get_device_properties(self._on).uuid}"
            query = f"--query-gpu={','.join(CLOCKS.values())}"
            command = ["nvidia-smi", which, query, "--format=csv,noheader,nounits", "-lms", "100"]
            try:
                self._process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True
                )
            except OSError:
                return self
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self, process: subprocess.Popen[str]) -> None:
        with Path(self._path or os.devnull).open("a") as file:
            for line in process.stdout or ():
                self.add(line, file.write)

    def add(self, line: str, write: Callable[[str], Any]) -> None:
        """One line of nvidia-smi's; one that is cut off, or says that a value is not there, is left out."""
        try:
            row = dict(zip(CLOCKS, map(float, line.split(",")), strict=True))
        except ValueError:
            return
        self._samples.append((time.monotonic(), row["sm_mhz"]))
        write(json.dumps({"time": time.time(), **row}) + "\n")

    def since(self, start: float) -> float | None:
        """Median clock of the processors in MHz since ``start`` (of time.monotonic), None without a sample."""
        found = [mhz for when, mhz in self._samples if when >= start]
        return statistics.median(found) if found else None
