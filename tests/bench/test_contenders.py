"""What takes part in the GPU benchmark computes what it says, and what is said about the measuring holds. On a CPU."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nsc_kernels as nk
from nsc_kernels import verified_hardware

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
if not (Path(__file__).resolve().parents[2] / "bench" / "from_tests.py").is_file():
    pytest.skip("needs the source tree", allow_module_level=True)

from bench import from_tests
from bench.hardware import operator_speed, speed_tables
from bench.hardware.layers import DRY_RUN, FAMILIES, SHAPES
from nsc_kernels.bench import registry, rounds
from nsc_kernels.bench.accuracy import Judge, faults
from nsc_kernels.bench.clocks import Clocks
from nsc_kernels.bench.costs import least_bytes, operations, rotation, touched
from nsc_kernels.bench.problem import DTYPES, Problem
from nsc_kernels.bench.rounds import Cell
from nsc_kernels.bench.shapes import Shape

# No width a multiple of a tile, several tiles of tokens, chunks of columns that are not all used; and one adapter.
ODD, ONE = Shape("odd", 37, 48, 80, 3, 4), Shape("one", 33, 64, 72, 1, 16)
MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def on() -> torch.device:
    if not torch.cuda.is_available():
        return from_tests.device(dry_run=True)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that a contender leaves unwritten reads as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def named(name: str, of: str = "operator") -> registry.Contender:
    (found,) = registry.chosen(of, [name])
    return found


def problem(shape: Shape, on: torch.device, seed: int = 0, of: str = "operator", dtype: str = "bf16") -> Problem:
    return Problem(shape, on, seed, of == "linear", DTYPES[dtype])


@pytest.mark.parametrize("of", ["operator", "linear"])
@pytest.mark.parametrize("shape", [ODD, ONE], ids=lambda shape: shape.name)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_contenders_compute_the_operator(of, shape, dtype, on):
    """All that can run here; two_launches and Triton's backend in the interpreter."""
    judge = Judge(problem(shape, on, of=of, dtype=dtype))
    tried = set()
    for contender in registry.chosen(of, ["all"]):
        if contender.unavailable and contender.unavailable(on, DTYPES[dtype], shape):
            continue
        tried.add(contender.name)
        found = judge.errors(contender)
        assert faults(found) == [], contender.name
        statistics = {"quad", "sqnorm"} if contender.stats else set()
        assert found.keys() == {"y", "dz", *(["dlam"] if contender.adapters else []), *statistics}
    assert {"fused", "concat", "loop", "peft", "compiled", "autotuned", "fused_triton"} <= tried
    assert ("two_launches" in tried) == (dtype == "bf16")


def test_errors_are_those_from_what_float64_gives(on):
    p, concat = problem(ODD, on, dtype="fp32"), named("concat")
    with torch.no_grad():
        y, *_ = concat.make(p)[0]()
        coefficients = p.lam.double().repeat_interleave(ODD.r)
        exact = p.base.double() + (p.z.double() @ p.A.double().t() * coefficients) @ p.Bt.double()
    assert Judge(p).errors(concat)["y"].found == pytest.approx(float((y - exact).abs().max()), rel=1e-6)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.hardware.triton_buffers import overwritten
from nsc_kernels.bench.contenders.two_launches import Tiles, default, expand_kernel, shrink_kernel

for key in ((1536, 4096, 1024, 96, False), (6304, 768, 768, 320, True)):
    how, backward, chunk = default(key, 132), key[4], min(key[3] & -key[3], 128)
    absent = {"norms"} if backward else {"dlam", "z"}
    sizes = {"N": key[3] // chunk, "C": chunk, "G": 16, "KP": 32, "SPLITS": how.splits, "STAGES": how.stages}
    for kernel, more in (
        (shrink_kernel, {"BT": how.shrink_t, "BK": how.shrink_k}),
        (expand_kernel, {"BT": how.expand_t, "BN": how.expand_n, "BACKWARD": backward}),
    ):
        constants = {n: v for n, v in (sizes | more | dict.fromkeys(absent)).items() if n in kernel.arg_names}
        halves = dict.fromkeys(("x", "w", "base", "out", "u", "z"), "*bf16")
        kinds = halves | dict.fromkeys(("parts", "norms", "lam", "quad", "sqnorm", "dlam"), "*fp32")
        types = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in kernel.arg_names}
        at = {(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants}
        aligned = [i for i, n in enumerate(kernel.arg_names) if n not in constants and n in (*kinds, "D", "stride_x")]
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
        source = ASTSource(fn=kernel, signature=types, constexprs=at, attrs=attributes)
        options = {"num_warps": how.warps, "num_stages": how.stages}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert made.metadata.shared <= 227 << 10, (key, kernel, made.metadata.shared)
        assert "warp_group_dot" in made.asm["ttgir"] and not overwritten(made.asm["ttgir"]), (key, kernel)
"""


def test_two_launches_compile_for_hopper_and_fit():
    """The interpreter lets pass what the compiler does not: a name that changes its shape from one loop to the next."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def broken(what: str) -> registry.Contender:
    """``concat``, with one mistake."""
    concat = named("concat")

    def make(p):
        forward, backward = concat.make(p)

        def wrong_forward():
            found = forward()
            if what == "nan":
                found.y[-1, -1] = math.nan
            if what == "one entry":
                found.y[-1, -1] += 1
            return found._replace(quad=found.quad * 1.03) if what == "quad" else found

        def wrong_backward(saved):
            dz, dlam = backward(saved)
            if what == "a gradient":  # that of the norm is left out
                dz = dz - 2 * p.dsqnorm.to(p.dtype)[:, None] * p.z
            return (dz, dlam * 1.1) if what == "dlam" else (dz, dlam)

        return wrong_forward, wrong_backward

    return dataclasses.replace(concat, name="broken", make=make)


def cell(**more: object) -> Cell:
    """Each way once."""
    hows = rounds.GRAPH, rounds.EAGER, rounds.WARM
    return Cell("operator", ODD, **{"hows": hows, "samples": 1, "seconds": 0.0, "cache_bytes": 1, **more})


@pytest.mark.parametrize("what", ["nan", "one entry", "quad", "a gradient", "dlam"])
def test_a_wrong_contender_is_named_and_not_timed(what, on, monkeypatch):
    monkeypatch.setattr(rounds, "chosen", lambda *given: [named("concat"), broken(what)])
    rows = list(rounds.run_cell(cell(), on))
    assert {row["contender"] for row in rows if "us" in row} == {"concat"}
    (row,) = [row for row in rows if "error" in row]
    assert row["contender"] == "broken"
    assert "twice eager PyTorch's error" in row["error"]


def test_one_that_raises_does_not_stop_the_others(on, monkeypatch):
    def raising(p):
        def backward(saved):
            raise ValueError("not here")

        return named("concat").make(p)[0], backward

    both = [dataclasses.replace(named("concat"), name="raising", make=raising), named("concat")]
    monkeypatch.setattr(rounds, "chosen", lambda *given: both)
    monkeypatch.setattr(rounds, "accuracy", lambda *given: {})
    rows = list(rounds.run_cell(cell(), on))
    assert {row["direction"] for row in rows if "error" in row} == {"backward"}
    measured = [row for row in rows if "us" in row and row["contender"] == "concat"]
    assert len(measured) == 2 * len(cell().hows)
    for row in measured:
        assert (row["sets"] > 1) == (row["cache"] == "cold")
        assert row["tflop_per_s"] == pytest.approx(2 * 37 * 12 * (48 + 80) / row["us_p50"] / 1e6)
        assert row["tb_per_s"] == pytest.approx(row["least_bytes"] / row["us_p50"] / 1e6)


@pytest.mark.parametrize("what", ["workspace", "result", "coefficients"])
def test_a_contender_that_is_right_once_is_named_and_not_timed(what, on, monkeypatch):
    def make(p):
        if what == "coefficients":
            p = copy.copy(p)
            p.lam = p.lam.detach().clone()
        forward, backward = named("concat").make(p)
        total, first = torch.zeros_like(p.lam), []

        def kept_forward():
            first[:] = first or [forward()]
            return first[0]

        def adding_backward(saved):
            dz, dlam = backward(saved)
            return dz, total.add_(dlam)  # nobody clears it

        return kept_forward if what == "result" else forward, adding_backward if what == "workspace" else backward

    once = dataclasses.replace(named("concat"), name="once", make=make)
    monkeypatch.setattr(rounds, "chosen", lambda *given: [named("concat"), once])
    rows = list(rounds.run_cell(cell(), on))
    assert {row["contender"] for row in rows if "us" in row} == {"concat"}
    assert [row["contender"] for row in rows if "error" in row] == ["once"]


@pytest.mark.parametrize("name", ["y", "quad", "dlam"])
def test_results_of_another_dtype_are_refused(name, on):
    def make(p):
        forward, backward = named("concat").make(p)

        def wide(values, names):
            return [t.double() if one == name else t for t, one in zip(values, names, strict=True)]

        return lambda: wide(forward(), ("y", "quad", "sqnorm", "u")), lambda u: wide(backward(u), ("dz", "dlam"))

    with pytest.raises(ValueError, match=f"{name} is torch.float64, expected torch."):
        Judge(problem(ODD, on)).errors(dataclasses.replace(named("concat"), make=make))


def test_what_a_contender_returns_too_little_of_is_said(on):
    concat, autograd = named("concat"), registry.Contender("mine", named("concat").make, autograd=True)
    forward, backward = concat.make(problem(ODD, on))
    mine = partial(registry.through_autograd, lambda p: lambda: [p.z @ p.A.t(), p.lam])
    for contender, make, why in (
        (concat, lambda p: None, "the contender is to return forward, backward; found NoneType"),
        (
            concat,
            lambda p: (lambda: forward()[:3], backward),
            "forward is to return y, quad, sqnorm, saved; found 3 of",
        ),
        (concat, lambda p: (forward, lambda u: backward(u)[0]), "backward is to return dz, dlam; found Tensor"),
        (autograd, mine, "forward is to return y, quad, sqnorm; found 2 of them"),
    ):
        with pytest.raises(ValueError, match=why):
            Judge(problem(ODD, on)).errors(dataclasses.replace(contender, make=make))


def test_statistics_may_be_in_a_list(on):
    mine = registry.Contender(
        "mine", partial(registry.through_autograd, lambda p: lambda: list(p.fused())), autograd=True
    )
    with nk.use_backend("reference"):
        assert faults(Judge(problem(ODD, on)).errors(mine)) == []


def test_the_line_of_a_contender_that_raises_is_said(on, monkeypatch):
    """Its own, and not that of what it called."""
    source = {}
    text = "def make(p):\n    def forward():\n        return p.z @ p.lam\n    return forward, None\n"
    exec(compile(text, "mine.py", "exec"), source)
    both = [named("concat"), dataclasses.replace(named("concat"), name="mine", make=source["make"])]
    monkeypatch.setattr(rounds, "chosen", lambda *given: both)
    (row,) = [row for row in rounds.run_cell(cell(hows=(rounds.EAGER,)), on) if "error" in row]
    assert row["error"].startswith("mine.py, line 3: RuntimeError: ")


@pytest.mark.parametrize("what", ["an error", "threads"])
def test_what_goes_wrong_in_a_later_round_stops_nobody_else(what, on, monkeypatch):
    threads = torch.get_num_threads()

    def make(p):
        forward, backward = named("concat").make(p)
        calls = itertools.count()

        def later():
            if next(calls) == 6:
                if what == "an error":
                    raise ValueError("not any more")
                torch.set_num_threads(threads + 1)
            return forward()

        return later, backward

    both = [named("concat"), dataclasses.replace(named("concat"), name="later", make=make)]
    monkeypatch.setattr(rounds, "chosen", lambda *given: both)
    rows = list(rounds.run_cell(cell(hows=(rounds.EAGER,), samples=9), on))
    assert torch.get_num_threads() == threads
    (row,) = [row for row in rows if "error" in row]
    assert (row["contender"], row["direction"]) == ("later", "forward")
    if what == "an error":
        assert row["error"].endswith("ValueError: not any more")
    else:
        assert row["error"].startswith("RuntimeError: it sets the number of threads")  # at no line of its own
    measured = [(row["contender"], row["direction"]) for row in rows if "us" in row]
    assert measured == [("concat", "forward"), ("concat", "backward"), ("later", "backward")]
    assert {row["sets"] for row in rows if "us" in row} == {2}


@pytest.mark.parametrize("of", ["operator", "linear"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_results_of_a_round_have_addresses_of_their_own(of, direction, on):
    for contender in registry.chosen(of, ["all"]):
        if contender.unavailable and contender.unavailable(on, torch.bfloat16, ODD):
            continue
        sets = [problem(ODD, on, seed, of) for seed in range(3)]
        with nk.use_backend("triton"), torch.set_grad_enabled(contender.autograd):
            pairs = [contender.make(p) for p in sets]
            calls = [forward for forward, _ in pairs]
            if direction == "backward":
                calls = [partial(backward, forward()[3]) for forward, backward in pairs]
            around = rounds.Round(calls, least=1)
            around.run()
            first = [result[0].data_ptr() for result in around.kept]
            around.run()
        assert len(set(first)) == 3, contender.name
        assert around.apart(), contender.name
        written = {p.base.data_ptr() if direction == "forward" else p.dz_base.data_ptr() for p in sets}
        assert ({result[0].data_ptr() for result in around.kept} == written) == contender.inplace, contender.name


def test_results_at_one_address_are_noticed(on):
    forward, _ = named("concat_inplace").make(problem(ODD, on))
    with torch.no_grad():
        around = rounds.Round([forward] * 2, least=1)
        around.run()
    assert not around.apart()


def test_a_round_is_whole_and_long_enough():
    seen: list[int] = []
    around = rounds.Round([lambda i=i: seen.append(i) for i in range(3)], least=16)
    around.run()
    assert around.turns == 18
    assert seen == [0, 1, 2] * 6


def test_a_part_of_a_round_goes_on_where_the_last_one_ended():
    seen: list[int] = []
    around = rounds.Round([lambda i=i: seen.append(i) for i in range(3)], least=2, some=True)
    for first in (0, 2, 4):
        around.run(first)
    assert seen == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("l2", [40 * MIB, 50 * MIB, 60 * MIB])
def test_the_others_of_a_round_move_three_times_the_l2(l2):
    for shape, whole in itertools.product(SHAPES, (False, True)):
        assert (rotation(shape, whole, l2) - 1) * touched(shape, whole) >= 3 * l2
        for direction, inplace in itertools.product(("forward", "backward"), (False, True)):
            assert least_bytes(shape, direction, whole, inplace) >= touched(shape, whole)


def test_least_bytes_and_operations_of_a_call():
    d = problem(ODD, torch.device("cpu"), of="linear")
    weights = d.A.nbytes + d.Bt.nbytes
    small = 2 * ODD.T * ODD.R + d.dquad.nbytes + d.dsqnorm.nbytes
    y, z = d.base.nbytes, d.z.nbytes
    assert (operations(ODD, False), operations(ODD, True)) == (2 * 37 * 12 * 128, 2 * 37 * (12 * 128 + 48 * 80))
    assert least_bytes(ODD, "forward", False, True) == weights + small + z + 2 * y
    assert least_bytes(ODD, "backward", False, False) == weights + small + y + 2 * z
    assert least_bytes(ODD, "backward", False, True) == weights + small + y + 3 * z
    assert least_bytes(ODD, "forward", True, True) == weights + small + z + y + d.W.nbytes
    assert least_bytes(ODD, "backward", True, True) == weights + small + y + 2 * z + d.W.nbytes


def test_values_stay_bounded_in_place(on):
    layer = problem(ODD, on, of="linear", dtype="fp32")
    y0 = layer.y0()
    sizes = [float(t.detach().std()) for t in (layer.z, y0, layer.fused()[0] - y0)]
    assert sizes == pytest.approx([1, 1, 1], abs=0.4)
    d = problem(DRY_RUN, on)
    forward, _ = named("concat_inplace").make(d)
    with torch.no_grad():
        for _ in range(3000):
            forward()
    # An entry of the update is at most a few; 512 times as much cannot be exceeded by adding it.
    assert float(d.base.abs().max()) < 1e4
    assert float(d.base.abs().min()) > 0


def test_ratios_are_of_like_with_like_in_one_sample(monkeypatch, on):
    spent = {"fused": [10.0, 20.0, 30.0], "fused_inplace": [5.0, 5.0, 5.0], "concat": [20.0, 30.0, 90.0]}
    spent["concat_inplace"] = [15.0, 10.0, 10.0]
    running = [named(name) for name in spent]
    taken = {name: iter(values) for name, values in spent.items()}
    monkeypatch.setattr(rounds, "sampler", lambda c, *given: rounds.Sampler(lambda first: next(taken[c.name]), 1))
    found = rounds.timed(running, "forward", "graph", [problem(ODD, on)], cell(samples=3))
    rows = {row["contender"]: row for row in found}
    assert rows["concat"]["over_ours"] == 2.0
    assert rows["concat_inplace"]["over_ours"] == 2.0
    assert rows["fused_inplace"]["over_ours"] == rows["fused"]["over_ours"] == 1.0


def test_families_come_first_on_each_backend(monkeypatch, tmp_path):
    monkeypatch.setattr(nk, "available_backends", lambda: {"triton": True, "cuda": True})
    args = SimpleNamespace(
        out=tmp_path / "b.jsonl",
        dry_run=False,
        samples=3,
        sets=list(operator_speed.SETS),
        backends=verified_hardware.BACKENDS,
    )
    trials = list(operator_speed.trials(args).values())
    first = trials[: 4 * len(FAMILIES)]
    assert {(t.backend, t.payload.set) for t in first} == set(
        itertools.product(verified_hardware.BACKENDS, ("operator", "whole"))
    )
    assert {t.payload.cell.shape for t in first} == set(FAMILIES)
    assert all(t.payload.set in ("autotuned", "whole_compiled") for t in trials[-2 * len(FAMILIES) :])
    assert {t.payload.cell.shape for t in trials if t.payload.set == "operator"} == set(SHAPES)


def test_every_set_names_contenders_that_there_are():
    for name, one in operator_speed.SETS.items():
        found = {contender.name for contender in registry.chosen(one.of, one.names)}
        assert found == set(one.names), name


def test_clocks(tmp_path):
    clocks, written = Clocks(tmp_path / "clocks.jsonl", torch.device("cpu")), []
    with clocks:
        for line in ("1980, 2619, 301.5, 44\n", "1755, 2619, 650.0, 51\n", "1980, 26", "[N/A], 2619, 1, 1\n"):
            clocks.add(line, written.append)
    assert [json.loads(line)["sm_mhz"] for line in written] == [1980, 1755]
    assert clocks.since(0.0) == 1867.5
    assert clocks.since(math.inf) is None


def row(contender: str, us: float, over: float | None, shape: Shape = FAMILIES[1], **more: object) -> dict[str, object]:
    """A measurement as operator_speed.py writes it."""
    moved = least_bytes(shape, "forward", False, False)
    common = {"trial": "one", "backend": "triton", "set": "operator", "how": "graph", "cache": "cold"}
    figures = {"us_p50": us, "over_ours": over, "tb_per_s": moved / us / 1e6, "least_bytes": moved, "tflop_per_s": 1.0}
    flags = {"stats": True, "adapters": True, "sm_mhz": 1980.0, "dry_run": False, "direction": "forward"}
    return {**common, **shape._asdict(), "contender": contender, **figures, **flags, **more}


def test_the_tables_say_what_was_reached(tmp_path, capsys):
    T256, large = FAMILIES[1], next(shape for shape in SHAPES if shape.T == 16384)
    at = 1e-6 * least_bytes(T256, "forward", False, False) / 3.0  # microseconds at a copy of 3 TB/s
    rows = [
        {"trial": "one", "backend": "triton", "started": 1.0, "dry_run": False},
        row("fused", at + 2.0, 1.0),
        row("loop", 30.0, 4.0),
        row("peft", 25.0, 1.01, stats=False),
        row("concat", 20.0, 2.5),
        row("fused_inplace", at, 1.0),
        row("concat_inplace", 9.0, 1.2),
        row("compiled", 18.0, 1.4, set="compiled"),
        row("autotuned", 17.0, 1.25, set="autotuned"),
        row("fused", 40.0, 1.0, set="whole"),
        row("linear", 32.0, 0.8, set="whole", adapters=False, stats=False),
        row("fused", 1e-6 * least_bytes(large, "forward", False, False) / 2.7, 1.0, large),
        {"trial": "one", "backend": "triton", "contender": "merged", "error": "y is off by 1", "dry_run": False},
    ]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = [{"what": "copy", "p50": 3.0, "unit": "TB/s"}, {"what": "graph_node", "p50": 1.0, "unit": "us"}]
    (tmp_path / "environment.jsonl").write_text("".join(json.dumps(row) + "\n" for row in environment))
    speed_tables.print_speed(tmp_path, speed_tables.print_ceilings(tmp_path))
    printed = capsys.readouterr().out
    for line in (
        "base given: 1.25x against the best other, autotuned",
        "base given, in place: 1.20x against the best other, concat_inplace",
        "whole layer: 1.25 times the bare layer",
        "times faster than compiled: 1.25, to be at least 1.30: missed",
        "times faster than PEFT's loop: 4.00, to be at least 4.80: missed",
        "of the copy bandwidth: 0.90, to be at least 0.80: reached",
        f"times a launch and the least bytes: {(at + 2) / (at + 1):.2f}, to be at most 1.50: reached",
        "one merged: y is off by 1",
    ):
        assert line in printed
