"""Options of the benchmarks that pytest runs."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nsc_kernels", "the operator's benchmark, test_operator.py")
    group.addoption("--shapes", default="vit-b.q,llama3-8b.kv", help="as python -m nsc_kernels.bench has them")
    group.addoption("--tokens", default="32,256")
    group.addoption("--adapters", default="6x16")
    group.addoption("--dtype", default="fp32")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--threads", type=int, default=1, help="of a CPU")
    group.addoption("--contenders", default="plain", help="names or groups")
    group.addoption("--contender", action="append", default=[], help="a module or file that registers your own")
