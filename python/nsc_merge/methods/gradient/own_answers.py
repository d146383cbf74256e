"""Answers that tasks' own models write, greedily, along which a merged model is then compared with them.

Sequence-level knowledge distillation (Kim and Rush, arXiv 1606.07947) with a teacher's most likely answer; theirs is
found by beam search, and learnt as a label, where here all that the teacher predicts along it counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nsc_merge.calibration.forward_passes import Pass
from nsc_merge.models.families import Family
from nsc_merge.processes.group import current
from nsc_merge.utils.option_checks import check_count

NewTokens = int | Mapping[str, int]

# How the inputs begin that a decoder behind an encoder has.
_DECODERS = "decoder_"
# Answers up to this are written by whole forwards: another takes two of them, to be sure of the cache.
_SHORT = 3


def check_new_tokens(new_tokens: Any, tasks: Sequence[str] | None = None) -> None:
    """Refuse what is no count, nor a mapping to some, and counts for other than ``tasks``, where they are known.

    Raises:
        ValueError: naming the task, what was found and what was expected.
    """
    if not isinstance(new_tokens, Mapping):
        check_count("new_tokens", new_tokens)
        return
    for task, count in new_tokens.items():
        if tasks is not None and task not in tasks:
            raise ValueError(f"new_tokens: expected counts for some of {list(tasks)}, found one for {task!r}")
        check_count(f"new_tokens[{task!r}]", count)


def end_tokens(model: nn.Module) -> list[int]:
    """Numbers of the tokens that end an answer, as the model's generation config has them, or else its config; none
    where neither says.
    """
    config = getattr(model, "config", None)
    # Of a model of text and images, the text's config.
    configs = [getattr(model, "generation_config", None), config, getattr(config, "text_config", None)]
    ends = [getattr(one, "eos_token_id", None) for one in configs]
    found: int | Sequence[int] = next((one for one in ends if one is not None), [])
    return [found] if isinstance(found, int) else list(found)


@dataclass(frozen=True)
class Answered:
    """Answers after the last tokens of a pass's rows.

    Attributes:
        inputs: tokens and mask of the rows with their answers, but for an answer's last token, which nothing is
            predicted from. They take the place of those of the pass.
        predicts: ``[rows, tokens]`` bool, where a token of the answer is predicted.
        weights: of those places, in order: all rows weigh alike, and so do the tokens of one. They add up to 1.
    """

    inputs: dict[str, Tensor]
    predicts: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Writing:
    """How answers are written.

    Attributes:
        tokens: name of the input ``[rows, tokens]`` of token numbers.
        mask: name of the input of the same shape that is 0 at padding.
        ends: numbers of the tokens that end an answer, which are its last.
    """

    tokens: str
    mask: str
    ends: Sequence[int]

    def __call__(
        self, predict: Callable[[Mapping[str, Any]], Tensor], one: Pass, most: int, model: nn.Module | None = None
    ) -> Answered | None:
        """Append to every row what is most likely to follow. Without gradients.

        Args:
            predict: gives logits ``[rows, tokens, V]`` of a model's inputs.
            model: whose logits these are. What it keeps of tokens that it has read (its key-value cache) then saves
                reading them again for every token, where the next one comes out the same.
            one: the pass; tokens after a row's last real one are padding.
            most: how many tokens an answer has at most, its end among them. Of 1 nothing is appended, and None is
                returned.

        Processes that share the work run ``predict`` equally often, until the answers of all have ended.

        Raises:
            ValueError: if another input has a value for every token, which those of an answer would not have.
        """
        if most == 1:
            with torch.no_grad():
                while current().any(False):
                    predict(one.inputs)
            return None
        ids, real = self._read(one)
        width = ids.shape[1]
        last = torch.where(real.bool(), torch.arange(width, device=ids.device), 0).amax(1)
        rows = torch.arange(len(ids), device=ids.device)
        ids, real = (pad(value, (0, most - 1)) for value in (ids, real))
        length = torch.ones_like(last)
        going = torch.ones_like(last, dtype=torch.bool)
        keeps = most > _SHORT and _keeps(model)
        keeping = _Keeping(model, self.tokens, self.mask, real[:, :width]) if keeps else None
        with torch.no_grad():
            while current().any(bool(going.any())):
                seen = max(width, int((last + length).max()))
                inputs = {**one.inputs, self.tokens: ids[:, :seen], self.mask: real[:, :seen]}
                at = last + length - 1
                following = None if keeping is None else keeping.after(inputs, at)
                # The first token that is read alone is read with all others, too: positions, masks and what is kept
                # are the model's matter.
                if following is None or (keeping is not None and keeping.count == 2):
                    logits = predict(inputs)
                    if not going.any():
                        continue
                    if logits.dim() != 3 or logits.shape[1] != seen:
                        raise ValueError(
                            "new_tokens: answers are written from logits [N, T, V] at every token, here "
                            f"[{len(ids)}, {seen}, V], found {list(logits.shape)}"
                        )
                    whole = logits[rows, at]
                    if following is not None and not _agree(following[going], whole[going]):
                        keeping = None
                    following = whole
                token = following.argmax(-1)
                going = going & ~torch.isin(token, torch.tensor(self.ends, dtype=token.dtype, device=token.device))
                place = (rows[going], (last + length)[going])
                ids[place], real[place] = token[going].to(ids), 1
                length = length + going
                going = going & (length < most)
        seen = max(width, int((last + length).max()))
        ids, real = ids[:, :seen], real[:, :seen]
        places = torch.arange(seen, device=ids.device) - last[:, None]
        predicts = (places >= 0) & (places < length[:, None])
        # Of whole numbers division makes torch's default dtype, which may be a narrow one.
        weights = (1.0 / (length * len(ids)).float())[:, None].expand_as(predicts)[predicts]
        return Answered({self.tokens: ids, self.mask: real}, predicts, weights)

    def _read(self, one: Pass) -> tuple[Tensor, Tensor]:
        """Tokens and mask of a pass, which has nothing else for every token."""
        ids = one.inputs.get(self.tokens)
        if ids is None:
            raise ValueError(f"calibration: answers are written after {self.tokens}, found only {sorted(one.inputs)}")
        real = one.inputs.get(self.mask)
        # An encoder reads the text apart from the answer, and may have as many tokens.
        beside = _DECODERS if self.tokens.startswith(_DECODERS) else ""
        for name, value in one.inputs.items():
            other = name.startswith(beside) and name not in (self.tokens, self.mask)
            if other and getattr(value, "shape", ())[:2] == ids.shape:
                raise ValueError(
                    f"calibration: answers are written after {self.tokens} and {self.mask} alone, found {name!r} with "
                    f"a value for every token, {list(value.shape)}; expected batches without it"
                )
        return ids, torch.ones_like(ids) if real is None else real


class _Keeping:
    """A model that keeps what it has read (its key-value cache), so that every further token is read alone.

    Args:
        model: it.
        tokens: name of the input of token numbers.
        mask: name of the input that is 0 at padding.
        real: its value of the texts.
    """

    def __init__(self, model: Any, tokens: str, mask: str, real: Tensor) -> None:
        self._model, self._tokens, self._mask, self._real = model, tokens, mask, real.clone()
        self._name = _cache_of(model)
        self._kept: Any = None
        self.count = 0

    def after(self, inputs: Mapping[str, Any], places: Tensor) -> Tensor | None:
        """Logits ``[rows, V]`` of what follows the tokens at ``places`` of the whole ``inputs``, all but these last
        ones of which were read before; None where nothing is kept.
        """
        self.count += 1
        rows = torch.arange(len(places), device=places.device)
        if self.count == 1:
            found = self._model(**inputs, use_cache=True)
            following = found.logits[rows.to(found.logits.device), places.to(found.logits.device)]
        elif self._kept is None:
            return None
        else:
            self._real = pad(self._real, (0, 1), value=1)
            last = {self._tokens: inputs[self._tokens][rows, places][:, None], self._mask: self._real}
            found = self._model(**last, position_ids=places[:, None], use_cache=True, **{self._name: self._kept})
            following = found.logits[:, -1]
        self._kept = getattr(found, self._name, None)
        return following.to(places.device)


def _keeps(model: nn.Module | None) -> bool:
    """Whether a model may keep what it has read. Layers that look a number of places back would count the padding
    between a text and its answer; in parts, all processes have to read alike.
    """
    if model is None or current().size > 1:
        return False
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    takes = inspect.signature(model.forward).parameters
    able = {_cache_of(model), "position_ids"} <= takes.keys()
    able &= "use_cache" in takes or any(one.kind is one.VAR_KEYWORD for one in takes.values())
    return able and kinds == {"full_attention"} and not any(windows)


def _cache_of(model: nn.Module) -> str:
    """What a model's forward calls its key-value cache, as an argument and in its outputs: transformers has another
    name for it since 5.24.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    found, wanted = found.double(), expected.double()
    spread = wanted - wanted.mean(-1, keepdim=True)
    return bool((found - wanted).norm() <= torch.finfo(expected.dtype).eps ** 0.5 * spread.norm())


def writing_of(model: nn.Module, family: Family | None, new_tokens: NewTokens) -> Writing | None:
    """How a model's answers are written; None where only their first tokens are asked for.

    Raises:
        ValueError: if the model does not answer from its last token.
    """
    counts = new_tokens.values() if isinstance(new_tokens, Mapping) else [new_tokens]
    if max(counts, default=1) == 1:
        return None
    if not (family and family.causal and family.tokens and family.mask):
        raise ValueError(f"new_tokens: {type(model).__name__} writes no answers; expected 1, found {new_tokens}")
    return Writing(family.tokens, family.mask, end_tokens(model))
