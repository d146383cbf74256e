"""Fisher information of single examples, wherever in a linear's input the rows of an example lie."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from data_cases import problem_of
from test_closed_form import explicit_fisher
from torch import nn
from zoo import write_adapter

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods import Problem
from nsc_merge.methods.closed_form import fisher

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
SMALL |= {"pad_token_id": 0, "initializer_range": 0.3}
DEBERTA = {"intermediate_size": 24, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 6}
XLNET = {"vocab_size": 64, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "num_labels": 3, "pad_token_id": 0}
BUILT = {
    "positions that all examples share": lambda: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(**SMALL, **DEBERTA, share_att_key=True, norm_rel_ebd="layer_norm")
    ),
    "positions before examples": lambda: tf.XLNetForSequenceClassification(tf.XLNetConfig(**XLNET)),
}
TARGETS = {
    "positions that all examples share": ["query_proj", "key_proj", "value_proj"],
    "positions before examples": ["layer_1", "layer_2"],
}


def words():
    ids = torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model, batch):
    return model(**batch).logits


def compared(problem, batch, **options):
    paths = list(problem.adapters["a"].factors)
    found = fisher.information(problem, "a", paths, [batch], fisher.FisherOptions(**options))
    expected = explicit_fisher(problem, "a", [batch], logits, paths)
    for path in paths:
        torch.testing.assert_close(found[path], expected[path], rtol=2e-3, atol=1e-6 * float(expected[path].max()))


@pytest.mark.parametrize("kind", BUILT)
def test_examples_are_told_apart_by_what_their_gradients_reach(kind, tmp_path):
    torch.manual_seed(0)
    model = BUILT[kind]().eval()
    folder = write_adapter(model, tmp_path / "a", 1, r=2, target_modules=TARGETS[kind])
    compared(problem_of(model, {"a": folder}), words())


class Experts(nn.Module):
    """Half of all rows go to either of two linears."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        rows = x.flatten(0, 1)
        found = torch.zeros_like(rows)
        order = rows.sum(1).argsort()
        for expert, chosen in zip(self.experts, order.chunk(2), strict=True):
            found[chosen] = expert(rows[chosen]).tanh()
        return tf.modeling_outputs.SequenceClassifierOutput(logits=self.head(found.view_as(x).mean(1)))


def test_rows_that_experts_are_sent_belong_to_their_examples():
    torch.manual_seed(0)
    model = Experts()
    factors = {f"experts.{n}": Factor(torch.randn(2, 8), torch.randn(8, 2), 1.0) for n in range(2)}
    problem = Problem(model, {"a": Adapter("a", factors)})
    # Each example's rows are alike enough that some examples go to one expert whole, and others to both.
    batch = {"x": torch.randn(4, 6, 8) + torch.tensor([-2.0, 0.0, 0.1, 2.0])[:, None, None]}
    assert len(logits(model, batch)) == 4
    paths = list(factors)
    found = fisher.information(problem, "a", paths, [batch], fisher.FisherOptions(outputs={"a": logits}))
    weights = dict(model.named_parameters())
    for path, factor in factors.items():
        weights[f"{path}.weight"] = weights[f"{path}.weight"].detach() + factor.delta().float()
    held = {path: weights[f"{path}.weight"].requires_grad_() for path in paths}
    log_p = torch.func.functional_call(model, weights, (), batch).logits.log_softmax(-1)
    expected = dict.fromkeys(paths, 0.0)
    for row in log_p:
        for value in row:
            for path, gradient in zip(paths, torch.autograd.grad(value, held.values(), retain_graph=True), strict=True):
                expected[path] += value.exp().detach() * gradient.square() / len(log_p)
    for path in paths:
        torch.testing.assert_close(found[path], expected[path], rtol=2e-3, atol=1e-6 * float(expected[path].max()))


def test_a_model_that_labels_every_token_has_information_at_each(tmp_path):
    torch.manual_seed(0)
    model = tf.BertForTokenClassification(tf.BertConfig(**SMALL, intermediate_size=24)).eval()
    folder = write_adapter(model, tmp_path / "a", 1, r=2, target_modules=["value"])
    problem = problem_of(model, {"a": folder})
    batch = words()
    batch["attention_mask"][1, 4:] = 0
    paths = list(problem.adapters["a"].factors)
    options = fisher.FisherOptions(), fisher.FisherOptions(outputs={"a": logits})
    own, of_function = (fisher.information(problem, "a", paths, [batch], one) for one in options)
    for path in paths:
        assert torch.equal(own[path], of_function[path])
