"""What is refused of a recipe before anything is loaded, so that no work is done in vain."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nsc_merge.calibration.raw.reading import is_raw
from nsc_merge.methods import Method, method_of
from nsc_merge.models.bases.architecture import quantised_as
from nsc_merge.models.bases.placement import PLAIN, check_plain, device_of
from nsc_merge.processes.group import current
from nsc_merge.recipes.merge_recipe import Recipe, RecipeError
from nsc_merge.recipes.placement_keys import Placed
from nsc_merge.results.layout import (
    CARD_FILE,
    COEFFICIENTS_FILE,
    HEADS_FOLDER,
    HISTORY_FILE,
    RECIPE_FILE,
    earlier_merge,
    refuse_mixture,
    refuse_pages,
    task_folders,
)
from nsc_merge.utils.atomic_folder import check_replaceable
from nsc_merge.utils.json_text import from_json

# One file of each format, which is written in any case.
_FIRST = {"lora": "adapter_config.json", "model": "config.json"}


def check(recipe: Recipe, *, resume: bool) -> None:
    """Refuse, before anything is loaded, what a merge would fail on only after its work, and to resume what keeps
    no state.

    Raises:
        RecipeError: naming the key, what was found and what was expected.
    """
    try:
        method = method_of(recipe.method)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    with options_at_fault(recipe, always=True):
        method.resolved(recipe.options, list(recipe.adapters))
    if resume and not method.resumable:
        raise RecipeError(f"--resume: method {recipe.method!r} keeps no state to go on from")
    if "data" in method.needs:
        missing = [task for task in recipe.adapters if task not in recipe.calibration]
        if missing:
            raise RecipeError(
                f"calibration.{missing[0]}: method {recipe.method!r} needs inputs of every task, found none"
            )
    for task, place in recipe.calibration.items():
        if place.own and place.local and not is_raw(place.source):
            raise RecipeError(
                f"calibration.{task}.{place.own[0]}: is of raw data, but {place.source} holds inputs that are made "
                "already; expected none"
            )
    stored_as = check_placement(recipe, recipe.model if recipe.local else None)
    _check_formats(recipe, method)
    if stored_as is not None and "model" in recipe.formats and not recipe.dequantize:
        raise RecipeError(
            f"output.formats: a model of plain numbers takes a plain base, found one quantised as {stored_as}; "
            "expected output.dequantize: true, or format lora"
        )
    _check_place(recipe, method)
    if recipe.push_to_hub is not None:
        check_push("output.push_to_hub")


def check_push(argument: str) -> None:
    """Refuse to upload where the hub may not be asked, or would not know who asks.

    Raises:
        RecipeError: naming ``argument``, with what to do.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise RecipeError(f"{argument}: HF_HUB_OFFLINE forbids to ask the hub; expected it unset")
    if get_token() is None:
        raise RecipeError(
            f"{argument}: expected a token that may write, found none: set HF_TOKEN, or run hf auth login"
        )


@contextmanager
def options_at_fault(recipe: Recipe, *, always: bool = False) -> Iterator[None]:
    """Make errors that begin with the name of an option that is given, or ``always`` all, the recipe's."""
    try:
        yield
    except (ValueError, TypeError) as error:
        named = re.split(r"\W", str(error), maxsplit=1)[0] in recipe.options
        if not named and not always:
            raise
        raise RecipeError(f"options.{error}" if named else f"options: {error}") from error


def _check_formats(recipe: Recipe, method: Method) -> None:
    gives = method.gives_with(recipe.options)
    if set(recipe.formats) == {"coefficients"} and gives != "coefficients":
        raise RecipeError(f"output.formats: method {recipe.method!r} gives no coefficients; expected lora or model")
    if "model" in recipe.formats and current().size > 1 and not recipe.local:
        raise RecipeError(
            f"output.formats: expected coefficients or lora from {current().size} processes, which hold a base from "
            "the hub in shards, found model; expected a base in a folder, or nsc-merge export of the finished merge"
        )
    if "lora" not in recipe.formats:
        return
    if gives == "nothing":
        raise RecipeError(f"output.formats: method {recipe.method!r} has no update for an adapter; expected model")
    if recipe.rank is None and gives == "full rank":
        raise RecipeError(
            f"output.rank: the update of method {recipe.method!r} is of full rank, so that no small adapter holds it "
            "exactly: expected a rank to truncate to, or format model; found format lora without a rank"
        )


def state_file(recipe: Recipe) -> Path:
    """Where an interrupted run keeps its state: beside the output folder, which stays untouched until the end."""
    return recipe.out.with_name(f"{recipe.out.name}.state.safetensors")


def _check_place(recipe: Recipe, method: Method) -> None:
    """Refuse an output folder that cannot be written in the end, or whose writing would replace what is not a merge's:
    inputs, and a recipe or a page of the user's own.
    """
    try:
        out = recipe.out.resolve()
        if out.name:
            # Says so if the name is too long for a file.
            state_file(recipe).is_file()
    except (OSError, RuntimeError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(
            f"output.dir: expected a folder that can be made, found {str(recipe.out)!r:.80}: {said}"
        ) from None
    places = list(task_folders(recipe.adapters).values()) if method.per_task else [""]
    written = _written(recipe, method, places)
    formats = [name for name in recipe.formats if name != "coefficients"]
    try:
        check_replaceable(out, written)
        refuse_mixture(out, places, formats, nested=True)
    except (OSError, ValueError) as error:
        raise RecipeError(f"output.dir{str(error).removeprefix('out')}") from None
    # The results come together beside the folder.
    parent = next(folder for folder in out.parents if folder.exists())
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{out.name[:40]}."):
            pass
    except OSError as error:
        raise RecipeError(f"output.dir: no folder can be made in {parent}: {error.strerror}") from None
    merge, earlier = earlier_merge(out)
    # What an earlier merge left goes, whether this one writes the same files or not.
    changed = {out / path for path in {*written, *map(Path, earlier)}}
    changed |= {out / place / name for place in places for name in formats}
    changed |= {state_file(recipe).resolve(), out / HEADS_FOLDER}
    for name, place in _inputs(recipe):
        # In the folder of a base or an adapter there is room for another; one of data would be read with the results.
        room = place in out.parents and not name.startswith("calibration.")
        if any(place.is_relative_to(path) or (not room and path.is_relative_to(place)) for path in changed):
            raise RecipeError(
                f"output.dir: {name} is {place}, in the way of what is written to {out}, which would replace it; "
                "expected a folder beside all inputs"
            )
    try:
        refuse_pages(out, merge, earlier)
    except ValueError as error:
        raise RecipeError(f"output.dir{str(error).removeprefix('out')}") from None


def _written(recipe: Recipe, method: Method, places: Sequence[str]) -> set[Path]:
    """Files that are written whatever the merge finds, by their paths within the output folder; formats in each of
    ``places``.
    """
    names = {CARD_FILE, RECIPE_FILE}
    if method.gives_with(recipe.options) == "coefficients":
        names.add(COEFFICIENTS_FILE)
    if "steps" in method.option_names:
        names.add(HISTORY_FILE)
    formats = {Path(place, name, _FIRST[name]) for place in places for name in recipe.formats if name in _FIRST}
    return {Path(name) for name in names} | formats


def _inputs(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """The files and folders that a recipe reads, by key."""
    if recipe.local:
        yield "model", Path(recipe.model).resolve()
    for task, place in recipe.adapters.items():
        if isinstance(place, Path):
            yield f"adapters.{task}", place.resolve()
    for task, source in recipe.calibration.items():
        if source.local:
            yield f"calibration.{task}", Path(source.source).resolve()
    for task, file in recipe.label_files.items():
        yield f"labels.{task}", file.resolve()


def check_placement(placed: Placed, folder: str | None) -> str | None:
    """Refuse devices that there are not, and ways to hold a model that exclude each other.

    Args:
        placed: the recipe.
        folder: of the base model, None if it is on the hub.

    Returns:
        How the base is quantised, by the recipe or by the ``config.json`` in its folder; None where it is not.

    Raises:
        RecipeError: naming the key, what was found and what was expected.
    """
    try:
        device_of(placed.device)
        for place in _gpus(placed):
            device_of(place)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    for key in ("device_map", "quantization"):
        if current().size > 1 and getattr(placed, key) is not None:
            raise RecipeError(
                f"{key}: several processes hold a plain base in shards, one for each; expected none, or one process, "
                f"found {getattr(placed, key)!r:.60}"
            )
    own = None if folder is None else _quantised_as(Path(folder) / "config.json")
    if own is not None and current().size > 1:
        raise RecipeError(
            f"model: several processes hold a plain base in shards, found files that are quantised ({own}); expected "
            "one process, with device_map where no device holds the base"
        )
    if placed.quantization == PLAIN:
        if folder is not None:
            try:
                check_plain(own)
            except ValueError as error:
                raise RecipeError(str(error)) from None
        return None
    if own is not None and placed.quantization is not None:
        raise RecipeError(
            f"quantization: the base in {folder} is quantised already ({own}); expected none, or "
            f"{PLAIN}, found {placed.quantization!r}"
        )
    return own or placed.quantization


def _gpus(placed: Placed) -> Iterator[str]:
    """The GPUs that a recipe names beside ``device``."""
    places = placed.device_map.values() if isinstance(placed.device_map, dict) else placed.max_memory or ()
    for place in places:
        if isinstance(place, int) or place.startswith("cuda"):
            yield f"cuda:{place}" if isinstance(place, int) else place


def _quantised_as(file: Path) -> str | None:
    """The method that a base's files are quantised by, as its configuration says."""
    if not file.is_file():
        return None
    return quantised_as(from_json(file.read_bytes(), f"model: {file}", not_finite=True))
