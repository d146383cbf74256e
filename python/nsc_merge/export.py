"""Writes merge results: PEFT adapter, transformers model or coefficients, with everything around them."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsc_merge.adapters import CONFIG_FILE, WEIGHTS_FILE
from nsc_merge.card import model_card
from nsc_merge.recipe import FORMATS, plain, recipe_of, to_yaml

if TYPE_CHECKING:
    from nsc_merge.result import MergeResult

COEFFICIENTS_FILE = "coefficients.json"
HISTORY_FILE = "history.jsonl"
RECIPE_FILE = "recipe.yaml"
CARD_FILE = "README.md"
TRUNCATION_FILE = "truncation.json"
HEADS_FOLDER = "heads"

COEFFICIENTS_FORMAT = "nsc_merge.coefficients"

_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")

# The ranks that vLLM's --max-lora-rank accepts.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def save(
    result: MergeResult,
    out: Path,
    format: str | Sequence[str],
    *,
    rank: int | None,
    max_shard_size: str | int,
    plots: bool,
) -> Path:
    """See :meth:`nsc_merge.MergeResult.save`."""
    wanted = [format] if isinstance(format, str) else list(format)
    for name in wanted:
        if name not in FORMATS:
            raise ValueError(f"format: expected one of {list(FORMATS)}, found {name!r}")
    if not wanted:
        raise ValueError(f"format: expected one or more of {list(FORMATS)}, found none")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank: expected a whole number of at least 1, found {rank!r}")
    if rank is not None and "lora" not in wanted:
        raise ValueError(f"rank: only format 'lora' can be truncated, found format {format!r}")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out: expected a folder, found the file {out}")
    if isinstance(format, str):
        _refuse_mixture(out, format)
    with _staged(out) as staging:
        if isinstance(format, str):
            errors = _write(result, staging, format, rank, max_shard_size)
            shown = [format]
        else:
            _write_coefficients(result, staging)
            errors = {}
            for name in wanted:
                if name != "coefficients":
                    (staging / name).mkdir()
                    errors |= _write(result, staging / name, name, rank, max_shard_size)
            shown = list(dict.fromkeys(["coefficients", *wanted]))
        nested = not isinstance(format, str)
        _write_surroundings(result, staging, plots=plots)
        card = model_card(result, shown, rank, errors, nested=nested)
        (staging / CARD_FILE).write_text(card, encoding="utf-8")
    return out


def _refuse_mixture(out: Path, format: str) -> None:
    """transformers adds an adapter that lies beside a model's weights to them: it would count twice."""
    if format == "model" and (out / CONFIG_FILE).exists():
        raise ValueError(f"out: {out} holds an adapter ({CONFIG_FILE}); expected a folder without one")
    if format == "lora" and (out / "config.json").exists():
        raise ValueError(f"out: {out} holds a model (config.json); expected a folder without one")


def _write(
    result: MergeResult, folder: Path, format: str, rank: int | None, max_shard_size: str | int
) -> dict[str, float]:
    if format == "coefficients":
        _write_coefficients(result, folder)
    elif format == "model":
        _write_model(result, folder, max_shard_size)
    else:
        return _write_lora(result, folder, rank)
    return {}


def _write_coefficients(result: MergeResult, folder: Path) -> None:
    document = {
        "format": COEFFICIENTS_FORMAT,
        "version": 1,
        "method": result.method,
        "tasks": result.tasks,
        "options": plain(result.options),
        "dead": result.dead,
        "coefficients": result.coefficients,
    }
    (folder / COEFFICIENTS_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def concatenated(result: MergeResult, path: str) -> tuple[Tensor, Tensor]:
    """``A [R, d_in]`` and ``B [d_out, R]`` in float64 whose product is the merged update, R = sum of ranks."""
    terms = list(result.terms(path))
    A = torch.cat([factor.A.double() for _, factor in terms])
    B = torch.cat([lam * factor.scaling * factor.B.double() for lam, factor in terms], 1)
    return A, B


def low_rank(result: MergeResult, path: str, rank: int) -> tuple[Tensor, Tensor, float]:
    """``A [r, d_in]``, ``B [d_out, r]`` of the best rank ``r <= rank``, and its relative Frobenius error."""
    A, B = concatenated(result, path)
    if A.shape[0] <= rank:
        return A, B, 0.0
    # QR of both factors first: the SVD is then of the sum of the ranks, not of the layer's width.
    q_in, r_in = torch.linalg.qr(A.t())
    q_out, r_out = torch.linalg.qr(B)
    left, sigma, right = torch.linalg.svd(r_out @ r_in.t(), full_matrices=False)
    roots = sigma[:rank].sqrt()
    error = float(sigma[rank:].norm() / sigma.norm()) if sigma.any() else 0.0
    return (roots[:, None] * right[:rank]) @ q_in.t(), (q_out @ left[:, :rank]) * roots, error


def _write_lora(result: MergeResult, folder: Path, rank: int | None) -> dict[str, float]:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    ranks, errors = {}, {}
    whole = [path for path in result.paths if any(factor.dense is not None for _, factor in result.terms(path))]
    biases = {path: result.bias_delta(path) for path in result.paths if path not in whole}
    has_bias = any(bias is not None for bias in biases.values())
    for path in biases:
        A, B = concatenated(result, path)
        if rank is not None:
            A, B, errors[path] = low_rank(result, path, rank)
        tensors[f"base_model.model.{path}.lora_A.weight"] = A.float().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = B.float().contiguous()
        if has_bias:
            bias = biases[path]
            tensors[f"base_model.model.{path}.lora_B.bias"] = (
                torch.zeros(B.shape[0]) if bias is None else bias.float()
            )
        ranks[path] = A.shape[0]
    if whole:
        merged = result.merged(result.model, whole)
        for path in whole:
            for parameter, value in result.model.get_submodule(path).state_dict().items():
                name = f"{path}.{parameter}"
                tensors[f"base_model.model.{name}"] = merged.get(name, value).contiguous()
    largest = max(ranks.values())
    other = {re.escape(path): value for path, value in ranks.items() if value != largest}
    bases = {adapter.base_model for adapter in result.adapters.values()}
    # alpha = r everywhere, so that the scaling that PEFT applies is exactly 1.
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": bases.pop() if len(bases) == 1 else None,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": list(ranks),
        "modules_to_save": whole or None,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": has_bias,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if rank is not None:
        document = {"rank": rank, "relative_error": errors}
        (folder / TRUNCATION_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return errors


def _write_model(result: MergeResult, folder: Path, max_shard_size: str | int) -> None:
    model: Any = result.model
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"format 'model' needs a transformers model, found {type(model).__name__}")
    if getattr(model, "is_quantized", False):
        raise ValueError("format 'model' would round the merge to the quantised base; use format 'lora'")
    state = {**model.state_dict(), **result.merged(model)}
    model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)


def _write_surroundings(result: MergeResult, folder: Path, *, plots: bool) -> None:
    from safetensors.torch import save_file

    for task, adapter in result.adapters.items():
        if adapter.trained:
            file = folder / HEADS_FOLDER / f"{_file_name(task)}.safetensors"
            if file.exists():
                raise ValueError(f"adapters[{task!r}]: another task's head is kept as {file.name}, too")
            file.parent.mkdir(exist_ok=True)
            save_file({name: value.contiguous() for name, value in adapter.trained.items()}, file)
    if result.history:
        lines = "".join(json.dumps(entry) + "\n" for entry in result.history)
        (folder / HISTORY_FILE).write_text(lines, encoding="utf-8")
    (folder / RECIPE_FILE).write_text(to_yaml(recipe_of(result)), encoding="utf-8")
    if plots:
        from nsc_merge.plots import draw

        draw(result.coefficients, result.dead, result.history, folder)


def _file_name(task: str) -> str:
    """The task as a file name: whatever could leave the folder is replaced."""
    return re.sub(r"[^\w.-]", "_", task).lstrip(".") or "task"


def serving_notes(result: MergeResult, rank: int | None = None) -> list[str]:
    """What a server must be told to load the result's adapter, one line each."""
    ranks = [sum(factor.rank for _, factor in result.terms(path)) for path in result.paths]
    largest = max(ranks) if rank is None else min(rank, max(ranks))
    flag = next((allowed for allowed in _VLLM_RANKS if allowed >= largest), None)
    notes = [
        f"the adapter has rank {largest}; vLLM: --enable-lora --max-lora-rank {flag}"
        if flag
        else f"the adapter has rank {largest}, more than vLLM's {_VLLM_RANKS[-1]}: save with a smaller rank, or "
        "as a model"
    ]
    if any(factor.dense is not None for path in result.paths for _, factor in result.terms(path)):
        notes.append("the adapter has modules_to_save, which PEFT loads and vLLM does not: save as a model")
    if any(factor.bias is not None for path in result.paths for _, factor in result.terms(path)):
        notes.append("the adapter has biases (lora_bias), which not every server loads")
    return notes


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` whose files move into ``out`` if the block succeeds."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield staging
        files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
        for file in files:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / file, out / file)
        _remove_old_shards(out, set(files))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_old_shards(out: Path, written: set[Path]) -> None:
    """Shards of an earlier model in the same folder, which an index of other shards no longer names."""
    for folder in {file.parent for file in written if file.name == "config.json"}:
        for old in (out / folder).iterdir():
            if _SHARD.fullmatch(old.name) and folder / old.name not in written:
                old.unlink()
