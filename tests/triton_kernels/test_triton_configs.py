"""The formula, the tables that override it, and the layout of the rank axis."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsc_kernels.triton import configs, warm_up
from nsc_kernels.triton.columns import MIN_CHUNK, chunk_size, columns, owner_table
from nsc_kernels.triton.configs import SHARED, Machine, Problem, bucket, choose, shared_bytes

H200 = Machine("NVIDIA H200", 90, 132, SHARED[90])
machines = st.sampled_from([Machine(f"sm_{arch}", arch, 128, shared) for arch, shared in SHARED.items()])
problems = st.builds(
    Problem,
    T=st.integers(1, 1 << 20),
    d_in=st.integers(1, 20000),
    d_out=st.integers(1, 20000),
    R=st.integers(0, configs.MAX_RANK),
    mode=st.sampled_from(["half", "ieee", "tf32x3"]),
).filter(lambda p: p.mode != "tf32x3" or p.R <= 128)


@given(on=machines, problem=problems)
def test_every_problem_has_a_configuration_that_the_kernel_accepts(on, problem):
    config = choose(on, problem)
    assert config is not None
    sizes = (config.chunk, config.block_t, config.block_k, config.block_n, config.rows, config.out_slices)
    assert all(n >= 1 and n & (n - 1) == 0 for n in (*sizes, config.warps, max(config.slices, 1)))
    assert min(sizes[:4]) >= MIN_CHUNK, "operands of a matrix instruction"
    assert config.block_t % config.rows == 0, "a mid unit belongs to one tile"
    assert shared_bytes(on, problem, config) <= on.shared


@given(problem=problems)
def test_configurations_change_with_the_bucket_of_T_only(problem):
    assert choose(H200, problem) == choose(H200, problem._replace(T=bucket(problem.T)))


def test_few_variants_serve_every_T():
    found = {choose(H200, Problem(T, 4096, 4096, 96, "half")) for T in range(1, 200_000, 7)}
    assert len(found) <= 13, "one per power of two at most"


def test_small_T_is_sliced_and_large_T_is_not():
    for T, sliced in ((1, True), (256, True), (3840, True), (8192, True), (16384, False), (65536, False)):
        config = choose(H200, Problem(T, 4096, 4096, 96, "half"))
        assert (config.slices > 0) is sliced, T
        if sliced:
            units = -(-T // config.block_t) * config.slices
            assert units >= 0.4 * H200.processors or config.slices == 32


def test_a_table_overrides_the_formula(tmp_path, monkeypatch):
    problem = Problem(2048, 4096, 4096, 96, "half")
    measured = replace(choose(H200, problem), slices=2)
    (tmp_path / "nvidia-h200.json").write_text(json.dumps([problem._asdict() | asdict(measured)]))
    monkeypatch.setattr(configs, "TABLES", tmp_path)
    configs.table.cache_clear()
    choose.cache_clear()
    try:
        assert choose(H200, problem._replace(T=1536)) == measured
        assert choose(H200, problem._replace(T=256)).slices != 2
    finally:
        configs.table.cache_clear()
        choose.cache_clear()


def test_nothing_fits_no_shared_memory():
    assert choose(Machine("none", 80, 10, 1024), Problem(100, 64, 64, 64, "half")) is None


@given(ranks=st.lists(st.integers(0, 64), min_size=1, max_size=64).filter(lambda r: 0 < sum(r) <= 512))
def test_every_group_of_columns_has_the_one_owner(ranks):
    offsets = tuple(sum(ranks[:k]) for k in range(len(ranks) + 1))
    layout = columns(offsets, chunk_size(offsets[-1]))
    assert layout.padded >= offsets[-1] > layout.padded - layout.chunk
    assert layout.chunk % layout.group == 0
    owner = owner_table(offsets, layout.group, torch.device("cpu")).tolist()
    expected = [k for k, r in enumerate(ranks) for _ in range(r)]
    assert [owner[j // layout.group] for j in range(offsets[-1])] == expected
    if layout.uniform:
        assert owner == list(range(len(ranks)))


@pytest.mark.parametrize(
    ("R", "padded"), [(1, 16), (16, 16), (20, 32), (96, 128), (128, 128), (320, 320), (384, 384), (500, 512)]
)
def test_padding_of_the_rank_axis(R, padded):
    assert -(-R // chunk_size(R)) * chunk_size(R) == padded


def test_warm_up_launches_each_variant_once(device):
    from nsc_kernels import AdapterBank

    bank = AdapterBank.from_factors([torch.randn(4, 24)] * 2, [torch.randn(40, 4)] * 2, device=device)
    assert warm_up(bank, [1, 2, 3], training=False) == 1
    assert warm_up(bank, 3, training=False) == 1
    assert warm_up(bank, [1, 2, 3], stats=False, base=False, per_row=True) == 2


@pytest.mark.parametrize("tokens", ["5", 5.0, [3, "5"], None])
def test_warm_up_refuses_what_is_no_number_of_tokens(tokens, device):
    from nsc_kernels import AdapterBank

    bank = AdapterBank.from_factors([torch.randn(4, 24)], [torch.randn(40, 4)], device=device)
    with pytest.raises(TypeError, match=r"^tokens must be an int, or several, found "):
        warm_up(bank, tokens)
