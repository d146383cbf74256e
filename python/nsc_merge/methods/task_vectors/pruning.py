"""Task arithmetic on what trimming leaves: TIES without its election."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from nsc_kernels import entries
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient_free import gradient_free
from nsc_merge.methods.shared_options import check_weights, weights_of
from nsc_merge.methods.task_vectors import elementwise, tiles
from nsc_merge.methods.task_vectors.elementwise import KEEPS, TRIM_SCOPES, Ties
from nsc_merge.methods.task_vectors.in_factors import merged_in_factors
from nsc_merge.utils.option_checks import check_choice, check_number


@dataclass(frozen=True)
class MagnitudePruneOptions:
    """Options of ``method="magnitude_prune"``.

    Attributes:
        scale: multiplies the merged update.
        density: share of a task's entries that stay, the largest by magnitude; 1 keeps all.
        trim_scope: counts a task's entries in each module (``"tensor"``), over all modules (``"global"``), or in A and
            B separately (``"factors"``; see :class:`nsc_merge.methods.task_vectors.ties.TiesOptions`).
        keep: how many that is, as in :class:`nsc_merge.methods.task_vectors.ties.TiesOptions`.
        weights: task -> weight of its values, 1 each when None.
    """

    scale: float = 1.0
    density: float = 0.2
    trim_scope: str = "tensor"
    keep: str = "floor"
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        check_number("density", self.density, 0, 1, above=True)
        check_choice("trim_scope", self.trim_scope, (*TRIM_SCOPES, "factors"))
        check_choice("keep", self.keep, KEEPS)
        check_weights(self.weights)


def magnitude_prune(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: MagnitudePruneOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and the weighted sum of the trimmed updates; with ``trim_scope="factors"`` of low rank, else dense."""
    weights = weights_of(options.weights, list(adapters))
    # Trimming looks at nothing else of the three steps.
    steps = Ties(options.density, options.trim_scope, options.keep, "sum", "positive", "sum")
    if options.trim_scope == "factors":

        def one(name: str, tensors: Mapping[str, Tensor], into: Mapping[str, float]) -> Tensor:
            kept = elementwise.trimmed(lambda path, task: tensors[task], {name: list(tensors)}, steps)
            return elementwise.added([into[task] * kept(name, task) for task in tensors])

        yield from merged_in_factors("trim_scope='factors'", adapters, paths, weights, options.scale, one)
        return
    tasks = elementwise.tasks_by_path(adapters, paths)
    # What is kept is weighted, and not what is trimmed: which of equal entries stays is decided by rounding otherwise.
    if tiles.serves(adapters, paths):
        layers = tiles.weighted(tiles.trimmed(tiles.layers_of(adapters), tasks, steps), tasks, weights)
        for path in tasks:
            yield path, Factor.of_matrix(entries.added(layers(path)).mul_(options.scale))
        return
    source = elementwise.trimmed(elementwise.dense_updates(adapters), tasks, steps)
    for path, row in tasks.items():
        kept = elementwise.added([weights[task] * source(path, task) for task in row])
        yield path, Factor.of_matrix(kept.mul_(options.scale))


METHODS = (
    gradient_free(
        "magnitude_prune",
        "keeps each task's largest entries, and adds the tasks",
        "PEFT's combination_type 'magnitude_prune'; trimming as in TIES-Merging, arXiv 2306.01708",
        MagnitudePruneOptions,
        magnitude_prune,
        gives="full rank",
        of_entries=True,
        low_rank_with={"trim_scope": "factors"},
    ),
)
