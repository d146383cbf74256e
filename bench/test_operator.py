"""The operator's contenders under pytest-benchmark, for those who compare and keep runs with it: ``make bench``.

    pytest bench/test_operator.py --shapes llama3-8b.q --tokens 256 --dtype bf16 --contenders fused,concat
    pytest bench/test_operator.py --contender my_kernel.py --contenders fused,mine --benchmark-autosave

The registry and the inputs are those of ``python -m nsc_kernels.bench``, and a contender that is wrong fails. That
command measures better: in rounds that all take part in, from cold caches, with a GPU's graphs and clocks.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch

from nsc_kernels.bench import measure, registry
from nsc_kernels.bench.accuracy import Judge, faults
from nsc_kernels.bench.measuring import synchronize
from nsc_kernels.bench.problem import DTYPES, Problem
from nsc_kernels.bench.registry import Contender
from nsc_kernels.bench.shapes import Shape, grid
from nsc_kernels.bench.timing import keep_freed_memory

SETS = 8  # of inputs that calls go around


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    for text in option("contender"):
        registry.load(text)
    contenders = registry.chosen("operator", measure.comma(option("contenders")), option("device"))
    shapes = grid(
        measure.comma(option("shapes")), measure.numbers(option("tokens")), measure.comma(option("adapters"))
    )
    cases = list(itertools.product(shapes, measure.comma(option("dtype")), contenders))
    metafunc.parametrize(("shape", "dtype", "contender"), cases, ids=lambda value: getattr(value, "name", str(value)))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_operator(
    benchmark: Any, shape: Shape, dtype: str, contender: Contender, direction: str, pytestconfig: pytest.Config
) -> None:
    on = torch.device(pytestconfig.getoption("device"))
    why = contender.unavailable and contender.unavailable(on, DTYPES[dtype], shape)
    if why:
        pytest.skip(why)
    torch.set_num_threads(pytestconfig.getoption("threads"))
    keep_freed_memory()
    assert faults(Judge(Problem(shape, on, 1000, dtype=DTYPES[dtype])).errors(contender)) == []
    with torch.set_grad_enabled(contender.autograd):
        pairs = [contender.make(Problem(shape, on, seed, dtype=DTYPES[dtype])) for seed in range(SETS)]
        calls = [forward if direction == "forward" else partial(backward, forward()[3]) for forward, backward in pairs]
        turns = itertools.cycle(calls)

        def call() -> None:
            next(turns)()
            synchronize(on)

        benchmark.group = f"{shape} {dtype} {direction}"
        benchmark(call)
