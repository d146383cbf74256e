"""The command line: recipes in, folders out, one line per error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
import yaml
from cli_cases import contents, interrupted, make_place, on_cpu
from peft import PeftModel
from safetensors.torch import load_file, save_file
from zoo import KINDS, build, outputs, write_adapter

import nsc_kernels
import nsc_merge
from nsc_merge.commands.main import main
from nsc_merge.methods import METHODS
from nsc_merge.recipes import run
from nsc_merge.recipes.merge_recipe import RecipeError, load_recipe
from nsc_merge.recipes.saved_result import load_result
from nsc_merge.utils.progress import Progress

TOLERANCE = {"rtol": 5e-5, "atol": 5e-5}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Every test here is local: a look at the network is an error, and the command's own setting is undone."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(*_):
        raise AssertionError("the network was touched")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture
def base():
    return build("llama-cls")


@pytest.fixture
def place(base, tmp_path):
    """A folder with base, two adapters, their inputs and a recipe."""
    return make_place(base, tmp_path)


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "nsc_merge.commands.main", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_another_process_imports_the_packages_of_this_one(tmp_path):
    code = "import nsc_merge, nsc_kernels; print(nsc_merge.__file__, nsc_kernels.__file__, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [nsc_merge.__file__, nsc_kernels.__file__]


def test_run_writes_every_format_and_each_gives_the_same_outputs(place, base):
    on_cpu(place)
    done = command("run", "recipe.yaml", "--json", "options.steps=5", cwd=place)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    merged = place / "merged"
    assert summary["steps"] == 5
    assert set(summary["files"]) == set(contents(merged))
    assert "\r" not in done.stderr
    for file in ("coefficients.json", "history.jsonl", "recipe.yaml", "README.md", "heads/nli.safetensors"):
        assert file in summary["files"]
    rank, no_tokenizer = summary["serving"]
    assert rank == "the adapter has rank 8; vLLM: --enable-lora --max-lora-rank 8"
    assert no_tokenizer.startswith("the base's folder holds no tokenizer and no processor: ")

    inputs = KINDS["llama-cls"].inputs(3)
    result = load_result(merged)
    whole = type(base).from_pretrained(merged / "model")
    lora = PeftModel.from_pretrained(type(base).from_pretrained(place / "base"), merged / "lora")
    expected = outputs(result.apply(type(base).from_pretrained(place / "base")), inputs)
    torch.testing.assert_close(outputs(whole, inputs), expected, **TOLERANCE)
    torch.testing.assert_close(outputs(lora, inputs), expected, **TOLERANCE)

    assert main(["run", str(merged / "recipe.yaml"), f"output.dir={place / 'again'}"]) == 0
    documents = [json.loads((place / out / "coefficients.json").read_text()) for out in ("merged", "again")]
    assert documents[0]["coefficients"] == documents[1]["coefficients"]
    assert not [path.name for path in place.iterdir() if "state" in path.name or path.name.startswith(".")]


def test_the_recipe_records_versions_and_hashes(place):
    assert main(["run", str(place / "recipe.yaml"), "output.formats=coefficients"]) == 0
    record = yaml.safe_load((place / "merged" / "recipe.yaml").read_text())["record"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["transformers"] == transformers.__version__
    assert set(record["sha256"]["adapters"]["nli"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert set(record["headers"]["model"]["model.safetensors"]) == {"header_sha256", "size"}
    assert set(record["sha256"]["calibration"]) == {"nli", "topic"}


def test_a_dry_run_says_what_would_happen_and_writes_nothing(place, capsys):
    before = contents(place)
    assert main(["run", str(place / "recipe.yaml"), "--dry-run", "--json", "options.steps=40"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 40
    assert plan["seconds"] == pytest.approx(40 * plan["seconds_per_step"])
    assert plan["measured_modules"] == ["model.layers.2.self_attn.v_proj"]
    assert set(plan["dead"]) == {f"model.layers.2.self_attn.{name}_proj" for name in "qv"}
    assert plan["tasks"]["nli"]["heads"] == 1
    assert plan["batches"] == {"nli": 3, "topic": 3}
    assert main(["run", str(place / "recipe.yaml"), "--dry-run"]) == 0
    assert "dead      4 coefficients come after them" in capsys.readouterr().out
    assert contents(place) == before


@pytest.mark.parametrize("method", ["match", "distill"])
def test_a_dry_run_times_whatever_takes_steps(place, capsys, method):
    command = ["run", str(place / "recipe.yaml"), "--dry-run", f"method={method}", "options.steps=40"]
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 40
    assert plan["seconds"] == pytest.approx(40 * plan["seconds_per_step"])
    assert plan["measured_modules"] == []
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "coefficients receive no gradient" in shown
    assert "measured " not in shown


@pytest.mark.parametrize("method", ["nsc", "distill", "match", "adamerging"])
def test_an_interrupted_run_resumes_to_the_same_coefficients(place, monkeypatch, capsys, method):
    on_cpu(place)
    command = ["run", str(place / "recipe.yaml"), f"method={method}", "options.steps=4", "options.lr=0.01"]
    assert main([*command, "output.dir=" + str(place / "whole")]) == 0
    recipe = load_recipe(place / "recipe.yaml")
    with interrupted(monkeypatch):
        assert main(command) == 130
    assert "go on with: nsc-merge run" in capsys.readouterr().err
    assert run.state_file(recipe).is_file()
    assert not recipe.out.exists()
    assert main([*command, "--resume"]) == 0
    assert "resuming from" in capsys.readouterr().err
    assert not run.state_file(recipe).exists()
    documents = [json.loads((place / out / "coefficients.json").read_text()) for out in ("whole", "merged")]
    assert documents[0]["coefficients"] == documents[1]["coefficients"]
    kept = load_recipe(place / "merged" / "recipe.yaml").options
    assert not any(name.startswith(("state", "resume")) for name in kept)


def test_a_run_that_a_batch_system_ends_says_how_to_go_on(place, monkeypatch, capsys):
    on_cpu(place)
    calls = []

    def ended(self, count=1, **values):
        calls.append(values)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", ended)
        assert main(["run", str(place / "recipe.yaml"), "options.steps=4"]) == 130
    assert "go on with: nsc-merge run" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert main(["run", str(place / "recipe.yaml"), "options.steps=4", "--resume"]) == 0


def test_inspect(place, base, monkeypatch, capsys):
    folders = [str(place / "adapters" / task) for task in ("nli", "topic")]
    arguments = ["--model", str(place / "base"), "--inputs", str(place / "inputs" / "nli.safetensors")]
    assert main(["inspect", *folders, *arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["adapters"]["nli"]["modules"] == {"q_proj": 3, "v_proj": 3}
    assert document["adapters"]["nli"]["trained"] == ["score.weight"]
    (pair,) = document["overlaps"]
    assert (pair["modules"], pair["union"]) == (6, 6)
    adapters = [nsc_merge.load_adapter(folder, "x").factors for folder in folders]
    deltas = [torch.cat([factor.delta().flatten() for factor in side.values()]) for side in adapters]
    cosine = torch.nn.functional.cosine_similarity(*deltas, dim=0)
    assert pair["cosine"] == pytest.approx(float(cosine), abs=1e-9)
    assert document["adapters"]["nli"]["norm"] == pytest.approx(float(deltas[0].norm()))
    ratio = document["null_space_ratio"]["nli"]
    assert ratio["random"] == pytest.approx((1 - 4 / 32) ** 0.5)
    assert 0.7 < ratio["measured"] < 1
    shutil.copytree(folders[0], place / "copy")
    # Of folders nothing is looked for on the network, whatever the environment allows.
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert main(["inspect", folders[0], str(place / "copy")]) == 0
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    shown = capsys.readouterr().out
    assert "6/6" in shown
    assert shown.count("1.000") == 2
    assert main(["inspect", folders[0], "--inputs", "x"]) == 2
    assert "--inputs: needs --model" in capsys.readouterr().err
    assert main(["inspect", folders[0], folders[0]]) == 2
    assert "given twice" in capsys.readouterr().err
    # DoRA as LoRA of its rank, and how far that is off.
    write_adapter(base, place / "dora", 3, r=2, target_modules=["v_proj"], task_type="SEQ_CLS", use_dora=True)
    assert main(["inspect", str(place / "dora"), *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["adapters"]["dora"]
    assert (found["ranks"], sum("DoRA converted at rank 2" in note for note in found["notes"])) == ([2], 3)


def test_export_and_plot(place, base, capsys):
    assert main(["run", str(place / "recipe.yaml"), "output.formats=coefficients"]) == 0
    merged = place / "merged"
    capsys.readouterr()
    assert main(["export", str(merged), "--format", "lora", "--rank", "3", "--out", str(place / "small")]) == 0
    assert "the adapter has rank 3; vLLM: --enable-lora --max-lora-rank 8" in capsys.readouterr().out
    errors = json.loads((place / "small" / "truncation.json").read_text())["relative_error"]
    result = load_result(merged)
    assert errors == result.rank_errors(3)
    small = nsc_merge.load_adapter(place / "small", "small")
    for path, error in errors.items():
        exact = result.delta(path)
        found = float((small.factors[path].delta() - exact).norm() / exact.norm())
        assert found == pytest.approx(error, abs=1e-6)
        sigma = torch.linalg.svdvals(exact)
        assert error == pytest.approx(float(sigma[3:].norm() / sigma.norm()), rel=1e-6)
    assert main(["export", str(merged), "--format", "model", "--out", str(place / "full")]) == 0
    inputs = KINDS["llama-cls"].inputs(3)
    torch.testing.assert_close(
        outputs(type(base).from_pretrained(place / "full"), inputs),
        outputs(result.apply(result.model), inputs),
        **TOLERANCE,
    )
    assert main(["plot", str(merged), "--out", str(place / "plots")]) == 0
    assert sorted(path.name for path in (place / "plots").iterdir()) == ["coefficients.png", "ratios.png"]

    weights = place / "adapters" / "nli" / "adapter_model.safetensors"
    save_file({key: 2 * value for key, value in load_file(weights).items()}, weights)
    assert main(["export", str(merged), "--format", "lora", "--out", str(place / "other")]) == 1
    assert "adapters.nli" in (error := capsys.readouterr().err)
    assert "has changed since it was merged" in error
    assert not (place / "other").exists()


def test_methods(capsys):
    assert main(["methods", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)
    assert {"nsc", "task_arithmetic"} <= set(methods)
    assert "steps" in methods["nsc"]["options"]
    assert methods["nsc"]["recipes"]["llm"]["options"]["steps"] == 500
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert "lr=by recipe" in shown
    assert "recipe llm (decoder): optimizer='adamw', lr=0.0003, weight_decay=0.01, steps=500" in shown
    assert "\n  recipe paper-supp (on demand): " in shown
    assert "\n  needs: data, gradients\n" in shown
    one = METHODS["task_arithmetic"]
    lines = [one.name, f"  {one.summary}", f"  {one.paper}", "  tuned on validation data: scale"]
    assert "\n".join(["", *lines, "  options: scale=0.4", "zero_shot", ""]) in shown


def damage(place, kind):
    """One thing wrong in an otherwise good folder."""
    weights = place / "adapters" / "nli" / "adapter_model.safetensors"
    inputs = place / "inputs" / "nli.safetensors"
    if kind == "truncated adapter":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif kind == "huge header":
        weights.write_bytes((1 << 60).to_bytes(8, "little") + weights.read_bytes()[8:])
    elif kind == "pickle":
        weights.rename(weights.with_name("adapter_model.bin"))
    elif kind == "stray tensor":
        save_file({**load_file(weights), "base_model.model.extra.weight": torch.zeros(2)}, weights)
    elif kind == "truncated inputs":
        inputs.write_bytes(inputs.read_bytes()[:100])
    elif kind == "wrong input":
        save_file({"pixels": torch.zeros(4, 3)}, inputs)
    elif kind == "other tokenizer":
        save_file({"input_ids": torch.full((4, 3), 64)}, inputs)
    elif kind == "mask of others":
        save_file({"input_ids": torch.zeros(4, 7).long(), "attention_mask": torch.ones(4, 3).long()}, inputs)
    elif kind == "uneven inputs":
        save_file({"input_ids": torch.zeros(4, 3), "attention_mask": torch.zeros(3, 3)}, inputs)
    elif kind == "only padding":
        mask = torch.tensor([[1, 0], [0, 0]])
        save_file({"input_ids": torch.ones_like(mask), "attention_mask": mask}, inputs)
    elif kind == "truncated base":
        file = place / "base" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    elif kind == "wrong base":
        config = json.loads((place / "base" / "config.json").read_text())
        (place / "base" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated adapter", "adapters['nli']"),
        ("huge header", "header length"),
        ("pickle", "adapter_model.safetensors is missing"),
        ("stray tensor", "1 of 14 tensors would be ignored"),
        ("truncated inputs", "calibration.nli"),
        ("wrong input", "calibration.nli: LlamaForSequenceClassification takes no input ['pixels']"),
        ("other tokenizer", "calibration.nli: expected tokens from 0 to 63 in input_ids, which LlamaFor"),
        ("mask of others", "attention_mask: expected the shape of input_ids, [4, 7], found [4, 3]"),
        ("uneven inputs", "one and the same number of rows"),
        ("only padding", "nli.safetensors: attention_mask has no real token in rows [1] (1 in all)"),
        ("truncated base", "is not valid safetensors"),
        ("wrong base", "lacks"),
    ],
)
def test_corrupt_files_give_one_line_and_leave_the_output_alone(place, capsys, kind, message):
    (place / "merged").mkdir()
    (place / "merged" / "mine.txt").write_text("kept")
    damage(place, kind)
    before = contents(place)
    assert main(["run", str(place / "recipe.yaml")]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("nsc-merge: error: ")
    assert message in lines[0]
    assert contents(place) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["modle=base"], "modle: no such key; did you mean model?"),
        (["output.format=lora"], "output.format: no such key; did you mean output.formats?"),
        (["output.formats=[gguf]"], "output.formats: expected some of"),
        (["output.rank=0"], "output.rank: expected a whole number of at least 1, found 0"),
        (["output.dir=recipe.yaml"], "is a file"),
        (["adapters.nli=nowhere"], "adapters.nli: expected a PEFT folder"),
        (["adapters=[a]"], "adapters: expected keys and values"),
        (["adapters.third=base"], "calibration.third: method 'nsc' needs inputs of every task"),
        (["calibration.third=base"], "calibration.third: no such task (tasks: nli, topic)"),
        (["calibration.nli=nowhere"], "calibration.nli: expected a file or folder of raw data"),
        (["model=nowhere"], "model: expected a folder or a hub id"),
        (["model=base/typo"], "is no folder"),
        (["method=magic"], "method: expected one of"),
        (["options.stepz=3"], "options.stepz: not an option of method 'nsc'"),
        (["batch_size=many"], "batch_size: expected a whole number"),
        (["dtype=int8"], "dtype: expected one of"),
        (["model=3"], "model: expected text, found 3"),
        (["nonsense"], "override: expected key.sub=value, found 'nonsense'"),
        (["options={"], "is not valid YAML"),
    ],
)
def test_bad_recipes_are_refused_with_status_2(place, monkeypatch, capsys, overrides, message):
    monkeypatch.chdir(place)
    before = contents(place)
    assert main(["run", "recipe.yaml", *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert contents(place) == before


def test_errors_of_a_whole_process(place):
    before = contents(place)
    for arguments, status, words in (
        (["run", "missing.yaml"], 2, "recipe: missing.yaml is not a file"),
        (["plot", "base"], 1, "coefficients.json is missing"),
    ):
        done = command(*arguments, cwd=place)
        assert (done.returncode, done.stdout) == (status, "")
        (line,) = done.stderr.splitlines()
        assert words in line
    assert contents(place) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a system without a full disk at hand")
@pytest.mark.parametrize("arguments", [["methods"], ["--help"], ["run", "--help"], ["--version"]])
def test_a_full_disk_behind_the_output_is_no_other_failure(arguments):
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "nsc_merge.commands.main", *arguments]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    said = "nsc-merge: error: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_what_is_for_a_closed_standard_error_is_not_among_the_output(place):
    words = [sys.executable, "-m", "nsc_merge.commands.main", "run", "missing.yaml", "--json"]
    done = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *words], stdout=subprocess.PIPE, cwd=place, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


def test_debug_shows_the_traceback(place):
    with pytest.raises(RecipeError):
        main(["run", str(place / "missing.yaml"), "--debug"])


def test_an_unexpected_error_is_one_line_too(place, monkeypatch, capsys):
    def fail(*_, **__):
        raise KeyError("gone\nastray")

    monkeypatch.setattr("nsc_merge.recipes.run.load_model", fail)
    assert main(["run", str(place / "recipe.yaml")]) == 1
    assert "unexpected error: KeyError: 'gone" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(KeyError):
        main(["run", str(place / "recipe.yaml"), "--debug"])


def test_recipes_read_numbers_and_paths_as_people_mean_them(place, monkeypatch):
    text = (place / "recipe.yaml").read_text() + "\nshared_modules: mean\n"
    (place / "recipe.yaml").write_text(text.replace("lr: 0.01", "lr: 1e-3"))
    recipe = load_recipe(place / "recipe.yaml", ["options.init={nli: 3e-1, topic: 0.2}"])
    assert recipe.options == {"lr": 1e-3, "steps": 4, "init": {"nli": 0.3, "topic": 0.2}}
    assert recipe.adapters["nli"] == place / "adapters" / "nli"
    assert recipe.shared_modules == "mean"
    assert recipe.local
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    changed = load_recipe(place / "recipe.yaml", ["output.dir=out", "model=owner/name"])
    assert changed.out == place / "elsewhere" / "out"
    assert not changed.local


def test_folders_of_batches_and_task_arithmetic_without_data(place, capsys):
    folder = place / "batches"
    folder.mkdir()
    for index in range(2):
        save_file(KINDS["llama-cls"].inputs(index), folder / f"{index}.safetensors")
    overrides = [f"calibration.nli={folder}", "output.formats=coefficients"]
    assert main(["run", str(place / "recipe.yaml"), "--dry-run", "--json", *overrides]) == 0
    assert json.loads(capsys.readouterr().out)["batches"] == {"nli": 2, "topic": 3}
    plain = ["method=task_arithmetic", "options=null", "calibration=null", "options.scale=0.3"]
    assert main(["run", str(place / "recipe.yaml"), *plain]) == 0
    document = json.loads((place / "merged" / "coefficients.json").read_text())
    assert {value for row in document["coefficients"].values() for value in row.values()} == {0.3}


def test_half_precision_plots_and_remarks(place, base, capsys):
    only_v = {"r": 2, "target_modules": ["v_proj"]}
    write_adapter(base, place / "v-only", 5, **only_v)
    overrides = ["dtype=bfloat16", "output.plots=true", f"adapters.nli={place / 'v-only'}", "output.rank=4"]
    assert main(["run", str(place / "recipe.yaml"), *overrides]) == 0
    shown = capsys.readouterr()
    assert "nli: coefficient 0 where it has no adapter: model.layers.0.self_attn.q_proj" in shown.err
    assert "relative error of the truncation" in shown.out
    merged = place / "merged"
    tensors = load_file(merged / "model" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert {"coefficients.png", "ratios.png"} <= set(contents(merged))
    card = (merged / "README.md").read_text()
    assert "| nli | 3 | 2 |" in card
    assert "Truncated to rank 4" in card
    assert "3 modules are not adapted by every task" in card
