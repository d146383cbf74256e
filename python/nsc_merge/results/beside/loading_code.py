"""Code on a model card that loads and runs the merge that lies beside it, and no other."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nsc_merge.models.bases.loading import base_name, commit_of
from nsc_merge.models.bases.sharded import own_class
from nsc_merge.results.beside.uses import SPEECH, TO_TEXT, Use, inputs_of, reads_and_hears, use_of
from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.option_checks import is_hub_id

# Tag -> what its pipeline prepares inputs with, and is tried on.
_PIPELINES = {
    "text-classification": (("tokenizer",), '"A sentence."'),
    "token-classification": (("tokenizer",), '"A sentence."'),
    "image-classification": (("image_processor",), '"picture.png"'),
    "image-segmentation": (("image_processor",), '"picture.png"'),
    "object-detection": (("image_processor",), '"picture.png"'),
    "zero-shot-object-detection": (
        ("tokenizer", "image_processor"),
        '"picture.png", candidate_labels=["a cat", "a dog"]',
    ),
    "depth-estimation": (("image_processor",), '"picture.png"'),
    "video-classification": (("image_processor",), '"video.mp4"'),
    "zero-shot-image-classification": (
        ("tokenizer", "image_processor"),
        '"picture.png", candidate_labels=["a cat", "a dog"]',
    ),
    SPEECH: (("tokenizer", "feature_extractor"), '"speech.wav"'),
    "audio-classification": (("feature_extractor",), '"speech.wav"'),
}
# Tag -> what its pipeline does, where that is not to classify.
_DOES = {
    SPEECH: "transcribe",
    "object-detection": "detect",
    "zero-shot-object-detection": "detect",
    "depth-estimation": "estimate",
}
_AUTOS = {
    "tokenizer": "AutoTokenizer",
    "image_processor": "AutoImageProcessor",
    "feature_extractor": "AutoFeatureExtractor",
}


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in a folder has a template that is taken where none is named; it has a configuration."""
    if any((folder / f"chat_template.{ending}").is_file() for ending in ("jinja", "json")):
        return True
    file = folder / "tokenizer_config.json"
    try:
        settings = from_json(file.read_bytes(), file.name, not_finite=True)
    except ValueError:  # which no tokenizer is read from either
        return False
    found = settings.get("chat_template") if isinstance(settings, dict) else None
    if isinstance(found, list):
        return any(isinstance(one, dict) and one.get("name") == "default" for one in found)
    return bool(found)


@dataclass(frozen=True)
class Base:
    """Where the base lies that an adapter is put on.

    Attributes:
        name: its folder or hub id; None of a model that somebody made, or changed, in memory.
        revision: on the hub.
    """

    name: str | None
    revision: str | None = None

    @staticmethod
    def of(model: nn.Module, revision: Any = None) -> Base:
        name = base_name(model)
        if name and Path(name).is_dir():
            return Base(str(Path(name).resolve()))
        if not is_hub_id(name):
            return Base(None)
        commit = commit_of(model)
        return Base(name, revision if isinstance(revision, str) else commit)


@dataclass(frozen=True)
class Saved:
    """One format of a merge, as it was written.

    Attributes:
        format: ``"lora"`` or ``"model"``.
        place: its folder within that of the merge, ``"."`` if it is the same.
        folder: where its files lie while they are written.
        kind: class of the model that it is loaded as.
        base: that it was merged on.
        labels: file with the classes of the head that was put in, for a base that has no such head.
        home: where a class that transformers lacks is imported from.
        remote: auto class of transformers that loads the base with code that comes with it.
        prompts: whether its text says where an image is, by a token.
        tokens: how many embeddings there are of, where the merge has more than the base.
    """

    format: str
    place: str
    folder: Path
    kind: str
    base: Base
    labels: str | None = None
    home: str = "transformers"
    remote: str | None = None
    prompts: bool = True
    tokens: int | None = None

    @property
    def _use(self) -> Use | None:
        return use_of(self.kind, self.remote)

    @property
    def auto(self) -> str:
        return self.remote or (self._use.auto if self._use else self.kind)

    @property
    def _reads_and_hears(self) -> bool:
        return self._use is not None and self.remote is None and reads_and_hears(self.kind)

    @property
    def _imported(self) -> str:
        return f"from {'transformers' if self.remote or self._use else self.home} import {self.auto}"

    @property
    def _trusting(self) -> list[str]:
        return ["trust_remote_code=True"] if self.remote else []

    @property
    def _quoted(self) -> str:
        return quoted(self.place)

    @property
    def _beside(self) -> str:
        """Arguments that load what turns raw data into inputs: its code may come with the base, too."""
        return ", ".join([self._quoted, *self._trusting])

    def loading(self) -> list[str]:
        """Lines that make ``model`` of it."""
        if self.format == "model":
            return [self._imported, f"model = {self._from_pretrained([self._quoted, *self._trusting])}"]
        lines = ["from peft import PeftModel"]
        if self.base.name is not None:
            lines += labels_of(self.labels) if self.labels else []
            lines += self.base_model(["num_labels=len(labels)", "id2label=labels"] if self.labels else [])
        lines += self._resized("base_model")
        return [*lines, f"model = PeftModel.from_pretrained(base_model, {self._quoted})"]

    def _resized(self, base: str) -> list[str]:
        return [] if self.tokens is None else [f"{base}.resize_token_embeddings({self.tokens})"]

    def base_model(self, settings: Iterable[str]) -> list[str]:
        """Lines that make ``base_model`` of the base, with settings of its head if there are any."""
        given = [quoted(str(self.base.name))]
        given += [] if self.base.revision is None else [f"revision={quoted(self.base.revision)}"]
        given += [*self._trusting, *settings, *(["ignore_mismatched_sizes=True"] if settings else [])]
        return [self._imported, f"base_model = {self._from_pretrained(given)}"]

    def _from_pretrained(self, given: list[str]) -> str:
        """The call, over several lines where there are settings."""
        if len(given) == 1:
            return f"{self.auto}.from_pretrained({given[0]})"
        return "\n".join([f"{self.auto}.from_pretrained(", *(f"    {one}," for one in given), ")"])

    def with_a_head(self, file: str, labels: str, *, whole: bool) -> list[str]:
        """Lines that make ``model`` of it with a head that the base has no place for.

        Args:
            file: of the head.
            labels: its classes.
            whole: whether an adapter is of the class with the head, and not of the trunk in it.
        """
        settings = ["num_labels=len(labels)", "id2label=labels"]
        put = f"model.load_state_dict(load_file({quoted(file)}), strict=False)"
        lines = ["from safetensors.torch import load_file", *labels_of(labels), self._imported]
        if self.format == "model":
            return [*lines, f"model = {self._from_pretrained([self._quoted, *settings])}", put]
        onto = "model" if whole else "model.base_model"
        made = [line.replace("base_model =", "model =", 1) for line in self.base_model(settings)]
        # Not a PeftModel: that of the adapter's task type would take the class for another.
        return [*lines, *made, *self._resized("model"), put, f"{onto}.load_adapter({self._quoted})"]

    def using(self, *, made: bool) -> list[str]:
        """Lines that run it on an example; none where no tokenizer or processor lies beside it.

        Args:
            made: whether ``model`` is there already, so that it is run and not what the folder holds.
        """
        tag = self._use.tag if self._use else ""
        text = (self.folder / "tokenizer_config.json").is_file()
        others = any((self.folder / f"{name}_config.json").is_file() for name in ("preprocessor", "processor"))
        speaks = tag == SPEECH and self._reads_and_hears
        if tag in _PIPELINES and not speaks:
            needed, example = _PIPELINES[tag]
            there = all(text if name == "tokenizer" else others for name in needed)
            return self._pipeline(tag, needed, example, made=made) if there else []
        if (tag == "text-generation" or self.auto == TO_TEXT or speaks) and text:
            return self._generating()
        if tag == "image-text-to-text" and text and others and self.prompts:
            return self._describing()
        if tag == "feature-extraction":
            taken = inputs_of(self.kind)
            if text and "input_ids" in taken and not taken & {"pixel_values", "decoder_input_ids"}:
                return self._features(images=False)
            if others and "pixel_values" in taken and "input_ids" not in taken:
                return self._features(images=True)
        return []

    def _pipeline(self, tag: str, needed: tuple[str, ...], example: str, *, made: bool) -> list[str]:
        done = _DOES.get(tag, "classify")
        called = [f"print({done}({example}))"]
        if not made:
            return ["from transformers import pipeline", f'{done} = pipeline("{tag}", model={self._beside})', *called]
        return [
            f"from transformers import {', '.join([*(_AUTOS[name] for name in needed), 'pipeline'])}",
            *(f"{name} = {_AUTOS[name]}.from_pretrained({self._beside})" for name in needed),
            f'{done} = pipeline("{tag}", {", ".join(f"{name}={name}" for name in ("model", *needed))})',
            *called,
        ]

    def _generating(self) -> list[str]:
        told = 'tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)'
        if has_chat_template(self.folder):
            told = (
                'tokenizer.apply_chat_template(\n    [{"role": "user", "content": "Hello!"}],\n'
                '    add_generation_prompt=True, return_dict=True, return_tensors="pt",\n)'
            )
        return ["from transformers import AutoTokenizer", *self._generated("AutoTokenizer", "tokenizer", told)]

    def _describing(self) -> list[str]:
        imports = ["from transformers import AutoProcessor"]
        if has_chat_template(self.folder):
            told = (
                'processor.apply_chat_template(\n    [{"role": "user", "content": [\n'
                '        {"type": "image", "path": "picture.png"},\n'
                '        {"type": "text", "text": "What is shown?"},\n    ]}],\n'
                '    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",\n)'
            )
        else:
            imports += ["from PIL import Image"]
            told = (
                'processor(\n    images=Image.open("picture.png").convert("RGB"),\n'
                '    text=f"USER: {processor.image_token}\\nWhat is shown? ASSISTANT:",\n    return_tensors="pt",\n)'
            )
        return [*imports, *self._generated("AutoProcessor", "processor", told)]

    def _generated(self, auto: str, name: str, told: str) -> list[str]:
        # What a decoder writes stands behind what it was given.
        apart = self.auto == TO_TEXT and not self._reads_and_hears
        written = "tokens[0]" if apart else 'tokens[0, inputs["input_ids"].shape[1] :]'
        return [
            f"{name} = {auto}.from_pretrained({self._beside})",
            f"inputs = {told}",
            "tokens = model.generate(**inputs.to(model.device), max_new_tokens=32)",
            f"print({name}.decode({written}, skip_special_tokens=True))",
        ]

    def _features(self, *, images: bool) -> list[str]:
        auto, imports, told = "AutoTokenizer", [], '"A sentence."'
        if images:
            auto, imports = "AutoImageProcessor", ["from PIL import Image"]
            told = 'Image.open("picture.png").convert("RGB")'
        return [
            *imports,
            f"from transformers import {auto}",
            f"prepare = {auto}.from_pretrained({self._beside})",
            f'features = model(**prepare({told}, return_tensors="pt")).last_hidden_state',
        ]


# Not load_state_dict: tasks have heads of other sizes than the base.
_PUT = """\
for name, value in load_file({file}).items():
    path, _, parameter = name.rpartition(".")
    layer = model.get_submodule(path)
    setattr(layer, parameter, torch.nn.Parameter(value.to(layer.weight)))"""


def putting(file: str, labels: str | None) -> list[str]:
    """Lines that put a head into a ``model`` that has a place for it, and its classes into the configuration."""
    lines = ["import torch", "from safetensors.torch import load_file", _PUT.format(file=quoted(file))]
    if labels is None:
        return lines
    inverse = "{label: number for number, label in labels.items()}"
    return [*lines, *labels_of(labels), f"model.config.id2label, model.config.label2id = labels, {inverse}"]


def labels_of(file: str) -> list[str]:
    """Lines that make ``labels`` of the classes of a head."""
    opened = f'with open({quoted(file)}, encoding="utf-8") as file:'
    numbered = '{int(number): label for number, label in json.load(file)["id2label"].items()}'
    return ["import json", f"{opened}\n    labels = {numbered}"]


def origin_of(model: nn.Module) -> tuple[str, str | None]:
    """``home`` and ``remote`` of :class:`Saved` for a model's class."""
    import transformers

    kind = own_class(model)
    if kind.__module__.startswith("transformers_modules."):
        autos = getattr(getattr(model, "config", None), "auto_map", None) or {}
        known = (auto for auto, place in autos.items() if auto.startswith("AutoModel") and kind.__name__ in str(place))
        return kind.__module__, next(known, None)
    return ("transformers" if hasattr(transformers, kind.__name__) else kind.__module__), None


def block(lines: Iterable[str]) -> str:
    """A block of Python in Markdown: what is imported first, in one line a module, then the rest."""
    lines = list(lines)
    whole = sorted({line for line in lines if line.startswith("import ")})
    taken: dict[str, set[str]] = {}
    for line in lines:
        if line.startswith("from "):
            module, names = line.removeprefix("from ").split(" import ")
            taken.setdefault(module, set()).update(names.split(", "))
    imports = [*whole, *(f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(taken.items()))]
    rest = [line for line in lines if not line.startswith(("import ", "from "))]
    return "\n".join(["```python", *imports, *([""] if imports and rest else []), *rest, "```", ""])


def quoted(value: str) -> str:
    """As Python takes it, whatever it holds."""
    return json.dumps(value, ensure_ascii=False)
