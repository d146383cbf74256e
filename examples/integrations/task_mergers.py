"""A search for the scale as KnOTS' and Core Space's evaluation scripts do it, with our handlers in place of theirs.

    python examples/integrations/task_mergers.py

In a script of either codebase one line changes:

    from task_merger import get_merge_handler                              # before
    from nsc_merge.integrations.task_mergers import get_merge_handler      # after

What the codebase brings, models and a handler that finds their parameters, is small and made up here.
"""

from __future__ import annotations

import torch
from torch import nn

from nsc_merge.integrations.task_mergers import get_merge_handler

WIDTH, RANK, TASKS = 64, 4, 3
task_merge_config = {
    "representation": "svd-vector",
    "merge_method": "ties",
    "merging_type": "mean",
    "topK": 20,
    "concat_across_output": True,
}


class LoRAHandler:
    """Stands for the codebase's own of that name."""

    def __init__(self, base_model: dict[str, torch.Tensor]) -> None:
        self.state_dict = base_model

    def get_ft_parameters(self) -> dict[str, torch.Tensor]:
        return {}  # of the pretrained model, which has no adapter here


def adapter() -> dict[str, torch.Tensor]:
    return {
        f"{layer}.lora_{part}.weight": torch.randn(shape) / WIDTH**0.5
        for layer in ("q_proj", "v_proj")
        for part, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK)))
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    pretrained = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("q_proj", "v_proj")})
    MergeClass = get_merge_handler(task_merge_config["representation"])
    merger = MergeClass(
        [adapter() for _ in range(TASKS)],
        pretrained_model=pretrained,
        param_handler=LoRAHandler,
        merge_config=task_merge_config,
    )
    merger.transform(task_merge_config)
    for scale in (0.1, 0.3, 1.0):
        # The alignment and the merge are computed once for all scales.
        merger.set_scaling_coeffs(scale)
        model = merger.merge(task_merge_config)
        moved = [model[name].weight - pretrained[name].weight for name in pretrained]
        share = torch.stack(moved).ne(0).float().mean()
        print(f"scale {scale}: {share:.0%} of the parameters moved, by {torch.stack(moved).norm():.3f} in all")
