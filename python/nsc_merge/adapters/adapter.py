"""An adapter in memory: one task's updates of the linears that it touches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsc_merge.utils.safetensors_checks import bytes_of


@dataclass(frozen=True)
class Factor:
    """The update of one linear layer: ``scaling * (B @ A)``, with ``scaling * bias`` on its bias. With a ``gain`` it
    also scales the rows of the base's weight ``W``: ``scaling * (gain[:, None] * W + B @ A)``.

    Attributes:
        A: down-projection ``[r, d_in]``, as all tensors here of any floating dtype.
        B: up-projection ``[d_out, r]``.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        bias: bias of lora_B (``lora_bias=True``), ``[d_out]``.
        dense: update of a layer that was trained in full, ``[d_out, d_in]``; ``A`` and ``B`` are then of
            rank 0.
        fixed: coefficient that no method may change, for layers trained in full and merged by rule.
        magnitude: DoRA's row norms ``[d_out]``, before :func:`nsc_merge.models.fitting.fit` knows the base's weight.
        gain: of DoRA, by what the rows of the base's weight grow, ``[d_out]``.
        transposed: an embedding's, whose first factor is ``B`` in PEFT, which keeps both transposed; methods that merge
            factors apart take them as PEFT does.
    """

    A: Tensor
    B: Tensor
    scaling: float
    bias: Tensor | None = None
    dense: Tensor | None = None
    fixed: float | None = None
    magnitude: Tensor | None = None
    gain: Tensor | None = None
    transposed: bool = False

    def __repr__(self) -> str:
        """What it has, of tensors shape and dtype."""
        held = {part.name: getattr(self, part.name) for part in fields(self)}
        said = {name: f"{list(v.shape)} {v.dtype}" if isinstance(v, Tensor) else v for name, v in held.items()}
        return f"Factor({', '.join(f'{name}: {v}' for name, v in said.items() if v is not None and v is not False)})"

    @classmethod
    def empty(cls, d_out: int, d_in: int, device: torch.device | str = "cpu") -> Factor:
        """An update that changes nothing, of rank 0; float32, whatever torch's default dtype is."""
        A, B = (torch.empty(shape, dtype=torch.float32, device=device) for shape in ((0, d_in), (d_out, 0)))
        return cls(A, B, 1.0)

    @classmethod
    def of_matrix(cls, update: Tensor, bias: Tensor | None = None) -> Factor:
        """An update ``[d_out, d_in]`` as it is, beside factors of rank 0."""
        d_out, d_in = update.shape
        return cls(update.new_empty(0, d_in), update.new_empty(d_out, 0), 1.0, bias, dense=update)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def cpu(self) -> Factor:
        """The same in the host's memory, where adapters are read to."""
        held: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value if value.is_meta else value.cpu() for name, value in held.items()})

    def delta(self) -> Tensor:
        """The dense update ``[d_out, d_in]``, in float64, but for what a ``gain`` makes of the base's weight."""
        low_rank = self.B.double() @ self.A.double()
        return self.scaling * (low_rank if self.dense is None else low_rank + self.dense.double())

    def bias_delta(self) -> Tensor | None:
        """The update of the layer's bias ``[d_out]`` in float64, if there is one."""
        return None if self.bias is None else self.scaling * self.bias.double()


@dataclass(frozen=True)
class About:
    """What an adapter's configuration says of it beside its weights, and its folder, which adapters in memory lack.

    Attributes:
        task_type: PEFT's, such as ``"CAUSAL_LM"``.
        base_revision: revision of the base on the hub.
        license: of the model card in the folder.
        id2label: number of a class of the head -> its name, of a ``config.json`` in the folder.
        hub: ``owner/name@commit`` that the folder was fetched from.
    """

    task_type: str | None = None
    base_revision: str | None = None
    license: str | None = None
    id2label: Mapping[int, str] = field(default_factory=dict)
    hub: str | None = None


class TokenRows(NamedTuple):
    """Rows of an embedding, or of a head, that were trained alone (``trainable_token_indices``).

    Attributes:
        indices: of the tokens.
        values: that their rows have in place of the base's, ``[tokens, d]``.
    """

    indices: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True)
class Stack:
    """LoRA on a parameter that is no linear's weight, such as those of all experts in one, as PEFT keeps it.

    Attributes:
        A, B: ``[E * r, d_in]`` and ``[d_out, r * E]``, for ``E`` matrices.
        targets: paths of parameters or ends of them (``target_parameters``), this one's among them.
        settings: given the parameter's path, rank and scaling.
        peft_version: that made it, if it is known: before 0.19.1 inputs and outputs of matrices were others.
    """

    A: Tensor
    B: Tensor
    targets: tuple[str, ...]
    settings: Callable[[str], tuple[int, float]]
    peft_version: str = ""


WRAPPER = ".base_layer"


def unwrapped(path: str) -> str:
    """Path of a module of which PEFT's path counts the wrappers, one around the other."""
    return path.replace(WRAPPER, "")


def parameters_of(module: str, targets: Iterable[str]) -> list[str]:
    """Names of a module's parameters that ``target_parameters`` selects: those whose path ends with one of them."""
    split = (target.rpartition(".") for target in targets)
    return [name for owner, _, name in split if owner in ("", module) or module.endswith(f".{owner}")]


@dataclass(frozen=True)
class Adapter:
    """One task's LoRA adapter.

    Attributes:
        name: the task.
        factors: module path in the base model -> its update.
        base_model: what the adapter's configuration says it was trained on, if anything.
        trained: parameter path -> value, of the modules that were trained in full (``modules_to_save``). Once
            fitted to a model by :func:`nsc_merge.models.fitting.fit`, only the task's own heads are left here.
        source: the folder it came from, if any.
        notes: what a person should know about how it was read.
        sha256: of an adapter that was read from a folder, file name -> SHA-256 of the very bytes that it was made of.
        base_weights: parameter path -> value, of the base model's weights that PEFT saved along (of a head or an
            embedding that has LoRA or was resized); :func:`nsc_merge.models.fitting.fit` checks that the model has
            the same.
        about: what else its folder says.
        token_rows: path of an embedding or head -> rows that were trained alone, which
            :func:`nsc_merge.models.fitting.fit` makes updates of.
        stacks: PEFT's path of a module -> LoRA on one of its parameters, which
            :func:`nsc_merge.models.fitting.fit` makes updates of single matrices.
        dora: what :func:`nsc_merge.models.fitting.fit` makes of DoRA: the ``"exact"`` update, or a plain one of the
            same rank (``"convert"``).
    """

    name: str
    factors: dict[str, Factor] = field(repr=False)
    base_model: str | None = None
    trained: dict[str, Tensor] = field(default_factory=dict, repr=False)
    source: Path | None = None
    notes: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)
    base_weights: dict[str, Tensor] = field(default_factory=dict, repr=False)
    about: About = field(default_factory=About)
    token_rows: dict[str, TokenRows] = field(default_factory=dict, repr=False)
    stacks: dict[str, Stack] = field(default_factory=dict, repr=False)
    dora: str = "exact"

    def with_factors(self, change: Callable[[str, Factor], Factor | None]) -> Adapter:
        """This adapter with what ``change`` makes of path and update of every module, and without those of which it
        makes None.
        """
        changed = ((path, change(path, factor)) for path, factor in self.factors.items())
        return replace(self, factors={path: factor for path, factor in changed if factor is not None})


def name_of(path: str) -> str:
    """What a module is called in its parent; numbers at the end, as of experts in one parameter, and PEFT's wrappers
    are no part of it.
    """
    names = [part for part in path.split(".") if not part.isdecimal() and part != "base_layer"]
    return names[-1] if names else path


def factors_digest(factors: Mapping[str, Factor]) -> str:
    """SHA-256 of updates by module path."""
    digest = hashlib.sha256()
    for path, factor in sorted(factors.items()):
        digest.update(path.encode())
        for name, value in vars(factor).items():
            if name == "transposed" or (name == "gain" and value is None):
                # Digests that were written down before there were these stay the same; where the one is, paths say.
                continue
            if isinstance(value, Tensor):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(bytes_of(value.cpu()).numpy().data)
            else:
                digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()
