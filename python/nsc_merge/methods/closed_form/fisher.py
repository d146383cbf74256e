"""Fisher merging (arXiv 2111.09832): an average of the tasks' weights, each entry by its Fisher information."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsc_kernels.modes import without_autocast
from nsc_merge.adapters import Factor
from nsc_merge.calibration.batches import Batch, naming_tasks
from nsc_merge.calibration.forward_passes import one_by_one
from nsc_merge.methods.closed_form.single_task import alone, changed, draw, in_turn, only_linears
from nsc_merge.methods.closed_form.squared_gradients import SquaredGradients, Term
from nsc_merge.methods.gradient_free import empty, low_rank_part, with_the_rest
from nsc_merge.methods.likelihoods import check_classes, check_likelihood, check_one_class, likelihoods_of
from nsc_merge.methods.method import Method, Problem
from nsc_merge.methods.shared_options import fill
from nsc_merge.methods.task_outputs import (
    Outputs,
    check_outputs,
    last_token,
    mask_of_outputs,
    output_of,
    plain_options,
    predicts_next,
    real_positions,
    with_heads,
)
from nsc_merge.methods.task_vectors.elementwise import dense_update
from nsc_merge.models.attachment import refuse_unseen
from nsc_merge.models.bases.quantised import Linear, check_gradients, keeping_gradients
from nsc_merge.models.bases.stored_weights import input_device
from nsc_merge.models.families import find_family
from nsc_merge.models.forward_contexts import recomputing
from nsc_merge.processes.group import current
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.option_checks import check_choice, check_count, check_number

GRADIENTS = ("example", "batch")
FLOORS = ("least", "added")
PRESETS: dict[str, dict[str, Any]] = {
    "canonical": {"gradients": "example", "floor_is": "least"},
    "mergelm": {"gradients": "batch", "floor_is": "added"},
}


@dataclass(frozen=True)
class FisherOptions:
    """Options of ``method="fisher"``; those that are None are the preset's.

    Biases, gains of DoRA and what was trained in full are averaged over all tasks, as the weights are: a task without
    one counts with the base's.

    Attributes:
        preset: ``"canonical"``, the authors' Fisher information (github.com/mmatena/model_merging; its default leaves
            the floor to the first model, here every task has it), or ``"mergelm"``, what MergeLM's code computes
            instead (also FusionBench's), for classes only.
        gradients: that are squared: ``"example"``, of one example's log-likelihood, in expectation over labels; or
            ``"batch"``, one of ``sqrt(p) log p`` summed over labels and over a batch, which has products of different
            labels and examples, grows with the size of batches and needs logits ``[N, C]``. Both are summed and divided
            by the number of examples.
        scale: multiplies the merged update.
        batches: how many batches of every task are run; where a task has fewer, its first ones again, which then count
            again.
        outputs: task -> function of model and batch that gives its output: logits with classes last, or values; what
            it gives at padding does not count. Tasks without one have the model's own logits, or its values, with the
            head that their adapter brought, of a model that predicts the next token those at the last real one.
        likelihood: what the output parametrises: ``"categorical"`` (classes) or ``"gaussian"`` (values, variance 1),
            one for all tasks or one per task. Labels are drawn from it and never needed.
        exact: up to this many classes the expectation over labels is exact, for outputs ``[N, C]``; beyond, and for
            outputs of many positions, one label is drawn per example.
        floor: of an entry's Fisher information, before any normalisation.
        floor_is: the ``"least"`` information that an entry has, or ``"added"`` to that of every entry, and to the norm.
        normalise: divide each task's Fisher information by its norm over all modules, without the floor, so that no
            task outweighs the others by the scale of its loss.
        seed: of drawn labels.
    """

    preset: str = "canonical"
    gradients: str | None = None
    scale: float = 1.0
    batches: int = 8
    outputs: Outputs | None = None
    likelihood: str | Mapping[str, str] = "categorical"
    exact: int = 16
    floor: float = 1e-6
    floor_is: str | None = None
    normalise: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        fill(self, PRESETS)
        check_outputs(self.outputs)
        check_choice("gradients", self.gradients, GRADIENTS)
        check_choice("floor_is", self.floor_is, FLOORS)
        check_number("scale", self.scale)
        check_count("batches", self.batches)
        check_likelihood(self.likelihood)
        kinds = self.likelihood.values() if isinstance(self.likelihood, Mapping) else [self.likelihood]
        if self.gradients == "batch" and "gaussian" in kinds:
            raise ValueError(
                "likelihood: expected 'categorical' with gradients='batch', which is defined for classes, "
                f"found {self.likelihood!r}; gradients='example' takes values"
            )
        check_count("exact", self.exact, 0)
        check_number("floor", self.floor, 0)
        check_choice("normalise", self.normalise, (True, False))
        check_count("seed", self.seed, 0)


def information(
    problem: Problem, task: str, paths: Sequence[str], batches: Sequence[Batch], options: FisherOptions
) -> dict[str, Tensor]:
    """Path -> the diagonal of the Fisher information of a weight ``[d_out, d_in]`` in the task's own model: the mean
    over examples of the squared gradient of the log-likelihood of one example, in expectation over labels that the
    model itself gives. float32. With ``gradients="batch"`` what :class:`FisherOptions` says of it. Processes that share
    the work run batches in turn.
    """
    model = problem.model
    family = find_family(model)
    masked = mask_of_outputs(family)
    answers = predicts_next(model, family)
    likelihood = likelihoods_of(options.likelihood, problem.tasks)[problem.tasks.index(task)]
    # A module that runs more than once in a forward has as many of each.
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    sums: dict[str, Tensor] = {}
    examples = 0

    def keep(path: str, z: Tensor, y: Tensor) -> Tensor:
        # Where nothing before has a gradient, the output itself is where the graph starts.
        y = y if y.requires_grad else y.detach().requires_grad_()
        if not recomputing():
            inputs.setdefault(path, []).append(z.detach())
            outputs.setdefault(path, []).append(y)
        return y

    values = likelihood == "gaussian"
    heads = _heads(problem, task, options, values=values)
    generator, gradients = torch.Generator(), SquaredGradients()
    with torch.inference_mode(False), torch.enable_grad(), alone(problem, task), ExitStack() as stack:
        for path in paths:
            hook = model.get_submodule(path).register_forward_hook(
                lambda _, arguments, y, path=path: keep(path, arguments[0], y)
            )
            stack.callback(hook.remove)
        device = input_device(model)
        for number, batch, counts in in_turn(batches):
            # Of the batch, so that labels are the same in however many processes. torch takes the lower 32 bits.
            generator.manual_seed(options.seed + 1_000_003 * number)
            held = one_by_one([batch], device)[0].inputs
            with naming_tasks({task: batch}):
                output = output_of(heads, task, model, held, values=values)
            refuse_unseen(model, [path for path in paths if path not in inputs])
            mask = held.get(masked) if masked else None
            if answers and task not in (options.outputs or {}) and output.dim() == 3:
                output = last_token(output, mask)
            if likelihood == "categorical":
                check_classes(output, task, "likelihood", "'gaussian' for values")
            if not any(outputs.values()):
                raise ValueError(
                    f"calibration[{task!r}]: none of the adapted modules runs on these inputs, so that they have no "
                    "Fisher information; expected inputs of the part of the model that the adapters touch"
                )
            examples += len(output) * counts
            real = real_positions(model, output, mask)
            if options.gradients == "batch":
                terms = _all_labels(output, task)
            else:
                terms = _labels(output, real, likelihood, options.exact, generator)
            uses = {path: list(zip(inputs[path], outputs[path], strict=True)) for path in outputs}
            # Whatever the forward was rounded to, squares are sums in float32.
            with without_autocast(device.type):
                squared = gradients.of(uses, terms)
            for path, squares in squared.items():
                squares = squares * float(counts)
                sums[path] = squares if path not in sums else sums[path] + squares
            inputs.clear()
            outputs.clear()
    total = torch.tensor([examples], device=device)
    current().add([total])
    for path in paths:
        # What the output does not depend on has no information.
        sums[path] = sums[path] if path in sums else _zeros(model.get_submodule(path), device)
        current().add([sums[path]])
    return {path: sums[path] / int(total) for path in paths}


def _zeros(linear: Linear, device: torch.device) -> Tensor:
    return torch.zeros(linear.out_features, linear.in_features, dtype=torch.float32, device=device)


def _labels(
    output: Tensor, real: Tensor | None, likelihood: str, exact: int, generator: torch.Generator
) -> list[Term]:
    """Weights ``[N]`` and log-likelihoods ``[N]``, of every label or of one that is drawn; over the positions that are
    ``real`` if given.
    """
    ones = torch.ones(len(output), dtype=torch.float32, device=output.device)
    output = output.float()
    if likelihood == "gaussian":
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float32, device="cpu").to(output)
        # The gradient of -(y - f)^2 / 2 with y = f + noise.
        terms = output * noise if real is None else output * noise * real[..., None]
        return [(ones, terms.reshape(len(terms), -1).sum(1))]
    log_p = output.log_softmax(-1)
    classes = log_p.shape[-1]
    if log_p.dim() == 2 and classes <= exact:
        return [(log_p[:, label].detach().exp(), log_p[:, label]) for label in range(classes)]
    probabilities = log_p.detach().exp().reshape(-1, classes).cpu()
    drawn = torch.multinomial(probabilities, 1, generator=generator).to(output.device)
    chosen = log_p.gather(-1, drawn.view(*log_p.shape[:-1], 1))[..., 0]
    terms = chosen if real is None else chosen * real
    return [(ones, terms.reshape(len(terms), -1).sum(1))]


def _all_labels(output: Tensor, task: str) -> list[Term]:
    """No weights and, of every example, ``sqrt(p) log p`` summed over labels ``[N]``, which squares to the expectation
    but for products of different labels (MergeLM, github.com/yule-BUAA/MergeLM).
    """
    if output.dim() != 2:
        raise ValueError(
            f"outputs[{task!r}]: expected logits [N, C] with gradients='batch', found {list(output.shape)}; "
            "gradients='example' takes many positions"
        )
    log_p = output.float().log_softmax(-1)
    return [(None, (log_p.detach().exp().sqrt() * log_p).sum(-1))]


def _heads(problem: Problem, task: str, options: FisherOptions, *, values: bool) -> dict[str, Any]:
    """What gives a task's outputs, where the model alone does not.

    Raises:
        ValueError: naming the task, if nothing does.
    """
    if not values and task not in (options.outputs or {}):
        check_one_class(problem.model, [task], "likelihood", "'gaussian', of its logits, or method 'distill'")
    own = {task: problem.adapters[task]}
    return with_heads(options.outputs, own, problem.model, [task] if values else [])


def _check(problem: Problem, given: Mapping[str, Any]) -> None:
    options = FisherOptions(**given)
    check_outputs(options.outputs, problem.tasks)
    likelihoods = likelihoods_of(options.likelihood, problem.tasks)
    linears, _, paths = low_rank_part(problem)
    only_linears("fisher", linears, paths)
    with torch.inference_mode(False), keeping_gradients(problem.model):
        check_gradients(problem.model)
    for task, likelihood in zip(problem.tasks, likelihoods, strict=True):
        _heads(problem, task, options, values=likelihood == "gaussian")


def _run(problem: Problem, given: Mapping[str, Any]) -> MergeResult:
    _check(problem, given)
    options = FisherOptions(**given)
    linears, low_rank, paths = low_rank_part(problem)
    paths = changed(low_rank, paths)
    batches = draw(problem, options.batches)
    above: dict[str, Tensor] = {}
    below: dict[str, Tensor] = {}
    for task in problem.tasks:
        fisher = information(problem, task, paths, batches[task], options)
        norm = torch.stack([value.norm().cpu() for value in fisher.values()]).norm()
        adds = options.floor_is == "added"
        size = norm + options.floor if adds else norm
        # A task without any information keeps the floor.
        divisor = size if options.normalise and size > 0 else 1.0
        for path in paths:
            held = fisher.pop(path)
            weight = ((held + options.floor if adds else held.clamp(min=options.floor)) / divisor).cpu()
            factor = low_rank[task].factors.get(path)
            update = torch.zeros_like(weight) if factor is None else weight * dense_update(factor)
            above[path] = update if path not in above else above[path] + update
            below[path] = weight if path not in below else below[path] + weight
    factors: dict[str, Factor] = {}
    for path, linear in linears.items():
        merged = empty(linear)
        if path in above:
            total = below.pop(path)
            merged = Factor.of_matrix(options.scale * above.pop(path) / torch.where(total > 0, total, 1.0))
        factors[path] = with_the_rest(path, merged, problem.adapters, options.scale, averages="tasks")
    return MergeResult(
        "fisher", {}, [], problem.adapters, plain_options(options), {}, problem.model, factors=factors
    )


METHODS = (
    Method(
        "fisher",
        "averages entries by how much each task's likelihood depends on them (no labels)",
        "Fisher merging, Matena and Raffel 2021, arXiv 2111.09832",
        FisherOptions,
        _run,
        needs=frozenset({"data", "gradients", "outputs"}),
        gives="full rank",
        tuned="scale",
        check=_check,
    ),
)
