"""The state of an interrupted optimisation: one safetensors file, exact to the bit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter
from nsc_merge.adapters.adapter import factors_digest
from nsc_merge.utils.atomic_file import replacing
from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.safetensors_checks import read_checked

FORMAT = "nsc_merge.state"
VERSION = "1"


@dataclass(frozen=True)
class State:
    """Everything that the next step depends on.

    Attributes:
        step: how many steps are done.
        tensors: coefficients, moments of the optimizer and states of the random generators.
        history: one entry per step done.
        problem: what the state belongs to; see :func:`problem_of`.
        batch_tasks: what the first step decided on running tasks together.
    """

    step: int
    tensors: dict[str, Tensor]
    history: list[dict[str, Any]]
    problem: dict[str, Any]
    batch_tasks: bool

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file: to a temporary one first, renamed when it is complete on disk."""
        from safetensors.torch import save

        path = Path(path)
        document = {name: value for name, value in vars(self).items() if name != "tensors"}
        metadata = {"format": FORMAT, "version": VERSION, "document": json.dumps(document)}
        content = save(self.tensors, metadata)
        with replacing(path) as temporary, temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, path: str | os.PathLike[str], problem: Mapping[str, Any]) -> State:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is something else, or belongs to another problem than ``problem``.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"resume_from: there is no file {os.fspath(path)}")
        try:
            read = read_checked(path)
        except ValueError as error:
            raise ValueError(f"resume_from: {error}") from None
        found = (read.metadata.get("format"), read.metadata.get("version"))
        if found != (FORMAT, VERSION):
            raise ValueError(
                f"resume_from: {os.fspath(path)}: expected format {FORMAT} version {VERSION}, found {found}"
            )
        place = f"resume_from: {os.fspath(path)}: its document"
        document = from_json(read.metadata.get("document", ""), place, not_finite=True)
        for name, value in problem.items():
            saved = document["problem"].get(name)
            if saved != value:
                name, saved, value = _first_difference(name, saved, value)
                # Sources have the names that whoever gave them knows.
                name = name.removeprefix("sources.")
                raise ValueError(
                    f"resume_from: {os.fspath(path)} was saved with {name}={_short(saved)}, and this is "
                    f"{name}={_short(value)}"
                )
        return cls(tensors=read.tensors, **document)


def problem_of(
    adapters: Mapping[str, Adapter],
    options: Mapping[str, Any],
    paths: list[str],
    scored: list[str],
    sources: Mapping[str, Any],
) -> dict[str, Any]:
    """What must be the same for a saved state to be continued: options, modules, adapters by content, and
    ``sources``, beyond which the base model and the calibration batches are taken on trust.
    """
    problem = {
        **options,
        "modules": paths,
        "scored": scored,
        # In their order, which is that of the columns of coefficients.
        "tasks": list(adapters),
        "adapters": {task: factors_digest(adapter.factors) for task, adapter in adapters.items()},
        "sources": dict(sources),
    }
    # As JSON gives it back, so that tuples compare with lists.
    return json.loads(json.dumps(problem))


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators that the loop's random numbers come from."""
    states = {"rng": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng_cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Undo what :func:`random_states` read."""
    torch.set_rng_state(tensors["rng"])
    if device.type == "cuda" and "rng_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng_cuda"], device)


def _first_difference(name: str, saved: Any, now: Any) -> tuple[str, Any, Any]:
    """Name and both values of what differs first in two values that differ, as deep in mappings as it lies."""
    if isinstance(saved, dict) and isinstance(now, dict):
        key = next(key for key in [*saved, *now] if saved.get(key) != now.get(key))
        return _first_difference(f"{name}.{key}", saved.get(key), now.get(key))
    return name, saved, now


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
