"""What a model says of itself, by its configuration, its methods and the signature of its forward."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

# Inputs of audio beside text, and what configurations call the token that stands in the text for it.
AUDIO = ("input_features", "input_values", "audio_input_features")
_HEARD = ("audio_token_id", "audio_token_index")
_TIED = "tie_word_embeddings"


def type_of(model: nn.Module) -> str:
    """What transformers calls the kind of a model, ``config.model_type``; nothing where it does not say."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def encodes(model: nn.Module) -> bool:
    """Whether an encoder reads the inputs, and a decoder writes from a start of its own (T5, BART, Whisper)."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def generates(model: nn.Module, config: Any) -> bool:
    """Whether it writes token after token."""
    return bool(getattr(config, "is_decoder", False) or getattr(model, "can_generate", lambda: False)())


def is_causal(model: nn.Module, config: Any) -> bool:
    """Whether it predicts the next token: generates, or has attention that says so."""
    attends = any(getattr(module, "is_causal", False) is True for module in model.modules())
    return generates(model, config) or has_vision_and_text(config) or attends


def has_vision_and_text(config: Any) -> bool:
    """Whether there is a part that reads images beside one that reads text."""
    return hasattr(config, "vision_config") and hasattr(config, "text_config")


def hears(model: nn.Module) -> bool:
    """Whether a model says a token, or a blank, of every frame (CTC)."""
    return any(kind.__name__.endswith("ForCTC") for kind in type(model).__mro__)


def has_two_towers(config: Any) -> bool:
    """Whether text and images, or text and sound, are read side by side, without a token in the text for the other."""
    sounds = hasattr(config, "audio_config") and hasattr(config, "text_config")
    heard = any(hasattr(config, name) for name in _HEARD)
    return (has_vision_and_text(config) or sounds) and not (has_image_token(config) or heard)


def has_image_token(config: Any) -> bool:
    """Whether a token of the text says where an image is."""
    return any(hasattr(config, name) for name in ("image_token_id", "image_token_index"))


def image_token_of(model: nn.Module) -> int | None:
    """The token of a text that says where an image is."""
    return getattr(getattr(model, "config", None), "image_token_id", None)


def places_of(model: nn.Module) -> dict[str, int]:
    """Input of images or audio -> the token of a text that says where one is."""
    config = getattr(model, "config", None)
    heard = next((token for name in _HEARD if (token := getattr(config, name, None)) is not None), None)
    places = {"pixel_values": image_token_of(model), **dict.fromkeys(AUDIO, heard)}
    return {name: token for name, token in places.items() if token is not None}


def main_input(model: nn.Module) -> str | None:
    """What a model of transformers is about; of several, as OneFormer's images and tasks, the first."""
    main = getattr(model, "main_input_name", None)
    return next(iter(main), None) if isinstance(main, (list, tuple)) else main


def arguments(module: nn.Module) -> list[str]:
    """The arguments of a forward."""
    return list(inspect.signature(module.forward).parameters)


def needed(module: nn.Module) -> set[str]:
    """The arguments that a forward does not do without."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = inspect.signature(module.forward).parameters.values()
    return {one.name for one in given if one.kind in kinds and one.default is inspect.Parameter.empty}


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The embeddings of a model's tokens, where it says so."""
    return asked(model, "get_input_embeddings")


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """What makes logits of the last hidden state, where the model says so."""
    return asked(model, "get_output_embeddings")


def classifiers(model: nn.Module) -> list[nn.Module]:
    """What makes logits of the last features, where a model of timm, or a part of the model, says so; distilled ones
    have two. In what reads text that is a tower of images, and its classifier none of the model's.
    """
    if "input_ids" in arguments(model):
        return []
    found = [_answer(module, "get_classifier") for module in model.modules()]
    parts = [part for one in found for part in (one if isinstance(one, (tuple, list)) else [one])]
    return [part for part in parts if isinstance(part, nn.Module)]


def asked(model: nn.Module, method: str) -> nn.Module | None:
    """What a model gives as one of its parts, where it has such a method and does."""
    part = _answer(model, method)
    return part if isinstance(part, nn.Module) else None


def _answer(model: nn.Module, method: str) -> Any:
    try:
        return getattr(model, method, lambda: None)()
    except (AttributeError, NotImplementedError, TypeError):
        # Those of transformers that have no such part may raise; others may mean something else by the name.
        return None


def configs_to_untie(model: Any) -> list[Any]:
    """The configurations of a model that say whether its weights are tied and nothing else by it.

    The forwards of SwitchTransformers, UMT5 and UDOP divide the head's inputs by the root of their width where
    ``tie_word_embeddings`` is set. Their weights become separate without it: transformers does not tie what it finds
    with different numbers in a checkpoint, whatever the configuration says.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, _TIED):
        return []
    read = {id(getattr(module, "config", None)) for module in model.modules() if _reads_it_itself(type(module))}
    text = getattr(config, "get_text_config", lambda: config)()
    return [one for number, one in {id(config): config, id(text): text}.items() if number not in read]


def _reads_it_itself(kind: type[nn.Module]) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and _TIED in code.co_names
