"""Embeddings, norms and convolutions around which merged updates stand: modules that are no linears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nsc_kernels import AdapterBank
from nsc_merge.models.bases.quantised import is_linear
from nsc_merge.models.bases.transposed import as_linear, is_transposed


@dataclass(frozen=True)
class Site:
    """An embedding, a norm or a convolution, with the sizes of the matrix that its weight stands for.

    Attributes:
        module: it itself.
        in_features: width of an embedding's rows; 1 of a norm, whose weight is a column; of a convolution, the inputs
            of one output: channels times kernel; of a transposed one, whose weight has its inputs first, the outputs of
            one input.
        out_features: tokens of an embedding, channels of the others.
    """

    module: Any
    in_features: int
    out_features: int

    @property
    def weight(self) -> Tensor:
        return self.module.weight


def site_of(module: nn.Module) -> Site | None:
    """The site that a module is; None if it is no embedding, no convolution in one group, and has more than a weight,
    and a bias, per channel.
    """
    if why_not(module):
        return None
    if isinstance(module, nn.Embedding):
        return Site(module, module.embedding_dim, module.num_embeddings)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Site(module, module.weight[0].numel(), module.out_channels)
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        # PEFT has no LoRA for it: what it holds was trained in full.
        return Site(module, module.weight[0].numel(), module.in_channels)
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight")
    if is_linear(module) or weight is None or weight.dim() != 1 or not set(own) <= {"weight", "bias"}:
        return None
    return Site(module, 1, len(weight))


def why_not(module: nn.Module) -> str:
    """The setting for which an embedding or a convolution is no site; nothing where there is none."""
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm, which changes the base's rows whenever they are read"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups > 1:
            return "several groups, whose LoRA PEFT does not merge either"
        if module.padding_mode != "zeros":
            return f"padding_mode {module.padding_mode!r}, with which PEFT's LoRA runs otherwise than it merges"
        if any(step > 1 for step in module.dilation):
            return "dilation, with which PEFT's LoRA does not run"
    return ""


def why_no_rows(module: nn.Module) -> str:
    """The reason for which PEFT's LoRA on an embedding, or its rows of tokens, are none of its weight; mostly nothing.

    PEFT looks rows up by the first argument, times ``embed_scale`` where there is one, beside whatever the module does:
    positions that are counted within, or rows that are normalised, are others.
    """
    kind: Any = type(module)
    if not isinstance(module, nn.Embedding) or kind.forward is nn.Embedding.forward:
        return ""
    alone = not list(module.children()) and set(module._parameters) == {"weight"}
    if (alone and hasattr(module, "embed_scale")) or _looks_up(module):
        return ""
    return (
        f"the forward of {kind.__name__} is its own, and other than rows of its weight by its first argument, to which "
        "PEFT's LoRA adds; expected adapters that leave it out, or that have it in modules_to_save"
    )


def _looks_up(module: nn.Embedding) -> bool:
    ids = torch.tensor([[min(1, module.num_embeddings - 1), 0]], device=module.weight.device)
    try:
        with torch.no_grad():
            found: Any = type(module).forward(module, ids)
            return found.shape == (1, 2, module.embedding_dim) and torch.equal(found, module.weight[ids])
    except Exception:
        # It takes something else, such as the shape of the tokens, or has no numbers here.
        return False


def merged_at(module: nn.Module) -> Any:
    """What an update is merged into at a module: the linear itself, one in place of a Conv1D, or a :class:`Site`."""
    return as_linear(module) if is_transposed(module) else site_of(module) or module


def is_part(module: nn.Module) -> bool:
    """Whether a module says of itself, as Megatron's and vLLM's do, that it holds a process's part of a linear."""
    return hasattr(module, "input_size_per_partition") or hasattr(module, "output_size_per_partition")


def instead(module: nn.Module) -> str:
    if is_part(module):
        return ", one process's part of a tensor-parallel linear; merge before the model is distributed"
    if reason := why_not(module):
        return f" with {reason}; expected adapters that leave it out"
    return "; the PeftModel's unload() takes the adapters off" if hasattr(module, "base_layer") else ""


class MergedWhole(nn.Module):
    """An embedding, norm or convolution whose weight is the base's plus every adapter's update times its coefficient.

    Attributes:
        module: the base's.
        lam: coefficients ``[K]``.
        bank: empty; says where the coefficients are needed.
        path, measure, folded, gains, biases, denses: as of a merged linear, which stands beside it; nothing is
            measured, and nothing has gains.
        linear: ``module``, under the name that a merged linear has it by.
    """

    path: str = ""
    measure = None
    folded = None
    gains = None

    def __init__(self, module: nn.Module, lam: Tensor, bank: AdapterBank, low_rank: list[tuple[int, Tensor, Tensor]]):
        """Args: ``low_rank`` has number of the adapter, ``scaling * A [r, d]`` and ``B [rows, r]``."""
        super().__init__()
        self.linear, self.bank, self.lam = module, bank, lam
        self.biases: Tensor | None = None
        self.denses: Tensor | None = None
        self._low_rank = low_rank

    @property
    def module(self) -> nn.Module:
        return self.linear

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Such as the eps of a norm, that models look at.
            return getattr(super().__getattr__("linear"), name)

    @property
    def weight(self) -> Tensor:
        """The merged weight, differentiable in the coefficients."""
        own: Tensor = self.linear.weight  # type: ignore[assignment]
        wide = own.to(self.lam.dtype)
        if self.denses is not None:
            wide = wide + torch.tensordot(self.lam, self.denses.to(self.lam), 1).reshape(own.shape)
        for number, A, B in self._low_rank:
            wide = wide + self.lam[number] * (B.to(self.lam) @ A.to(self.lam)).reshape(own.shape)
        return wide.to(own.dtype)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        module = self.linear
        if type(module).forward is nn.Embedding.forward:
            return self._rows(inputs[0])
        values = {"weight": self.weight}
        if self.biases is not None:
            own: Tensor = module.bias  # type: ignore[assignment]
            values["bias"] = (own.to(self.lam) + self.lam @ self.biases.to(self.lam)).to(own.dtype)
        return functional_call(module, values, inputs, named)

    def _rows(self, ids: Tensor) -> Tensor:
        """Of an embedding, the rows that are looked up: a vocabulary is large."""
        y = self.linear(ids)
        wide = y.to(self.lam.dtype)
        if self.denses is not None:
            for share, dense in zip(self.lam, self.denses, strict=True):
                wide = wide + share * nn.functional.embedding(ids, dense).to(self.lam)
        for number, A, B in self._low_rank:
            wide = wide + self.lam[number] * (nn.functional.embedding(ids, B).to(self.lam) @ A.to(self.lam))
        return wide.to(y.dtype)
