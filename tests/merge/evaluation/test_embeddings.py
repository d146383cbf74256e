"""Embeddings of texts are measured as a merged model gives them, against transformers, PEFT, scipy and torchmetrics."""

from __future__ import annotations

import json
import math

import embedding_cases as cases
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
import yaml
from scipy.stats import pearsonr, spearmanr
from torchmetrics.functional.retrieval import (
    retrieval_normalized_dcg,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

from nsc_merge.commands.main import main
from nsc_merge.evaluation.eval_recipe_reader import load_eval_recipe
from nsc_merge.evaluation.metrics import METRICS
from nsc_merge.evaluation.rows.fingerprint import fingerprint
from nsc_merge.recipes.yaml_keys import RecipeError

TEXTS = {
    "similar": ["sentence1", "sentence2"],
    "found": [f"{cases.PROMPT}{{query}}", "positive"],
    "nearest": ["anchor", "positive", "negative"],
}
METRIC_OF = {"similar": "spearman", "found": {"name": "ndcg", "k": 3}, "nearest": "accuracy"}


TUNED = {"method": "task_arithmetic", "tune": "loss"}


def made(place, *, modules=True, pooling="mean", metrics=METRIC_OF, **keys):
    """A folder with a base, two adapters and a recipe that measures them, of each task on data of its own."""
    base = cases.write_base(place / "base", modules=modules, pooling=pooling)
    tasks = {}
    for seed, (name, metric) in enumerate(metrics.items(), 1):
        cases.write_adapter(base, place / name, seed)
        tasks[name] = {
            "adapter": name,
            "metric": metric,
            "test": {"source": str(cases.write_rows(place, name, seed)), "texts": TEXTS[name], "max_length": 32},
            "validation": {
                "source": str(cases.write_rows(place, name, seed + 10, 8)), "texts": TEXTS[name], "max_length": 32,
            },
            **keys,
        }  # fmt: skip
    recipe = {
        "model": "base",
        "tasks": tasks,
        "methods": [{"method": "task_arithmetic", "options": {"scale": 0.4}}],
        "output": {"dir": "out", "plots": False},
        "batch_size": 5,
    }
    (place / "eval.yaml").write_text(yaml.safe_dump(recipe))
    return place


def changed(place, **values):
    recipe = yaml.safe_load((place / "eval.yaml").read_text())
    (place / "eval.yaml").write_text(yaml.safe_dump({**recipe, **values}))


def measured(place, *more):
    assert main(["eval", str(place / "eval.yaml"), *more]) == 0
    document = json.loads((place / "out" / "results.json").read_text())
    return {row["row"]: row["runs"][0] for row in document["rows"]}


def by_hand(place, name, adapters, pooling="mean"):
    """What the task's metric is of embeddings that are made one text at a time."""
    rows = cases.rows_in(place / f"{name}-{list(METRIC_OF).index(name) + 1}.jsonl")

    def embedded(column, prompt=""):
        texts = [prompt + row[column] for row in rows]
        return F.normalize(cases.embeddings(place / "base", adapters, texts, pooling), dim=-1)

    if name == "similar":
        known = [number for number, row in enumerate(rows) if row["score"] is not None]
        near = (embedded("sentence1") * embedded("sentence2")).sum(1)[known]
        return spearmanr(near, [rows[number]["score"] for number in known]).statistic
    if name == "nearest":
        anchor = embedded("anchor")
        gap = (anchor * (embedded("positive") - embedded("negative"))).sum(1)
        return (gap > 0).double().mean().item()
    near = embedded("query", cases.PROMPT) @ embedded("positive").T
    questions = list(dict.fromkeys(row["query"] for row in rows))
    documents = list(dict.fromkeys(row["positive"] for row in rows))
    asked = [[row["query"] for row in rows].index(one) for one in questions]
    held = [[row["positive"] for row in rows].index(one) for one in documents]
    belongs = [
        torch.tensor([any(r["query"] == q and r["positive"] == d for r in rows) for d in documents]) for q in questions
    ]
    figures = [
        retrieval_normalized_dcg(near[row][held], wanted, top_k=3) for row, wanted in zip(asked, belongs, strict=True)
    ]
    return torch.stack(figures).double().mean().item()


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_figures_are_those_of_texts_embedded_one_by_one(tmp_path, pooling):
    place = made(tmp_path, pooling=pooling)
    found = measured(place)
    merged = {str(place / name): 0.4 for name in METRIC_OF}
    for name in METRIC_OF:
        for row, adapters in (("zero_shot", {}), ("finetuned", {str(place / name): 1.0}), ("task_arithmetic", merged)):
            expected = by_hand(place, name, adapters, pooling)
            assert math.isclose(found[row]["metrics"][name], expected, abs_tol=2e-6), (name, row)
    # By 20 groups of rows, of every metric.
    assert all(found["task_arithmetic"]["stderr"][name] > 0 for name in METRIC_OF)


@pytest.mark.parametrize("where", ["adapter", "pool"])
def test_a_plain_base_embeds_as_its_adapter_or_the_task_says(tmp_path, where):
    keys = {"pool": "first"} if where == "pool" else {}
    place = made(tmp_path, modules=False, **keys)
    if where == "adapter":
        for name in METRIC_OF:
            cases.write_modules(place / name, "cls")
    found = measured(place)
    for name in METRIC_OF:
        expected = by_hand(place, name, {str(place / name): 1.0}, "cls")
        assert math.isclose(found["finetuned"]["metrics"][name], expected, abs_tol=2e-6)


def test_methods_with_data_take_every_text(tmp_path):
    place = made(tmp_path)
    methods = [
        {"method": "nsc", "options": {"steps": 2}},
        {"method": "match", "options": {"steps": 2}},
        "regmean",
        {"method": "distill", "options": {"steps": 2}},
        "ensemble",
    ]
    changed(place, methods=methods)
    found = measured(place)
    assert all(math.isfinite(value) for row in found.values() for value in row["metrics"].values())
    # The mean of embeddings, not of similarities.
    rows = cases.rows_in(place / "similar-1.jsonl")
    known = [row for row in rows if row["score"] is not None]
    sides = []
    for column in ("sentence1", "sentence2"):
        texts = [row[column] for row in known]
        each = [cases.embeddings(place / "base", {str(place / name): 1.0}, texts) for name in METRIC_OF]
        sides.append(torch.stack([F.normalize(one, dim=-1) for one in each]).mean(0))
    near = F.cosine_similarity(*sides, dim=-1)
    expected = spearmanr(near, [row["score"] for row in known]).statistic
    assert math.isclose(found["ensemble"]["metrics"]["similar"], expected, abs_tol=2e-6)


def test_a_scale_is_not_tuned_on_the_rows_that_are_measured(tmp_path, capsys):
    place = made(tmp_path, metrics={"similar": "pearson"})
    test, rows = place / "similar-1.jsonl", cases.rows_in(place / "similar-1.jsonl")
    other = {"source": str(place / "other.jsonl"), "texts": TEXTS["similar"], "max_length": 32}
    tasks = yaml.safe_load((place / "eval.yaml").read_text())["tasks"]
    changed(place, tasks={"similar": {**tasks["similar"], "validation": other}}, methods=[TUNED])
    # In another order, so that other texts share their batches.
    (place / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert main(["eval", str(place / "eval.yaml")]) == 1
    assert "and 24 of the 24 samples of test are the 24 of validation" in capsys.readouterr().err
    # The same first texts, with others.
    (place / "other.jsonl").write_text(
        "".join(json.dumps({**row, "sentence2": f"w{n} w1"}) + "\n" for n, row in enumerate(rows))
    )
    assert test.read_text() != (place / "other.jsonl").read_text()
    main(["eval", str(place / "eval.yaml")])
    assert "samples of test" not in capsys.readouterr().err


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_texts_are_compared_as_the_base_says(tmp_path, similarity):
    place = made(tmp_path, metrics={"similar": "pearson"})
    cases.write_modules(place / "base", "mean", cases.MODULES[:2], similarity_fn_name=similarity)
    rows = [row for row in cases.rows_in(place / "similar-1.jsonl") if row["score"] is not None]
    one, two = (cases.embeddings(place / "base", {}, [row[name] for row in rows]) for name in TEXTS["similar"])
    near = {
        "cosine": F.cosine_similarity(one, two, dim=-1),
        "dot": (one * two).sum(-1),
        "euclidean": -(one - two).norm(dim=-1),
        "manhattan": -(one - two).abs().sum(-1),
    }[similarity]
    expected = pearsonr(near, [row["score"] for row in rows]).statistic
    assert math.isclose(measured(place)["zero_shot"]["metrics"]["similar"], expected, abs_tol=1e-5)


def retrieval(seed, count=23, several=3, width=4):
    """Embeddings and numbers of rows in which questions and documents return."""
    generator = torch.Generator().manual_seed(seed)
    asked = torch.randint(0, 12, (count, 1), generator=generator)
    documents = torch.randint(0, 30, (count, several - 1), generator=generator)
    labels = torch.cat([asked, documents], 1)
    of_asked, of_documents = torch.randn(12, width, generator=generator), torch.randn(30, width, generator=generator)
    return torch.cat([of_asked[asked], of_documents[documents]], 1), labels, of_asked, of_documents


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 3, 10, 50])
def test_ranks_are_those_of_torchmetrics(seed, k):
    outputs, labels, of_asked, of_documents = retrieval(seed)
    known = labels[:, 1:].unique()
    near = F.normalize(of_asked.double(), dim=-1) @ F.normalize(of_documents.double(), dim=-1).T
    theirs = {
        "ndcg": retrieval_normalized_dcg, "mrr": retrieval_reciprocal_rank, "recall": retrieval_recall,
    }  # fmt: skip
    for name, measure in theirs.items():
        figures = []
        for question in labels[:, 0].unique():
            mine = labels[labels[:, 0] == question][:, 1].unique()
            # Its reciprocal rank leaves out what is below 0.
            figures.append(measure(near[question][known] + 2, torch.isin(known, mine), top_k=min(k, len(known))))
        found = METRICS[name].with_options(k=k).measure(outputs, labels)
        assert math.isclose(found, torch.stack(figures).double().mean().item(), rel_tol=1e-6)
        # Every question counts once, in its first row.
        quality = METRICS[name].quality(outputs, labels, k=k)
        assert int((~quality.isnan()).sum()) == len(labels[:, 0].unique())


def test_what_is_no_number_finds_nothing():
    outputs, labels, _, _ = retrieval(0)
    outputs[:, 1:] = torch.nan
    assert [METRICS[name].measure(outputs, labels) for name in ("ndcg", "mrr", "recall")] == [0.0, 0.0, 0.0]


def test_texts_that_are_all_alike_are_not_found_nearest(tmp_path):
    place = made(tmp_path, metrics={"nearest": "accuracy"})
    base = tf.BertModel.from_pretrained(place / "base")
    with torch.no_grad():
        base.encoder.layer[-1].output.LayerNorm.weight.zero_()
        base.encoder.layer[-1].output.LayerNorm.bias.fill_(1.0)
    base.save_pretrained(place / "base")
    assert measured(place)["zero_shot"]["metrics"]["nearest"] == 0.0


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("similar", {"metric": "f1"}, "metric: of texts that are read alone one of .*'ndcg', 'mrr',.*, found f1"),
        ("similar", {"metric": "accuracy"}, "test.texts: metric accuracy compares at least 3, found 2"),
        ("nearest", {"metric": "pearson"}, "test.texts: metric pearson compares 2, found 3"),
        ("found", {"labels": "positive"}, "labels: expected none, as texts of a row are compared"),
        ("similar", {"head": "model"}, "head: expected none, as texts of a row are compared"),
        ("similar", {"classes": ["a"]}, "classes: expected none, as texts are compared"),
        ("similar", {"pool": "tokens"}, r"pool: of an embedding it is one of \['mean',.*\], found 'tokens'"),
        ("similar", {"metric": {"name": "ndcg", "k": 0}}, "metric.k: expected a whole number of at least 1, found 0"),
        ("similar", {"test": "similar-1.jsonl", "metric": "ndcg"}, "test.texts: metric ndcg is of embeddings of texts"),
        ("similar", {"validation": "similar-11.jsonl"}, "validation.texts: expected those of test, found none"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path, name, keys, message):
    place = made(tmp_path, metrics={name: METRIC_OF[name]}, **keys)
    with pytest.raises(RecipeError, match=f"tasks.{name}.{message}"):
        load_eval_recipe(place / "eval.yaml")


def test_a_base_that_says_nothing_of_its_embeddings_is_told_the_way(tmp_path, capsys):
    place = made(tmp_path, modules=False)
    assert main(["eval", str(place / "eval.yaml")]) == 1
    assert ".pool: expected one of ['mean', 'first', 'last'], as neither" in capsys.readouterr().err


def test_texts_that_are_cut_in_use_are_refused(tmp_path, capsys):
    place = made(tmp_path, metrics={"similar": "spearman"})
    cases.write_modules(place / "base")
    (place / "base" / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    assert main(["eval", str(place / "eval.yaml")]) == 1
    assert "tokens, and in use sentence-transformers reads 6 of it; expected max_length: 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules.json": [{"path": "", "type": "st.StaticEmbedding"}]}, "expected a Transformer and a Pooling at"),
        ({"1_Pooling/config.json": {"pooling_mode": "attention"}}, "pooling_mode: expected some of"),
        ({"1_Pooling/config.json": {"include_prompt": False}}, "include_prompt: expected prompts that are part"),
        ({"sentence_bert_config.json": {"do_lower_case": True}}, "do_lower_case true"),
    ],
)  # fmt: skip
def test_other_modules_are_refused_with_the_way_out(tmp_path, capsys, files, message):
    place = made(tmp_path, metrics={"similar": "spearman"})
    for name, value in files.items():
        (place / "base" / name).write_text(json.dumps(value))
    assert main(["eval", str(place / "eval.yaml")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "measure such a merge with sentence-transformers' own evaluators" in error


@pytest.mark.parametrize(
    "file", ["base/1_Pooling/config.json", "base/config_sentence_transformers.json", "words/tokenizer.json"]
)
def test_rows_are_measured_again_where_texts_are_embedded_in_another_way(tmp_path, file):
    place = made(tmp_path, metrics={"similar": "pearson"})
    cases.words().save_pretrained(place / "words")
    tasks = yaml.safe_load((place / "eval.yaml").read_text())["tasks"]
    tasks["similar"]["test"]["tokenizer"] = "words"
    changed(place, tasks=tasks)

    def mark():
        recipe = load_eval_recipe(place / "eval.yaml")
        return fingerprint(recipe, recipe.rows[0], 0)

    before = mark()
    assert mark() == before
    (place / file).write_text((place / file).read_text().rstrip() + "\n\n")
    assert mark() != before
