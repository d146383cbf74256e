"""What outputs of tasks' heads parametrise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsc_merge.utils.option_checks import check_choice

LIKELIHOODS = ("categorical", "gaussian")
# Of classes of which several may be true, as transformers calls it, too.
BERNOULLI, _MULTI_LABEL = "bernoulli", "multi_label_classification"
OF_LOGITS_OR_VALUES = (*LIKELIHOODS, BERNOULLI)


def check_likelihood(likelihood: str | Mapping[str, str], known: Sequence[str] = LIKELIHOODS) -> None:
    """Refuse what is none of ``known``, nor a mapping to them.

    Raises:
        ValueError: naming what was found.
    """
    for value in likelihood.values() if isinstance(likelihood, Mapping) else [likelihood]:
        check_choice("likelihood", value, known)


def check_one_class(model: nn.Module, tasks: Sequence[str], argument: str, way: str) -> None:
    """Refuse logits of a base whose configuration says that several classes may be true: their softmax is of one.

    Args:
        tasks: whose outputs are the model's own logits, taken for classes of which one is true.
        argument, way: for the message.

    Raises:
        ValueError: naming the first.
    """
    if tasks and getattr(getattr(model, "config", None), "problem_type", None) == _MULTI_LABEL:
        raise ValueError(
            f"{argument}: by the configuration of {type(model).__name__} ({_MULTI_LABEL}) several classes of a sample "
            f"of {tasks[0]!r} may be true; expected {way}"
        )


def likelihoods_of(likelihood: str | Mapping[str, str], tasks: Sequence[str]) -> list[str]:
    """What each task's output parametrises.

    Raises:
        ValueError: if a mapping has not exactly these tasks.
    """
    if isinstance(likelihood, str):
        return [likelihood] * len(tasks)
    if set(likelihood) != set(tasks):
        raise ValueError(f"likelihood: expected one for each of {list(tasks)}, found {sorted(likelihood)}")
    return [likelihood[task] for task in tasks]


def check_classes(output: Tensor, task: str, argument: str, expected: str) -> None:
    """Refuse logits of one class, as heads of regressions have: it is certain, whatever the model says.

    Args:
        output: ``[..., C]``.
        task, argument, expected: for the message.

    Raises:
        ValueError: naming the task and its output.
    """
    if output.shape[-1] == 1:
        raise ValueError(
            f"{argument}: the output {list(output.shape)} of {task!r} has one class, which is certain; "
            f"expected {expected}"
        )


def differences(
    output: Tensor, own: Tensor, likelihood: str, variance: Tensor | float = 1.0, *, bounded: bool
) -> Tensor:
    """How far outputs are from a task's own at each position: of distributions the total variation, or the divergence
    of Kullback and Leibler; of values the squared differences, divided by their ``variance``, of which the bound is
    ``d / (1 + d)``. Of classes of which several may be true each is a distribution of its own.

    Args:
        output, own: ``[..., C]`` logits, or values.
        likelihood: what they parametrise.
    """
    if likelihood == BERNOULLI:
        # Each class is one of two: that it is not true, and that it is.
        output, own = (torch.stack([torch.zeros_like(one), one], -1) for one in (output, own))
    if likelihood == "gaussian":
        each = (output - own).square() / variance
        if bounded:
            each = each if each.dim() < 2 else each.mean(-1)
            each = each / (1 + each)
        return each
    if bounded:
        return (output.softmax(-1) - own.softmax(-1)).abs().sum(-1) / 2
    return F.kl_div(output.log_softmax(-1), own.log_softmax(-1), reduction="none", log_target=True).sum(-1)
