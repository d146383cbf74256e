"""Whether a saved merge is an update of the base that it is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsc_merge.recipes.yaml_keys import absolute_model
from nsc_merge.results.beside.record import digests_in
from nsc_merge.results.layout import RECIPE_FILE, RECORD, earlier_merge
from nsc_merge.utils.provenance import Digest, digests, hashes, in_form_of
from nsc_merge.utils.yaml_text import read_yaml

# A task's own adapter lies in tasks/NAME/lora.
_DEEPEST = 3


def check_base(folder: Path, model: str) -> None:
    """Refuse the update in ``folder`` if its record says that it was made for other weights than those of ``model``.

    Bases in folders are compared by the SHA-256 of their weights, as long as that of the record is still there, else
    by what the record has of them. Of those on the hub, and of updates without a record, nothing is known.

    Args:
        folder: with an adapter or coefficients, or that of a whole merge with these in it.
        model: folder of the base, or a hub id.

    Raises:
        ValueError: naming both bases.
    """
    for place in (folder, *folder.parents[:_DEEPEST]):
        digest, files = earlier_merge(place)
        if digest is not None and any((place / file).is_relative_to(folder) for file in files):
            break
    else:
        return
    written = read_yaml(place / RECIPE_FILE)
    base, here = Path(str(absolute_model(written.get("model"), place))), Path(model)
    if not (base.is_absolute() and here.is_absolute()) or base.resolve() == here.resolve():
        return
    theirs, ours = (_weights(hashes(one)) if one.is_dir() else {} for one in (base, here))
    if not theirs:
        recorded = digests_in(written[RECORD])
        theirs, ours = _weights(recorded), _weights(digests(here, in_form_of(recorded)))
    if theirs and theirs != ours:
        raise ValueError(
            f"folder: {folder} is an update of {base}, and model is {here}, whose weights are others; expected the "
            "same base, or a whole model (save format model)"
        )


def _weights(found: Mapping[str, Digest]) -> dict[str, Any]:
    return {name: digest for name, digest in found.items() if name.endswith(".safetensors")}
