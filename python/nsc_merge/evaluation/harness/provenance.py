"""What figures of the lm-evaluation-harness depend on."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from nsc_merge.evaluation.eval_recipe import EvalRecipe
from nsc_merge.utils.provenance import whole

# How text becomes tokens, as transformers saves it beside a model.
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")


def harness_versions() -> dict[str, str]:
    """Of the packages that measure, and that read what is measured."""
    return {"lm-eval": version("lm-eval"), "datasets": version("datasets")}


def harness_fingerprint(recipe: EvalRecipe) -> list[Any]:
    """Settings, files and versions that all figures of the harness depend on; data on the hub are not looked at."""
    settings = recipe.lm_eval
    places = [*settings.data, *([settings.include_path] if settings.include_path else [])]
    if recipe.local:
        places += [file for pattern in _TOKENIZER for file in sorted(Path(recipe.model).glob(pattern))]
    return [
        [settings.batch_size, settings.apply_chat_template],
        {str(place): whole_of(place) for place in places},
        harness_versions(),
    ]


def whole_of(place: Path) -> dict[str, str]:
    """SHA-256 of a file, or of every file in a folder and below, but for what Python leaves there."""
    files = [place] if place.is_file() else sorted(place.rglob("*"))
    return {
        str(file.relative_to(place)): whole(file) for file in files if file.is_file() and "__pycache__" not in file.parts
    }
