"""Where in a model a matrix of such a parameter is, by its path.

That of the fourth expert is ``model.layers.0.mlp.experts.gate_up_proj.3``: the parameter's path, and the number along
its first dimension. That of a parameter which is one matrix is the parameter's, as ``model.layers.0.mlp.gate.weight``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from nsc_merge.models.bases.quantised import is_linear
from nsc_merge.models.bases.transposed import is_transposed
from nsc_merge.models.merged.whole import Site, site_of


@dataclass(frozen=True)
class Matrix(Site):
    """A matrix ``[out_features, in_features]`` of a parameter, in the convention of ``nn.Linear``.

    Attributes:
        module: whose parameter it is.
        owner: path of that.
        name: of the parameter in it.
        number: along the first dimension; None of a parameter of two.
        transposed: whether the parameter is ``[E, d_in, d_out]``, as gpt-oss and Llama 4 have theirs.
    """

    owner: str
    name: str
    number: int | None
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """All of the parameter."""
        value: Tensor = self.module._parameters[self.name]
        return value

    @property
    def parameter(self) -> str:
        """The parameter's path."""
        return f"{self.owner}.{self.name}"


def is_matrix_alone(module: nn.Module) -> bool:
    """Whether a module is no linear, but has a weight of two dimensions and nothing else, as routers."""
    weight = module._parameters.get("weight")
    alone = list(module._parameters) == ["weight"] and weight is not None and weight.dim() == 2
    return alone and not _is_merged_whole(module)


def _is_merged_whole(module: nn.Module) -> bool:
    """Whether a module's weight is the one matrix of that module, be it merged or refused."""
    kept = isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return kept or is_linear(module) or is_transposed(module) or site_of(module) is not None


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, None if there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def matrix_at(model: nn.Module, path: str) -> Matrix | None:
    """The matrix of that path, None if there is none such."""
    head, _, last = path.rpartition(".")
    number = int(last) if last.isdecimal() else None
    owner, _, name = (path if number is None else head).rpartition(".")
    module = module_at(model, owner)
    value = None if module is None else module._parameters.get(name)
    if module is None or value is None or _is_merged_whole(module):
        return None
    if number is None:
        return Matrix(module, value.shape[1], len(value), owner, name, None, False) if value.dim() == 2 else None
    if value.dim() != 3 or number >= len(value):
        return None
    transposed = bool(getattr(module, "is_transposed", False))
    d_out, d_in = reversed(value.shape[1:]) if transposed else value.shape[1:]
    return Matrix(module, d_in, d_out, owner, name, number, transposed)


def owner_of(model: nn.Module, path: str) -> nn.Module:
    """The module at a path, or that of a matrix."""
    matrix = matrix_at(model, path)
    return model.get_submodule(path) if matrix is None else matrix.module


def numbers_in(paths: Iterable[str], parameter: str) -> dict[int, str]:
    """Number -> path of the matrices of one parameter that are among ``paths``."""
    begin = f"{parameter}."
    ends = {path: path.removeprefix(begin) for path in paths if path.startswith(begin)}
    return {int(end): path for path, end in ends.items() if end.isdecimal()}
