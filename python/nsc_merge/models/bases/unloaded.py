"""A base model whose weights stay in their files, and what its tensors are called there.

What transformers writes a tensor as is its own affair: it renames, fuses, splits and ties as the model's class and its
origin ask for. So it is asked, by having it write marks in the place of tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.models.bases.numbers import FileTensor
from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.provenance import mark_of
from nsc_merge.utils.safetensors_checks import DTYPES, check_safetensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# A mark is so long that its halves and its elements are seen to be none.
_LENGTH = 8
_CPU = torch.device("cpu")


class Rewritten(ValueError):
    """A checkpoint does not hold a model's tensors one by one, each as it is; the message says what is otherwise."""


def saved_names(model: nn.Module, folder: Path) -> dict[str, str]:
    """Name in ``model.state_dict()`` -> what ``save_pretrained`` calls that tensor in a file; tied ones have one name,
    and those that it leaves out have none.

    Everything else that ``save_pretrained`` writes, such as ``config.json``, lies in ``folder`` afterwards.

    Raises:
        Rewritten: if it writes a tensor otherwise than as it is.
    """
    from safetensors.torch import load_file

    state = model.state_dict(keep_vars=True)
    first: dict[Hashable, str] = {}
    for name, value in state.items():
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
            raise Rewritten(f"{name} is no plain tensor")
        first.setdefault(_identity(value), name)
    mark_of_first = {
        name: torch.arange(_LENGTH * at, _LENGTH * (at + 1), device="cpu").double()
        for at, name in enumerate(first.values())
    }
    marks = {name: mark_of_first[first[_identity(value)]] for name, value in state.items()}
    firsts = {tuple(mark.tolist()): name for name, mark in mark_of_first.items()}
    saving: Any = model
    try:
        with without_bars():
            saving.save_pretrained(folder, state_dict=marks)
        saved = {key: mark.clone() for key, mark in load_file(folder / WEIGHTS).items()}
    except (RuntimeError, ValueError, IndexError) as error:
        # Operations on weights, which marks are not.
        raise Rewritten(f"transformers converts its tensors: {' '.join(str(error).split()):.200}") from error
    finally:
        # Nobody may take it for weights.
        (folder / WEIGHTS).unlink(missing_ok=True)
    found: dict[str, str] = {}
    for key, mark in saved.items():
        own = firsts.get(tuple(mark.double().flatten().tolist())) if mark.dim() == 1 else None
        if own is None or own in found:
            raise Rewritten(f"transformers makes {key} of one or more tensors")
        found[own] = key
    return {name: found[first[_identity(value)]] for name, value in state.items() if first[_identity(value)] in found}


@contextmanager
def without_bars() -> Iterator[None]:
    """For the duration of a ``with`` block transformers shows no progress: nobody waits."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _identity(value: Tensor) -> Hashable:
    """The same for tensors that share their numbers."""
    in_memory = value.device.type != "meta" and value.numel()
    return (value.device, value.data_ptr(), value.shape) if in_memory else id(value)


def weight_files(folder: Path) -> dict[str, dict[str, FileTensor]]:
    """File name -> name -> tensor, in the order of the data, of the weights that transformers reads from a folder.

    Raises:
        OSError, ValueError: if a file is missing or damaged, or if the index is not of what the files hold.
    """
    if (folder / WEIGHTS).is_file():
        names, index = [WEIGHTS], None
    else:
        fields = from_json((folder / INDEX).read_bytes(), f"model: {folder / INDEX}")
        index = fields.get("weight_map") if isinstance(fields, dict) else None
        if not isinstance(index, dict):
            raise Rewritten(f"{INDEX} names no files")
        names = sorted(set(map(str, index.values())))
    found = {name: _tensors_in(folder / name) for name in names}
    held = {key: name for name, tensors in found.items() for key in tensors}
    if len(held) != sum(map(len, found.values())) or (index is not None and index != held):
        raise Rewritten(f"{INDEX} and the files that it names hold different tensors")
    return found


def _tensors_in(file: Path) -> dict[str, FileTensor]:
    mark = mark_of(file.stat())
    entries = check_safetensors(file)
    with file.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
    return {
        key: FileTensor(
            file, mark, start + entry["data_offsets"][0], tuple(entry["shape"]), DTYPES[entry["dtype"]], _CPU
        )
        for key, entry in entries.items()
    }


def leave_in_files(model: nn.Module, folder: Path, device: torch.device) -> None:
    """Let the tensors of a model on the meta device, that ``folder`` is the checkpoint of, be read from its files.

    Args:
        device: that they are brought to when they are.

    Raises:
        Rewritten: if the files do not hold them one by one.
        OSError, ValueError: if the files are damaged.
    """
    import tempfile

    if getattr(model, "is_quantized", False):
        raise Rewritten("it is quantised")
    _check_ties(model)
    with tempfile.TemporaryDirectory() as scratch:
        names = saved_names(model, Path(scratch))
    held: Mapping[str, FileTensor] = {key: one for each in weight_files(folder).values() for key, one in each.items()}
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        there = held.get(names.get(name, ""))
        if there is None or there.shape != tuple(value.shape):
            raise Rewritten(f"{name} is not in its files as it is")
        if there.dtype is not value.dtype and not (there.dtype.is_floating_point and value.dtype.is_floating_point):
            raise Rewritten(f"{name} is in its files in {there.dtype}")
        replace(there, device=device).attach_to(value)


def _check_ties(model: nn.Module) -> None:
    """Refuse what transformers ties only if the numbers are equal, which it did not see."""
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for one, other in ties.items():
        if model.get_parameter(one) is not model.get_parameter(other):
            raise Rewritten(f"its files hold {one} beside {other}, which its config.json ties")
