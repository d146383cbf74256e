"""distill compares the embeddings of texts, of a base that sentence-transformers saved."""

from __future__ import annotations

from pathlib import Path

import embedding_cases as cases
import pytest
import torch
import torch.nn.functional as F
import transformers as tf

import nsc_merge
from nsc_merge.methods.task_outputs import output_of

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return cases.write_base(tmp_path / "base")


def batch_of(texts: list[str]) -> dict[str, torch.Tensor]:
    return dict(cases.words()(texts, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_an_output_is_the_embedding_of_each_text(base, pooling):
    cases.write_modules(base, pooling)
    model = tf.AutoModel.from_pretrained(base).eval()
    with torch.no_grad():
        found = output_of(None, "task", model, batch_of(TEXTS), values=True)
    expected = F.normalize(cases.embeddings(base, {}, TEXTS, pooling), dim=-1)
    assert torch.allclose(found.double(), expected, atol=1e-6)


def test_what_is_minimised_is_how_far_embeddings_are_from_each_tasks_own(base, tmp_path):
    folders = {str(seed): cases.write_adapter(base, tmp_path / str(seed), seed) for seed in (1, 2)}
    texts = {"1": TEXTS, "2": ["w10 w11", "w12 w13 w14 w15", "w16"]}
    model = tf.AutoModel.from_pretrained(base).eval()
    inputs = {task: [batch_of(texts[task])] for task in folders}
    distances = []
    for task, folder in folders.items():
        each = [{str(folder): 1.0}, {str(one): 0.5 for one in folders.values()}]
        own, merged = (F.normalize(cases.embeddings(base, adapters, texts[task]), dim=-1) for adapters in each)
        distances.append(float((merged - own).square().mean()))
    options = {"likelihood": "gaussian", "distance": "divergence", "normalise": "none", "steps": 40, "init": 0.5}
    history = nsc_merge.merge(model, folders, inputs, "distill", **options).history
    assert history[0]["objective"] == pytest.approx(sum(distances) / 2, rel=1e-4)
    assert history[-1]["objective"] < 0.9 * history[0]["objective"]


def test_logits_that_are_not_there_are_told_with_the_way(base, tmp_path):
    folder = cases.write_adapter(base, tmp_path / "1", 1)
    model = tf.AutoModel.from_pretrained(base).eval()
    with pytest.raises(ValueError, match="BertModel has no logits; likelihood 'gaussian' takes its embedding"):
        nsc_merge.merge(model, {"1": folder}, {"1": [batch_of(TEXTS)]}, "distill", steps=1)
    (base / "modules.json").unlink()
    with pytest.raises(ValueError, match="BertModel has no logits; expected a function"):
        nsc_merge.merge(model, {"1": folder}, {"1": [batch_of(TEXTS)]}, "distill", steps=1, likelihood="gaussian")
