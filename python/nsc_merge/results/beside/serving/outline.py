"""An adapter as a server meets it: its configuration and the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsc_merge.adapters.adapter_files import read_headers
from nsc_merge.adapters.peft_config import Scalings
from nsc_merge.adapters.peft_keys import PREFIX
from nsc_merge.utils.json_text import from_json

REFUSED, LEFT_OUT, WRONG, UNSURE = "refused", "left out", "wrong", "unsure"
AS_A_MODEL = "save as a model"
LANGUAGE_MODEL = "language_model"

_LAYER = re.compile(r"(?:^|\.)layers\.(?P<number>\d+)\.(?P<rest>.+)")
_LOW = re.compile(r"(?P<path>.+)\.lora_(?:(?P<embedding>embedding_)(?P<a>[AB])|(?P<b>[AB])\.(?P<end>weight|bias))")
# Settings that change what an adapter means, and that no server here reads except to refuse them.
_OTHER_KINDS = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
_WRITERS = (
    "ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForSequenceClassification", "ForTokenClassification",
)  # fmt: skip
# Initialisations after which a saved adapter is plain LoRA on the base as it is.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


@dataclass(frozen=True)
class Problem:
    """Of one server with one adapter.

    Attributes:
        effect: ``"refused"``: an error, when it is loaded or at its first request; ``"left out"``: a part is not
            served, without a word; ``"wrong"``: another update is served, without a word; ``"unsure"``: it depends on
            what only the server's model says.
        what: the reason.
        cure: the way out.
    """

    effect: str
    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.effect}: {self.what}: {self.cure}"


@dataclass(frozen=True)
class Low:
    """LoRA on one module.

    Attributes:
        rank: rows of A.
        shape: of the weight that it is added to: ``(d_out, d_in)``, or ``(tokens, d)`` of an embedding.
        scaling: that PEFT runs it with.
    """

    rank: int
    shape: tuple[int, int]
    scaling: float


@dataclass(frozen=True)
class Base:
    """What is known of the base model; nothing, where ``kind`` is empty.

    Attributes:
        kind: ``model_type`` of the part that generates text.
        layers: of that part; 0 if not known.
        shapes: last part of a linear's name -> ``(d_out, d_in)``, where the configuration says it.
        shows: it has images, too.
        writes: it generates text or classifies it, as far as the names of its architectures say.
        tied: the head is the embeddings' weight (``tie_word_embeddings``); None where the configuration does not say.
    """

    kind: str = ""
    layers: int = 0
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    shows: bool = False
    writes: bool = True
    tied: bool | None = None


@dataclass(frozen=True)
class Outline:
    """An adapter, of which no number was read.

    Attributes:
        config: as in ``adapter_config.json``.
        modules: path in the base model -> LoRA on the linear there.
        embeddings: path in the base model -> LoRA on the embedding there.
        whole: names of tensors that are no part of a LoRA: modules trained in full.
        biased: there are biases beside factors.
        gained: there are DoRA's magnitudes.
        parameters: LoRA is on parameters of modules (``target_parameters``), too.
        base: what is known of the base model.
    """

    config: Mapping[str, Any]
    modules: Mapping[str, Low]
    embeddings: Mapping[str, Low] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    biased: bool = False
    gained: bool = False
    parameters: bool = False
    base: Base = Base()

    @property
    def low(self) -> dict[str, Low]:
        """Linears and embeddings."""
        return {**self.modules, **self.embeddings}

    @property
    def ranks(self) -> list[int]:
        """All that the configuration and the tensors have."""
        said = [self.config.get("r"), *(self.config.get("rank_pattern") or {}).values()]
        return [rank for rank in said if isinstance(rank, int)] + [one.rank for one in self.low.values()]

    @property
    def layers(self) -> int:
        """Of the base, or else as many as the adapter has numbers of."""
        numbers = [place[0] for path in self.modules if (place := place_of(path))]
        return self.base.layers or max(numbers, default=-1) + 1


def read_outline(folder: Path, base: str | Path | Mapping[str, Any] | None = None) -> Outline:
    """Read the configuration and the header of the tensors in a folder; no number of them.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: the base model's folder, or its configuration as a mapping; by default the folder that the adapter names,
            if it is there. Without one, nothing is said of what depends on it.

    Raises:
        FileNotFoundError, ValueError: if a file is missing or damaged, or if ``base`` is no folder of a model.
    """
    files = read_headers(folder, folder.name)
    shapes = {key.removeprefix(PREFIX): tuple(value.shape) for key, value in files.weights.items()}
    config = files.config
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    embedded: dict[str, dict[str, tuple[int, ...]]] = {}
    whole, biased, gained = [], False, False
    for key, shape in shapes.items():
        match = _LOW.fullmatch(key)
        if match and match["embedding"]:
            # PEFT keeps both factors transposed, and calls the second A.
            embedded.setdefault(match["path"], {})["B" if match["a"] == "A" else "A"] = shape[::-1]
        elif match and match["end"] == "weight":
            factors.setdefault(match["path"], {})[match["b"]] = shape
        elif match:
            biased = True
        elif key.endswith(".lora_magnitude_vector"):
            gained = True
        elif ".base_layer." not in key:
            whole.append(key)
    alone = [path for path, held in (*factors.items(), *embedded.items()) if set(held) != {"A", "B"}]
    if alone:
        raise ValueError(f"{folder}: {alone[0]} has one factor; expected lora_A and lora_B")
    scalings = Scalings(folder.name, config)

    def lows(found: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, Low]:
        made = {}
        for path, held in found.items():
            rank, scaling = scalings.of(path)
            if not held["A"][0] == held["B"][1] == rank:
                raise ValueError(f"{folder}: {path} has factors of {held}; expected rank {rank}, by its configuration")
            made[path] = Low(rank, (held["B"][0], held["A"][-1]), scaling)
        return made

    return Outline(
        config, {} if config.get("target_parameters") else lows(factors), lows(embedded), tuple(whole), biased, gained,
        bool(config.get("target_parameters")), read_base(config.get("base_model_name_or_path"), base),
    )  # fmt: skip


def read_base(named: Any, base: str | Path | Mapping[str, Any] | None = None) -> Base:
    """What a configuration of transformers says of a model; see :func:`read_outline`."""
    if isinstance(base, Mapping):
        return _base_of(base)
    place = Path(base if base is not None else str(named or "")) / "config.json"
    if not place.is_file():
        if base is not None:
            raise FileNotFoundError(f"base: expected the folder of a model, with config.json; found none in {base}")
        return Base()
    found = from_json(place.read_bytes(), str(place))
    if not isinstance(found, Mapping):
        raise ValueError(f"{place}: expected a JSON object, found {found!r:.40}")
    return _base_of(found)


def _base_of(config: Mapping[str, Any]) -> Base:
    text = config.get("text_config") or config.get("llm_config") or config
    if "text_config" in config and not text.get("model_type"):
        text = {**text, "model_type": "llama"}
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    shapes: dict[str, tuple[int, int]] = {}
    if isinstance(hidden, int) and isinstance(heads, int):
        size = text.get("head_dim") or hidden // heads
        keys = (text.get("num_key_value_heads") or heads) * size
        shapes = {"q_proj": (heads * size, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        shapes["o_proj"] = (hidden, heads * size)
        wide = text.get("intermediate_size")
        if isinstance(wide, int):
            shapes |= {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}
    layers = text.get("num_hidden_layers")
    count = layers if isinstance(layers, int) else 0
    named = config.get("architectures") or [_WRITERS[0]]
    writes = any(str(name).endswith(_WRITERS) for name in named)
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return Base(str(text.get("model_type") or ""), count, shapes, text is not config, writes, tied)


def place_of(path: str) -> tuple[int, str] | None:
    """Number of a layer and what stands behind it, ``(3, "self_attn.q_proj")``; None outside of layers."""
    match = _LAYER.search(path)
    return (int(match["number"]), match["rest"]) if match else None


def beyond(outline: Outline) -> list[str]:
    """Paths in layers that the base has not, where it is known how many it has."""
    last = outline.base.layers
    return [path for path in outline.modules if last and (place := place_of(path)) and place[0] >= last]


def part_of(path: str) -> str:
    """The last part of a module's name."""
    return path.rsplit(".", 1)[-1]


def changed_bases(outline: Outline) -> str:
    """The setting under which the adapter is none of the base as it is, or no plain LoRA; empty if there is none."""
    start = outline.config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        return f"init_lora_weights={start!r}"
    return next((f"{key}={outline.config[key]!r:.40}" for key in _OTHER_KINDS if outline.config.get(key)), "")


def first_of(paths: Iterable[str]) -> str:
    """``"3 modules, such as model.layers.0..."``, or the one there is."""
    held = list(paths)
    return held[0] if len(held) == 1 else f"{len(held)} modules, such as {held[0]}"
