"""The language and vision-language quality suites, small enough to train here."""

from __future__ import annotations

import copy
import importlib.util
import json
import sysconfig
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import nsc_merge
from bench.quality import ratios
from bench.quality.suite import evaluate, merged
from bench.quality.suites import corpus, llama, llava
from bench.quality.suites.kept_adapters import kept_adapters
from bench.quality.suites.language import pooled
from nsc_merge.demo.data import digit_split

TEXT = llama.Settings(pretrain_steps=4, train=48, val=24, test=40, probe_steps=10, steps=3, batch=8)
PICTURES = llava.Settings(
    pretrain_pictures=64, pretrain_steps=4, pretrain_batch=8, train=48, val=24, test=40, steps=3, batch=8
)
SUITES = {"llama": (llama, TEXT), "llava": (llava, PICTURES)}
# Parts of the packages, as all of them take half a minute to read.
PARTS = {
    "python": "email",
    "numpy": "lib",
    "scipy": "cluster",
    "sklearn": "neighbors",
    "torch": "optim",
    "transformers": "generation",
    "sympy": "ntheory",
    "matplotlib": "projections",
    "networkx": "classes",
}


def part_of(source: str) -> Path:
    if source == "python":
        return Path(sysconfig.get_path("stdlib")) / PARTS[source]
    spec = importlib.util.find_spec(source)
    return Path(spec.origin).parent / PARTS[source]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_root", part_of)
        yield tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module", params=SUITES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def trained(work, name):
    module, settings = SUITES[name]
    lines: list[str] = []
    suite = module.load(work, 0, log=lines.append, progress=False, settings=settings, permuted=module.PERMUTED[:1])
    assert sum("adapters:" in line for line in lines) == len(module.TASKS)
    assert sum("permuted:" in line for line in lines) == 1
    return suite


@pytest.fixture(scope="module")
def texts(work):
    return corpus.load_corpus(work / "llama", lambda line: None)


def linked(work: Path, target: Path, suite: str, tasks) -> None:
    """The base and the adapters of ``tasks`` as another work folder has them."""
    adapters = target / suite / "seed0" / "adapters"
    adapters.mkdir(parents=True)
    for part in ("base", "corpus"):
        if (work / suite / part).is_dir():
            (target / suite / part).symlink_to(work / suite / part)
    for task in tasks:
        (adapters / task).symlink_to(work / suite / "seed0" / "adapters" / task)


def test_parts_are_trained_once(trained, work, name):
    module, settings = SUITES[name]
    lines: list[str] = []
    again = module.load(work, 0, log=lines.append, settings=settings, permuted=module.PERMUTED[:1])
    assert lines == []
    assert list(again.tasks) == list(trained.tasks) == list(module.TASKS)
    assert again.name == name
    assert not list(work.rglob("*.part-*"))
    assert not trained.model.training
    assert {value.dtype for value in trained.model.parameters()} == {torch.float32}


def test_a_missing_adapter_is_trained_again_and_comes_out_the_same(trained, work, name, tmp_path):
    module, settings = SUITES[name]
    *others, last = module.TASKS
    linked(work, tmp_path, name, others)
    lines: list[str] = []
    again = module.load(tmp_path, 0, log=lines.append, progress=False, settings=settings)
    assert len(lines) == 1
    for file in trained.adapters[last].parent.rglob("*.safetensors"):
        stored = load_file(file)
        fresh = load_file(again.adapters[last].parent / file.relative_to(trained.adapters[last].parent))
        assert stored.keys() == fresh.keys()
        assert all(torch.equal(value, fresh[key]) for key, value in stored.items())
    config = (trained.adapters[last] / "adapter_config.json").read_bytes()
    assert config == (again.adapters[last] / "adapter_config.json").read_bytes()


def test_seeds_and_permuted_labels_give_other_adapters(trained, work, name, tmp_path):
    module, settings = SUITES[name]
    task = module.PERMUTED[0]
    # Only one adapter of the other seed is trained here.
    linked(work, tmp_path, name, [])
    (tmp_path / name / "seed0").rename(tmp_path / name / "seed1")
    for other in module.TASKS:
        if other != task:
            (tmp_path / name / "seed1" / "adapters" / other).symlink_to(trained.adapters[other].parent)
    seeded = module.load(tmp_path, 1, log=lambda line: None, progress=False, settings=settings)
    one, two = (nsc_merge.load_adapter(suite.adapters[task], task).factors for suite in (trained, seeded))
    low_rank = [path for path, factor in one.items() if factor.rank]
    assert all(not torch.equal(one[path].A, two[path].A) for path in low_rank)
    permuted = work / name / "seed0" / "permuted" / task / "adapter"
    other = nsc_merge.load_adapter(permuted, task).factors
    assert any(not torch.equal(one[path].B, other[path].B) for path in low_rank)


def test_adapters_along_training_are_kept(trained, work, name):
    module, settings = SUITES[name]
    task = module.PERMUTED[0]
    for kind in ("adapters", "permuted"):
        kept = kept_adapters(work, name, 0, task, kind)
        assert [entry["step"] for entry, _ in kept] == list(range(settings.steps + 1))
        start, end = (nsc_merge.load_adapter(kept[at][1], task).factors for at in (0, -1))
        final = nsc_merge.load_adapter(work / name / "seed0" / kind / task / "adapter", task).factors
        low_rank = [path for path, factor in final.items() if factor.rank]
        assert not any(start[path].B.any() for path in low_rank)
        assert all(torch.equal(end[path].B, final[path].B) for path in low_rank)
    # The curve is that of the model as it is measured elsewhere.
    alone = merged(trained, nsc_merge.merge(trained.model, trained.adapters, method="finetuned"))
    scores = evaluate(trained, alone, "val")
    last, _ = kept_adapters(work, name, 0, task, "adapters")[-1]
    assert last["metric"] == pytest.approx(scores.metrics[task], rel=1e-4)
    assert last["loss"] == pytest.approx(scores.losses[task], rel=1e-4)
    record = ratios.training_record(trained, work, task, "adapters")
    assert record["steps"][0]["all"] == pytest.approx(record["random"], abs=0.02)


def test_samples_are_related_to_their_quality(trained):
    records = ratios.sample_records(trained)
    assert [(record["model"], record["task"]) for record in records] == [
        (model, task) for model in ("finetuned", "TA@0.4") for task in trained.tasks
    ]
    for record in records:
        assert record["samples"] == 40
        assert record["rho"].keys() == {"all", "target"}


def test_adapters_are_peft_folders_of_rank_8_on_q_and_v(trained, name):
    for task, folder in trained.adapters.items():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 8, None)
        assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        adapter = nsc_merge.load_adapter(folder, task)
        low_rank = {path for path, factor in adapter.factors.items() if factor.rank}
        assert {path.rsplit(".", 1)[-1] for path in low_rank} == {"q_proj", "v_proj"}
        assert len(low_rank) == 12
        assert all(adapter.factors[path].B.any() for path in low_rank)
        assert not any("vision" in path for path in (*low_rank, *adapter.trained))
        # A head stays with its task; only the projector is shared.
        projector = {path for path in adapter.trained if "multi_modal_projector" in path}
        assert set(adapter.trained) == projector
        assert bool(projector) == (name == "llava")


def test_outputs_losses_and_measures_agree(trained):
    for task, info in trained.tasks.items():
        (inputs, labels), *_ = trained.labelled(task, "test")
        with torch.no_grad():
            output = trained.output(task, trained.model, inputs)
        loss = trained.loss(task, output, labels)
        assert loss.shape == ()
        assert loss.isfinite()
        quality = trained.quality(task, output, labels)
        assert quality.shape == (len(labels),)
        sign = -1 if info.lower_is_better else 1
        assert trained.measure(task, output, labels) == pytest.approx(sign * quality.mean().item(), rel=1e-5)
        if info.kind == "regression":
            assert trained.measure(task, labels[:, None], labels) == 0
        else:
            perfect = torch.nn.functional.one_hot(labels, output.shape[-1]).float()
            assert perfect.shape == output.shape
            assert trained.measure(task, perfect, labels) == 1
            assert trained.measure(task, -perfect, labels) == 0


def test_outputs_are_differentiable(trained):
    model = copy.deepcopy(trained.model)
    for task in trained.tasks:
        inputs, labels = trained.labelled(task, "val")[0]
        model.zero_grad()
        trained.loss(task, trained.output(task, model, inputs), labels).backward()
        assert all(
            value.grad is not None and value.grad.any()
            for path, value in model.named_parameters()
            if path.endswith(("q_proj.weight", "v_proj.weight")) and "vision" not in path
        )


def test_splits_have_the_sizes_asked_for(trained, name):
    settings = SUITES[name][1]
    for split, count in (("val", settings.val), ("test", settings.test)):
        for task in trained.tasks:
            batches = trained.labelled(task, split)
            assert sum(len(labels) for _, labels in batches) == count
            assert all(len(value) == len(labels) for inputs, labels in batches for value in inputs.values())


def test_calibration_is_unlabelled_and_the_same_each_time(trained):
    drawn, again = trained.calibration(5, 7), trained.calibration(5, 7)
    assert list(drawn) == list(trained.tasks)
    for task, batches in drawn.items():
        assert len(batches) == 7
        for one, two in zip(batches, again[task], strict=True):
            assert all(len(value) == 5 and torch.equal(value, two[key]) for key, value in one.items())
            assert "labels" not in one
        with torch.no_grad():
            trained.model(**batches[0])


def test_the_finetuned_reference_is_what_peft_computes(trained):
    result = nsc_merge.merge(trained.model, trained.adapters, method="finetuned")
    models = merged(trained, result)
    for task, folder in trained.adapters.items():
        inputs, _ = trained.labelled(task, "test")[0]
        own = PeftModel.from_pretrained(copy.deepcopy(trained.model), folder).eval()
        with torch.no_grad():
            theirs = trained.output(task, own, inputs)
            ours = trained.output(task, models[task], inputs)
            base = trained.output(task, trained.model, inputs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(base, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["nsc", "task_arithmetic"])
def test_suites_merge(trained, method, name):
    options = {"steps": 2, "progress": False} if method == "nsc" else {"scale": 0.4}
    result = nsc_merge.merge(trained.model, trained.adapters, trained.calibration(4, 2), method=method, **options)
    scores = evaluate(trained, merged(trained, result), "val")
    assert set(scores.metrics) == set(trained.tasks)
    assert all(torch.tensor(list(scores.losses.values())).isfinite())
    projector = [path for path in result.coefficients if "multi_modal_projector" in path]
    assert bool(projector) == (name == "llava")


def test_files_are_split_by_their_path(texts):
    assert [corpus.split_of(f"numpy/{number}.py") for number in range(200)].count("train") > 110
    assert {corpus.split_of("python/ast.py") for _ in range(3)} == {corpus.split_of("python/ast.py")}
    files, sections = texts
    for kind in (files, sections):
        for split in corpus.SPLITS:
            assert kind[split].ends[-1] == len(kind[split].tokens)
            assert kind[split].tokens.max() < corpus.VOCABULARY
            assert kind[split].tokens.min() >= 0
    assert set(files["train"].labels.tolist()) == set(range(len(corpus.SOURCES)))


def test_tokens_are_the_text_of_the_installation(work, texts):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work / "llama" / "corpus" / "tokenizer.json"))
    for split in corpus.SPLITS:
        source = corpus.SOURCES[int(texts[0][split].labels[0])]
        text = tokenizer.decode(texts[0][split].text(0).tolist())
        assert len(text) >= 60
        originals = {
            f"{source}/{file.relative_to(part_of(source)).as_posix()}": file.read_text(encoding="utf-8")
            for file in part_of(source).rglob("*.py")
        }
        found = [name for name, original in originals.items() if text in original]
        assert found
        assert split in {corpus.split_of(name) for name in found}
    versions = json.loads((work / "llama" / "corpus" / "versions.json").read_text())
    assert set(versions) == {"python", *corpus.PACKAGES}


def test_docstring_sections():
    source = '''
def add(a):
    """Add one.

    Parameters
    ----------
    a : int

    Returns
    -------
    int
        One more.
    """


class Plain:
    """Has no sections."""
'''
    assert list(corpus.sections(source)) == [
        ("Summary", "Add one."),
        ("Parameters", "a : int"),
        ("Returns", "int\n    One more."),
    ]


def examples(texts, task: str, split="val", count=60):
    files, sections = texts
    found = llama.make_examples(task, files[split], sections[split], count, 2)
    ids, mask = found.inputs["input_ids"], found.inputs["attention_mask"].bool()
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)], found


def passages(row: list[int]) -> tuple[list[int], list[int]]:
    middle = row.index(corpus.BREAK)
    assert row[-1] == corpus.BREAK
    return row[1:middle], row[middle + 1 : -1]


def test_texts_are_padded_on_the_right(texts):
    for task in llama.TASKS:
        rows, found = examples(texts, task)
        ids, mask = found.inputs["input_ids"], found.inputs["attention_mask"]
        assert (mask.diff(dim=1) <= 0).all()
        assert (ids[mask == 0] == corpus.PAD).all()
        assert len({len(row) for row in rows}) > 5
        assert all(row[0] == corpus.START for row in rows)


def test_padding_changes_no_output(work):
    suite = llama.load(work, 0, log=lambda line: None, progress=False, settings=TEXT)
    for task in suite.tasks:
        inputs, _ = suite.labelled(task, "val")[0]
        one = {key: value[:1, : int(inputs["attention_mask"][0].sum())] for key, value in inputs.items()}
        with torch.no_grad():
            together = suite.output(task, suite.model, inputs)[:1]
            torch.testing.assert_close(suite.output(task, suite.model, one), together, rtol=1e-4, atol=1e-5)


def test_pooling_leaves_padding_out():
    hidden = torch.tensor([[[1.0], [3.0], [100.0]], [[2.0], [4.0], [9.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pooled(hidden, mask).tolist() == [[3.0, 2.0], [9.0, 5.0]]


def test_labels_of_texts(texts):
    rows, found = examples(texts, "varied")
    for row, label in zip(rows, found.labels.tolist(), strict=True):
        assert label == pytest.approx((len(set(row[1:])) / len(row[1:]) - 0.6) / 0.1, abs=1e-4)
    rows, found = examples(texts, "shared")
    for row, label in zip(rows, found.labels.tolist(), strict=True):
        first, second = passages(row)
        share = sum(token in first for token in second) / len(second)
        assert label == pytest.approx((share - 0.45) / 0.3, abs=1e-4)
    rows, found = examples(texts, "relation")
    stream = texts[0]["val"].tokens.tolist()
    for row, label in zip(rows, found.labels.tolist(), strict=True):
        first, second = passages(row)
        if label == 1:
            assert any(second == first[turn:] + first[:turn] for turn in range(1, len(first)))
        else:
            assert any(stream[at : at + len(second)] == second for at in range(len(stream)))
        if label == 0:
            both = first + second
            assert any(stream[at : at + len(both)] == both for at in range(len(stream)))
    assert found.labels.bincount().tolist() == [20, 20, 20]


def test_pictures_show_what_is_said_of_them():
    pictures = llava.make_pictures(40, "val")
    assert torch.equal(pictures.pixels, llava.make_pictures(40, "val").pixels)
    assert not torch.equal(pictures.pixels, llava.make_pictures(40, "val", seed=1).pixels)
    assert torch.equal(pictures.digits < 0, pictures.colours < 0)
    assert (pictures.digits >= 0).any(1).all()
    pixels = pictures.pixels * 0.3 + 0.3
    palette = torch.tensor(list(llava.COLOURS.values()))
    for half in range(2):
        part = pixels[..., : llava.SIZE // 2] if half == 0 else pixels[..., llava.SIZE // 2 :]
        for image, colour in zip(part, pictures.colours[:, half].tolist(), strict=True):
            brightest = image.flatten(1)[:, image.sum(0).argmax()]
            if colour < 0:
                assert image.max() <= 0.25 + 1e-6
            else:
                assert (palette - brightest).abs().sum(1).argmin() == colour
    splits = [set(indices.tolist()) for indices in digit_split().values()]
    assert not any(one & two for number, one in enumerate(splits) for two in splits[number + 1 :])


def test_answers():
    pictures = llava.Pictures(
        torch.zeros(3, 3, 24, 24),
        torch.tensor([[7, 2], [-1, 3], [4, -1]]),
        torch.tensor([[0, 2], [-1, 1], [3, -1]]),
    )

    def answers(task: str) -> list[str]:
        labels = llava.make_examples(task, pictures).labels
        return [" ".join(llava.WORDS[token] for token in row) for row in labels.view(3, -1).tolist()]

    assert answers("digit") == ["7", "nothing", "4"]
    assert answers("colour") == ["blue", "green", "nothing"]
    assert answers("count") == ["2", "1", "1"]
    assert answers("larger") == ["yes", "no", "yes"]
    assert answers("describe") == [
        "red 7 blue 2 <end>",
        "nothing nothing green 3 <end>",
        "yellow 4 nothing nothing <end>",
    ]
    assert answers("caption") == [
        "2 blue 7 red <end>",
        "3 green nothing nothing <end>",
        "nothing nothing 4 yellow <end>",
    ]


def test_a_caption_is_right_where_greedy_decoding_writes_it(work):
    suite = llava.load(work, 0, log=lambda line: None, progress=False, settings=PICTURES)
    inputs, labels = suite.labelled("caption", "test")[0]
    prompt = inputs["input_ids"].shape[1] - labels.shape[1] + 1
    written = inputs["input_ids"][:, :prompt]
    with torch.no_grad():
        for _ in range(labels.shape[1]):
            logits = suite.model(input_ids=written, pixel_values=inputs["pixel_values"]).logits
            written = torch.cat([written, logits[:, -1].argmax(-1)[:, None]], 1)
        # The same with what was written in place of the labels, so that some are right.
        half = len(labels) // 2
        wanted = torch.cat([written[:half, prompt:], labels[half:]])
        inputs["input_ids"] = torch.cat([written[:, :prompt], wanted[:, :-1]], 1)
        quality = suite.quality("caption", suite.output("caption", suite.model, inputs), wanted)
    assert quality[:half].all()
    assert torch.equal(quality.bool(), (written[:, prompt:] == wanted).all(1))
    # Calibration stops at the prompt: what follows is a label.
    assert suite.calibration(4, 1)["caption"][0]["input_ids"].shape == (4, prompt)
