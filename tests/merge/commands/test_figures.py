"""The figures that a command shows: each says what it is of, and compares nothing with anything else."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import yaml
from cli_cases import contents, make_place, on_cpu
from zoo import build, write_adapter

from nsc_merge.commands.main import main
from nsc_merge.methods.registry import METHODS
from nsc_merge.recipes import run
from nsc_merge.recipes.merge_recipe import load_recipe
from nsc_merge.recipes.saved_result import load_result
from nsc_merge.results.beside.plots import draw
from nsc_merge.utils import plot_style
from nsc_merge.utils.atomic_folder import replacing_folder
from nsc_merge.utils.plot_style import running_mean
from nsc_merge.utils.progress import Progress


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return make_place(build("llama-cls"), tmp_path)


@pytest.mark.parametrize("method", [name for name in METHODS if "steps" in METHODS[name].option_names])
def test_one_headline_in_log_summary_card_and_what_is_read_back(place, capsys, method):
    overrides = [f"method={method}", "options.steps=4", "options.progress=false", "output.formats=coefficients"]
    assert main(["run", "recipe.yaml", "--json", *overrides]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)["objective"]
    result = load_result(place / "merged")
    assert result.objective == found
    # Three batches of every task, and coefficients after the last step.
    values = [value for row in result.coefficients.values() for value in row.values()]
    quantity = "null-space ratio" if method == "nsc" else "loss"
    course = (
        f"4 steps: mean {quantity} {found['before']:#.4g} -> {found['after']:#.4g} on the same 3 batches of every "
        f"task, coefficients {min(values):.3f} to {max(values):.3f}"
    )
    assert result.course == course
    assert course in shown.err.splitlines()
    assert f"{course}." in (place / "merged" / "README.md").read_text().splitlines()
    assert result.history[-1]["lambda_max"] < max(values)


def test_a_method_without_steps_has_no_headline(place, capsys):
    assert main(["run", "recipe.yaml", "--json", "method=task_arithmetic", "output.formats=coefficients"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["objective"] == {}
    assert "->" not in shown.err


@pytest.mark.parametrize("objective", [[], "better", {"before": 1}, {"before": 1, "after": float("nan"), "batches": 0}])
def test_a_comparison_that_is_none_is_refused(place, capsys, objective):
    assert main(["run", "recipe.yaml", "output.formats=coefficients"]) == 0
    file = place / "merged" / "coefficients.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "objective": objective}))
    capsys.readouterr()
    assert main(["plot", "merged"]) == 1
    assert "objective: expected before, after and batches, found" in capsys.readouterr().err


STEP = {"step": 1, "objective": 0.5, "omega": {"nli": 0.5, "topic": 0.5}}


@pytest.mark.parametrize(
    "entry",
    [
        [],
        {"step": 1},
        {**STEP, "step": "first"},
        {**STEP, "objective": None},
        {**STEP, "omega": {"nli": None, "topic": 0.5}},
        {**STEP, "omega": {"nli": 0.5, "other": 0.5}},
        {**STEP, "omega": {"nli": 0.5}},
        {"step": 1, "objective": 0.5, "loss": {"nli": 0.5, "topic": 0.5}},
    ],
)
def test_a_history_that_is_none_is_refused(place, capsys, entry):
    assert main(["run", "recipe.yaml", "output.formats=coefficients"]) == 0
    file = place / "merged" / "history.jsonl"
    kept = file.read_text().splitlines()[:1]
    file.write_text("\n".join([*kept, json.dumps(entry)]))
    capsys.readouterr()
    assert main(["plot", "merged"]) == 1
    assert "history.jsonl: line 2: expected numbers for step, objective, and omega" in capsys.readouterr().err


def test_no_picture_is_drawn_while_another_merge_is_saved_there(place, capsys):
    assert main(["run", "recipe.yaml", "output.formats=coefficients"]) == 0
    before = contents(place)
    with replacing_folder(place / "merged", lambda path, written: False) as staging:
        (staging / "another").touch()
        assert main(["plot", "merged"]) == 1
    assert "out: another writer is at work on" in capsys.readouterr().err
    (place / "merged" / "another").unlink()
    assert contents(place) == before
    assert main(["plot", "merged"]) == 0
    assert main(["plot", "nowhere"]) == 1
    assert contents(place).keys() - before.keys() == {"merged/coefficients.png", "merged/ratios.png"}


def test_the_steps_of_a_dry_run_are_those_of_the_merge(place, capsys):
    assert main(["run", "recipe.yaml", "--dry-run", "--json", "options.steps=30"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps"], plan["options"]["steps"], plan["steps_tried"]) == (30, 30, 3)
    assert plan["peak_of"].startswith("of the ")
    assert main(["run", "recipe.yaml", "--dry-run", "options.steps=2"]) == 0
    shown = capsys.readouterr().out
    assert "time      2 steps of" in shown
    assert plan["peak_of"] in shown


def test_a_mean_over_batches_that_repeat_shows_no_batches():
    difficulty = [5.0, -3.0, 0.5]
    values = [difficulty[step % 3] - 0.1 * step for step in range(30)]
    assert running_mean(values, 3) == pytest.approx([sum(difficulty) / 3 - 0.1 * (step - 1) for step in range(2, 30)])
    assert running_mean(values, 1) == pytest.approx(values)


@pytest.mark.parametrize("window", [1, 3, 50])
def test_curves_are_means_over_the_batches_compared(tmp_path, monkeypatch, window):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *a, **s: drawn.append((x, y)) or plot(self, x, y, *a, **s))
    history = [{"step": n, "objective": 0.9 - 0.01 * n, "omega": {"a": 0.9 - 0.01 * n}} for n in range(6)]
    draw({"layers.0.q": {"a": 0.4}}, {}, history, tmp_path, window)
    window = min(window, len(history))
    raw, means = drawn[-2:] if window > 1 else drawn[-1:] * 2
    assert list(raw[1]) == pytest.approx([entry["objective"] for entry in history])
    assert list(means[0]) == list(range(window - 1, 6))
    assert list(means[1]) == pytest.approx(running_mean(list(raw[1]), window))


@pytest.mark.parametrize(
    ("path", "block", "name"),
    [
        ("model.layers.11.self_attn.q_proj", 11, "q_proj"),
        ("vit.encoder.layer.3.attention.attention.query", 3, "query"),
        ("transformer.h.7.attn.c_attn", 7, "c_attn"),
        ("encoder.block.5.layer.0.SelfAttention.q", 5, "q"),
        ("visual.blocks.9.attn.qkv", 9, "qkv"),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", 1, "to_out"),
        ("model.layers.2.mlp.experts.gate_up_proj.4", 2, "gate_up_proj"),
        ("lm_head", -1, "lm_head"),
    ],
)
def test_modules_stand_in_their_blocks(path, block, name):
    assert plot_style.place(path) == (block, name)


def test_long_names_of_tasks_do_not_run_into_each_other(tmp_path, monkeypatch):
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    tasks = ["winogrande-large", "arc_challenge", "glue_mnli_matched", "hellaswag"]
    draw({f"h.{n}.attn.c_attn": dict.fromkeys(tasks, 0.1 * n) for n in range(3)}, {}, [], tmp_path)
    (figure,) = figures
    figure.draw_without_rendering()
    axes = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in axes] == tasks
    corners = [axis.title.get_transform().transform(axis.title.get_position())[0] for axis in axes]
    # Slanted names overlap as boxes, not as lines: they are as high as the letters, and begin apart.
    assert all(axis.title.get_rotation() == 30 for axis in axes)
    apart = [math.sin(math.radians(30)) * (right - left) for left, right in itertools.pairwise(corners)]
    assert min(apart) > 1.2 * axes[0].title.get_size() * figure.dpi / 72


def test_progress_counts_all_that_was_done_when_it_is_shown(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    clock = iter([0.0, 1.0, 10.0, 20.0])
    monkeypatch.setattr("nsc_merge.utils.progress.time.perf_counter", lambda: next(clock))
    with Progress("steps", 20) as bar:
        for count in (2, 8, 10):
            bar.update(count)
    assert capsys.readouterr().err.splitlines() == [
        "steps: 2/20  (2 step/s, 1 s, 9 s left)",
        "steps: 10/20  (1 step/s, 10 s, 10 s left)",
        "steps: 20/20  (1 step/s, 20 s, 0 s left)",
    ]


@pytest.mark.parametrize("asked", [True, None])
def test_a_terminal_gets_a_bar_and_progress_false_shows_nothing(asked, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: asked is None)
    with Progress("steps", 20, asked) as bar:
        bar.update(20, objective=0.5)
    drawn = capsys.readouterr().err
    assert "steps: 100%" in drawn
    assert "20/20" in drawn
    assert "objective=0.5" in drawn
    with Progress("steps", 20, False) as bar:
        bar.update(20)
    assert capsys.readouterr().err == ""


def test_another_method_does_not_take_the_options_of_the_recipes_own(place, capsys):
    overrides = ["method=task_arithmetic", "output.formats=coefficients"]
    assert main(["run", "recipe.yaml", *overrides]) == 0
    assert "method=task_arithmetic: dropped options of the recipe's own method: lr, steps" in capsys.readouterr().err
    written = yaml.safe_load((place / "merged" / "recipe.yaml").read_text())
    assert "scale" in written["options"]
    assert not {"lr", "steps"} & set(written["options"])


@pytest.mark.parametrize("overrides", [["options.lr=0.5", "method=match"], ["method=match", "options.lr=0.5"]])
def test_options_given_beside_the_method_are_kept(place, overrides):
    recipe = load_recipe("recipe.yaml", overrides)
    assert (recipe.method, recipe.options, recipe.dropped) == ("match", {"lr": 0.5}, ("lr", "steps"))
    same = load_recipe("recipe.yaml", ["options.lr=0.5", "method=nsc"])
    assert (same.options, same.dropped) == ({"lr": 0.5, "steps": 4}, ())


def test_options_of_the_other_method_are_refused_where_they_are_given(place, capsys):
    assert main(["run", "recipe.yaml", "method=ties", "options.steps=5", "output.rank=2"]) == 2
    assert "options.steps: not an option of method 'ties'" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["recipes.run.save", "descent.optimisation.Optimisation.comparison"])
def test_an_interruption_after_the_last_step_loses_none(place, monkeypatch, capsys, where):
    on_cpu(place)
    assert main(["run", "recipe.yaml", "output.dir=whole", "output.formats=coefficients"]) == 0

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"nsc_merge.{where}", interrupt)
        assert main(["run", "recipe.yaml", "output.formats=coefficients"]) == 130
    assert "--resume" in capsys.readouterr().err
    before = contents(place)
    assert not (place / "merged").exists()
    assert run.state_file(load_recipe("recipe.yaml")).name in before
    assert main(["run", "recipe.yaml", "output.formats=coefficients", "--resume"]) == 0
    whole, merged = (json.loads((place / out / "coefficients.json").read_text()) for out in ("whole", "merged"))
    assert merged == whole


def test_nothing_to_truncate_is_no_error(place, capsys):
    """Every linear that one adapter has a rank in, the other trained in full."""
    for seed, (task, names) in enumerate({"nli": ["q_proj", "v_proj"], "topic": ["v_proj", "q_proj"]}.items(), 1):
        settings = {"r": 4, "target_modules": names[:1], "modules_to_save": names[1:], "task_type": "SEQ_CLS"}
        write_adapter(build("llama-cls"), place / "full" / task, seed, **settings)
    overrides = ["adapters={nli: full/nli, topic: full/topic}", "output.rank=2", "output.formats=lora"]
    assert main(["run", "recipe.yaml", "method=task_arithmetic", *overrides]) == 0
    assert "of the truncation" not in capsys.readouterr().out
    assert main(["export", "merged", "--format", "lora", "--rank", "2", "--out", "again"]) == 0
    assert "of the truncation" not in capsys.readouterr().out
