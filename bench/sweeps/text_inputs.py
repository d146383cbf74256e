"""A batch of two texts of unequal lengths for a model of text, by what its ``forward`` takes."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

TOKENS, ANSWERS = 11, 5


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Tokens and mask, padded on the right, and an answer for an encoder-decoder."""
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 80, (2, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    if "attention_mask" in takes:
        mask[1, -3:] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    if "decoder_input_ids" in takes and "SequenceClass" in type(model).__name__:
        # Answered where the text ends, which a decoder reads too.
        ids[torch.arange(2), mask.sum(1) - 1] = getattr(model.config, "eos_token_id", None) or 1
    elif "decoder_input_ids" in takes:
        found["decoder_input_ids"] = torch.randint(3, 80, (2, ANSWERS), generator=generator)
    return {name: value for name, value in found.items() if name in takes}
