"""What a base model takes, and the tokenizer or processor that lies beside it or is named."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.models.bases.architecture import architecture_of
from nsc_merge.models.traits import AUDIO, has_two_towers
from nsc_merge.utils.errors import hub_problem
from nsc_merge.utils.option_checks import is_hub_id

# Key of the settings -> the files of which one is there where what it names is saved.
_FILES = {
    "tokenizer": ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json"),
    "processor": ("preprocessor_config.json", "processor_config.json"),
}
# RoBERTa and its kin, as fairseq had them: the first token's position is the one behind the padding token's number.
_BEHIND_PADDING = frozenset(
    (
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "xmod", "esm", "ibert"),
        *("data2vec-text", "longformer", "mpnet", "luke", "lilt", "markuplm"),
    )
)


@dataclass(frozen=True)
class Base:
    """What data have to be made for.

    Attributes:
        name: folder or hub id, beside which tokenizer and processor are looked for; empty if it is not known.
        revision: of one on the hub.
        config: of transformers.
        takes: names of the inputs of its forward.
        writes: whether it has a decoder behind an encoder that begins a text of its own, rather than read that of the
            encoder once more, for a head (classifiers).
        words: whether it classifies tokens, and reads lists of words, which data of such models are.
    """

    name: str
    revision: str | None
    config: Any
    takes: frozenset[str]
    writes: bool = False
    words: bool = False

    @property
    def text(self) -> bool:
        return "input_ids" in self.takes

    @property
    def images(self) -> bool:
        return "pixel_values" in self.takes

    @property
    def audio(self) -> bool:
        """Whether it runs on audio: alone, with a text for its decoder where it has one; or in the midst of text."""
        if self.text:
            return not self.decodes and bool(self.takes.intersection(AUDIO))
        return bool(self.takes.intersection(AUDIO)) and not self.takes & {"pixel_values", "decoder_input_values"}

    @property
    def audio_files(self) -> bool:
        """Whether a folder or list of files is one of audio, and not of images."""
        return self.audio and not self.images

    @property
    def decodes(self) -> bool:
        """Whether it has a decoder behind an encoder, each with inputs of its own."""
        return "decoder_input_ids" in self.takes

    @property
    def start(self) -> int | None:
        """The token that begins what a decoder behind an encoder reads."""
        places = (self.config, self.config.get_text_config())
        found = (getattr(one, "decoder_start_token_id", None) for one in places)
        return next((number for number in found if isinstance(number, int)), None)

    @property
    def grey(self) -> bool:
        """Whether its images have one channel."""
        return getattr(getattr(self.config, "vision_config", self.config), "num_channels", None) == 1

    @property
    def positions(self) -> int | None:
        """Tokens that it has positions for."""
        config = self.config.get_text_config()
        # The first is Whisper's, of its decoder.
        found = getattr(config, "max_target_positions", getattr(config, "max_position_embeddings", None))
        if not isinstance(found, int) or found <= 0:
            return None
        return found - (config.pad_token_id or 0) - 1 if config.model_type in _BEHIND_PADDING else found

    @property
    def whole(self) -> int | None:
        """Tokens that every text is filled up to for SigLIP, which was trained so: it sees the filling, and its last
        token says what the text is.
        """
        return self.positions if "siglip" in self.config.model_type else None

    @property
    def apart(self) -> bool:
        """Whether it reads text and images beside each other, and always both."""
        return self.images and has_two_towers(self.config)

    @property
    def in_front(self) -> bool:
        """Whether its processor puts the one image of a text in front of it by itself (Florence-2)."""
        return bool(self.config.model_type == "florence2")

    @property
    def image_token(self) -> int | None:
        """What stands for a piece of an image, in a model of text and images."""
        return getattr(self.config, "image_token_id", None) if self.images else None

    @property
    def audio_token(self) -> int | None:
        """The same of audio."""
        names = ("audio_token_id", "audio_token_index")
        return next((found for name in names if (found := getattr(self.config, name, None)) is not None), None)

    @property
    def vocabulary(self) -> int | None:
        found = getattr(self.config.get_text_config(), "vocab_size", None)
        return found if isinstance(found, int) else None


def base_of(base: Any, revision: str | None, settings: DataSettings, argument: str) -> Base:
    """What a folder, a hub id or a loaded model takes.

    Raises:
        ValueError, OSError: if there is no such model, or if its inputs cannot be made of raw data.
    """
    if isinstance(base, (str, Path)):
        name = str(base)
        if not Path(name).is_dir() and not is_hub_id(name):
            raise FileNotFoundError(f"model: {name} is missing; expected a folder or a hub id owner/name")
        found = architecture_of(
            name, local=Path(name).is_dir(), revision=revision, trust_remote_code=settings.trust_remote_code
        )
        # Whatever is uploaded meanwhile, the tokenizer is that of the same commit.
        kind = _class(found)
        config, forward, revision = found.config, kind.forward, found.revision
    else:
        kind = type(base)
        config, forward = getattr(base, "config", None), getattr(base, "forward", None)
        if config is None or forward is None:
            given = type(base).__name__
            raise ValueError(f"model: expected a model of transformers, its folder or its hub id, found {given}")
        name = str(getattr(config, "_name_or_path", "") or "")
    parameters = inspect.signature(forward).parameters.values()
    takes = frozenset(one.name for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD)
    writes = "decoder_input_ids" in takes and _writes(kind, config)
    # Layouts have a box of every word, and images, which are in no list of them.
    words = classifies_tokens(kind) and not takes & {"bbox", "pixel_values"}
    made = Base(name, revision, config, takes, writes, words)
    # Processors of text and images for an encoder place them each in its own way.
    in_text = made.decodes and made.text and made.images and not made.in_front
    if in_text or not (made.text or made.images or made.audio):
        raise ValueError(
            f"{argument}: a {config.model_type} does not run on text, images or audio alone (it takes "
            f"{', '.join(sorted(takes))}); write its inputs as .safetensors"
        )
    if made.decodes and made.start is None:
        raise ValueError(
            f"{argument}: the configuration of {name or kind.__name__} has no decoder_start_token_id, with which its "
            "decoder begins; set it, or write the inputs as .safetensors, decoder_input_ids among them"
        )
    return made


def classifies_tokens(kind: type) -> bool:
    """Whether a class of models says a class of every token, by what transformers calls such models."""
    return any(one.__name__.endswith("ForTokenClassification") for one in kind.__mro__)


def _writes(kind: Any, config: Any) -> bool:
    """Whether a class has a language model's head, or none."""
    import transformers

    bare = transformers.MODEL_MAPPING.get(type(config), None)
    return getattr(kind, "can_generate", bool)() or kind is bare


def _class(architecture: Any) -> Any:
    """The class of a model; configurations that name none are of the bare model."""
    import transformers

    if architecture.kind is transformers.AutoModel:
        return transformers.MODEL_MAPPING[type(architecture.config)]
    return architecture.kind


def tokenizer_of(base: Base, settings: DataSettings, argument: str) -> Any:
    """The tokenizer that is named, or lies beside the base; never one that would be added to."""
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer, "tokenizer", base, settings, argument)


def image_processor_of(base: Base, settings: DataSettings, argument: str) -> Any:
    """The image processor that is named, or lies beside the base."""
    from transformers import AutoImageProcessor

    return _loaded(AutoImageProcessor, "processor", base, settings, argument)


def feature_extractor_of(base: Base, settings: DataSettings, argument: str) -> Any:
    """The feature extractor of audio that is named, or lies beside the base."""
    from transformers import AutoFeatureExtractor

    found = _loaded(AutoFeatureExtractor, "processor", base, settings, argument)
    if not isinstance(getattr(found, "sampling_rate", None), int):
        raise ValueError(
            f"{argument}: {settings.processor or base.name} holds a {type(found).__name__}, which has no "
            "sampling_rate; expected a feature extractor of audio, which processor: FOLDER names"
        )
    return found


def extractor_in(processor: Any) -> Any:
    """The feature extractor of audio in a processor; None where there is none that says its rate."""
    found = (getattr(processor, name, None) for name in ("feature_extractor", "audio_processor"))
    return next((one for one in found if isinstance(getattr(one, "sampling_rate", None), int)), None)


def processor_of(base: Base, settings: DataSettings, argument: str) -> Any:
    """The processor of text and images or audio that is named, or lies beside the base; a tokenizer that is named is
    put in.
    """
    from transformers import AutoProcessor

    found = _loaded(AutoProcessor, "processor", base, settings, argument)
    name = settings.processor or base.name
    media = "images" if base.images else "audio"
    parts = ("image_processor",) if base.images else ("feature_extractor", "audio_processor")
    if not hasattr(found, "tokenizer") or not any(hasattr(found, part) for part in parts):
        raise ValueError(
            f"{argument}: {name} holds a {type(found).__name__} alone; expected a processor of text and {media}, which "
            "processor: FOLDER names"
        )
    if getattr(found, "patch_size", "") is None:
        raise ValueError(
            f"{argument}: the processor of {name} does not say patch_size, vision_feature_select_strategy and "
            "num_additional_image_tokens, as those of old releases do not; set them and save it again"
        )
    if settings.tokenizer is not None:
        found.tokenizer = tokenizer_of(base, settings, argument)
    return found


def _loaded(kind: Any, what: str, base: Base, settings: DataSettings, argument: str) -> Any:
    """By a class of transformers, what the key ``what`` names, or what lies beside the base."""
    files, given = _FILES[what], getattr(settings, what)
    name = base.name if given is None else given
    place = f"{argument}: {'beside the base' if given is None else what}"
    folder = Path(name)
    local = folder.is_dir()
    if not name:
        raise ValueError(f"{argument}: the model does not say where it is from; name a folder with {what}")
    if not local and not is_hub_id(name):
        raise FileNotFoundError(f"{place}: {name} is missing; expected a folder or a hub id owner/name")
    # Of timm's models transformers has the processor in config.json, and saves none.
    within = what == "processor" and given is None and getattr(base.config, "model_type", "") == "timm_wrapper"
    if local and not within and not any((folder / file).is_file() for file in files):
        # transformers would make an empty one for some models.
        raise FileNotFoundError(
            f"{place}: {name} holds no {what} ({' or '.join(files[:2])}); name a folder that does: {what}: FOLDER"
        )
    revision = base.revision if name == base.name and not local else None
    try:
        # Where a class needs a package that is not installed, it says so once it is asked for anything.
        return kind.from_pretrained(
            name, local_files_only=local, trust_remote_code=settings.trust_remote_code,
            **({} if revision is None else {"revision": revision}),
        )  # fmt: skip
    except Exception as error:
        # Of many files in many formats: whatever is raised, it could not be loaded.
        problem = None if local else hub_problem(error, place, name, revision)
        reason = f"{place}: the {what} of {name} cannot be loaded: {' '.join(str(error).split()):.300}"
        raise ValueError(problem or reason) from None
