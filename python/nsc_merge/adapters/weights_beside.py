"""Trained weights that lie beside an adapter's own files: read where they are safetensors, never passed over."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from nsc_merge.adapters.adapter_files import CONFIG_FILE, widened
from nsc_merge.adapters.formats.diffusers_file import FILE as DIFFUSERS_FILE
from nsc_merge.adapters.peft_keys import PREFIX
from nsc_merge.utils.errors import naming
from nsc_merge.utils.safetensors_checks import read_checked

# LLaVA's training code (haotian-liu/LLaVA, llava/train/train.py) writes what it trained beside LoRA, such as the
# projector, as a pickled file of this name, with the names of the parameters under PEFT's wrapper; LongLoRA's
# (dvlab-research/LongLoRA, get_trainable_weights.py) embeddings and norms as the last of these, with the base's names.
CONVERTED = "non_lora_trainables.safetensors"
_PICKLED = ("non_lora_trainables.bin", "mm_projector.bin", "trainable_params.bin")
# What vLLM and its users call rows of embeddings for tokens that training added.
_NEW_ROWS = ("new_embeddings.safetensors", "new_embeddings.bin", "new_embeddings.pt")
# PEFT does not read these either, or they are of the optimisation.
_KNOWN = re.compile(
    r"adapter_model\.safetensors|(non_lora_trainables|mm_projector|trainable_params)\.\w+"
    r"|(optimizer|scheduler|scaler|training_args|rng_state\w*)\.(pt|pth|bin)|random_states_\d+\.pkl"
)
# SetFit's classifiers, as scikit-learn's in general, are the last two.
_WEIGHTS = re.compile(r".+\.(bin|pt|pth|ckpt|safetensors|pkl|joblib)")


class Beside(NamedTuple):
    """What lies beside an adapter's own files.

    Attributes:
        parameters: parameter path in the model -> value.
        notes: on files that are not read.
        sha256: file name -> SHA-256 of the very bytes that were read.
    """

    parameters: dict[str, Tensor]
    notes: tuple[str, ...]
    sha256: dict[str, str]


def read_beside(folder: Path, name: str, names: Collection[str] | None = None) -> Beside:
    """Read the weights beside an adapter.

    Args:
        folder: of the adapter.
        name: of the task, for messages.
        names: of all files that there are, of a folder on the hub of which only those that are read were fetched.

    Raises:
        ValueError: if there are weights that no one may leave out and only unpickling reads, with the command that
            converts them; if there are rows of new tokens; or if the converted file is none.
    """
    if names is None:
        names = [file.name for file in folder.iterdir() if file.is_file()]
    pickled = [file for file in _PICKLED if file in names]
    if pickled and CONVERTED not in names:
        convert = (
            "import torch; from safetensors.torch import save_file; "
            f"t = torch.load('{pickled[0]}', map_location='cpu', weights_only=True); "
            f"save_file({{k: v.contiguous().clone() for k, v in t.items()}}, '{CONVERTED}')"
        )
        raise ValueError(
            f"adapters[{name!r}]: {folder / pickled[0]} holds weights trained beside LoRA, and is pickled, which is "
            f'never opened here: expected {CONVERTED}. If you trust the file, in its folder: python -c "{convert}"'
        )
    rows = [file for file in _NEW_ROWS if file in names]
    if rows:
        raise ValueError(
            f"adapters[{name!r}]: {folder / rows[0]} holds rows for tokens that the base does not have; expected an "
            "adapter without them: put them into the base's embeddings, and the file elsewhere"
        )
    own = () if CONFIG_FILE in names else (DIFFUSERS_FILE,)
    notes = tuple(
        f"{file} lies beside the adapter and is not read: if weights were trained there, they are missing"
        for file in sorted(names)
        if _WEIGHTS.fullmatch(file) and not _KNOWN.fullmatch(file) and file not in own
    )
    if CONVERTED not in names:
        return Beside({}, notes, {})
    with naming(f"adapters[{name!r}]"):
        read = read_checked(folder / CONVERTED)
    found: dict[str, Tensor] = {}
    for key, value in read.tensors.items():
        path = re.sub("^(?=mm_projector\\.)", "model.", key.removeprefix(PREFIX))
        if path in found:
            raise ValueError(f"adapters[{name!r}]: {folder / CONVERTED}: {key} and another key both mean {path}")
        found[path] = widened(value)
    return Beside(found, notes, {CONVERTED: read.sha256})
