"""What a model's forward makes of its weights being tied, beside that they are."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_FLAG = "tie_word_embeddings"


def configs_to_untie(model: Any) -> list[Any]:
    """The configurations of a model that say whether its weights are tied and nothing else by it.

    The forwards of SwitchTransformers, UMT5 and UDOP divide the head's inputs by the root of their width where
    ``tie_word_embeddings`` is set. Their weights become separate without it: transformers does not tie what it finds
    with different numbers in a checkpoint, whatever the configuration says.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, _FLAG):
        return []
    read = {id(getattr(module, "config", None)) for module in model.modules() if _reads_the_flag(type(module))}
    text = getattr(config, "get_text_config", lambda: config)()
    return [one for number, one in {id(config): config, id(text): text}.items() if number not in read]


def _reads_the_flag(kind: type[nn.Module]) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and _FLAG in code.co_names
