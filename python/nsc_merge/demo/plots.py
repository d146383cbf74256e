"""The demo's three pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsc_merge.demo.data import Scene, SceneSet
from nsc_merge.demo.model import BLOCKS
from nsc_merge.demo.tasks import Task
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.plot_style import COLOURS, pyplot_in_style, running_mean, write_picture

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def plot_coefficients(result: MergeResult, path: Path) -> None:
    """Every coefficient: a panel per task, blocks by projections, coloured by distance from the start."""
    with pyplot_in_style() as plt:
        start = float(result.options["init"])
        modules = {
            (block, column): f"layers.{block}.attention.{name}"
            for block in range(BLOCKS)
            for column, name in enumerate(_PROJECTIONS)
        }
        rows = [result.coefficients[name] for name in modules.values()]
        values = {
            task: torch.tensor([row[task] for row in rows], device="cpu").view(BLOCKS, -1) for task in result.tasks
        }
        reach = max(1e-3, max(float((value - start).abs().max()) for value in values.values()))
        figure, axes = plt.subplots(
            1, len(values), figsize=(1.75 * len(values) + 1.2, 4.2), sharey=True, squeeze=False
        )
        for axis, (task, value) in zip(axes[0], values.items(), strict=True):
            image = axis.imshow(value, cmap="RdBu_r", vmin=start - reach, vmax=start + reach, aspect="auto")
            axis.set_title(task)
            axis.set_xticks(range(len(_PROJECTIONS)), [name[0] for name in _PROJECTIONS])
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            for (block, column), module in modules.items():
                if task in result.dead.get(module, ()):
                    axis.plot(column, block, marker="x", color="0.35", markersize=7)
        axes[0][0].set_yticks(range(BLOCKS))
        axes[0][0].set_ylabel("block")
        figure.supxlabel("projection (x: receives no gradient, keeps its start)", fontsize=10)
        bar = figure.colorbar(image, ax=axes[0].tolist(), fraction=0.05, pad=0.02)
        bar.set_label(f"coefficient λ (white: start, {start:g})")
        figure.suptitle("Merge coefficients found by NSC", y=1.0)
        write_picture(figure, path)


def plot_ratios(result: MergeResult, path: Path) -> None:
    """Null-space ratio of every task over the steps, and their mean: averages over as many steps as the objective was
    compared on, and faint what each step measured on its own batches.
    """
    with pyplot_in_style() as plt:
        figure, axis = plt.subplots(figsize=(7, 4))
        steps = [entry["step"] for entry in result.history]
        window = result.objective["batches"]
        curves = {task: [entry["omega"][task] for entry in result.history] for task in result.tasks}
        curves["mean (objective)"] = [entry["objective"] for entry in result.history]
        styles = [(colour, 1.4, "normal") for colour in COLOURS[: len(result.tasks)]] + [("black", 2.4, "bold")]
        ends = {}
        for (name, values), (colour, width, weight) in zip(curves.items(), styles, strict=True):
            means = running_mean(values, window)
            axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
            axis.plot(steps[window - 1 :], means, color=colour, linewidth=width)
            ends[name] = (means[-1], colour, weight)
        low, high = axis.get_ylim()
        placed = -float("inf")
        for name, (value, colour, weight) in sorted(ends.items(), key=lambda item: item[1][0]):
            # Labels stand at the ends of their lines, pushed apart where lines end close together.
            placed = max(value, placed + 0.045 * (high - low))
            axis.text(
                1.015,
                (placed - low) / (high - low),
                name,
                color=colour,
                weight=weight,
                va="center",
                transform=axis.transAxes,
            )
        axis.set_xlim(0, max(1, steps[-1]))
        axis.set_ylim(low, high)
        axis.set_xlabel("step")
        axis.set_ylabel("null-space ratio ω")
        axis.set_title(f"What NSC minimises (mean over {window} steps; faint: each, on its own batches)", loc="left")
        axis.grid(axis="y", color="0.9")
        write_picture(figure, path)


def plot_predictions(
    tasks: Sequence[Task],
    scenes: Mapping[Scene, SceneSet],
    predictions: Mapping[str, Mapping[str, Tensor]],
    index: int,
    path: Path,
) -> None:
    """Test scene ``index``: input, truth and every method's prediction, one row per dense task.

    Args:
        tasks: of which at least one is dense.
        predictions: method -> task -> output ``[N, C, 24, 24]``.
    """
    dense = [task for task in tasks if task.dense]
    with pyplot_in_style() as plt:
        columns = ["input", "truth", *predictions]
        figure, axes = plt.subplots(
            len(dense), len(columns), figsize=(1.5 * len(columns), 1.5 * len(dense) + 0.4), squeeze=False
        )
        for row, task in zip(axes, dense, strict=True):
            scene = scenes[task.scene]
            truth = scene.labels[task.name][index]
            row[0].imshow(scene.pixels[index, 0], cmap="gray")
            style = _map_style(task, truth)
            row[1].imshow(_as_map(task, truth), **style)
            for axis, outputs in zip(row[2:], predictions.values(), strict=True):
                output = outputs[task.name][index]
                if task.name == "semseg":
                    output = output.argmax(0)
                elif task.channels == 1:
                    output = output[0]
                axis.imshow(_as_map(task, output), **style)
            row[0].set_ylabel(task.name, fontsize=11)
        for axis, title in zip(axes[0], columns, strict=True):
            axis.set_title(title, fontsize=10)
        for axis in axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        figure.tight_layout(pad=0.4)
        write_picture(figure, path)


def _as_map(task: Task, value: Tensor) -> Tensor:
    if task.name == "normal":
        return (torch.nn.functional.normalize(value, dim=0).permute(1, 2, 0) * 0.5 + 0.5).clamp(0, 1)
    return value


def _map_style(task: Task, truth: Tensor) -> dict[str, Any]:
    from matplotlib.colors import ListedColormap

    if task.name == "normal":
        return {}
    if task.name == "semseg":
        return {"cmap": ListedColormap(["#2b2b33", "#56B4E9", "#E69F00"]), "vmin": 0, "vmax": 2}
    return {
        "cmap": "magma" if task.name == "edge" else "viridis_r",
        "vmin": float(truth.min()),
        "vmax": float(truth.max()),
    }
