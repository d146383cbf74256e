"""What a merge returns, and the three forms in which it is kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.adapters import CONFIG_FILE, WEIGHTS_FILE, Adapter, Factor
from nsc_merge.attachment import adapted_linears

FORMATS = ("coefficients", "lora", "model")
COEFFICIENTS_FILE = "coefficients.json"
HISTORY_FILE = "history.jsonl"


@dataclass(frozen=True)
class MergeResult:
    """Merge coefficients, with the adapters that they belong to.

    Attributes:
        method: what found them.
        coefficients: module path in the base model -> task -> coefficient; 0 where a task's adapter is
            absent.
        history: one entry per step: ``step``, ``objective`` (Eq. 5), ``omega`` (per task), ``lambda_min``,
            ``lambda_mean``, ``lambda_max`` and ``seconds``. All values are from before the step's update.
        adapters: task -> adapter.
        options: resolved options of the method.
        dead: module path -> tasks whose coefficient cannot receive a gradient and therefore kept its initial
            value.
        model: the base model, unchanged.
    """

    method: str
    coefficients: dict[str, dict[str, float]]
    history: list[dict[str, Any]]
    adapters: dict[str, Adapter]
    options: dict[str, Any]
    dead: dict[str, list[str]]
    model: nn.Module = field(repr=False)

    @property
    def tasks(self) -> list[str]:
        return list(self.adapters)

    def delta(self, path: str) -> Tensor:
        """The merged update ``sum_k lam_k s_k B_k A_k`` of one linear, ``[d_out, d_in]`` in float64."""
        return torch.stack([lam * factor.delta() for lam, factor in self._terms(path)]).sum(0)

    def apply(self, model: nn.Module) -> nn.Module:
        """Add the merged updates to the weights of ``model``, in place, and return it.

        The sum is formed in float64 and rounded once. Calling it twice adds twice.

        Raises:
            ValueError: if a module is missing or has another shape, before any weight changes.
            TypeError: if a module is not an ``nn.Linear``.
        """
        linears = adapted_linears(model, self.adapters)
        with torch.no_grad():
            for path, linear in linears.items():
                linear.weight.copy_(self._merged_weight(path, linear.weight))
        return model

    def save(self, out: str | os.PathLike[str], format: str = "model") -> Path:
        """Write the result into the folder ``out``, which appears or changes only once everything is written.

        Args:
            out: a folder; made if needed. Files of the same names are replaced.
            format: ``"lora"`` writes one PEFT adapter with the coefficients folded in, exact and of rank sum
                of the ranks; ``"model"`` writes the merged transformers model; ``"coefficients"`` writes
                ``coefficients.json`` and ``history.jsonl``.

        Returns:
            ``out`` as a path.
        """
        if format not in FORMATS:
            raise ValueError(f"format: expected one of {list(FORMATS)}, found {format!r}")
        out = Path(out)
        if out.exists() and not out.is_dir():
            raise NotADirectoryError(f"out: expected a folder, found the file {out}")
        with _staged(out) as staging:
            if format == "coefficients":
                self._write_coefficients(staging)
            elif format == "lora":
                self._write_lora(staging)
            else:
                self._write_model(staging)
        return out

    def _terms(self, path: str) -> Iterator[tuple[float, Factor]]:
        for task, adapter in self.adapters.items():
            if path in adapter.factors:
                yield self.coefficients[path][task], adapter.factors[path]

    def _merged_weight(self, path: str, weight: Tensor) -> Tensor:
        return (weight.double() + self.delta(path).to(weight.device)).to(weight.dtype)

    def _write_coefficients(self, folder: Path) -> None:
        document = {
            "format": "nsc_merge.coefficients",
            "version": 1,
            "method": self.method,
            "tasks": self.tasks,
            "options": self.options,
            "dead": self.dead,
            "coefficients": self.coefficients,
        }
        (folder / COEFFICIENTS_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if self.history:
            lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
            (folder / HISTORY_FILE).write_text(lines, encoding="utf-8")

    def _write_lora(self, folder: Path) -> None:
        from safetensors.torch import save_file

        tensors, ranks = {}, {}
        for path in self.coefficients:
            terms = list(self._terms(path))
            A = torch.cat([factor.A.float() for _, factor in terms])
            B = torch.cat([(lam * factor.scaling * factor.B.double()).float() for lam, factor in terms], 1)
            tensors[f"base_model.model.{path}.lora_A.weight"] = A.contiguous()
            tensors[f"base_model.model.{path}.lora_B.weight"] = B.contiguous()
            ranks[path] = A.shape[0]
        rank = max(ranks.values())
        other = {re.escape(path): value for path, value in ranks.items() if value != rank}
        bases = {adapter.base_model for adapter in self.adapters.values()}
        # alpha = r everywhere, so that the scaling that PEFT applies is exactly 1.
        config = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": bases.pop() if len(bases) == 1 else None,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": other,
            "alpha_pattern": other,
            "target_modules": list(ranks),
            "use_rslora": False,
            "use_dora": False,
            "bias": "none",
            "lora_dropout": 0.0,
            "inference_mode": True,
        }
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _write_model(self, folder: Path) -> None:
        save_pretrained = getattr(self.model, "save_pretrained", None)
        if save_pretrained is None:
            raise TypeError(f"format 'model' needs a transformers model, found {type(self.model).__name__}")
        state = dict(self.model.state_dict())
        for path in self.coefficients:
            state[f"{path}.weight"] = self._merged_weight(path, state[f"{path}.weight"])
        save_pretrained(folder, state_dict=state)


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` whose files move into ``out`` if the block succeeds."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield staging
        out.mkdir(exist_ok=True)
        for file in sorted(staging.iterdir()):
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
