"""What a model says by itself, where that is not logits of its rows, and heads with statistics."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    PatchTSTConfig,
    PatchTSTForPrediction,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from nsc_merge.evaluation.heads import LinearHead, ModelHead, head_of
from nsc_merge.evaluation.metrics import METRICS

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
WORDS = BertConfig(**SIZES, vocab_size=40, max_position_embeddings=32)


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    sizes = {"depths": [1], "sr_ratios": [2], "hidden_sizes": [16], "patch_sizes": [3], "strides": [4]}
    more = {"num_encoder_blocks": 1, "num_attention_heads": [1], "mlp_ratios": [2], "decoder_hidden_size": 16}
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, **more, num_labels=5)).eval()


def test_pixels_are_scored_by_a_head_with_a_batch_norm(segmenter):
    """Whose buffers are put back, too."""
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    brought = {name: value.clone() for name, value in before.items() if name.startswith("decode_head.")}
    brought["decode_head.batch_norm.running_mean"] += 3
    brought["decode_head.batch_norm.num_batches_tracked"] += 7
    brought["decode_head.classifier.weight"] = torch.randn(7, 16, 1, 1)
    brought["decode_head.classifier.bias"] = torch.randn(7)
    photos = {"pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        found = head_of(brought, segmenter, None, "head")(segmenter, photos)
    assert all(torch.equal(value, before[name]) for name, value in segmenter.state_dict().items())
    other = SegformerForSemanticSegmentation(type(segmenter.config)(**{**segmenter.config.to_dict(), "num_labels": 7}))
    other.load_state_dict({**before, **brought})
    with torch.no_grad():
        logits = other.eval()(**photos).logits
    torch.testing.assert_close(found, logits.movedim(1, -1))
    assert METRICS["accuracy"].measure(found, logits.argmax(1)) == 1.0
    assert METRICS["miou"].measure(found, logits.argmax(1)) == 1.0


def test_a_forecast_is_scored_as_it_is():
    config = PatchTSTConfig(context_length=16, patch_length=4, patch_stride=4, d_model=16, num_attention_heads=2,
                            ffn_dim=24, num_hidden_layers=1, num_input_channels=3, prediction_length=4)  # fmt: skip
    model = PatchTSTForPrediction(config).eval()
    series = {"past_values": torch.randn(2, 16, 3)}
    with torch.no_grad():
        wanted = model(**series).prediction_outputs
        assert METRICS["rmse"].measure(ModelHead()(model, series), wanted + 2.0) == pytest.approx(2.0, rel=1e-5)


def test_an_answer_is_scored_by_its_start_and_end_and_none_is_at_padding():
    model = BertForQuestionAnswering(WORDS).eval()
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 3:] = 0
    texts = {"input_ids": torch.randint(4, 40, (2, 6)), "attention_mask": mask}
    with torch.no_grad():
        found, own = ModelHead()(model, texts), model(**texts)
    torch.testing.assert_close(found[0], torch.stack([own.start_logits[0], own.end_logits[0]]))
    assert int(found[1].argmax(-1).max()) < 3
    places = found.argmax(-1)
    assert METRICS["accuracy"].measure(found, places) == 1.0


def test_a_model_that_says_nothing_is_refused():
    with pytest.raises(ValueError, match="head: BertModel gives no logits; expected a head beside the model"):
        ModelHead()(BertModel(WORDS), {"input_ids": torch.tensor([[5, 6]])})


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_head_on_a_decoder_that_reads_the_text_again_leaves_its_padding_out(pool):
    torch.manual_seed(0)
    sides = {f"{side}_{what}": size for side in ("encoder", "decoder")
             for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}
    model = BartModel(BartConfig(vocab_size=40, d_model=16, max_position_embeddings=16, **sides)).eval()
    ids = torch.randint(4, 40, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        features = model(input_ids=ids, attention_mask=mask).last_hidden_state
        found = LinearHead(torch.eye(16), None, pool)(model, {"input_ids": ids, "attention_mask": mask})
    wanted = features[1, 3] if pool == "last" else features[1, :4].mean(0)
    torch.testing.assert_close(found[1], wanted)
