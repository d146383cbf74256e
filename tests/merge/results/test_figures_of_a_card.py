"""The figures on a card are those of the merge."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nsc_merge
from nsc_merge.adapters import Factor
from nsc_merge.results.beside import norms
from nsc_merge.results.beside.figures import tasks_table
from nsc_merge.results.beside.norms import inner_products, norm_kept


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_inner_products_are_those_of_the_dense_updates(kinds, d_in, d_out, seed):
    draw = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=draw)

    weight = random(d_out, d_in)
    factors = [
        Factor(random(rank, d_in), random(d_out, rank), 0.5 * number - 1, dense=random(d_out, d_in) if whole else None)
        for number, (rank, whole, _) in enumerate(kinds)
    ]
    dense = torch.stack([factor.delta().flatten() for factor in factors])
    for number, (_, _, gains) in enumerate(kinds):
        if gains:
            factors[number] = replace(factors[number], gain=random(d_out))
            grown = factors[number].scaling * factors[number].gain[:, None] * weight
            dense[number] += grown.flatten()
    rows, norms._ROWS = norms._ROWS, 4
    try:
        found = inner_products(factors, lambda begin, end: weight[begin:end])
    finally:
        norms._ROWS = rows
    lengths = dense.norm(dim=1)
    exact = not any(whole or gains for _, whole, gains in kinds)
    error = (found - dense @ dense.t()).abs()
    assert (error <= (1e-12 if exact else 1e-6) * (lengths[:, None] * lengths + 1)).all()


@pytest.mark.parametrize(("method", "options"), [("task_arithmetic", {"scale": 0.3}), ("ties", {}), ("svd", {})])
def test_norms_kept_are_those_of_the_dense_updates(model, folders, method, options):
    result = nsc_merge.merge(model, folders, method=method, **options)
    kept = norm_kept(result)
    merged = {path: result.delta(path) for path in result.paths}
    adapters = result.adapters
    own = {task: {path: one.delta() for path, one in adapters[task].factors.items()} for task in adapters}
    squares = {task: sum(float(value.square().sum()) for value in deltas.values()) for task, deltas in own.items()}
    whole = sum(float(value.square().sum()) for value in merged.values())
    assert kept.merged == pytest.approx(whole**0.5, rel=1e-5)
    assert kept.total == pytest.approx((whole / sum(squares.values())) ** 0.5, rel=1e-5)
    for task, deltas in own.items():
        assert kept.own[task] == pytest.approx(squares[task] ** 0.5, rel=1e-6)
        inner = sum(float((value * merged[path]).sum()) for path, value in deltas.items())
        assert kept.along[task] == pytest.approx(inner / squares[task], rel=1e-4)


def test_one_adapter_as_it_is_is_kept_in_full(model, folders, tmp_path):
    result = nsc_merge.merge(model, {"plain": folders["plain"]}, method="task_arithmetic", scale=1.0)
    kept = norm_kept(result)
    assert (kept.along["plain"], kept.total) == (pytest.approx(1.0), pytest.approx(1.0))
    card = (result.save(tmp_path / "out", "lora") / "README.md").read_text()
    assert "100.0% of that of all adapters' updates together (100.0% of plain's)" in card
    assert "calibration data" not in card


def test_the_card_has_the_ratios_of_every_task_and_the_worst_modules(model, folders, calibration, tmp_path):
    result = nsc_merge.merge(model, folders, calibration, steps=2, progress=False)
    digest = "ab" * 32
    said = {
        "calibration": {"plain": "/home/someone/data/p.jsonl", "mixed": {"source": "org/set"}, "partial": "q.txt"},
        "record": {
            "sha256": {
                "calibration": {
                    "plain": {"p.jsonl": "0" * 64, "samples": digest},
                    "mixed": {"m.jsonl": "cd" * 32},
                    "partial": {"q.safetensors": "0" * 64, "r.safetensors": "1" * 64},
                }
            },
            "samples": {"plain": 96},
        },
    }
    out = replace(result, inputs=said).save(tmp_path / "out", "lora", rank=2)
    card = (out / "README.md").read_text()
    assert "| task | modules | ranks | coefficients | mean | ratio before | after | norm | kept along it |" in card
    for task, both in result.objective["tasks"].items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {task} |"))
        factors = result.adapters[task].factors
        values = [result.coefficients[path][task] for path in factors]
        ranks = ", ".join(map(str, sorted({factor.rank for factor in factors.values()})))
        told = f"{min(values):.3f} to {max(values):.3f} | {sum(values) / len(values):.3f}"
        ratios = f"{both['before']:#.4g} | {both['after']:#.4g}"
        assert row.startswith(f"| {task} | {len(factors)} | {ranks} | {told} | {ratios} |")
    assert f"| plain | p.jsonl | 96 | `{digest[:16]}` |" in card
    assert f"| mixed | org/set |  | `{'cd' * 8}` |" in card
    assert "| partial | q.txt |  | in `recipe.yaml` |" in card
    assert "someone" not in card
    errors = result.rank_errors(2)
    worst = sorted(errors, key=errors.get, reverse=True)[:5]
    lines, kept = tasks_table(result), norm_kept(result)
    begins = ["| task", "|---" * 9 + "|", *(f"| {task}" for task in folders)]
    assert [line.split(" | ")[0] for line in lines[:5]] == begins
    assert ", ".join(f"{kept.merged / kept.own[task]:.1%} of {task}'s" for task in folders) in lines[-1]
    lost = replace(result, history=[{"step": 1, "loss": {}}])
    assert "| loss before | after |" in tasks_table(lost)[0]
    # What no method may change is told as it is.
    fixed = {path: replace(one, fixed=0.125) for path, one in result.adapters["plain"].factors.items()}
    held = replace(result, adapters={**result.adapters, "plain": replace(result.adapters["plain"], factors=fixed)})
    assert "| 0.125 to 0.125 | 0.125 |" in "".join(tasks_table(held))
    listed = re.findall(r"^\| `(layers[^`]+)` \| ([\d.e-]+) \|$", card, re.MULTILINE)
    assert listed == [(path, f"{errors[path]:.3g}") for path in worst]
