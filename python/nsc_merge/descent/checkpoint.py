"""The state of an interrupted optimisation: one safetensors file, exact to the bit."""

from __future__ import annotations

import json
import math
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
from nsc_merge.utils.option_checks import is_number
from nsc_merge.utils.safetensors_checks import read_checked

FORMAT = "nsc_merge.state"
VERSION = "1"
# Tensors of the shape of the coefficients.
_OF_COEFFICIENTS = ("lam", "start", "dead")
_OF_A_STEP = {"step", "objective", "lambda_min", "lambda_mean", "lambda_max", "seconds"}
# In front of the names of what an objective remembers.
OF_THE_OBJECTIVE = "objective."
# Name -> shape and dtype, None for that of the coefficients.
Shapes = Mapping[str, tuple[list[int], torch.dtype | None]]


@dataclass(frozen=True)
class State:
    """Everything that the next step depends on.

    Attributes:
        step: how many steps are done.
        tensors: coefficients, moments of the optimizer, what the objective remembers, and states of the random
            generators.
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
    def load(
        cls, path: str | os.PathLike[str], problem: Mapping[str, Any], remembered: Shapes | None = None
    ) -> State:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            problem: of :func:`problem_of`.
            remembered: what the objective remembers once it has made a step.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is something else, is damaged, or belongs to another problem than ``problem``.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"resume_from: there is no file {os.fspath(path)}")
        try:
            read = read_checked(path)
        except ValueError as error:
            raise ValueError(f"resume_from: {error}; remove the file to start anew") from None
        found = (read.metadata.get("format"), read.metadata.get("version"))
        if found != (FORMAT, VERSION):
            raise ValueError(
                f"resume_from: {os.fspath(path)}: expected format {FORMAT} version {VERSION}, found {found}"
            )
        try:
            document = from_json(read.metadata.get("document", ""), "metadata", not_finite=True)
        except ValueError as error:
            raise _damaged(path, str(error)) from None
        wrong = _wrong_document(document)
        if wrong is not None:
            raise _damaged(path, wrong)
        # First of all: other methods have other options.
        for name, value in {"method": problem.get("method", "nsc"), **problem}.items():
            saved = document["problem"].get(name, "nsc" if name == "method" else None)
            if saved != value:
                name, saved, value = _first_difference(name, saved, value)
                # Sources have the names that whoever gave them knows.
                name = name.removeprefix("sources.")
                written = " (the file was written to since)" if name.endswith(".mtime_ns") else ""
                raise ValueError(
                    f"resume_from: {os.fspath(path)} was saved with {name}={_short(saved)}, and this is "
                    f"{name}={_short(value)}{written}; expected the same settings and files: take those, or remove "
                    "the state to start anew"
                )
        wrong = _wrong_history(document, problem)
        if wrong is not None:
            raise _damaged(path, wrong)
        state = cls(tensors=read.tensors, **document)
        wrong = state._wrong_tensors([len(problem["modules"]), len(problem["tasks"])], remembered or {})
        if wrong is not None:
            raise _damaged(path, wrong)
        return state

    def _wrong_tensors(self, shape: list[int], remembered: Shapes) -> str | None:
        """What is wrong with the tensors, if anything, of coefficients of a shape."""
        # The optimizer has no moments before its first step, and the objective nothing to remember.
        moments = ["optimizer.exp_avg", "optimizer.exp_avg_sq"] if self.step else []
        counts = ["optimizer.step"] if self.step else []
        beside = {f"{OF_THE_OBJECTIVE}{name}": one for name, one in remembered.items()} if self.step else {}
        expected = {*_OF_COEFFICIENTS, *moments, *counts, *beside, "rng"}
        if not expected <= set(self.tensors) <= {*expected, "rng_cuda"}:
            return f"expected tensors {sorted(expected)}, found {sorted(self.tensors)}"
        kind = self.tensors["lam"].dtype
        own: Shapes = {name: (shape, torch.bool if name == "dead" else None) for name in (*_OF_COEFFICIENTS, *moments)}
        for name, (size, given) in {**own, **beside}.items():
            value, wanted = self.tensors[name], given or kind
            if list(value.shape) != size or value.dtype is not wanted or kind not in (torch.float32, torch.float64):
                return f"{name}: expected {wanted} {size}, found {value.dtype} {list(value.shape)}"
            if not value.isfinite().all():
                return f"{name}: expected finite numbers, found some that are not"
        if self.step and self.tensors["optimizer.step"].tolist() != self.step:
            return f"optimizer.step: expected {self.step}, the steps done, found another"
        try:
            torch.Generator().set_state(self.tensors["rng"])
        except (RuntimeError, TypeError) as error:
            return f"rng: expected the state of a generator, found another: {error}"
        return None


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


def _wrong_document(document: Any) -> str | None:
    """What is wrong with what stands beside the tensors, if anything."""
    kinds = {"step": int, "history": list, "problem": dict, "batch_tasks": bool}
    if not isinstance(document, dict) or set(document) != set(kinds):
        found = sorted(document) if isinstance(document, dict) else "no such JSON"
        return f"metadata: expected {sorted(kinds)}, found {_short(found)}"
    for name, kind in kinds.items():
        if type(document[name]) is not kind:
            return f"{name}: expected {kind.__name__}, found {_short(document[name])}"
    return None


def _wrong_history(document: Mapping[str, Any], problem: Mapping[str, Any]) -> str | None:
    """What is wrong with the entries of the steps, if anything."""
    quantity, tasks = problem.get("quantity", "omega"), problem.get("counted", problem["tasks"])
    expected = {*_OF_A_STEP, quantity}
    entries = document["history"]
    if len(entries) != document["step"]:
        return f"history: expected one entry for each of {document['step']} steps, found {len(entries)}"
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not entry.keys() >= expected or entry["step"] != number:
            return f"history: expected {sorted(expected)} of step {number}, found {_short(entry)}"
        of_tasks = entry[quantity]
        if not isinstance(of_tasks, dict) or list(of_tasks) != tasks:
            return f"history: expected {quantity} of every task at step {number}, found {_short(of_tasks)}"
        values = [*of_tasks.values(), *(value for name, value in entry.items() if name != quantity)]
        if not all(is_number(value) and math.isfinite(value) for value in values):
            return f"history: expected finite numbers of step {number}, found {_short(entry)}"
    return None


def _damaged(path: str | os.PathLike[str], what: str) -> ValueError:
    return ValueError(f"resume_from: {os.fspath(path)} is damaged: {what}; remove the file to start anew")


def _first_difference(name: str, saved: Any, now: Any) -> tuple[str, Any, Any]:
    """Name and both values of what differs first in two values that differ, as deep in mappings as it lies."""
    if isinstance(saved, dict) and isinstance(now, dict):
        key = next(key for key in [*saved, *now] if saved.get(key) != now.get(key))
        return _first_difference(f"{name}.{key}", saved.get(key), now.get(key))
    return name, saved, now


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
