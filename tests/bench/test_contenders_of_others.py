"""Contenders of other people: what one does to the rest is told, and what cannot be loaded says where."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from nsc_kernels.bench import measure, registry, tables
from nsc_kernels.bench.environment import float32_products, settings_kept
from nsc_kernels.bench.registry import contender
from nsc_kernels.bench.rounds import Cell, run_cell
from nsc_kernels.bench.shapes import Shape

SHAPE = Shape("s", 9, 40, 24, 2, 4)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    registry.load_shipped()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(registry.sys, "path", [*registry.sys.path])


def forward_of(p):
    """The right y, and nothing else."""
    return torch.addmm(p.base, (p.z @ p.A.t() * p.lam.repeat_interleave(p.shape.r)).to(p.dtype), p.Bt)


def measured(*names: str) -> tuple[set[str], dict[str, str]]:
    """Who is timed, and why others are not."""
    rows = list(run_cell(Cell("operator", SHAPE, "fp32", names, samples=1, seconds=0, cache_bytes=1), CPU))
    return (
        {row["contender"] for row in rows if tables.is_timed(row)},
        {row["contender"]: row["error"] for row in rows if "error" in row},
    )


def test_one_that_writes_over_what_all_are_given_is_told_and_costs_no_other():
    @contender("over base", stats=False)
    def over_base(p):
        def forward():
            with torch.no_grad():
                return p.base.copy_(forward_of(p)).clone(), None, None, None

        def backward(saved):
            u, v = p.z @ p.A.t(), p.dy @ p.Bt.t()
            return v * p.lam.repeat_interleave(p.shape.r) @ p.A, (u * v).sum(0).unflatten(0, (p.shape.K, -1)).sum(-1)

        return forward, backward

    @contender("over z", stats=False, autograd=True, inplace=True)
    def over_z(p):
        def forward():
            y = forward_of(p)
            p.z.data.zero_()
            return y

        return forward

    timed, errors = measured("over base", "over z", "fused", "concat", "peft")
    assert timed == {"fused", "concat", "peft"}
    assert errors.keys() == {"over base", "over z"}
    assert "it writes over base, which all are given: write to a copy, or register it with" in errors["over base"]
    assert "it writes over z, which all are given" in errors["over z"]


def test_one_whose_functions_are_others_than_asked_for_is_told():
    @contender("no arguments")
    def no_arguments():
        return None

    @contender("numbers", stats=False)
    def numbers(p):
        return lambda: (1.0, None, None, None), lambda saved: (p.dz_base, None)

    @contender("numbers backwards", stats=False)
    def numbers_backwards(p):
        return lambda: (forward_of(p), None, None, None), lambda saved: ([1.0], None)

    timed, errors = measured("no arguments", "numbers", "numbers backwards", "fused")
    assert timed == {"fused"}
    assert "no_arguments() takes 0 positional arguments but 1 was given" in errors["no arguments"]
    assert errors["numbers"] == "ValueError: y is to be a tensor; found float"
    assert errors["numbers backwards"] == "ValueError: dz is to be a tensor; found list"


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_one_that_sets_the_precision_of_all_is_told_and_it_is_put_back(precision):
    before = torch.get_float32_matmul_precision(), float32_products()

    @contender("less", stats=False, autograd=True)
    def less(p):
        torch.set_float32_matmul_precision(precision)
        return lambda: forward_of(p)

    timed, errors = measured("less", "fused", "concat")
    assert timed == {"fused", "concat"}
    assert "it sets the precision of float32 products to tf32" in errors["less"]
    assert (torch.get_float32_matmul_precision(), float32_products()) == before

    with pytest.raises(RuntimeError, match="it sets the default dtype to torch.float64 and the number of threads to 7"):
        threads = torch.get_num_threads()
        with settings_kept():
            torch.set_default_dtype(torch.float64)
            torch.set_num_threads(7)
    assert (torch.get_default_dtype(), torch.get_num_threads()) == (torch.float32, threads)


def test_what_products_were_computed_in_is_said():
    fields = {"stats": True, "over": "fused", "us_p20": 1.0, "us_p50": 1.0, "us_p80": 1.0}
    said = list(tables.closing([fields, {"float32_products": "tf32"}]))
    assert "products of float32 were computed in tf32, eager PyTorch's, which errors are held to, as well" in said
    assert not any("products" in line for line in tables.closing([fields, {"float32_products": "ieee"}]))


REGISTERS = "from nsc_kernels.bench import contender\n@contender({!r}, of={!r})\ndef mine(p):\n    pass\n"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1\ndef f(:\n    pass\n", "mine.py, line 2: invalid syntax"),
        ("import torch\nfrom torch import nothing_of_this_name\n", "mine.py, line 2: ImportError: cannot import name"),
        ("\n\nraise RuntimeError('no GPU')\n", "mine.py, line 3: RuntimeError: no GPU"),
        ("raise RuntimeError('no\\n  GPU')\n", "mine.py, line 1: RuntimeError: no GPU"),
        ("import nobody_has_it\n", "mine.py, line 1: ModuleNotFoundError: No module named 'nobody_has_it'\n"),
        ("import sys\nsys.exit('not like this')\n", "mine.py, line 2: SystemExit: not like this"),
        (REGISTERS.format("fused", "operator"), "mine.py, line 2: ValueError: there is a contender named 'fused'"),
        (REGISTERS.format("mine", "linear"), "mine.py registers none of operator; see the command linear"),
    ],
)
def test_a_file_that_gives_no_contender_is_refused_with_its_line(tmp_path, capsys, source, words):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(SystemExit) as ended:
        measure.main("operator", ["--device", "cpu", "--contender", str(tmp_path / "mine.py")])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_what_lies_beside_a_file_is_imported_and_the_file_stands_in_no_module_s_place(tmp_path, monkeypatch):
    (tmp_path / "a_file_beside.py").write_text("NAME = 'beside'\n")
    source = REGISTERS.format("x", "operator").replace("'x'", "NAME")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (tmp_path / "colorsys.py").write_text(f"import colorsys\nfrom a_file_beside import NAME\n{source}")
    registry.load(str(tmp_path / "colorsys.py"))
    assert importlib.import_module("colorsys").rgb_to_hsv
    assert registry.chosen("operator", ["beside"])
