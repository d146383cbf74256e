"""Which rows of a linear's input are of tokens, and which of padding."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nsc_merge.models.block_finding import REDUCES
from nsc_merge.models.families import find_family
from nsc_merge.models.traits import encodes, type_of

_SIDE = re.compile(r"(?:^|[._])(encoder|decoder)(?:\.|$)")
# Keys and values of an attention to another sequence: T5, BART and those like it, ProphetNet, BERT as a decoder.
_OF_ENCODER = re.compile(r"(?:cross\w*|encoder_attn\w*|EncDecAttention)\.(?:\w+\.)*(?:k|v|key|value)(?:_proj)?$")
# Types of models that compute with [positions, rows, d], and in which of their modules they do.
_POSITIONS_FIRST = {"xlnet": ".layer.", "longformer": ".attention.self.", "led": ".longformer_self_attn."}
_POSITIONS_FIRST |= {"fsmt": "coder."}
# Types that put padding of their own behind the tokens, up to a multiple of what attends to one another.
_PADDING = ("longformer", "led", "big_bird", "bigbird_pegasus")
# Types that read an image's patches behind the tokens, of which no mask of tokens speaks.
_PATCHES_BEHIND = ("layoutlmv2", "layoutlmv3", "vilt")


class RealTokens:
    """Tells tokens from padding by the masks among a model's inputs, which is one for each side of an encoder-decoder.

    Args:
        model: that is run. Where it has no family, ``attention_mask`` is what transformers calls its mask.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, family = model, find_family(model)
        self._mask = family.mask if family else "attention_mask"
        # DiffusionGemma has two sides and does not say so.
        self._two_sided = encodes(model) or self._mask == "decoder_attention_mask"
        self._unmasked = f"{family.unmasked}." if family and family.unmasked else None

    def of(self, path: str, z: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        """Bool of the shape of ``z``, False at padding; None where no mask speaks of it, and all rows count.

        Args:
            path: of the linear.
            z: something that it has of every row of its input: ``[rows, tokens]``, ``[tokens, rows]`` or
                ``[rows * tokens]``, or of one head ``[rows, 1, tokens]``.
            inputs: of the model.
        """
        mask = of_tokens(mask_named(self._name(path), inputs))
        if mask is None:
            return None
        count, shape = mask.shape[1], without_heads(z.shape)
        if len(shape) > 1 and len(mask) in shape[:2]:
            count = shape[0] if positions_first(self._model, path) else shape[1]
        real = at_positions(self._model, mask, count).bool().to(z.device)
        # A router or an expert that all tokens go through sees the rows of all examples in one.
        views = [real, real.t(), real.flatten()]
        # Of as many rows as positions, the shape does not say which is which.
        views = views[1:] if positions_first(self._model, path) else views
        return next((view.reshape(z.shape) for view in views if view.shape == shape), None)

    def _name(self, path: str) -> str | None:
        if self._unmasked is not None and path.startswith(self._unmasked):
            return None
        if not self._two_sided:
            return self._mask
        side = _SIDE.search(path)
        of_encoder = side is not None and (side[1] == "encoder" or _OF_ENCODER.search(path) is not None)
        return "attention_mask" if of_encoder else "decoder_attention_mask"


def of_tokens(mask: Any) -> Tensor | None:
    """A mask, if it is one of tokens. In masks of more dimensions, which are added to attention scores, 0 lets a token
    through, and those of FlexAttention and of several kinds of layers are no tensors.
    """
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def rereads(inputs: Mapping[str, Any]) -> bool:
    """Whether the decoder of an encoder-decoder is given nothing to read: that of a classifier, as of T5 and BART,
    reads the encoder's text again.
    """
    return not any(name.startswith("decoder_") for name in inputs)


def mask_named(name: str | None, inputs: Mapping[str, Any]) -> Any:
    """The mask among a model's inputs, which of a decoder that reads the encoder's text again is the encoder's."""
    name = name.removeprefix("decoder_") if name is not None and rereads(inputs) else name
    return None if name is None else inputs.get(name)


def without_heads(shape: torch.Size) -> torch.Size:
    """A shape of rows and positions, without the one head between them for which DeepSeek's latents are."""
    return torch.Size([shape[0], *(size for size in shape[1:-1] if size != 1), shape[-1]]) if len(shape) > 2 else shape


def at_positions(model: nn.Module, mask: Tensor, count: int) -> Tensor:
    """A mask ``[rows, inputs]`` at the ``count`` positions that a model of sound makes of its inputs, as it does so
    itself, or that Longformer and its kind fill up with padding, and LayoutLM's and ViLT with an image; the mask as it
    is, of a model that makes one position of each input or where that gives other numbers of them.
    """
    kind = type_of(model)
    if kind in (*_PADDING, *_PATCHES_BEHIND) and mask.dim() == 2 and mask.shape[1] < count:
        return pad(mask, (0, count - mask.shape[1]), value=int(kind in _PATCHES_BEHIND))
    if mask.dim() != 2 or mask.shape[1] == count:
        return mask
    owner: Any = next((module for module in model.modules() if hasattr(module, REDUCES)), None)
    if owner is None:
        return mask
    # Behind the blocks there may be convolutions once more.
    taken = inspect.signature(getattr(owner, REDUCES)).parameters
    for options in ({"add_adapter": False}, {"add_adapter": True}) if "add_adapter" in taken else ({},):
        whole = owner._get_feat_extract_output_lengths(torch.tensor(mask.shape[1], device="cpu"), **options)
        if int(whole) == count:
            return getattr(owner, REDUCES)(count, mask.long(), **options)
    return mask


def positions_first(model: nn.Module, path: str) -> bool:
    """Whether the linear at ``path`` sees ``[positions, rows, d]``, as in XLNet, and not ``[rows, positions, d]``."""
    where = _POSITIONS_FIRST.get(type_of(model))
    return where is not None and where in path
