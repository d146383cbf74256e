"""Writes merge results: PEFT adapter, transformers model or coefficients, with everything around them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsc_merge.adapters import CONFIG_FILE, WEIGHTS_FILE
from nsc_merge.card import model_card
from nsc_merge.fields import from_yaml
from nsc_merge.folders import files_in, replacing_folder
from nsc_merge.plots import COEFFICIENTS_PLOT, LOSSES_PLOT, RATIOS_PLOT
from nsc_merge.recipe import FORMATS, RECORD, digest_of, plain, recipe_of, to_yaml

if TYPE_CHECKING:
    from nsc_merge.result import MergeResult

COEFFICIENTS_FILE = "coefficients.json"
HISTORY_FILE = "history.jsonl"
RECIPE_FILE = "recipe.yaml"
CARD_FILE = "README.md"
TRUNCATION_FILE = "truncation.json"
HEADS_FOLDER = "heads"
TASKS_FOLDER = "tasks"

COEFFICIENTS_FORMAT = "nsc_merge.coefficients"

_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")

# Up to this width an exact SVD of a dense update takes about a second; a wide one would take minutes.
_EXACT_WIDTH = 1024
_OVERSAMPLING, _ITERATIONS = 16, 4

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
) -> list[str]:
    """See :meth:`nsc_merge.MergeResult.save`; returns the files written, by their paths within ``out``."""
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
    if not result.coefficients and format == "coefficients":
        raise ValueError(f"format 'coefficients': method {result.method!r} gives none; use 'lora' or 'model'")
    if rank is None and "lora" in wanted:
        _refuse_full_rank(result)
    if "model" in wanted or ("lora" in wanted and any(map(result.is_whole, result.paths))):
        result.check_base()
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out: expected a folder, found the file {out}")
    if isinstance(format, str):
        _refuse_mixture(out, format)
    digest = digest_of(result)
    earlier, files = _earlier(out)
    kept = files if earlier == digest else set()

    def obsolete(path: Path, written: set[Path]) -> bool:
        return path.as_posix() in files - kept or _is_outdated(path, written)

    with replacing_folder(out, obsolete) as staging:
        errors: dict[str, float] = {}
        nested = not isinstance(format, str)
        if nested and result.coefficients:
            _write_coefficients(result, staging)
            shown = list(dict.fromkeys(["coefficients", *wanted]))
        else:
            shown = [name for name in wanted if name != "coefficients" or not nested]
        for place, one in _by_task(result):
            for name in shown:
                if nested and name == "coefficients":
                    continue
                folder = staging / place / (name if nested else "")
                folder.mkdir(parents=True, exist_ok=True)
                found = _write(one, folder, name, rank, max_shard_size)
                errors |= {f"{place}/{path}" if place else path: error for path, error in found.items()}
        _write_surroundings(result, staging, plots=plots)
        card = model_card(result, shown, rank, errors, nested=nested)
        (staging / CARD_FILE).write_text(card, encoding="utf-8")
        written = {path.as_posix() for path in files_in(staging)} | {RECIPE_FILE}
        places = {Path(path) for path in written}
        left = {path for path in kept if (out / path).is_file() and not _is_outdated(Path(path), places)}
        document = recipe_of(result, digest, sorted(written | left))
        (staging / RECIPE_FILE).write_text(to_yaml(document), encoding="utf-8")
    return sorted(written)


def _earlier(out: Path) -> tuple[str | None, set[str]]:
    """Digest of the merge that an earlier save left in a folder, and what is its; nothing if there is none."""
    import yaml

    try:
        record = from_yaml((out / RECIPE_FILE).read_text(encoding="utf-8"))[RECORD]
        # The pictures may have been drawn later.
        return record["merge"], {*record["files"], COEFFICIENTS_PLOT, RATIOS_PLOT, LOSSES_PLOT}
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        return None, set()


def _by_task(result: MergeResult) -> Iterator[tuple[str, MergeResult]]:
    """Folder within the output, and what is written there: one entry, or one for each task."""
    if not result.per_task:
        yield "", result
        return
    for task in result.tasks:
        yield f"{TASKS_FOLDER}/{file_name(task)}", result.for_task(task)


def _refuse_full_rank(result: MergeResult) -> None:
    for _, one in _by_task(result):
        for path in one.paths:
            if not one.is_whole(path) and any(factor.dense is not None for _, factor in one.terms(path)):
                raise ValueError(
                    f"rank: the update of method {result.method!r} is of full rank, so that no small adapter holds it "
                    "exactly: expected a rank to truncate to, or format 'model'; found format 'lora' without a rank"
                )


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
    """``A [r, d_in]``, ``B [d_out, r]`` with r <= ``rank`` next to the merged update, and their relative Frobenius
    error.

    The best of that rank; of a wide update that has no factors, as good as a few subspace iterations find it.
    """
    if any(factor.dense is not None for _, factor in result.terms(path)):
        return _low_rank_of_dense(result.delta(path), rank)
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


def _low_rank_of_dense(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    narrow = min(delta.shape)
    if narrow <= max(_EXACT_WIDTH, 4 * rank):
        left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
    else:
        # Seeded here, so that the same merge gives the same file.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, sigma, columns = torch.svd_lowrank(delta, q=min(narrow, rank + _OVERSAMPLING), niter=_ITERATIONS)
        right = columns.t()
    kept = int((sigma[:rank] > 0).sum())
    roots = sigma[:kept].sqrt()
    A, B = roots[:, None] * right[:kept], left[:, :kept] * roots
    norm = delta.norm()
    return A, B, float((delta - B @ A).norm() / norm) if norm > 0 else 0.0


def _write_lora(result: MergeResult, folder: Path, rank: int | None) -> dict[str, float]:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    ranks, errors = {}, {}
    whole = [path for path in result.paths if result.is_whole(path)]
    biases = {path: result.bias_delta(path) for path in result.paths if path not in whole}
    has_bias = any(bias is not None for bias in biases.values())
    for path in biases:
        if rank is None:
            A, B = concatenated(result, path)
        else:
            A, B, errors[path] = low_rank(result, path, rank)
        if A.shape[0] == 0:
            # PEFT has no adapters of rank 0. Leaving the module out says the same, unless it has a bias.
            if biases[path] is None:
                continue
            A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
        tensors[f"base_model.model.{path}.lora_A.weight"] = A.float().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = B.float().contiguous()
        if has_bias:
            bias = biases[path]
            tensors[f"base_model.model.{path}.lora_B.bias"] = (
                torch.zeros(B.shape[0]) if bias is None else bias.float()
            )
        ranks[path] = A.shape[0]
    if not ranks and not whole:
        raise ValueError(f"format 'lora': the update of method {result.method!r} is zero, there is nothing to save")
    if whole:
        merged = result.merged(result.model, whole)
        for path in whole:
            for parameter, value in result.model.get_submodule(path).state_dict().items():
                name = f"{path}.{parameter}"
                tensors[f"base_model.model.{name}"] = merged.get(name, value).contiguous()
    largest = max(ranks.values(), default=1)
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
            file = folder / HEADS_FOLDER / f"{file_name(task)}.safetensors"
            if file.exists():
                raise ValueError(f"adapters[{task!r}]: another task's head is kept as {file.name}, too")
            file.parent.mkdir(exist_ok=True)
            save_file({name: value.contiguous() for name, value in adapter.trained.items()}, file)
    if result.history:
        lines = "".join(json.dumps(entry) + "\n" for entry in result.history)
        (folder / HISTORY_FILE).write_text(lines, encoding="utf-8")
    if plots and result.coefficients:
        from nsc_merge.plots import draw

        draw(result.coefficients, result.dead, result.history, folder)


def file_name(task: str) -> str:
    """The task as a file name: whatever could leave the folder is replaced."""
    return re.sub(r"[^\w.-]", "_", task).lstrip(".") or "task"


def _rank(result: MergeResult, path: str) -> int:
    """Of the exact adapter of one module."""
    return sum(
        factor.rank if factor.dense is None else min(factor.dense.shape) for _, factor in result.terms(path)
    )


def serving_notes(result: MergeResult, rank: int | None = None) -> list[str]:
    """What a server must be told to load the result's adapter, one line each."""
    merges = [one for _, one in _by_task(result)]
    full = max((_rank(one, path) for one in merges for path in one.paths if not one.is_whole(path)), default=0)
    largest = full if rank is None else min(rank, full)
    flag = next((allowed for allowed in _VLLM_RANKS if allowed >= largest), None)
    notes = [
        f"the adapter has rank {largest}; vLLM: --enable-lora --max-lora-rank {flag}"
        if flag
        else f"the adapter has rank {largest}, more than vLLM's {_VLLM_RANKS[-1]}: save with a smaller rank, or "
        "as a model"
    ]
    if any(result.is_whole(path) for path in result.paths):
        notes.append("the adapter has modules_to_save, which PEFT loads and vLLM does not: save as a model")
    if any(factor.bias is not None for one in merges for path in one.paths for _, factor in one.terms(path)):
        notes.append("the adapter has biases (lora_bias), which not every server loads")
    return notes


def _is_outdated(path: Path, written: set[Path]) -> bool:
    """Of an earlier save in the same folder: a shard that the index of other shards no longer names, or the errors of a
    truncation that is no more.
    """
    if path.name == TRUNCATION_FILE:
        return path not in written and path.with_name(CONFIG_FILE) in written
    return _SHARD.fullmatch(path.name) is not None and path.with_name("config.json") in written
