"""Padding counts nowhere, whichever mask speaks of it and however a linear sees the rows of a batch."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import Tensor
from zoo import write_adapter

import nsc_merge
from nsc_merge.analysis.adapter_overlap import null_space_ratios
from nsc_merge.analysis.bound import check_bound
from nsc_merge.models.fitting import fit
from nsc_merge.models.real_tokens import RealTokens

SIDES = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
WIDTHS = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 16}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
PARTS = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_key_value_heads": 2}


def t5():
    config = tf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, **TOKENS)
    return tf.T5ForConditionalGeneration(config)


def bart():
    config = tf.BartConfig(vocab_size=64, d_model=16, **SIDES, **WIDTHS, **TOKENS, forced_eos_token_id=None)
    return tf.BartForConditionalGeneration(config)


def seamless():
    """Whose sides are ``text_encoder`` and ``text_decoder``."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = tf.SeamlessM4TConfig(vocab_size=64, **sizes, **{**SIDES, "decoder_layers": 2}, **WIDTHS, **TOKENS)
    return tf.SeamlessM4TForTextToText(config)


def two_berts():
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(tf.BertConfig(**PARTS), tf.BertConfig(**PARTS))
    return tf.EncoderDecoderModel(config=config)


def experts():
    return tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**PARTS, **TOKENS, **EXPERTS, shared_expert_intermediate_size=24))


def latents():
    """Keys and values are made of latents ``[rows, 1, positions, d]``."""
    ranks = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    heads = {"head_dim": 4, "num_key_value_heads": 2, "first_k_dense_replace": 2}
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**PARTS, **ranks, **heads))


def positions_first():
    config = tf.XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=24, pad_token_id=0)
    return tf.XLNetForSequenceClassification(config)


def filled_up():
    config = tf.LongformerConfig(**PARTS, attention_window=4, max_position_embeddings=32, pad_token_id=1)
    return tf.LongformerForSequenceClassification(config)


TARGETS = {
    t5: ["q", "k", "v", "o", "wi", "wo"],
    bart: ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    seamless: ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    two_berts: ["query", "key", "value", "attention.output.dense"],
    experts: ["q_proj", "shared_expert_gate"],
    latents: ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    positions_first: ["layer_1", "layer_2"],
}


def batch(filler: int, *, length: int, two_sided: bool) -> dict[str, Tensor]:
    """Rows with ``filler`` as padding at different places of both sides."""
    generator = torch.Generator().manual_seed(4)
    found = {}
    for side, many, ends in (("", 8, (5, 8, 3, 8)), ("decoder_", length, (8, 6, 8, 8)))[: 1 + two_sided]:
        ids = torch.randint(3, 60, (4, many), generator=generator)
        mask = (torch.arange(many) < torch.tensor(ends)[:, None]).long()
        found |= {f"{side}input_ids": torch.where(mask > 0, ids, filler), f"{side}attention_mask": mask}
    return found


@pytest.mark.parametrize("length", [8, 7])
@pytest.mark.parametrize("build", TARGETS)
def test_regmean_does_not_see_what_padding_holds(build, length, tmp_path):
    torch.manual_seed(0)
    model = build().eval()
    folders = {task: write_adapter(model, tmp_path / task, n, r=2, target_modules=TARGETS[build])
               for n, task in enumerate("ab")}
    two_sided = bool(getattr(model.config, "is_encoder_decoder", False))
    merged = []
    for filler in (7, 50):
        data = {task: [batch(filler, length=length, two_sided=two_sided)] for task in folders}
        merged.append(nsc_merge.merge(model, folders, data, "regmean", batches=1, ridge=1e-2))
    for path in merged[0].paths:
        torch.testing.assert_close(merged[0].delta(path), merged[1].delta(path), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("method", "options"), [("distill", {}), ("match", {"warm_up": 0, "ratio_weight": 1.0})])
def test_a_decoder_after_adapted_encoders_is_compared_at_its_own_tokens(method, options, tmp_path):
    torch.manual_seed(0)
    model = t5().eval()
    in_encoder = {"r": 2, "target_modules": r"encoder.*\.(q|v)"}
    folders = {task: write_adapter(model, tmp_path / task, n, **in_encoder) for n, task in enumerate("ab")}
    options = {**options, "steps": 2, "positions": "all", "progress": False}
    found = []
    for filler in (7, 50):
        data = {task: [batch(filler, length=8, two_sided=True)] for task in folders}
        found.append(nsc_merge.merge(model, folders, data, method, **options).coefficients)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("build", "measured"),
    [(seamless, "text_decoder.layers.1.self_attn.v_proj"), (latents, "model.layers.1.self_attn.kv_b_proj")],
)
def test_padding_is_not_measured(build, measured, tmp_path):
    torch.manual_seed(0)
    model = build().eval()
    folders = {
        task: write_adapter(model, tmp_path / task, n, r=2, target_modules=TARGETS[build])
        for n, task in enumerate("ab")
    }
    found = []
    for filler in (7, 50):
        data = {task: [batch(filler, length=7, two_sided=build is seamless)] for task in folders}
        found.append(nsc_merge.merge(model, folders, data, "nsc", steps=1, compile=False, progress=False))
    assert found[0].options["scored"] == [measured]
    assert found[0].history[0]["omega"] == found[1].history[0]["omega"]
    # So is what match weighs beside its features.
    options = {"steps": 1, "warm_up": 0, "ratio_weight": 1.0, "progress": False}
    losses = []
    for filler in (7, 50):
        data = {task: [batch(filler, length=7, two_sided=build is seamless)] for task in folders}
        losses.append(nsc_merge.merge(model, folders, data, "match", **options).history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("kind", ["T5", "Bart"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("nsc", {"steps": 2, "compile": False}), ("match", {"steps": 2, "warm_up": 0}), ("regmean", {"batches": 1})],
)
def test_a_classifier_s_decoder_reads_the_encoder_s_text_and_its_padding(kind, method, options, tmp_path):
    """Whose batches have no tokens for it: it makes them itself."""
    torch.manual_seed(0)
    config = (t5 if kind == "T5" else bart)().config
    config.num_labels, config.decoder_layers = 3, 2
    model = getattr(tf, f"{kind}ForSequenceClassification")(config).eval()
    targets = {"r": 2, "target_modules": TARGETS[t5 if kind == "T5" else bart]}
    folders = {task: write_adapter(model, tmp_path / task, n, **targets) for n, task in enumerate("ab")}
    options = options if method == "regmean" else {**options, "progress": False}

    def merged(filler):
        texts = batch(filler, length=8, two_sided=False)
        # Answered where the text ends.
        texts["input_ids"][torch.arange(4), texts["attention_mask"].sum(1) - 1] = config.eos_token_id
        result = nsc_merge.merge(model, folders, {task: [texts] for task in folders}, method, **options)
        return torch.cat([result.delta(path).flatten() for path in result.paths])

    torch.testing.assert_close(merged(7), merged(50), rtol=1e-4, atol=1e-6)


def test_a_text_model_of_which_no_blocks_are_known_is_matched_at_its_tokens(tmp_path):
    """SqueezeBERT's are convolutions, and its embeddings are adapted."""
    torch.manual_seed(0)
    groups = {f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate", "output")}
    model = tf.SqueezeBertForSequenceClassification(tf.SqueezeBertConfig(**PARTS, **groups, embedding_size=16)).eval()
    targets = {"r": 2, "target_modules": ["word_embeddings"]}
    folders = {task: write_adapter(model, tmp_path / task, n, **targets) for n, task in enumerate("ab")}

    def losses(filler):
        data = {task: [batch(filler, length=8, two_sided=False)] for task in folders}
        options = {"steps": 2, "warm_up": 0, "positions": "all", "progress": False}
        return [one["loss"] for one in nsc_merge.merge(model, folders, data, "match", **options).history]

    assert losses(7) == losses(50)


def test_analyses_do_not_see_what_padding_holds(tmp_path):
    torch.manual_seed(0)
    model = t5().eval()
    folders = {task: write_adapter(model, tmp_path / task, n, r=2, target_modules=["v"]) for n, task in enumerate("ab")}
    adapters = fit({task: nsc_merge.load_adapter(folder, task) for task, folder in folders.items()}, model)
    data = [[batch(filler, length=8, two_sided=True)] for filler in (7, 50)]
    ratios, inputs = ([call(model, adapters, one) for one in data] for call in (null_space_ratios, check_bound))
    assert ratios[0] == ratios[1]
    assert inputs[0] == inputs[1]
    found = {check["path"]: check["inputs"] for check in inputs[0]}
    assert found["encoder.block.0.layer.0.SelfAttention.v"] == int(data[0][0]["attention_mask"].sum())


def pages():
    sizes = {"coordinate_size": 3, "shape_size": 2, "input_size": 16, "patch_size": 8, "max_position_embeddings": 32}
    return tf.LayoutLMv3ForTokenClassification(tf.LayoutLMv3Config(**PARTS, **sizes, pad_token_id=1)).eval()


def questions():
    sizes = {"image_size": 16, "patch_size": 8, "max_position_embeddings": 32, "num_labels": 3}
    return tf.ViltForQuestionAnswering(tf.ViltConfig(**PARTS, **sizes)).eval()


@pytest.mark.parametrize("build", [pages, questions])
@pytest.mark.parametrize(("method", "options"), [("nsc", {"steps": 2, "progress": False}), ("regmean", {"batches": 1})])
def test_patches_behind_the_tokens_count_and_padding_does_not(build, method, options, tmp_path):
    torch.manual_seed(0)
    model = build()
    targets = {"r": 2, "target_modules": ["query", "value"]}
    folders = {task: write_adapter(model, tmp_path / task, n, **targets) for n, task in enumerate("ab")}

    def merged(filler, image):
        texts = batch(filler, length=8, two_sided=False)
        seen = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(image))
        boxes = {"bbox": torch.zeros(4, 8, 4, dtype=torch.long)} if build is pages else {}
        data = {task: [{**texts, **boxes, "pixel_values": seen}] for task in folders}
        result = nsc_merge.merge(model, folders, data, method, **options)
        return torch.cat([result.delta(path).flatten() for path in result.paths])

    torch.testing.assert_close(merged(7, 1), merged(50, 1), rtol=1e-4, atol=1e-6)
    assert (merged(7, 1) - merged(7, 2)).abs().max() > 1e-5


def test_no_mask_speaks_of_images_beside_texts():
    towers = {"text_config": {**PARTS, "max_position_embeddings": 8}, "vision_config": {**PARTS, "image_size": 8}}
    towers["vision_config"] |= {"patch_size": 4}
    model = tf.CLIPModel(tf.CLIPConfig(**towers))
    tokens, mask = RealTokens(model), torch.tensor([[1, 1, 1, 0, 0]])
    of = {tower: tokens.of(f"{tower}_model.encoder.layers.0.mlp.fc1", torch.zeros(1, 5), {"attention_mask": mask})
          for tower in ("text", "vision")}
    assert of["vision"] is None
    assert torch.equal(of["text"], mask.bool())


@pytest.mark.parametrize(
    ("method", "options"), [("nsc", {}), ("nsc", {"batch_tasks": True}), ("match", {}), ("regmean", {})]
)
@pytest.mark.parametrize(
    ("build", "targets"), [(positions_first, ["layer_1", "layer_2"]), (filled_up, ["query", "value"])]
)
@pytest.mark.parametrize("rows", [4, 9])
def test_padding_counts_nowhere_where_positions_come_before_rows(build, targets, rows, method, options, tmp_path):
    """Also of as many rows as positions, and where the model fills up a window of attention by itself."""
    torch.manual_seed(0)
    model = build().eval()
    folders = {task: write_adapter(model, tmp_path / task, n, r=2, target_modules=targets)
               for n, task in enumerate("ab")}
    ratios = {"match": {"ratio_weight": 1.0}, "regmean": {"ridge": 1e-2}}.get(method, {})
    steps = {} if method == "regmean" else {"steps": 1, "progress": False}
    found = []
    for added in (0, 3):
        data = {}
        for n, task in enumerate(folders):
            ids = torch.randint(3, 60, (rows, 6), generator=torch.Generator().manual_seed(n))
            padded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            data[task] = [{name: torch.nn.functional.pad(one, (0, added)) for name, one in padded.items()}]
        found.append(nsc_merge.merge(model, folders, data, method, **options, **ratios, **steps))
    for path in found[0].paths:
        torch.testing.assert_close(found[1].delta(path), found[0].delta(path), rtol=1e-3, atol=1e-5)
    if steps:
        assert found[1].objective["before"] == pytest.approx(found[0].objective["before"], rel=1e-5)


SOUND = {**PARTS, "vocab_size": 8, "num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 4}
SOUND |= {"num_feat_extract_layers": 2, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
SOUND |= {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "initializer_range": 0.2}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("nsc", {"steps": 2}),
        ("match", {"steps": 2, "ratio_weight": 1.0}),
        ("distill", {"steps": 2}),
        ("adamerging", {"steps": 2}),
        ("regmean", {"ridge": 1e-2}),
    ],
)
@pytest.mark.parametrize("kind", [tf.Wav2Vec2ForCTC, tf.HubertForCTC])
def test_sound_that_is_padded_counts_as_long_as_it_is(kind, method, options, tmp_path):
    """The mask is of samples, some of which make a position that is measured and matched."""
    torch.manual_seed(0)
    model = kind(kind.config_class(**SOUND)).eval()
    folders = {task: write_adapter(model, tmp_path / task, n, r=2, target_modules=["q_proj", "v_proj"])
               for n, task in enumerate("ab")}
    sounds = {task: torch.randn(2, 200, generator=torch.Generator().manual_seed(n)) for n, task in enumerate("ab")}
    found = []
    for added in (0, 130):
        data = {
            task: [
                {
                    "input_values": torch.nn.functional.pad(sound, (0, added)),
                    "attention_mask": torch.nn.functional.pad(torch.ones_like(sound).long(), (0, added)),
                }
            ]
            for task, sound in sounds.items()
        }
        quiet = {"progress": False} if "steps" in options else {}
        found.append(nsc_merge.merge(model, folders, data, method, **options, **quiet))
    if "steps" in options:
        quantity = "omega" if method == "nsc" else "loss"
        first, padded = (one.history[0][quantity] for one in found)
        assert padded == pytest.approx(first, rel=1e-5)
    for path in found[0].paths:
        torch.testing.assert_close(found[1].delta(path), found[0].delta(path), rtol=1e-3, atol=1e-5)
