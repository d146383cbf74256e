"""What a saved merge looks like on disk: formats, and names of its files."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from nsc_merge.adapters.hub import SENTENCE_MODULES
from nsc_merge.results.beside.plots import COEFFICIENTS_PLOT, LOSSES_PLOT, RATIOS_PLOT
from nsc_merge.utils.provenance import sha256
from nsc_merge.utils.yaml_text import read_yaml

FORMATS = ("coefficients", "lora", "model")
# What a finished merge keeps of its circumstances; ignored when the file is run again.
RECORD = "record"
COEFFICIENTS_FILE = "coefficients.json"
HISTORY_FILE = "history.jsonl"
RECIPE_FILE = "recipe.yaml"
CARD_FILE = "README.md"
TRUNCATION_FILE = "truncation.json"
HEADS_FOLDER = "heads"
TASKS_FOLDER = "tasks"
COEFFICIENTS_FORMAT = "nsc_merge.coefficients"

# Options that the command sets, and all options of one run, not of the merge: no recipe keeps them.
OPTIONS_OF_RUN = ("state_to", "state_of", "resume_from")
PASSING_OPTIONS = ("progress", *OPTIONS_OF_RUN, "state_every", "scored")


# What transformers and diffusers call a model's files of weights, and the index of several.
_WEIGHTS = r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
_FILE = rf"""(?x:
    adapter_config\.json | adapter_model\.safetensors | pytorch_lora_weights\.safetensors | truncation\.json
    | config\.json | {_WEIGHTS}
    | coefficients\.json | history\.jsonl | recipe\.yaml | README\.md | (coefficients|ratios|losses)\.png
)"""
# What transformers' tokenizers, processors and generation read from a model's folder, of this release and of earlier
# ones: configurations, chat templates, vocabularies, as patterns of the hub. No code, and no weights but those of the
# modules that sentence-transformers puts behind a model.
PREPROCESSING = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("image_processor_config.json", "audio_tokenizer_config.json", "generation_config.json"),
    *("tokenizer.model", "tokenizer.model.v*", "tekken.json", "*.tiktoken", "spiece.model", "sentencepiece.model"),
    *("sentencepiece.bpe.model", "spm.model", "spm_char.model", "source.spm", "target.spm", "prophetnet.tokenizer"),
    *("vocab.json", "vocab.txt", "vocab.bpe", "vocab-src.json", "vocab-tgt.json", "entity_vocab.json"),
    *("target_vocab.json", "merges.txt", "bpe.codes", "dict.txt", "emoji.json", "normalizer.json", "byte_maps.json"),
    *("word_shape.json", "word_pronunciation.json"),
    *SENTENCE_MODULES,
)
# A base's licence and what it asks to be passed on, which a merge of it is under as well; as patterns of the hub.
LICENSES = (
    *("LICENSE", "LICENSE.*", "LICENSE-*", "LICENSE_*", "LICENCE", "LICENCE.*", "COPYING", "COPYING.*"),
    *("NOTICE", "NOTICE.*", "Notice", "Notice.*", "USE_POLICY.*", "USAGE_POLICY.*"),
)


def _expression(patterns: Iterable[str]) -> str:
    escaped = (re.escape(name).replace(r"\[1\-9\]", "[1-9]") for name in patterns)
    return "|".join(name.replace(r"\*", r"[\w-][\w.-]*") for name in escaped)


_PREPROCESSING, _LICENSES = _expression(PREPROCESSING), _expression(LICENSES)
_MODEL = "(tasks/[^/]+/)?((lora|model)/)?"
_OURS = re.compile(rf"{_MODEL}({_FILE}|{_PREPROCESSING}|{_LICENSES})|heads/[^/]+\.(safetensors|json)")
_CODE = re.compile(rf"{_MODEL}[\w-][\w.-]*\.py")


def is_preprocessing(path: str) -> bool:
    """Whether a file of a model's folder is of its tokenizer, processor or generation, by its path within."""
    return re.fullmatch(_PREPROCESSING, path) is not None


def is_license(path: str) -> bool:
    """Whether a file of a model's folder is of its licence, by its path within."""
    return re.fullmatch(_LICENSES, path) is not None


def is_weights(name: str) -> bool:
    """Whether a file of a model's folder is of its weights, or their index, by its name."""
    return re.fullmatch(_WEIGHTS, name) is not None


def is_ours(path: str) -> bool:
    """Whether a save could have written a file, by its path within the folder. A list that lies in a folder, of what
    was written there, is nobody's word: what it names beside these is a user's own.
    """
    return _OURS.fullmatch(path) is not None


def code_in(folder: Path, written: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the files of code among those ``written``, as a record keeps them."""
    return {path: sha256(folder / path) for path in sorted(written) if _CODE.fullmatch(path)}


def recorded(folder: Path, record: Mapping[str, Any]) -> set[str]:
    """Of the files that a record names, those that a save wrote: by their names, and code by its SHA-256, too, as it
    may be called anything.
    """
    named, code = {path for path in record["files"] if isinstance(path, str)}, record.get("code")
    known = code if isinstance(code, dict) else {}
    there = code_in(folder, (path for path in named & known.keys() if (folder / path).is_file()))
    return {path for path in named if is_ours(path) or (path in there and there[path] == known[path])}


def earlier_merge(out: Path) -> tuple[str | None, set[str]]:
    """Digest of the merge that an earlier save left in a folder, and what is its; nothing if there is none."""
    import yaml

    try:
        record = read_yaml(out / RECIPE_FILE)[RECORD]
        # The pictures may have been drawn later.
        return record["merge"], {*recorded(out, record), COEFFICIENTS_PLOT, RATIOS_PLOT, LOSSES_PLOT}
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        return None, set()


# What every file system takes for a name and can be told apart there, case aside: no dot in front or at the end, no
# name of a device of Windows, room for an ending.
_SIMPLE = re.compile(r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)(\.|$))[\w-]([\w.-]*[\w-])?")
_LONGEST = 200


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Each of some names -> a name for a file or folder that no other of them has, on any file system.

    A name of letters, digits, ``_``, ``-`` and ``.`` stands for itself. Any other, and those that differ from each
    other in case only, get a digest behind what is left of them: see :func:`marked`.
    """
    names = list(names)
    folded = Counter(map(_folded, dict.fromkeys(names)))
    return {name: name if _is_simple(name) and folded[_folded(name)] == 1 else marked(name) for name in names}


def task_folders(tasks: Iterable[str]) -> dict[str, str]:
    """Each task -> the folder, within the output, of the update that it alone has."""
    return {task: f"{TASKS_FOLDER}/{name}" for task, name in file_names(tasks).items()}


def marked(name: str) -> str:
    """``<what is simple in it>+<digest>``; no simple name has a ``+``."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:40]}+{digest}"


def refuse_inputs(inputs: Mapping[str, Path], folders: Iterable[Path]) -> None:
    """Refuse to write into a folder that something was merged of: what is there would be replaced by what follows from
    it.

    Args:
        inputs: what each is called -> its folder.
        folders: that files will be written to.
    """
    resolved = {folder.resolve(): folder for folder in folders}
    for name, place in inputs.items():
        folder = resolved.get(place.resolve())
        if folder is not None:
            raise ValueError(
                f"out: {folder} is the folder of {name}, whose files would be replaced; expected a folder that nothing "
                "was merged of"
            )


def refuse_mixture(out: Path, places: Iterable[str], formats: Sequence[str], *, nested: bool) -> None:
    """transformers adds an adapter that lies beside a model's weights to them: it would count twice."""
    for folder, name in ((out / place / (name if nested else ""), name) for place in places for name in formats):
        if name == "model" and os.path.lexists(folder / "adapter_config.json"):
            raise ValueError(f"out: {folder} holds an adapter (adapter_config.json); expected a folder without one")
        if name == "lora" and os.path.lexists(folder / "config.json"):
            raise ValueError(f"out: {folder} holds a model (config.json); expected a folder without one")


def refuse_pages(out: Path, merge: str | None, earlier: Set[str]) -> None:
    """Refuse to replace a recipe or a page that no save wrote.

    Args:
        out: the folder that is written to.
        merge: with ``earlier``, what :func:`earlier_merge` finds there.
    """
    left = merge is not None and any((out / path).is_file() for path in earlier - {RECIPE_FILE, CARD_FILE})
    for name in (RECIPE_FILE, CARD_FILE):
        if os.path.lexists(out / name) and not (left and name in earlier):
            raise ValueError(
                f"out: {out / name} is there and no earlier merge's, and would be replaced; expected a folder without "
                "it: choose another, or move the file"
            )


def found_as(folder: Path, name: str, ending: str = "") -> Path:
    """Where :func:`file_names` put ``name`` in ``folder``, whatever other names there were; there may be nothing."""
    place = folder / f"{marked(name)}{ending}"
    return folder / f"{name}{ending}" if _is_simple(name) and not place.exists() else place


def _is_simple(name: str) -> bool:
    short = len(name.encode("utf-8", "surrogatepass")) <= _LONGEST
    return short and unicodedata.is_normalized("NFC", name) and _SIMPLE.fullmatch(name) is not None


def _folded(name: str) -> str:
    """The same for names that some file system takes for one."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
