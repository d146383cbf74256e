"""The small denoiser: its page says what its rows do, and its data are held out."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from bench.quality import denoiser

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_table_of_the_rows():
    rows = [json.loads(line) for line in (ROOT / "bench/results/quality/denoiser.jsonl").read_text().splitlines()]
    assert {row["seed"] for row in rows} == {0, 1, 2}
    assert len(rows) == 3 * (1 + len(denoiser.METHODS) + 1)
    assert denoiser.table(rows) in (ROOT / "docs/pipelines.md").read_text()


def test_shares_are_means_over_seeds_with_their_range():
    rows = [
        {"row": "errors"},
        *({"row": "a", "shares": dict.fromkeys(denoiser.TASKS, share), "plain": share} for share in (0.25, 0.5)),
    ]
    assert denoiser.table(rows).splitlines()[-1] == "| a | 38 % | 38 % | 38 % | 38 % (25 to 50) | 0.38 |"


def test_parts_hold_other_images_and_tasks_show_them_their_way():
    data = denoiser.Images()
    parts = [data.of(None, part) for part in ("train", "validation", "test")]
    assert sum(len(images) for images, _ in parts) + sum(
        len(data.of("digits", part)[0]) for part in ("train", "validation", "test")
    ) == 1797
    plain, tokens = parts[2]
    assert set(tokens[:, 0].tolist()) == set(range(8))
    assert set(tokens[:, 1].tolist()) == {denoiser.PLAIN}
    assert torch.equal(data.of("inverted", "test")[0], -plain)
    assert torch.equal(data.of("sideways", "test")[0], plain.rot90(1, (2, 3)))
    assert set(data.of("digits", "test")[1][:, 0].tolist()) == {8, 9}
    assert {data.of(task, "test")[1][0, 1].item() for task in denoiser.TASKS} == {10, 11, 12}
