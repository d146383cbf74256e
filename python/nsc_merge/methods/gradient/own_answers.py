"""Answers that tasks' own models write, greedily, along which a merged model is then compared with them.

Sequence-level knowledge distillation (Kim and Rush, arXiv 1606.07947) with a teacher's most likely answer; theirs is
found by beam search, and learnt as a label, where here all that the teacher predicts along it counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nsc_merge.calibration.forward_passes import Pass
from nsc_merge.models.families import Family
from nsc_merge.models.traits import places_of, type_of
from nsc_merge.processes.group import current
from nsc_merge.utils.option_checks import check_count

NewTokens = int | Mapping[str, int]

# How the inputs begin that a decoder behind an encoder has.
_DECODERS = "decoder_"
# Inputs with a value for every token that generation goes on with -> that of an answer's tokens; None is the one of the
# text's last token.
_CONTINUED: dict[str, int | None] = {
    "mm_token_type_ids": 0,
    "moe_mm_token_type_ids": 0,
    "token_type_ids": None,
    "cross_attention_mask": None,
}
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
        continued: other inputs with a value for every token -> that of an answer's; None is the last token's own.
    """

    tokens: str
    mask: str
    ends: Sequence[int]
    continued: Mapping[str, int | None] = field(default_factory=lambda: _CONTINUED)

    def __call__(
        self, predict: Callable[[Mapping[str, Any]], Tensor], one: Pass, most: int, model: nn.Module | None = None
    ) -> Answered | None:
        """Append to every row what is most likely to follow. Without gradients.

        Args:
            predict: gives logits ``[rows, tokens, V]`` of a model's inputs.
            model: whose logits these are. What it keeps of tokens that it has read (its key-value cache) then saves
                reading them again for every token, where the next one comes out the same.
            one: the pass.
            most: how many tokens an answer has at most, its end among them. Of 1 nothing is appended, and None is
                returned.

        Processes that share the work run ``predict`` equally often, until the answers of all have ended.

        Raises:
            ValueError: as :class:`Growing`, or if there are not logits at every token.
        """
        if most == 1:
            with torch.no_grad():
                while current().any(False):
                    predict(one.inputs)
            return None
        rows = Growing(self, one.inputs, most)
        # Where a token has more than its number, it may have another position than its place.
        keeps = most > _SHORT and _keeps(model) and not rows.others
        keeping = _Keeping(model, self.tokens, self.mask, rows.real[:, : rows.width]) if keeps else None
        with torch.no_grad():
            while current().any(bool(rows.going.any())):
                inputs = rows.inputs()
                following = None if keeping is None else keeping.after(inputs, rows.at)
                # The first token that is read alone is read with all others, too: positions, masks and what is kept
                # are the model's matter.
                if following is None or (keeping is not None and keeping.count == 2):
                    logits = predict(inputs)
                    if not rows.going.any():
                        continue
                    whole = rows.following(logits)
                    if following is not None and not _agree(following[rows.going], whole[rows.going]):
                        keeping = None
                    following = whole
                rows.append(following.argmax(-1))
        own = rows.own()
        ids = own[self.tokens]
        places = torch.arange(ids.shape[1], device=ids.device) - rows.last[:, None]
        predicts = (places >= 0) & (places < rows.length[:, None])
        # Of whole numbers division makes torch's default dtype, which may be a narrow one.
        weights = (1.0 / (rows.length * len(ids)).float())[:, None].expand_as(predicts)[predicts]
        return Answered(own, predicts, weights)


class Growing:
    """The rows of a batch with what has been written behind them, and all padding behind that.

    Args:
        how: answers are written.
        given: the batch.
        most: how many tokens an answer has at most.

    Attributes:
        real: 0 at padding.
        others: inputs with a value for every token beside tokens and mask.
        width: of the batch.
        last: place of the last token that was given, by row.
        length: of every answer with the token that is predicted next, which is not read.
        ended: whether an answer has come to its end, by row.

    Raises:
        ValueError: if an input has a value for every token, and it is not known which those of an answer have.
    """

    def __init__(self, how: Writing, given: Mapping[str, Any], most: int) -> None:
        self._how, self._given, self._most = how, given, most
        ids, real, others = self._read()
        self.width = ids.shape[1]
        # Stable, so that real tokens keep their order.
        order = (real == 0).long().sort(dim=1, stable=True).indices
        self._rows = torch.arange(len(ids), device=ids.device)
        self.last = ((real != 0).sum(1) - 1).clamp(min=0)
        self._ids, self.real = (pad(value.gather(1, order), (0, most - 1)) for value in (ids, real))
        moved = {name: value[self._rows[:, None], order] for name, value in others.items()}
        self.others = {name: self._continued(name, value) for name, value in moved.items()}
        self.length = torch.ones_like(self.last)
        self.ended = torch.zeros_like(self.last, dtype=torch.bool)

    @property
    def going(self) -> Tensor:
        """Whether there is room for another token, and no end, by row."""
        return ~self.ended & (self.length < self._most)

    @property
    def at(self) -> Tensor:
        """Place of the token that the next one is predicted from, by row."""
        return self.last + self.length - 1

    def inputs(self) -> dict[str, Any]:
        """The batch with the answers so far, no wider than the longest."""
        return {**self._given, **self.own()}

    def own(self) -> dict[str, Tensor]:
        """Those of ``inputs`` that answers go on with."""
        seen = max(self.width, int((self.last + self.length).max()))
        longer = {self._how.tokens: self._ids, self._how.mask: self.real, **self.others}
        return {name: value[:, :seen] for name, value in longer.items()}

    def following(self, logits: Tensor) -> Tensor:
        """Logits ``[rows, V]`` of what comes next, of those of all ``inputs``."""
        seen = self.own()[self._how.tokens].shape
        if logits.dim() != 3 or logits.shape[:2] != seen:
            raise ValueError(
                f"new_tokens: answers are written from logits [N, T, V] at every token, here {[*seen, 'V']}, found "
                f"{list(logits.shape)}"
            )
        return logits[self._rows, self.at]

    def append(self, token: Tensor) -> None:
        """Go on with a token ``[rows]`` for every row whose answer it does not end."""
        ends = torch.tensor(self._how.ends, dtype=token.dtype, device=token.device)
        self.ended = self.ended | torch.isin(token, ends)
        going = self.going
        place = (self._rows[going], (self.last + self.length)[going])
        self._ids[place], self.real[place] = token[going].to(self._ids), 1
        self.length = self.length + going

    def _continued(self, name: str, value: Tensor) -> Tensor:
        """An input ``[rows, tokens, ...]`` that goes on behind every row's last token."""
        given = self._how.continued[name]
        following = value[self._rows, self.last] if given is None else torch.full_like(value[:, 0], given)
        longer = following[:, None].repeat(1, self.width + self._most - 1, *[1] * (value.dim() - 2))
        own = torch.arange(self.width, device=value.device) <= self.last[:, None]
        longer[:, : self.width][own] = value[own]
        return longer

    def _read(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Tokens and mask of a batch, and what else it has for every token."""
        tokens, mask = self._how.tokens, self._how.mask
        ids = self._given.get(tokens)
        if ids is None:
            raise ValueError(f"calibration: answers are written after {tokens}, found only {sorted(self._given)}")
        real = self._given.get(mask)
        # An encoder reads the text apart from the answer, and may have as many tokens.
        beside, others = _DECODERS if tokens.startswith(_DECODERS) else "", {}
        for name, value in self._given.items():
            other = name.startswith(beside) and name not in (tokens, mask)
            if not other or getattr(value, "shape", ())[:2] != ids.shape:
                continue
            if name not in self._how.continued:
                raise ValueError(
                    f"calibration: answers are written after {tokens} and {mask} alone, found {name!r} with a value "
                    f"for every token, {list(value.shape)}; expected batches without it"
                )
            others[name] = value
        return ids, torch.ones_like(ids) if real is None else real, others


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
    return writing_after(model, family.tokens, family.mask)


def writing_after(model: nn.Module, tokens: str, mask: str) -> Writing:
    """How a model's answers are written behind the inputs of these names."""
    # What PaliGemma is given it sees as a whole, and what it writes from left to right.
    own = {"token_type_ids": 1} if type_of(model) == "paligemma" else {}
    # Behind the place of an image or of audio, which a model may name before it is trained, nothing could be read.
    ends = dict.fromkeys([*end_tokens(model), *places_of(model).values()])
    return Writing(tokens, mask, list(ends), {**_CONTINUED, **own})
