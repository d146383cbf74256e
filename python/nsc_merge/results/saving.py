"""Writes merge results: PEFT adapter, transformers model or coefficients, with everything around them."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from nsc_merge.adapters import CONFIG_FILE, Factor
from nsc_merge.adapters.algebra.low_rank import concatenated, low_rank, total_gain
from nsc_merge.adapters.formats import diffusers_file
from nsc_merge.adapters.hub import source_of
from nsc_merge.adapters.peft_writer import write_adapter
from nsc_merge.models.bases.loading import base_name
from nsc_merge.models.bases.stored_weights import state_of
from nsc_merge.models.bases.transposed import is_transposed
from nsc_merge.models.merged.matrices import matrix_at
from nsc_merge.models.merged.stacks import names_for_peft, stacks_of_linears, stacks_of_updates
from nsc_merge.models.own_base import split_modules
from nsc_merge.models.vocabulary import grown_elsewhere, grown_modules
from nsc_merge.results.about_adapter import about_adapter
from nsc_merge.results.beside.heads import Head, heads_of, with_head, write_heads
from nsc_merge.results.beside.model_card import model_card
from nsc_merge.results.beside.plots import draw
from nsc_merge.results.beside.preprocessing import leave_out_licenses, write_preprocessing
from nsc_merge.results.beside.record import merge_digest, recipe_of
from nsc_merge.results.dora_adapter import as_dora, check_as_adapter, has_gains
from nsc_merge.results.layout import (
    CARD_FILE,
    COEFFICIENTS_FILE,
    COEFFICIENTS_FORMAT,
    FORMATS,
    HISTORY_FILE,
    RECIPE_FILE,
    TRUNCATION_FILE,
    code_in,
    earlier_merge,
    is_weights,
    refuse_inputs,
    refuse_mixture,
    refuse_pages,
    task_folders,
)
from nsc_merge.results.merged_model import part_of_pipeline, write_model
from nsc_merge.results.merged_update import MergedUpdate, by_task
from nsc_merge.utils.atomic_file import no_room
from nsc_merge.utils.atomic_folder import files_in, replacing_folder
from nsc_merge.utils.json_text import plain
from nsc_merge.utils.option_checks import check_count, is_size
from nsc_merge.utils.yaml_text import to_yaml


def save(
    result: MergedUpdate,
    out: Path,
    format: str | Sequence[str],
    *,
    rank: int | None,
    max_shard_size: str | int | None,
    plots: bool,
    dequantize: bool = False,
    head: str | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """See :meth:`nsc_merge.MergeResult.save`; returns the files written, by their paths within ``out``."""
    wanted = _checked_formats(format, rank, max_shard_size, dequantize=dequantize, head=head)
    if not result.coefficients and format == "coefficients":
        raise ValueError(f"format 'coefficients': method {result.method!r} gives none; use 'lora' or 'model'")
    for task in result.tasks:
        if any("\ud800" <= character <= "\udfff" for character in task):
            raise ValueError(f"adapters[{task!r}]: expected a name that UTF-8 can hold, found half a character in it")
    if rank is None and "lora" in wanted:
        _refuse_full_rank(result)
    if "model" in wanted or ("lora" in wanted and (has_gains(result) or any(map(result.is_whole, result.paths)))):
        result.check_base()
    if "lora" in wanted:
        check_as_adapter(result)
        _refuse_biases_beside_others(result)
        _refuse_second_names(result)
    heads = heads_of(result, labels)
    if head is not None and head not in heads:
        raise ValueError(f"head: expected a task that brought a head, of {list(heads)}, found {head!r}")
    merges = dict(by_task(result))
    # Where every task has an update of its own, the head belongs to that of its task.
    headed = "" if head is None or not result.per_task else task_folders(result.tasks)[head]
    if head is not None:
        merges[headed] = with_head(merges[headed], head, heads[head])
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out: expected a folder, found the file {out}")
    nested = not isinstance(format, str)
    places = list(task_folders(result.tasks).values()) if result.per_task else [""]
    folders = [out, *(out / place / (name if nested else "") for place in places for name in wanted)]
    refuse_inputs(_inputs(result), folders)
    digest = merge_digest(result)
    gone: set[str] = set()

    def obsolete(path: Path, written: set[Path]) -> bool:
        return path.as_posix() in gone or _is_outdated(path, written)

    with _disk_errors(out), replacing_folder(out, obsolete) as staging:
        # Nobody else writes there from here on, and what somebody just wrote counts.
        refuse_mixture(out, places, wanted, nested=nested)
        earlier, files = earlier_merge(out)
        refuse_pages(out, earlier, files)
        kept = files if earlier == digest else set()
        gone |= files - kept
        errors: dict[str, float] = {}
        if nested and result.coefficients:
            _write_coefficients(result, staging)
            shown = list(dict.fromkeys(["coefficients", *wanted]))
        else:
            shown = [name for name in wanted if name != "coefficients" or not nested]
        for place, one in merges.items():
            own = heads[head] if head is not None and place == headed else None
            for name in shown:
                if nested and name == "coefficients":
                    continue
                folder = staging / place / (name if nested else "")
                folder.mkdir(parents=True, exist_ok=True)
                found = _write(one, folder, name, rank, max_shard_size, dequantize, own)
                errors |= {f"{place}/{path}" if place else path: error for path, error in found.items()}
        leave_out_licenses(staging, out, files)
        write_heads(result, heads, staging)
        _write_surroundings(result, staging, plots=plots)
        card = model_card(result, shown, staging, rank, errors, nested=nested, heads=heads, head=head)
        (staging / CARD_FILE).write_text(card, encoding="utf-8")
        named = {"labels": {task: list(names) for task, names in labels.items()}} if labels else {}
        return _write_record(replace(result, inputs={**result.inputs, **named}), digest, out, staging, kept)


def _write_record(result: MergedUpdate, digest: str, out: Path, staging: Path, kept: set[str]) -> list[str]:
    """Write ``recipe.yaml``, which tells all that will be in ``out``: of this save, whose files are returned, and of
    earlier ones of the same merge what is ``kept``.
    """
    written = {path.as_posix() for path in files_in(staging)} | {RECIPE_FILE}
    paths = {Path(path) for path in written}
    left = {path for path in kept if (out / path).is_file() and not _is_outdated(Path(path), paths)}
    code = {**code_in(out, left), **code_in(staging, written - {RECIPE_FILE})}
    document = recipe_of(result, digest, sorted(written | left), code)
    (staging / RECIPE_FILE).write_text(to_yaml(document), encoding="utf-8")
    return sorted(written)


def _checked_formats(
    format: str | Sequence[str], rank: Any, max_shard_size: Any, *, dequantize: bool, head: str | None
) -> list[str]:
    """The formats, once all that is asked for is for some of them."""
    wanted = [format] if isinstance(format, str) else list(format)
    for name in wanted:
        if name not in FORMATS:
            raise ValueError(f"format: expected one of {list(FORMATS)}, found {name!r}")
    if not wanted:
        raise ValueError(f"format: expected one or more of {list(FORMATS)}, found none")
    if rank is not None:
        check_count("rank", rank)
    if rank is not None and "lora" not in wanted:
        raise ValueError(f"rank: only format 'lora' can be truncated, found format {format!r}")
    size = max_shard_size
    if size is not None and not (is_size(size) if isinstance(size, str) else type(size) is int and size > 0):
        raise ValueError(f"max_shard_size: expected bytes, or a size such as '5GB', found {size!r:.60}")
    if dequantize and "model" not in wanted:
        raise ValueError(f"dequantize: only format 'model' can be dequantised, found format {format!r}")
    if head is not None and not {"lora", "model"} & set(wanted):
        raise ValueError(f"head: only formats 'lora' and 'model' hold a head, found format {format!r}")
    return wanted


def _inputs(result: MergedUpdate) -> dict[str, Path]:
    """The folders that a merge was made of, by what they are called."""
    base = base_name(result.model)
    sources = {"the base": base, **{f"adapters[{task!r}]": source_of(one) for task, one in result.adapters.items()}}
    found = {name: Path(place) for name, place in sources.items() if isinstance(place, str) and place}
    return {name: place for name, place in found.items() if place.is_dir()}


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """What safetensors says of a full disk, as the error that everyone else says it with, and where it is full."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"out: {out} cannot be written: {error}") from None
    except OSError as error:
        if (cure := no_room(error, out.resolve().parent)) is None:
            raise
        other = "a smaller max_shard_size" if error.errno == errno.EFBIG else "save elsewhere"
        raise OSError(f"out: {out} cannot be written: {error.strerror}; expected {cure}, or {other}") from None


def _refuse_biases_beside_others(result: MergedUpdate) -> None:
    factors = [item for one in result.adapters.values() for item in one.factors.items()]
    if all(factor.bias is None for _, factor in factors):
        return
    for path, factor in factors:
        if matrix_at(result.model, path) is not None:
            what = "one of several matrices in a parameter"
        elif factor.rank and isinstance(result.model.get_submodule(path), nn.Embedding):
            what = "an embedding"
        else:
            continue
        raise ValueError(
            f"format 'lora': {path} is {what}, for which PEFT has no adapter with biases (lora_bias), expected no "
            "biases; use format 'model'"
        )


def _refuse_second_names(result: MergedUpdate) -> None:
    if elsewhere := grown_elsewhere(result.model):
        raise ValueError(
            f"format 'lora': {elsewhere[0]} has the rows of new tokens, too (added_tokens), and PEFT's modules_to_save "
            f"hold those of {grown_modules(result.model)[0]} alone, expected no more tokens than the base has "
            "(added_tokens='base'); use format 'model'"
        )
    second = next((path for path in result.paths if path in split_modules(result.model)), None)
    if second is not None:
        raise ValueError(
            f"format 'lora': {second} is merged on its own, but the base has one module there and under another name, "
            "and PEFT adapts it under one name alone, expected modules of their own; use format 'model', or merge on "
            "the base saved and loaded anew (save_pretrained, from_pretrained), which resize_token_embeddings did not "
            "put together"
        )


def _refuse_full_rank(result: MergedUpdate) -> None:
    for _, one in by_task(result):
        for path in one.paths:
            if not one.is_whole(path) and any(factor.dense is not None for _, factor in one.terms(path)):
                raise ValueError(
                    f"rank: the update of method {result.method!r} is of full rank, so that no small adapter holds it "
                    "exactly: expected a rank to truncate to, or format 'model'; found format 'lora' without a rank"
                )


def _write(
    result: MergedUpdate,
    folder: Path,
    format: str,
    rank: int | None,
    max_shard_size: str | int | None,
    dequantize: bool,
    head: Head | None,
) -> dict[str, float]:
    errors: dict[str, float] = {}
    if format == "coefficients":
        _write_coefficients(result, folder)
    elif format == "model":
        write_model(result, folder, max_shard_size, dequantize=dequantize)
    else:
        errors = _write_lora(result, folder, rank, head)
    if format != "coefficients":
        write_preprocessing(result, folder)
    return errors


def _write_coefficients(result: MergedUpdate, folder: Path) -> None:
    document = {
        "format": COEFFICIENTS_FORMAT,
        "version": 1,
        "method": result.method,
        "tasks": result.tasks,
        "options": plain(result.options),
        "dead": result.dead,
        "coefficients": result.coefficients,
        **({"objective": result.objective} if result.objective else {}),
    }
    (folder / COEFFICIENTS_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _write_lora(result: MergedUpdate, folder: Path, rank: int | None, head: Head | None) -> dict[str, float]:
    factors, errors = {}, {}
    # A vocabulary that has grown is nowhere else.
    grown = grown_modules(result.model)
    whole = [path for path in result.paths if result.is_whole(path) or path in grown]
    for path in result.paths:
        if path in whole:
            continue
        if rank is None:
            A, B = concatenated(result.terms(path))
        else:
            A, B, errors[path] = low_rank(result.terms(path), rank)
        bias = result.bias_delta(path)
        if A.shape[0] == 0:
            # PEFT has no adapters of rank 0. Leaving the module out says the same, unless it has a bias.
            if bias is None and total_gain(result.terms(path)) is None:
                continue
            A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
        # As they are written: all of them in float64 would take as much again.
        factors[path] = Factor(A.float(), B.float(), 1.0, bias)
    if has_gains(result):
        factors = as_dora(result, factors)
    if not factors and not whole and head is None:
        raise ValueError(f"format 'lora': the update of method {result.method!r} is zero, there is nothing to save")
    merged = result.merged(result.model, whole) if whole else {}
    kept = {
        path: {
            # Tied ones share memory, which safetensors refuses.
            name: merged.get(f"{path}.{name}", value.clone() if path in grown else value)
            for name, value in state_of(result.model.get_submodule(path)).items()
        }
        for path in dict.fromkeys((*whole, *grown))
    }
    kept |= {path: state_of(result.model.get_submodule(path)) for path in (head.modules(result.model) if head else ())}
    matrices = {path: factors.pop(path) for path in list(factors) if matrix_at(result.model, path) is not None}
    stacks = stacks_of_linears(factors, result.model)
    factors = {path: factor for path, factor in factors.items() if path not in stacks}
    modules: dict[str, Any] = {path: result.model.get_submodule(path) for path in factors}
    write_adapter(
        folder,
        factors,
        kept,
        about_adapter(result, kept),
        embeddings=[path for path, module in modules.items() if isinstance(module, nn.Embedding)],
        kernels={path: tuple(one.weight.shape[2:]) for path, one in modules.items() if hasattr(one, "kernel_size")},
        stacks={**stacks, **stacks_of_updates(matrices, result.model)},
        fan_in_fan_out=any(map(is_transposed, modules.values())),
        modules=[path for path, _ in result.model.named_modules()],
        names=names_for_peft(factors, result.model),
    )
    part = part_of_pipeline(result.model)
    if part is not None and not kept:
        diffusers_file.write_beside(folder, part)
    if rank is not None:
        document = {"rank": rank, "relative_error": errors}
        (folder / TRUNCATION_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return errors


def _write_surroundings(result: MergedUpdate, folder: Path, *, plots: bool) -> None:
    if result.history:
        lines = "".join(json.dumps(entry) + "\n" for entry in result.history)
        (folder / HISTORY_FILE).write_text(lines, encoding="utf-8")
    if plots and result.coefficients:
        draw(result.coefficients, result.dead, result.history, folder, result.objective.get("batches", 1))


def _is_outdated(path: Path, written: set[Path]) -> bool:
    """Of an earlier save in the same folder: a shard that the index of other shards no longer names, or the errors of a
    truncation that is no more.
    """
    if path.name == TRUNCATION_FILE:
        return path.with_name(CONFIG_FILE) in written
    return is_weights(path.name) and path.with_name("config.json") in written
