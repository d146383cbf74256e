"""Models of transformers that call, tie or surround their parts otherwise than the rest of them do."""

from __future__ import annotations

import copy

import torch
import transformers as tf
from architectures import write_adapter
from torch import nn
from transformers.modeling_outputs import CausalLMOutput, ImageClassifierOutput
from zoo import DECODER

import nsc_merge
from nsc_merge.models.block_finding import trunk_of
from nsc_merge.models.families import find_family

NARROW = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.tensor([[3, 5, 7, 9, 11, 4, 2], [6, 8, 3, 2, 1, 1, 1]])
TEXT = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
PICTURES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def adapted(model, folder, **config):
    """Two adapters, each in a folder of its own."""
    return {
        task: write_adapter(model, folder / task, seed, r=2, **{"target_modules": ["q_proj", "v_proj"], **config})
        for seed, task in enumerate("ab")
    }


def descends(model, folders, batch, method, **options):
    """What two steps of a method give, every task with the same batch."""
    chosen = {"nsc": {"compile": False}, "match": {"warm_up": 0}}[method]
    return nsc_merge.merge(
        model, folders, {task: [batch] for task in folders}, method, steps=2, progress=False, **chosen, **options
    )


def gemma4(**config):
    """Every second layer attends to all tokens, and takes its keys for values."""
    torch.manual_seed(0)
    own = {"vocab_size": 64, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16, "num_kv_shared_layers": 0}
    own |= {"num_global_key_value_heads": 1, "attention_k_eq_v": True, "hidden_size_per_layer_input": 16}
    kinds = ["sliding_attention", "full_attention"] * 4
    own |= {**NARROW, "num_hidden_layers": 8, "vocab_size_per_layer_input": 64, "layer_types": kinds, "pad_token_id": 0}
    return tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(**{**own, **config})).eval()


def test_keys_that_are_values_are_measured_as_values(tmp_path):
    folders = adapted(gemma4(), tmp_path, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    found = descends(gemma4(), folders, TEXT, "nsc")
    wanted = ["model.layers.6.self_attn.v_proj", "model.layers.7.self_attn.k_proj"]
    assert sorted(found.options["scored"]) == wanted
    # What is named takes them, too; the keys of layers with values of their own are none.
    assert sorted(descends(gemma4(), folders, TEXT, "nsc", score_modules=["v_proj"]).options["scored"]) == wanted
    apart = gemma4(attention_k_eq_v=False)
    values = descends(apart, adapted(apart, tmp_path / "2"), TEXT, "nsc")
    assert sorted(values.options["scored"]) == [f"model.layers.{layer}.self_attn.v_proj" for layer in (6, 7)]


def test_blocks_that_read_images_alone_are_not_the_language_model_s(tmp_path):
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "embed_dim": 64, **NARROW}
    text = {"vocab_size": 64, "additional_vocab_size": 0, "cross_layer_interval": 1, "use_resampler": False, **NARROW}
    model = tf.IdeficsForVisionText2Text(tf.IdeficsConfig(vision_config=vision, **text)).eval()
    batch = {**TEXT, "pixel_values": PICTURES["pixel_values"][:, None], "image_attention_mask": torch.ones(2, 7, 1)}
    found = descends(model, adapted(model, tmp_path), batch, "nsc")
    assert found.options["scored"] == ["model.layers.1.self_attn.v_proj"]


def diffusion_gemma():
    torch.manual_seed(0)
    own = {"vocab_size": 64, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16, "pad_token_id": 0}
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32, "num_global_key_value_heads": 1}
    vision = {"head_dim": 16, "patch_size": 4, **NARROW}
    config = tf.DiffusionGemmaConfig(text_config={**own, **experts, **NARROW}, vision_config=vision)
    return tf.DiffusionGemmaForBlockDiffusion(config).eval()


def test_a_canvas_beside_a_text_is_masked_by_its_own_mask(tmp_path):
    model = diffusion_gemma()
    family = find_family(model)
    assert (family.tokens, family.mask, family.causal) == ("decoder_input_ids", "decoder_attention_mask", False)
    folders = adapted(model, tmp_path, target_modules=r".*decoder\.layers.*(self_attn\.[qkvo]_proj|router\.proj)")
    found = descends(model, folders, {**TEXT, "decoder_input_ids": IDS[:, :4]}, "nsc")
    # Not what chooses experts.
    assert found.options["scored"] == ["model.decoder.layers.1.self_attn.k_proj"]


def test_text_and_sound_side_by_side_are_both_measured(tmp_path):
    torch.manual_seed(0)
    sound = {"patch_embeds_hidden_size": 8, "hidden_size": 64, "depths": [1, 1, 1, 2]}
    sound["num_attention_heads"] = [1, 2, 2, 4]
    text = {"vocab_size": 64, "max_position_embeddings": 16, **NARROW}
    config = tf.ClapConfig(audio_config=sound, text_config=text, projection_dim=8)
    model = tf.ClapModel(config).eval()
    folders = adapted(model, tmp_path, target_modules=["query", "value"])
    batch = {**TEXT, "input_features": torch.randn(2, 1, 64, 64), "is_longer": torch.zeros(2, 1).bool()}
    found = descends(model, folders, batch, "nsc")
    sounds = "audio_model.audio_encoder.layers.3.blocks.1.attention.self.value"
    assert found.options["scored"] == ["text_model.encoder.layer.1.attention.self.value", sounds]
    # What is padding in the texts says nothing of the sound.
    assert find_family(model).unmasked == "audio_model"


def test_messages_between_frames_are_not_what_is_seen(tmp_path):
    vision = {"image_size": 16, "patch_size": 8, "num_frames": 2, "mit_hidden_size": 64, **NARROW}
    text = {"vocab_size": 64, **NARROW}
    model = tf.XCLIPModel(tf.XCLIPConfig(vision_config=vision, text_config=text, projection_dim=64)).eval()
    assert find_family(model).score_modules[0] == "self_attn.v_proj"
    # Frames are rows there, which tell no task from another, and those of texts are: tasks run one by one.
    videos = torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    folders = adapted(model, tmp_path)
    batches = {task: [{**TEXT, "pixel_values": videos + number}] for number, task in enumerate(folders)}
    options = {"steps": 1, "compile": False, "progress": False}
    found = nsc_merge.merge(model, folders, batches, "nsc", **options)
    apart = nsc_merge.merge(model, folders, batches, "nsc", batch_tasks=False, **options)
    assert found.history[0]["omega"] == apart.history[0]["omega"]
    assert len(found.options["scored"]) == 2


def test_the_text_in_front_of_a_canvas_has_its_own_mask(tmp_path):
    model = diffusion_gemma()
    folders = adapted(model, tmp_path, target_modules=r".*encoder\.language_model.*(q_proj|mlp\.up_proj)")
    found = []
    for filler in (1, 9):
        ids = IDS.where(TEXT["attention_mask"].bool(), filler)
        data = {task: [{**TEXT, "input_ids": ids, "decoder_input_ids": IDS[:, :4]}] for task in folders}
        merged = nsc_merge.merge(model, folders, data, "regmean", batches=1)
        found.append(merged.delta("model.encoder.language_model.layers.1.mlp.up_proj"))
    torch.testing.assert_close(*found)


class Detector(tf.PreTrainedModel):
    """Two heads with one weight, as those of detectors that refine boxes; no tokens."""

    config_class = tf.ViTConfig
    main_input_name = "pixel_values"
    _tied_weights_keys = {"second.weight": "first.weight"}  # noqa: RUF012 -- as transformers has it

    def __init__(self, config):
        super().__init__(config)
        self.encoder = tf.ViTModel(config, add_pooling_layer=False)
        self.first, self.second = nn.Linear(64, 3, bias=False), nn.Linear(64, 3, bias=False)
        self.post_init()

    def forward(self, pixel_values):
        states = self.encoder(pixel_values).last_hidden_state
        return ImageClassifierOutput(logits=self.first(states) + self.second(states.relu()))

    def get_input_embeddings(self):
        raise NotImplementedError


def vit(**config):
    return tf.ViTConfig(image_size=16, patch_size=8, **NARROW, **config)


def test_tied_heads_are_merged_apart_where_there_are_no_embeddings(tmp_path):
    torch.manual_seed(0)
    model = Detector(vit(tie_word_embeddings=True)).eval()
    assert model.first.weight is model.second.weight
    plain = copy.deepcopy(model)
    plain.get_input_embeddings = nn.Identity  # PEFT asks for them
    folders = adapted(plain, tmp_path, target_modules=["first"])
    merged = nsc_merge.merge(model, folders, method="task_arithmetic", scale=1.0)
    wanted = model.first.weight + sum(adapter.factors["first"].delta() for adapter in merged.adapters.values())
    applied = merged.apply(copy.deepcopy(merged.model))
    torch.testing.assert_close(applied.first.weight, wanted.float())
    assert torch.equal(applied.second.weight, model.second.weight)


def test_a_model_may_be_about_several_inputs(monkeypatch, tmp_path):
    monkeypatch.setattr(tf.BeitForImageClassification, "main_input_name", ["pixel_values", "task_inputs"])
    torch.manual_seed(0)
    model = tf.BeitForImageClassification(tf.BeitConfig(image_size=16, patch_size=8, **NARROW)).eval()
    found = descends(model, adapted(model, tmp_path), PICTURES, "nsc")
    assert found.options["scored"] == ["beit.layers.1.attention.v_proj"]


class PairForKeypointMatching(tf.PreTrainedModel):
    """A detector of its own in front of what is adapted, as LightGlue has."""

    config_class = tf.ViTConfig
    main_input_name = "pixel_values"

    def __init__(self, config, layers):
        super().__init__(config)
        self.detector = tf.ViTModel(config, add_pooling_layer=False)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(layers))
        self.post_init()


def test_a_detector_in_front_is_not_the_trunk():
    most, least = PairForKeypointMatching(vit(), 1), PairForKeypointMatching(vit(), 40)
    assert trunk_of(most) is most.detector
    assert trunk_of(least) is least


def test_what_retrieves_is_matched_by_its_embeddings(tmp_path):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {"vocab_size": 64, "num_key_value_heads": 2, "rope_parameters": rope, **NARROW}
    vision = {"embed_dim": 32, "depth": 1, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2}
    vlm = {"model_type": "qwen2_vl", "text_config": text, "vision_config": vision, "image_token_id": 60}
    model = tf.ColQwen2ForRetrieval(tf.ColQwen2Config(vlm_config=vlm, embedding_dim=8)).eval()
    # Two pictures of as many patches as the larger has, which its trunk does not take.
    pictures = {"pixel_values": torch.randn(2, 16, 1176), "image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]])}
    ids = torch.tensor([[3, 60, 60, 60, 60, 4], [5, 60, 60, 7, 1, 1]])
    batch = {**pictures, "input_ids": ids, "attention_mask": (ids > 1).long()}
    found = descends(model, adapted(model, tmp_path, target_modules=r".*language_model.*[qv]_proj"), batch, "match")
    assert found.history[1]["loss"] != found.history[0]["loss"]
    nsc = descends(model, adapted(model, tmp_path / "2", target_modules=r".*language_model.*[qv]_proj"), batch, "nsc")
    assert nsc.options["scored"] == ["vlm.language_model.layers.1.self_attn.v_proj"]


class Omni(tf.PreTrainedModel):
    """Around a language model, whose head it does not say."""

    config_class = tf.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.language_model = tf.LlamaForCausalLM(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return CausalLMOutput(logits=self.language_model(input_ids, attention_mask).logits)


class Tower(nn.Module):
    """Of timm, which says what its classifier is."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 5)

    def forward(self, pixel_values):
        return self.head(pixel_values.flatten(1)[:, :64])

    def get_classifier(self):
        return self.head


class SeeingModel(tf.PreTrainedModel):
    """A language model behind a tower whose classifier runs."""

    config_class = tf.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.tower = Tower()
        self.language_model = tf.LlamaModel(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, pixel_values=None):
        seen = self.tower(pixel_values).mean()
        return self.language_model(
            inputs_embeds=self.language_model.embed_tokens(input_ids) + seen, attention_mask=attention_mask
        )


class Seeing(tf.PreTrainedModel):
    config_class = tf.LlamaConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = SeeingModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, pixel_values=None):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids, attention_mask, pixel_values)[0]))


def test_the_classifier_of_a_tower_is_not_the_model_s(tmp_path):
    torch.manual_seed(0)
    model = Seeing(tf.LlamaConfig(**DECODER)).eval()
    found = descends(model, adapted(model, tmp_path), {**TEXT, **PICTURES}, "match")
    assert found.history[1]["loss"] != found.history[0]["loss"]


def test_what_is_matched_ends_before_the_head_of_the_language_model_within(tmp_path):
    torch.manual_seed(0)
    model = Omni(tf.LlamaConfig(**DECODER)).eval()
    folders = adapted(model, tmp_path)
    final = descends(model, folders, TEXT, "match", positions="all")
    named = descends(model, folders, TEXT, "match", positions="all", features=["language_model.model.norm"])
    assert [row["loss"] for row in final.history] == [row["loss"] for row in named.history]
