"""``python -m nsc_kernels.bench``: what is typed, what is printed and written, and what the package needs for it."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import platform
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import forked_workers
import pytest
import torch

import nsc_kernels as nk
from nsc_kernels import printing
from nsc_kernels.bench import __main__ as command
from nsc_kernels.bench import ceilings, compare, measure, measuring, registry, report, tables
from nsc_kernels.bench.costs import Ceilings, roofline
from nsc_kernels.bench.measuring import quantiles, read_rows
from nsc_kernels.bench.problem import call_of
from nsc_kernels.bench.shapes import MODELS, Shape, adapters, grid, layers
from nsc_kernels.bench.trials import Outcome

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--device", "cpu", "--shapes", "40x24", "--adapters", "2x4", "--samples", "3", "--sample-ms", "0.5"]
SMALL += ["--cache", "warm"]  # sets of inputs so small would have to be many to be more than a cache holds


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def measured(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command, in this process: only those are forked that it measures in."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "orig_argv", [sys.executable, "-m", "nsc_kernels.bench", *arguments])
        registry.load_shipped()
        patch.setattr(registry, "_registered", dict(registry._registered))  # what --contender adds is of this call
        forked_workers.forked(patch)
        try:
            status = command.main(arguments)
        except SystemExit as ended:
            status = ended.code
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module", autouse=True)
def server():
    with forked_workers.server("nsc_kernels.bench.measure", "nsc_kernels.bench.contenders"):
        yield


@pytest.fixture(scope="module")
def of_the_machine(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a report has of the machine, measured once: a run that finds it in its report goes on from there."""
    folder = tmp_path_factory.mktemp("machine")
    assert measured(*SMALL, "--tokens", "5", "--contenders", "fused", "--out", "r.jsonl", cwd=folder).returncode == 0
    rows = [row for row in read_rows(folder / "r.jsonl") if row["trial"].startswith(measure.MACHINE)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def documented() -> str:
    """The contenders of docs/benchmarking.md."""
    page = ROOT / "docs" / "benchmarking.md"
    if not page.is_file():
        pytest.skip("needs the source tree")
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    return code


def test_the_documented_contender_is_timed_and_the_wrong_one_is_told(tmp_path):
    (tmp_path / "my_kernel.py").write_text(documented())
    asked = [*SMALL, "--tokens", "5,7,9", "--out", "r.jsonl", "--plot", "pictures"]
    asked += ["--contender", "my_kernel.py", "--contenders", "fused,concat,mine,wrong"]
    done = run("-m", "nsc_kernels.bench", *asked, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "not timed: wrong at 40x24 40->24 2x4 T=5 fp32: y is off by" in done.stdout
    assert "twice eager PyTorch's error" in done.stdout
    assert re.search(r"fused spread roofline +concat +mine\n", done.stdout)
    lines = [line for line in done.stdout.splitlines() if line.startswith("40x24")]
    assert len(lines) == 6
    assert all(re.search(r"[\d.]+x~? +[\d.]+x\*~?$", line) for line in lines), lines  # mine: no statistics
    rows = report.read(tmp_path / "r.jsonl")
    timed = [row for row in rows if tables.is_timed(row)]
    assert {row["contender"] for row in timed} == {"fused", "concat", "mine"}
    assert all(len(row["us"]) == 3 for row in timed)
    (facts,) = [row for row in rows if row.get("what") == "environment"]
    assert facts["torch"] == torch.__version__
    assert len(facts["sources"]["cpu"] or "") in (0, 64)
    assert {"copy", "read", "matrix", "eager_launch"} <= {row.get("what") for row in rows}
    pictures = {path.name.split("-operator")[0] + path.suffix for path in (tmp_path / "pictures").iterdir()}
    assert pictures == {f"{name}{end}" for name in ("roofline", "speedups", "growth-T") for end in (".png", ".svg")}
    before = (tmp_path / "r.jsonl").read_text()
    again = measured(*asked, "--json", cwd=tmp_path)  # goes on where it stopped: nothing is left to do
    assert again.returncode == 1
    assert list(map(json.loads, again.stdout.splitlines())) == rows  # what was asked for, measured now or before
    assert (tmp_path / "r.jsonl").read_text() == before


def test_a_report_goes_on_by_the_contenders_and_samples_of_now(tmp_path, of_the_machine):
    """Not with the times, or the error, of what my_kernel.py was at the time."""
    source = documented()
    asked = [*SMALL, "--tokens", "5", "--out", "r.jsonl"]
    asked += ["--contender", "my_kernel.py", "--contenders", "fused,wrong"]
    (tmp_path / "my_kernel.py").write_text(source)
    (tmp_path / "r.jsonl").write_text(of_the_machine)
    assert measured(*asked, cwd=tmp_path).returncode == 1
    first = [row for row in report.read(tmp_path / "r.jsonl") if tables.is_timed(row)]
    (tmp_path / "my_kernel.py").write_text(source.replace("p.lam.mean()", "p.lam.repeat_interleave(p.shape.r)"))
    done = measured(*asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not timed" not in done.stdout
    second = report.read(tmp_path / "r.jsonl")
    assert {row["contender"] for row in second if tables.is_timed(row)} == {"fused", "wrong"}
    assert not any(row in first for row in second if tables.is_timed(row))
    assert measured(*asked, "--samples", "4", cwd=tmp_path).returncode == 0
    third = report.read(tmp_path / "r.jsonl")
    assert {len(row["us"]) for row in third if tables.is_timed(row)} == {4}
    cut = measured(*asked, "--samples", "5", "--seconds", "0", cwd=tmp_path)
    assert (cut.returncode, "40x24" in cut.stdout) == (3, False)  # nothing of before in the place of what was asked for
    assert "1 left" in cut.stderr
    # The machine was measured once, by another torch now.
    before = (tmp_path / "r.jsonl").read_text()
    other = before.replace(f'"torch": "{torch.__version__}"', '"torch": "2.11.0"')
    (tmp_path / "r.jsonl").write_text(other)
    refused = measured(*asked, cwd=tmp_path)
    assert refused.returncode == 2
    assert f"was measured with torch 2.11.0, here it is {torch.__version__}; give another file" in refused.stderr
    assert (tmp_path / "r.jsonl").read_text() == other


def test_a_whole_layer_without_a_report(tmp_path):
    done = measured("linear", *SMALL, "--tokens", "5", "--quick", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    timed = {row["contender"] for row in rows if tables.is_timed(row)}
    assert {"fused", "concat", "product_copied", "product_ready", "merged", "peft", "linear"} <= timed
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "r.jsonl").write_text(done.stdout)  # it is a report
    assert report.read(tmp_path / "r.jsonl") == rows
    assert "multiply_add" in {row.get("what") for row in rows} or ceilings.multiply_add() is None


def test_the_backend_that_is_asked_for_is_the_one_that_is_timed(tmp_path, monkeypatch, of_the_machine):
    """And figures of another are not gone on with."""
    (tmp_path / "r.jsonl").write_text(of_the_machine)
    asked = [*SMALL, "--tokens", "5", "--contenders", "fused,concat", "--out", "r.jsonl"]
    monkeypatch.setenv("NSC_BACKEND", "reference")  # read once, when the package is imported
    done = run("-m", "nsc_kernels.bench", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fused is the reference here" in done.stdout
    monkeypatch.delenv("NSC_BACKEND")
    done = measured(*asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    compiled = nk.available_backends()["cpu"] is True
    assert ("fused is the reference here" in done.stdout) != compiled
    served = [row["served_by"] for row in read_rows(tmp_path / "r.jsonl") if "served_by" in row]
    assert served == ["reference", "cpu" if compiled else "reference"]


def test_figures_of_a_backend_that_is_passed_over_no_longer_are_not_gone_on_with(tmp_path, monkeypatch):
    """As those from before python -m nsc_kernels.verify, or from before a build."""
    measured = []
    (tmp_path / "r.jsonl").write_text(json.dumps({"trial": "of other shapes", "us": [1.0]}) + "\n")
    monkeypatch.setattr(measure, "supervise", lambda args, trials, *others: measured.append(trials) or Outcome(1, 0, 0))
    for name in ("reference", "triton", "triton"):
        monkeypatch.setattr(measure, "served_by", lambda on, dtype, shape, name=name: name)
        assert command.main(["operator", *SMALL, "--tokens", "5", "--out", str(tmp_path / "r.jsonl")]) == 0
    (before, *_), (after, *_), (again, *_) = ([t for t in trials.values() if t.payload] for trials in measured)
    row = {"source": before.source, "settings": before.settings}
    assert before.wrote(row)
    assert not after.wrote(row)
    assert after == again


def test_commands_that_are_none_and_arguments_that_cannot_be(capsys, tmp_path):
    out = ["--out", str(tmp_path / "r.jsonl"), "--plot", str(tmp_path / "pictures")]
    assert command.main(["--help"]) == 0
    assert command.main(["llama3-8b"]) == 2
    assert "'llama3-8b' is no command; there are operator, linear, step" in capsys.readouterr().err
    for arguments, why in (
        (["--shapes", "llama3-8b.qq"], "did you mean 'llama3-8b.q'?"),
        (["--shapes", "0x5"], "has a width of 0"),
        (["--adapters", "6"], "expected how many by their rank, such as 6x16, found '6'"),
        (["--adapters", "2x0"], "adapters: expected how many by their rank, such as 6x16, found '2x0'"),
        (["--adapters", "0x4"], "found '0x4'"),
        (["--tokens", "0"], "tokens: expected at least 1, found 0"),
        (["--dtype", "int8"], "dtype: expected some of fp32, bf16, fp16, found 'int8'"),
        (["--cache", "hot"], "cache: expected some of cold, warm, found 'hot'"),
        (["--calls", "graph"], "a CPU has no graphs"),
        (["--tokens", "many"], "--tokens: expected whole numbers, such as 32,512, found 'many'"),
        (["--threads", "2,0"], "threads: expected at least 1, found 0"),
        (["--samples", "0"], "samples: expected at least 1, found 0"),
        (["--seconds", "-1"], "seconds: expected seconds of at least 0, found -1"),
        (["--limit", "0"], "limit: expected seconds above 0, found 0"),
        (["--sample-ms", "0"], "sample-ms: expected milliseconds above 0, found 0"),
        (["--sample-ms", "inf"], "sample-ms: expected milliseconds above 0, found inf"),
        (["--contenders", "fast"], "'fast' is not one of operator: fused, "),
        (["--contenders", ","], "contenders: none of operator is in "),
        (["--contender", "nowhere"], "'nowhere' cannot be imported"),
        (["--contender", "nowhere.py"], "there is no file nowhere.py"),
        (["--contender", "json"], "'json' registers none"),
        (["--contender", "json:load_it"], "json has no class or function 'load_it'"),
    ):
        with pytest.raises(SystemExit) as caught:
            measure.main("operator", ["--device", "cpu", *arguments, *out])
        assert caught.value.code == 2
        assert why in capsys.readouterr().err, arguments
        assert not list(tmp_path.iterdir()), arguments


@pytest.mark.parametrize(
    ("arguments", "anew"),
    [
        ([], True),
        (["--quick"], True),
        (["step", "--only", "loop"], True),
        (["--help"], False),
        (["linear", "-h"], False),
        (["list"], False),
        (["table", "r.jsonl"], False),
        (["stpe"], False),
    ],
)
def test_only_what_times_something_starts_anew_to_wait_passively(monkeypatch, arguments, anew):
    class Anew(Exception):
        pass

    def start(program, started, environment):
        assert (started, environment["OMP_WAIT_POLICY"]) == ([sys.executable, "-m", "..."], "PASSIVE")
        raise Anew

    def ran(_):
        raise SystemExit(0)

    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(os, "execve", start)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "..."])
    monkeypatch.setattr(sys, "argv", ["nsc_kernels.bench", *arguments])
    monkeypatch.setattr(printing, "exit_status", ran)
    with pytest.raises(Anew if anew else SystemExit):
        runpy.run_module("nsc_kernels.bench", run_name="__main__")


def test_what_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for option, place, words in (
        ("--plot", tmp_path / "file", "plot: expected a folder, found"),
        ("--out", tmp_path, "out: expected a file that can be written, found"),
        ("--out", tmp_path / "file" / "r.jsonl", "out: expected a file"),
        ("--out", tmp_path / "file", "file is no report, and would be written to"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main([*SMALL, option, str(place)])
        assert ended.value.code == 2
        line = capsys.readouterr().err.strip()
        assert words in line
        assert "\n" not in line
    assert (tmp_path / "file").read_text() == "mine"


def test_pictures_without_matplotlib_are_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    with pytest.raises(SystemExit) as ended:
        command.main([*SMALL, "--plot", str(tmp_path / "pictures")])
    assert ended.value.code == 2
    assert "plot: pictures need matplotlib, which is not installed: pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_reader_that_has_left_ends_it_quietly(tmp_path, words, of_the_machine):
    (tmp_path / "r.jsonl").write_text(of_the_machine)
    read, write = os.pipe()
    os.close(read)
    asked = [sys.executable, "-m", "nsc_kernels.bench", *SMALL, "--tokens", "5,7", "--contenders", "fused", *words]
    asked += ["--out", "r.jsonl"]
    done = subprocess.run(asked, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_on_a_gpu_both_ways_of_calling_and_all_backends(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "served_by", lambda *layer: "triton")
    options = ["--shapes", "vit-b", "--cache", "cold,warm", "--out", str(tmp_path / "r.jsonl")]
    arguments = measure.completed(measure.parser_of("linear").parse_args(options))
    found = measure.trials(arguments)
    assert [trial.group for trial in found.values()] == ["gpu"] * 7  # the machine; three layers, two numbers of tokens
    cell = list(found.values())[-1].payload
    assert (cell.of, cell.shape.T, cell.dtype, cell.threads) == ("linear", 1536, "bf16", 0)
    assert cell.hows == (("graph", "cold"), ("graph", "warm"), ("eager", "cold"))
    assert cell.clocks == tmp_path / "r.clocks.jsonl"
    assert (arguments.tokens, arguments.dtype) == ([256, 1536], ["bf16"])
    with pytest.raises(ValueError, match="on a GPU warm is of graphs"):
        measure.completed(measure.parser_of("linear").parse_args(["--cache", "warm", "--calls", "eager"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: there is no CUDA device"):
        measure.completed(measure.parser_of("linear").parse_args(["--device", "cuda"]))
    on_cpu = measure.completed(measure.parser_of("linear").parse_args(["--cache", "cold,warm"]))
    assert (on_cpu.device, on_cpu.tokens, on_cpu.dtype, on_cpu.threads) == ("cpu", [32, 512], ["fp32"], [1])
    assert measure.hows(on_cpu) == (("eager", "cold"), ("eager", "warm"))
    quick = measure.completed(measure.parser_of("linear").parse_args(["--quick", "--samples", "1"]))
    assert (quick.samples, quick.sample_ms, quick.tokens) == (1, 8, [32, 256])
    words = ["--shapes", "40x24,24x40", "--threads", "1,2", "--dtype", "fp32,bf16", "--adapters", "2x4,3x4"]
    every = measure.trials(measure.completed(measure.parser_of("linear").parse_args([*words, "--tokens", "5,7"])))
    assert len(every) == 1 + 2**5  # none under the name of another
    assert len({trial.payload for trial in every.values()}) == len(every)


def test_layers_by_name():
    assert layers(["llama3-8b.q"]) == [("llama3-8b.q", (4096, 4096))]
    assert layers(["llama3-8b.v", "llama3-8b.k"]) == [("llama3-8b.kv", (4096, 1024))]
    assert layers(["llama3-8b.mlp"]) == [("llama3-8b.up", (4096, 14336)), ("llama3-8b.down", (14336, 4096))]
    assert layers(["vit-b"]) == [("vit-b.q", (768, 768)), ("vit-b.up", (768, 3072)), ("vit-b.down", (3072, 768))]
    assert layers(["qwen3-0.6b.attention"])[2] == ("qwen3-0.6b.o", (2048, 1024))
    assert layers(["96x40"]) == [("96x40", (96, 40))]
    every = [widths for _, widths in layers(["all"])]
    assert len(every) == len(set(every))
    assert set(every) == {widths for model in MODELS.values() for widths in model.values()}
    assert adapters("20x16") == (20, 16)
    (shape,) = grid(["vit-b.q"], [7], ["2x4"])
    assert shape == Shape("vit-b.q", 7, 768, 768, 2, 4)
    assert shape.R == 8
    device = torch.device("cpu")
    assert call_of(device, torch.float32, shape) == (device, torch.float32, 7, 768, 768, (0, 4, 8))


# Parameters as they are published, those outside of the blocks' linears (embeddings, norms, biases), and the blocks.
PUBLISHED = {
    "vit-b": (85_798_656, 768 * (768 + 201) + 12 * 13 * 768, 12),
    "vit-l": (303_301_632, 1024 * (768 + 201) + 24 * 13 * 1024, 24),
    "llama3-8b": (8_030_261_248, 2 * 128_256 * 4096 + 65 * 4096, 32),
    "llama3.2-1b": (1_235_814_400, 128_256 * 2048 + 33 * 2048, 16),
    "llama3-70b": (70_553_706_496, 2 * 128_256 * 8192 + 161 * 8192, 80),
    "llava-7b": (6_738_415_616, 2 * 32_000 * 4096 + 65 * 4096, 32),
    "qwen3-0.6b": (596_049_920, 151_936 * 1024 + 57 * 1024 + 28 * 256, 28),
    "qwen3-4b": (4_022_468_096, 151_936 * 2560 + 73 * 2560 + 36 * 256, 36),
    "qwen3-8b": (8_190_735_360, 2 * 151_936 * 4096 + 73 * 4096 + 36 * 256, 36),
    "gemma3-1b": (999_885_952, 262_144 * 1152 + 105 * 1152 + 26 * 512, 26),
    "gemma3-4b": (3_880_263_168, 262_208 * 2560 + 137 * 2560 + 34 * 512, 34),
    "gemma2-9b": (9_241_705_984, 256_000 * 3584 + 169 * 3584, 42),
}


def test_the_layers_of_a_model_have_as_many_parameters_as_it_has():
    for model, (parameters, others, blocks) in PUBLISHED.items():
        size = {layer: d_in * d_out for layer, (d_in, d_out) in MODELS[model].items()}
        gated = 1 + (not model.startswith("vit"))
        block = size["q"] + 2 * size["kv"] + size["o"] + gated * size["up"] + size["down"]
        assert blocks * block + others == parameters, model
    assert MODELS["llava-7b-vision"] == MODELS["vit-l"]
    assert MODELS.keys() == {*PUBLISHED, "llava-7b-vision"}


@pytest.fixture
def own_registry(monkeypatch):
    registry.load_shipped()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


CLASS = """
class Mine:
    \"\"\"By a class.\"\"\"
    stats = False
    def __init__(self, p):
        self.p = p
    def forward(self):
        p = self.p
        u = p.z @ p.A.t()
        return p.base + u * p.lam.repeat_interleave(p.shape.r) @ p.Bt, None, None, u
    def backward(self, u):
        p = self.p
        v = p.dy @ p.Bt.t()
        return v * p.lam.repeat_interleave(p.shape.r) @ p.A, (u * v).sum(0).unflatten(0, (p.shape.K, -1)).sum(-1)
"""


def test_a_class_is_a_contender(tmp_path, own_registry):
    from nsc_kernels.bench.rounds import Cell, run_cell

    (tmp_path / "by_class.py").write_text(CLASS)
    registry.load(f"{tmp_path / 'by_class.py'}:Mine")
    (found,) = registry.chosen("operator", ["Mine"])
    assert (found.stats, found.about) == (False, "By a class.")
    shape = Shape("s", 9, 40, 24, 2, 4)
    cell = Cell("operator", shape, "fp32", ("concat", "Mine"), samples=2, seconds=0, cache_bytes=1)
    rows = [row for row in run_cell(cell, torch.device("cpu")) if tables.is_timed(row)]
    assert {(row["contender"], row["direction"]) for row in rows} == {
        (name, direction) for name in ("concat", "Mine") for direction in ("forward", "backward")
    }
    with pytest.raises(ValueError, match="there is a contender named 'Mine' of operator already"):
        registry.contender("Mine")(lambda p: None)
    with pytest.raises(ValueError, match="of: expected 'operator' or 'linear', found 'layer'"):
        registry.contender("other", of="layer")(lambda p: None)
    with pytest.raises(ValueError, match="group: expected one of plain, compiles, .*, found 'fast'"):
        registry.contender("other", group="fast")(lambda p: None)


DECORATED = """
from __future__ import annotations
from dataclasses import dataclass
from nsc_kernels.bench import contender
@dataclass
class Tiles:
    rows: int = 4
@contender("mine")
def my_kernel(p):
    return None
"""


def test_a_decorated_function_may_be_named(tmp_path, own_registry):
    (tmp_path / "decorated.py").write_text(DECORATED)
    before = registry.registered("operator")
    registry.load(f"{tmp_path / 'decorated.py'}:my_kernel")
    assert [one.name for one in registry.registered("operator") if one not in before] == ["mine"]


def test_an_installed_package_registers_contenders(own_registry, monkeypatch):
    points = {"nsc_kernels.contenders": [SimpleNamespace(load=lambda: registry.contender("theirs")(lambda p: None))]}
    monkeypatch.setattr(registry, "entry_points", lambda group: points[group])
    registry.load_shipped.__wrapped__()
    assert "theirs" in {one.name for one in registry.registered("operator")}


def test_groups():
    quick = {one.name for one in registry.chosen("operator", ["default"], quick=True)}
    assert quick == {"fused", "concat", "loop", "peft"}
    assert "compiled" in {one.name for one in registry.chosen("operator", ["default"])}
    on_gpu = [one.name for one in registry.chosen("operator", ["default"], "cuda")]
    assert on_gpu[0] == "fused"
    assert {"fused_triton", "fused_cuda"} <= {*on_gpu}
    assert ("two_launches" in on_gpu) == (importlib.util.find_spec("triton") is not None)
    assert {one.group for one in registry.chosen("operator", ["variant"])} == {"variant"}
    assert {one.group for one in registry.chosen("operator", ["all"])} == {*registry.GROUPS} - {"variant"}
    assert {"vllm"} == {one.name for one in registry.chosen("operator", ["package"])}


def row(contender: str, us: list[float], over: float, **more: object) -> dict[str, object]:
    """A figure as rounds.py has it."""
    ordered = sorted(us)
    shape = Shape("vit-b.q", 32, 768, 768, 6, 16)
    common = {"set": "operator", "dtype": "fp32", "threads": 1, "how": "eager", "cache": "cold", "direction": "forward"}
    figures = {"us": us, "us_p20": ordered[1], "us_p50": ordered[2], "us_p80": ordered[3], "over": "fused"}
    rest = {"contender": contender, "stats": True, "over_ours": over, "least_bytes": 10**6, "operations": 10**7}
    return {**common, **shape._asdict(), **figures, **rest, **more}


MACHINE = [
    {"what": "environment", "device": "a processor", "cores": 2, "torch": "2.13"},
    {"what": "copy", "threads": 1, "p50": 0.01},
    {"what": "matrix", "dtype": "fp32", "threads": 1, "p50": 0.05},
]


def test_the_table_says_share_spread_and_noise():
    rows = [
        row("fused", [398.0, 400.0, 400.0, 404.0, 406.0], 1.0, load=3.5),
        row("peft", [500.0, 700.0, 800.0, 900.0, 990.0], 149.1, stats=False, load=3.0),
        {**row("wrong", [1.0] * 5, 1.0), "error": "y is off by 1, allowed is 0.1"},
    ]
    del rows[2]["us_p50"]
    assert roofline(10**6, 10**7, Ceilings(1e10, 5e10)) == pytest.approx(2e-4)
    lines = list(tables.table(rows, MACHINE))
    assert "1 thread of a processor: eager calls, cold cache; it moves 10 GB/s and multiplies 50 GFLOP/s" in lines[0]
    assert re.fullmatch(r"vit-b.q 768->768 6x16 T=32 +forward +400 us +1% +50% +149.10x\*~", lines[2])
    closing = "\n".join(tables.closing([*rows, *MACHINE]))
    assert "not timed: wrong at vit-b.q 768->768 6x16 T=32 fp32: y is off by 1" in closing
    assert "in 1 of 2 figures the middle 60 % of samples spread over 10% or more" in closing
    assert "the machine was busy: a load of up to 3.5 on 2 cores" in closing
    assert ", and at" not in closing
    assert "*: computes no statistics" in closing
    assert "statistics" not in "\n".join(tables.closing(rows[:1]))
    assert "is off by 1, allowed is 0.1, and at 1 more" in "\n".join(tables.closing([*rows, rows[2]]))


def test_the_tables_of_a_report(tmp_path, capsys):
    back = [{**one, "direction": "backward"} for one in (row("fused", [90.0] * 5, 1.0), row("peft", [180.0] * 5, 2.0))]
    rows = [row("fused", [400.0] * 5, 1.0), row("peft", [800.0] * 5, 2.0), *back, *MACHINE]
    assert command.main(["table", write(tmp_path / "r.jsonl", rows), "--markdown"]) == 0
    said = capsys.readouterr().out
    assert "| layer | K × r | T | fused | of the roofline | peft |\n|---|---|---|---|---|---|\n" in said
    assert "| vit-b.q 768 → 768 | 6 × 16 | 32 | 400 us / 90 us | 50% / 222% | 2.00× / 2.00× |" in said
    assert command.main(["table", write(tmp_path / "bare.jsonl", rows[:4]), "--markdown"]) == 0  # no ceilings
    assert "| 400 us / 90 us | - / - | 2.00× / 2.00× |" in capsys.readouterr().out
    write(tmp_path / "less.jsonl", [{**one, "stats": one.get("contender") != "peft"} for one in rows])
    assert command.main(["table", str(tmp_path / "less.jsonl"), "--markdown"]) == 0
    assert "| T | fused | of the roofline | peft (no statistics) |" in capsys.readouterr().out
    assert command.main(["table", str(tmp_path / "r.jsonl"), "--contenders", "fused"]) == 0
    assert "peft" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["table", str(tmp_path / "r.jsonl"), "--contenders", "fused,conct"])
    assert "contenders: no 'conct' in these reports, only fused, peft" in capsys.readouterr().err


def test_ratios_to_one_contender_have_a_table_of_their_own(tmp_path, capsys):
    """Of a report that was gone on with under another first contender, whose own ratio is 1 there."""
    one = [row("fused", [100.0] * 5, 1.0), row("mine", [200.0] * 5, 2.0)]
    other = [row("mine", [300.0] * 5, 1.0), row("fused", [150.0] * 5, 0.5)]
    rows = [*MACHINE, *({**figure, "trial": "a"} for figure in one)]
    rows += [{**figure, "trial": "b", "over": "mine"} for figure in other]
    assert command.main(["table", write(tmp_path / "r.jsonl", rows)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "768->768" in line or "spread" in line]
    assert [line[0] for line in lines] == ["fused", "vit-b.q", "mine", "vit-b.q"]
    assert [(line[5], line[-1]) for line in lines[1::2]] == [("100", "2.00x"), ("300", "0.50x")]
    assert command.main(["table", str(tmp_path / "r.jsonl"), "--markdown"]) == 0
    said = capsys.readouterr().out
    assert "| fused | of the roofline | mine |" in said
    assert "| mine | of the roofline | fused |" in said


def test_a_step_is_shown_over_what_its_ratios_are_to(tmp_path, capsys):
    """The floor, which is measured last."""
    step = {"set": "step", "direction": "step", "over": "floor"}
    rows = [{**row("loop", [300.0] * 5, 1.5), **step}, {**row("floor", [200.0] * 5, 1.0), **step}, *MACHINE]
    assert command.main(["table", write(tmp_path / "r.jsonl", rows)]) == 0
    heading, line = capsys.readouterr().out.splitlines()[1:3]
    assert heading.split() == ["floor", "spread", "roofline", "loop"]
    assert (line.split()[5], line.split()[-1]) == ("200", "1.50x")
    assert command.main(["table", str(tmp_path / "r.jsonl"), "--markdown"]) == 0
    assert "| 6 × 16 | 32 | 200 us | 100% | 1.50× |" in capsys.readouterr().out


def test_a_step_is_shown_beside_the_operator(tmp_path, capsys):
    """It has neither a backend nor the least bytes of a roofline."""
    step = {"set": "step", "direction": "step", "over": "floor", "trial": "step"}
    steps = [{**row("loop", [300.0] * 5, 1.5), **step}, {**row("floor", [200.0] * 5, 1.0), **step}]
    for one in steps:
        del one["least_bytes"], one["operations"]
    for backends in (["cpu"], ["cuda", "triton"]):
        rows = [{**row(name, [9.0] * 5, 1.0), "backend": of} for of in backends for name in ("fused", "peft")]
        write(tmp_path / "r.jsonl", [*rows, *steps, *MACHINE])
        assert command.main(["table", str(tmp_path / "r.jsonl")]) == 0
        said = capsys.readouterr().out
        assert re.search(r"\nstep, fp32, 1 thread of a processor: .*\n +floor spread roofline +loop\n", said)
        assert re.search(r"T=32 +step +200 us +0% +1\.50x\n", said)
        assert command.main(["table", str(tmp_path / "r.jsonl"), "--markdown"]) == 0
        assert "| 6 × 16 | 32 | 200 us | - | 1.50× |" in capsys.readouterr().out
        assert command.main(["plot", str(tmp_path / "r.jsonl"), "--out", str(tmp_path)]) == 0
        assert {path.name.partition("-fp32")[0] for path in tmp_path.glob("speedups-step*.png")} == {"speedups-step"}


@pytest.mark.parametrize("show", ["table", "plot"])
def test_reports_of_two_machines_or_of_the_same_figures_are_not_shown_as_one(tmp_path, capsys, show):
    rows = [row("fused", [400.0] * 5, 1.0), *MACHINE]
    one = write(tmp_path / "one.jsonl", rows)
    again = write(tmp_path / "again.jsonl", rows)
    other = write(tmp_path / "other.jsonl", [{**rows[0], "name": "vit-b.k"}, {**MACHINE[0], "device": "another"}])
    for second, said in (
        (other, "the reports differ in device, a processor and another: show them one by one, or what changed"),
        (again, f"{one} and {again} have figures of the same: show them one by one, or what changed"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main([show, one, second])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", ["rounds", "threads", "layers", "tasks"])
def test_a_step_of_nothing_is_refused(capsys, option):
    with pytest.raises(SystemExit) as ended:
        command.main(["step", "--only", "loop", "--no-memory", f"--{option}", "0"])
    assert ended.value.code == 2
    assert f"--{option}: expected at least 1, found 0" in capsys.readouterr().err


def test_a_step_that_cannot_be_measured_or_written_is_refused_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").write_text("mine")
    for option, place, words in (
        ("--device", "cuda", "device: there is no CUDA device; --device cpu measures"),
        ("--out", str(tmp_path), "out: expected a file that can be written, found"),
        ("--plot", str(tmp_path / "file"), "plot: expected a folder, found"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main(["step", "--only", "loop", "--no-memory", "--layers", "1", "--d", "8", option, place])
        assert ended.value.code == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith(f"python -m nsc_kernels.bench step: {words}")
        assert "\n" not in line


def test_a_line_that_was_cut_off_anywhere_is_left_out(tmp_path):
    """Also within an object, behind a brace."""
    whole = json.dumps({"trial": "one", "accuracy": {"y": [0.1, 0.2]}, "contender": "fused"})
    cut = whole[: whole.index("}") + 1]
    (tmp_path / "r.jsonl").write_text(f"{whole}\n{cut}\n{whole}\n{whole[:9]}")
    assert read_rows(tmp_path / "r.jsonl") == [json.loads(whole)] * 2


def test_backends_have_tables_and_pictures_of_their_own(tmp_path, capsys):
    """As the GPU stages measure them, whose ceilings belong to no trial."""
    rows = [
        {**one, "backend": backend}
        for backend, us in (("cuda", 400.0), ("triton", 500.0))
        for one in (row("fused", [us] * 5, 1.0), row("peft", [800.0] * 5, 800 / us))
    ]
    bench, machine = write(tmp_path / "bench.jsonl", rows), tmp_path / "environment.jsonl"
    machine.write_text("".join(json.dumps(one) + "\n" for one in MACHINE))
    assert command.main(["table", str(machine), bench]) == 0
    first, second = capsys.readouterr().out.split("\n\n")[:2]
    assert first.startswith("operator by cuda, fp32, 1 thread of a processor: eager calls, cold cache; it moves 10")
    assert second.startswith("operator by triton")
    assert ("400 us" in first, "500 us" in second, "500 us" in first) == (True, True, False)
    assert command.main(["plot", str(machine), bench, "--out", str(tmp_path)]) == 0
    for backend in ("cuda", "triton"):
        assert (tmp_path / f"speedups-operator-{backend}-fp32-1-eager-cold.png").is_file()


def test_a_backend_is_compared_with_itself(tmp_path, capsys):
    """Though the figures of both have one name in a report, and another order in the next."""

    def timed(backend: str, us: float) -> list[dict[str, object]]:
        return [
            {**one, "backend": backend, "trial": backend}
            for one in (row("fused", [us] * 5, 1.0), row("peft", [800.0] * 5, 800 / us))
        ]

    before = write(tmp_path / "before.jsonl", [*timed("cuda", 400.0), *timed("triton", 500.0)])
    after = write(tmp_path / "after.jsonl", [*timed("triton", 500.0), *timed("cuda", 200.0)])
    assert compare.main([before, after]) == 0
    said = capsys.readouterr()
    (line,) = said.out.splitlines()
    assert re.search(r"^fused +operator by cuda fp32 1 eager cold .* 400 -> +200  0.50x$", line)
    assert "of 4 figures in both, 0 are slower and 1 faster" in said.err
    assert compare.main([before, after, "--ratios", "--json"]) == 0
    (change,) = json.loads(capsys.readouterr().out)["changes"]
    assert (change["contender"], change["by"], change["ratio"]) == ("peft", "cuda", 2.0)


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps({"trial": "one", **row}) + "\n" for row in rows))
    return str(path)


def test_a_processor_multiplies_at_the_better_of_two_rates():
    of = ceilings.of_rows
    assert of(MACHINE, "fp32", 1) == Ceilings(1e10, 5e10)
    bare = {"what": "multiply_add", "float32": 90.0}
    assert of([*MACHINE, bare], "fp32", 1) == Ceilings(1e10, 9e10)
    assert of([*MACHINE, bare], "bf16", 1) == Ceilings(1e10, 9e10)
    assert of([*MACHINE, {**bare, "bfloat16": 200.0}], "bf16", 1) == Ceilings(1e10, 2e11)
    assert of([*MACHINE, {**bare, "float32": 30.0}], "fp32", 1) == Ceilings(1e10, 5e10)
    assert of([*MACHINE, {"what": "copy", "threads": 2, "p50": 0.02}, bare], "fp32", 2) == Ceilings(2e10, 1.8e11)
    assert of([bare], "fp32", 1) is None
    narrow = {"what": "matrix", "dtype": "bf16", "threads": 1, "p50": 0.3}
    assert of([*MACHINE, narrow], "bf16", 1) == Ceilings(1e10, 3e11)
    assert of([*MACHINE, narrow], "fp32", 1) == Ceilings(1e10, 5e10)
    # On a GPU a unit of its own multiplies each type.
    gpu = [{**one, "threads": 0} for one in (*MACHINE[1:], {**narrow, "p50": 0.03})]
    assert of(gpu, "bf16", 0) == Ceilings(1e10, 3e10)
    assert of(gpu, "fp32", 0) == Ceilings(1e10, 5e10)


def test_a_processor_moves_what_it_copies_or_what_it_reads():
    of = ceilings.of_rows
    figures = [(1, 0.03), (1, 0.02), (1, 0.04), (2, 0.9)]
    reads = [{"what": "read", "threads": threads, "p50": p50} for threads, p50 in figures]
    assert of([*MACHINE, *reads], "fp32", 1) == Ceilings(3e10, 5e10)
    assert of([*MACHINE, {**reads[0], "p50": 0.005}], "fp32", 1) == Ceilings(1e10, 5e10)


def test_quantiles_and_microseconds(monkeypatch):
    assert quantiles([9, 0, 7, 2, 5, 4, 6, 3, 8, 1]) == {"p20": 2, "p50": 4.5, "p80": 7, "samples": 10}
    assert quantiles([3.0]) == {"p20": 3.0, "p50": 3.0, "p80": 3.0, "samples": 1}
    seconds, ran = iter([1.0, 1.25]), []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(seconds))
    assert measuring.microseconds(lambda: ran.append(1), torch.device("cpu")) == 250_000
    assert ran == [1]


def test_what_changed_beyond_the_spread(tmp_path, capsys):
    before = [*MACHINE, row("fused", [99.0, 100.0, 101.0, 102.0, 103.0], 1.0), row("concat", [150.0] * 5, 1.5)]
    after = [
        {**MACHINE[0], "torch": "2.14"},
        row("fused", [129.0, 130.0, 131.0, 132.0, 133.0], 1.0),
        row("concat", [140.0, 149.0, 151.0, 152.0, 160.0], 1.2),
        row("new", [1.0] * 5, 1.0),
    ]
    files = write(tmp_path / "a.jsonl", before), write(tmp_path / "b.jsonl", after)
    assert compare.main([*files, "--exit-code"]) == 1
    said = capsys.readouterr()
    assert "torch: 2.13 -> 2.14" in said.out
    assert re.search(r"fused .*vit-b.q 768->768 6x16 T=32 forward +101 -> +131  1.30x", said.out)
    assert "concat" not in said.out
    assert "of 2 figures in both, 1 are slower and 0 faster" in said.err
    assert compare.main([*files, "--ratios", "--json"]) == 0
    (change,) = json.loads(capsys.readouterr().out)["changes"]
    assert change["contender"] == "concat"
    assert change["ratio"] == pytest.approx((151 / 131) / (150 / 101), rel=0.01)
    assert compare.main([files[0], files[0]]) == 0
    assert "nothing changed beyond the spread" in capsys.readouterr().out
    assert compare.main([files[0], write(tmp_path / "c.jsonl", MACHINE)]) == 2
    with pytest.raises(SystemExit) as caught:
        compare.main([files[0], str(tmp_path / "none.jsonl")])
    assert caught.value.code == 2
    assert "there is no such file" in capsys.readouterr().err


def test_what_changed_most_is_told_first_and_one_slower_figure_is_enough(tmp_path, capsys):
    def report(name: str, **us: float) -> str:
        return write(tmp_path / name, [*MACHINE, *(row(contender, [time] * 5, 1.0) for contender, time in us.items())])

    before = report("a", concat=100.0, fused=100.0, peft=100.0, loop=100.0)
    after = report("b", concat=50.0, fused=200.0, peft=110.0, loop=101.0)
    assert compare.main([before, after, "--json", "--exit-code"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [one["contender"] for one in told["changes"]] == ["fused", "concat", "peft"]
    assert told["compared"] == 4
    assert compare.main([before, report("c", concat=50.0, fused=90.0, peft=100.0), "--exit-code"]) == 0


FRESH = """
import resource
import torch
from nsc_kernels.bench.timing import keep_freed_memory

keep_freed_memory()
faults = []
for _ in range(16):
    held = [torch.ones(12 << 20) for _ in range(3)]  # 48 MiB each
    del held
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[11])  # once the heap is large enough
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_no_page_fault_of_a_large_result_is_timed():
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100


def test_the_list(capsys):
    assert command.main(["list", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"fused_cuda +backend +not here: ", said)
    assert "llama3-8b         q 4096x4096  kv 4096x1024" in said
    assert command.main(["list", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"fused", "merged"} <= {one["name"] for one in found["contenders"]}


SIZES = {"d": 32, "intermediate": 48, "heads": 2, "kv_heads": 2, "layers": 4, "vocabulary": 32}
SIZES |= {"tasks": 2, "rank": 2, "batches": 2}
TINY = [text for name, value in SIZES.items() for text in (f"--{name}", str(value))]
STEP = [*TINY, "--device", "cpu", "--rounds", "2", "--no-memory", "--only", "loop", "concatenated", "floor"]


@pytest.mark.parametrize("model", ["small-llama", "vit-b"])
def test_a_step_of_a_merge(tmp_path, capsys, model):
    tokens = ["--tokens", "10" if model == "vit-b" else "7"]
    assert command.main(["step", "--model", model, *STEP, *tokens, "--out", str(tmp_path / "s.jsonl")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"loop +[\d.]+s +\d+% +[\d.]+x +[\d.]+x", said)
    rows = [row for row in report.read(tmp_path / "s.jsonl") if tables.is_timed(row)]
    objectives = {row["contender"]: row["objective"] for row in rows}
    assert objectives["loop"] == pytest.approx(objectives["concatenated"], abs=1e-5)
    assert all(len(row["us"]) == 2 and row["over"] == "floor" for row in rows)
    assert compare.main([str(tmp_path / "s.jsonl")] * 2) == 0


def test_a_step_is_timed_outside_of_the_mode_for_a_default_device(monkeypatch):
    made, ran = [], []

    def contender(problem, stack):
        made.append(torch.overrides._get_current_function_mode_stack())
        return lambda: ran.append(torch.overrides._get_current_function_mode_stack())

    contenders = pytest.importorskip("nsc_kernels.bench.step.contenders")
    monkeypatch.setitem(contenders.CONTENDERS, "loop", contender)
    assert command.main(["step", *STEP[:-3], "loop"]) == 0
    assert len(made[0]) == 1
    assert ran == [[]] * 3  # one to begin with, and two rounds


def test_under_pytest_benchmark():
    if not (ROOT / "bench" / "test_operator.py").is_file():
        pytest.skip("needs the source tree")
    pytest.importorskip("pytest_benchmark")
    options = ["--shapes", "24x40", "--tokens", "5", "--adapters", "2x4", "--contenders", "fused,concat"]
    done = run("-m", "pytest", "bench/test_operator.py", *options, "--benchmark-disable", "-p", "no:xdist", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("....")


ALONE = """
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys(("bench", "tests", "pytest", "nsc_merge"))
import nsc_kernels
assert not [name for name in sys.modules if name.startswith("nsc_kernels.bench")]
import nsc_kernels.bench
for module in pkgutil.iter_modules(nsc_kernels.bench.__path__, "nsc_kernels.bench."):
    importlib.import_module(module.name)
assert "transformers" not in sys.modules
sys.modules.pop("sitecustomize", None)  # what the tests' processes begin with
print(*[path for module in sys.modules.values() if "/tests/" in (path := getattr(module, "__file__", None) or "")])
"""


def test_the_package_measures_by_itself(tmp_path):
    """Without what only a checkout has and without pytest; and using the operator loads nothing of it."""
    pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
    done = run("-c", ALONE, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
