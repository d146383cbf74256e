"""Which layers are measured: the linear layers of model families by name, or widths given outright.

Widths are ``d_in x d_out``, those of an ``nn.Linear(d_in, d_out)``. A layer of a model is ``MODEL.LAYER``:

    llama3-8b.q            one layer; ``k`` and ``v`` are one where they have one shape, and so are ``gate`` and ``up``
    llama3-8b.mlp          ``up`` and ``down``; ``attention``: q, k and v, o
    llama3-8b              all its linear layers, one of each shape
    all                    all layers of all models, one of each shape
    4096x14336             4096 inputs, 14336 outputs
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

Widths = tuple[int, int]  # d_in, d_out


class Shape(NamedTuple):
    """One adapted linear layer with T tokens and K adapters of rank r."""

    name: str
    T: int
    d_in: int
    d_out: int
    K: int
    r: int

    @property
    def R(self) -> int:
        return self.K * self.r

    def __str__(self) -> str:
        return f"{self.name} T={self.T} {self.d_in}->{self.d_out} {self.K}x{self.r}"


def _block(d: int, mlp: int, q: int | None = None, kv: int | None = None) -> dict[str, Widths]:
    """The linears of a transformer's block: width, width of the MLP, all heads of q, all heads of k (GQA)."""
    q = q or d
    return {"q": (d, q), "kv": (d, kv or q), "o": (q, d), "up": (d, mlp), "down": (mlp, d)}


# From the models' own configurations: hidden_size, intermediate_size, heads x head_dim of q, and of k and v.
MODELS: dict[str, dict[str, Widths]] = {
    "vit-b": _block(768, 3072),
    "vit-l": _block(1024, 4096),
    "llama3-8b": _block(4096, 14336, kv=8 * 128),
    "llama3.2-1b": _block(2048, 8192, kv=8 * 64),
    "llama3-70b": _block(8192, 28672, kv=8 * 128),
    "llava-7b": _block(4096, 11008),  # LLaVA-1.5: the language model is Vicuna 7B
    "llava-7b-vision": _block(1024, 4096),  # its CLIP ViT-L/14
    "qwen3-0.6b": _block(1024, 3072, q=16 * 128, kv=8 * 128),
    "qwen3-4b": _block(2560, 9728, q=32 * 128, kv=8 * 128),
    "qwen3-8b": _block(4096, 12288, q=32 * 128, kv=8 * 128),
    "gemma3-1b": _block(1152, 6912, q=4 * 256, kv=1 * 256),
    "gemma3-4b": _block(2560, 10240, q=8 * 256, kv=4 * 256),
    "gemma2-9b": _block(3584, 14336, q=16 * 256, kv=8 * 256),
}
ALIASES: dict[str, tuple[str, ...]] = {"k": ("kv",), "v": ("kv",), "gate": ("up",), "fc1": ("up",), "fc2": ("down",)}
ALIASES |= {"mlp": ("up", "down"), "attention": ("q", "kv", "o")}


def _layers_of(model: str) -> Iterator[tuple[str, Widths]]:
    seen: set[Widths] = set()
    for layer, widths in MODELS[model].items():
        if widths not in seen:
            seen.add(widths)
            yield f"{model}.{layer}", widths


def _named(text: str) -> Iterator[tuple[str, Widths]]:
    if text == "all":
        seen: set[Widths] = set()
        for model in MODELS:
            for name, widths in _layers_of(model):
                if widths not in seen:
                    seen.add(widths)
                    yield name, widths
        return
    if match := re.fullmatch(r"(\d+)x(\d+)", text):
        widths = int(match[1]), int(match[2])
        if 0 in widths:
            raise ValueError(f"shapes: {text!r} has a width of 0; give d_in x d_out, such as 4096x14336")
        yield text, widths
        return
    if text in MODELS:
        yield from _layers_of(text)
        return
    model, _, layer = text.rpartition(".")
    if model in MODELS and (layer in ALIASES or layer in MODELS[model]):
        for one in ALIASES.get(layer, (layer,)):
            yield f"{model}.{one}", MODELS[model][one]
        return
    known = [*MODELS, *(f"{name}.{layer}" for name in MODELS for layer in (*MODELS[name], *ALIASES)), "all"]
    near = difflib.get_close_matches(text, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(
        f"shapes: {text!r} is neither a layer nor widths{hint} Models: {', '.join(MODELS)}; their layers: "
        f"q, kv, o, up, down, mlp, attention; or d_in x d_out, such as 4096x14336; or all"
    )


def layers(names: Iterable[str]) -> list[tuple[str, Widths]]:
    """Every layer that is named, once, in order.

    Raises:
        ValueError: for a name that is not known, with the nearest one.
    """
    return list(dict.fromkeys(layer for name in names for layer in _named(name)))


def adapters(text: str) -> tuple[int, int]:
    """``6x16``: how many adapters, and the rank of each.

    Raises:
        ValueError: if the text says something else.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or not (int(match[1]) and int(match[2])):
        raise ValueError(f"adapters: expected how many by their rank, such as 6x16, found {text!r}")
    return int(match[1]), int(match[2])


def grid(names: Iterable[str], tokens: Iterable[int], counts: Iterable[str]) -> list[Shape]:
    """Every layer with every number of tokens and every set of adapters.

    Raises:
        ValueError: for a name, a number of adapters or of tokens that cannot be.
    """
    tokens = list(tokens)
    for T in tokens:
        if T < 1:
            raise ValueError(f"tokens: expected at least 1, found {T}")
    kinds = [adapters(text) for text in counts]
    return [Shape(name, T, *widths, *kind) for name, widths in layers(names) for kind in kinds for T in tokens]
