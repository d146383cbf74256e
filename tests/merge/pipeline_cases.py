"""Small pipelines of diffusers, with random adapters ``ink`` and ``toy`` in their models."""

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

diffusers = pytest.importorskip("diffusers")

PROMPTS = {"ink": ["ink tower", "ink boat"], "toy": ["toy tower", "toy boat"]}
FEW = {"height": 16, "width": 16, "num_inference_steps": 4}
WORDS = ["<s>", "</s>", "ink", "toy", "tower", "boat"]
CROSS = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
BLOCKS = {"layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}
TEXT = {"vocab_size": 6, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def add(model, targets, names=("ink", "toy"), std=0.3):
    for seed, name in enumerate(names):
        config = LoraConfig(r=2 + seed, lora_alpha=4, target_modules=targets, init_lora_weights=False)
        model.add_adapter(config, adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                nn.init.normal_(parameter, std=std, generator=generator)


def tokenizer():
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="</s>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=6
    )


def text_encoder(kind):
    config = CLIPTextConfig(
        **TEXT, max_position_embeddings=6, bos_token_id=0, eos_token_id=1, projection_dim=8, hidden_act="gelu"
    )
    model = kind(config).eval()
    add(model, ["q_proj", "v_proj"])
    return model


def unet(**settings):
    down, up = CROSS
    return diffusers.UNet2DConditionModel(
        sample_size=8, **BLOCKS, down_block_types=down, up_block_types=up, **settings
    )


def decoder():
    return diffusers.AutoencoderKL(
        block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, shift_factor=0.0,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )


def stable_diffusion():
    torch.manual_seed(0)
    model = unet(cross_attention_dim=8)
    add(model, ["to_q", "to_v", "ff.net.2"])
    pipe = diffusers.StableDiffusionPipeline(
        vae=decoder(), text_encoder=text_encoder(CLIPTextModel), tokenizer=tokenizer(), unet=model,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_xl():
    """Whose UNet is given a dictionary of tensors beside the others, and whose second text encoder projects."""
    torch.manual_seed(0)
    model = unet(
        cross_attention_dim=16, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4, transformer_layers_per_block=2,
    )
    add(model, ["to_q", "to_v"])
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=decoder(), unet=model, tokenizer=tokenizer(), tokenizer_2=tokenizer(),
        text_encoder=text_encoder(CLIPTextModel), text_encoder_2=text_encoder(CLIPTextModelWithProjection),
        scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1), add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan():
    """Two transformers, one for the first steps and one for the last."""
    torch.manual_seed(0)
    first, second = (
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=8, freq_dim=8, ffn_dim=16, num_layers=2, rope_max_seq_len=32,
        )
        for _ in range(2)
    )
    for model in (first, second):
        add(model, ["to_q", "to_v", "ffn.net.2"])
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                     temperal_downsample=[False, True, True],
                                     latents_mean=[0.0] * 4, latents_std=[1.0] * 4)  # fmt: skip
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=first, transformer_2=second, boundary_ratio=0.5,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def z_image():
    """Which takes and gives lists with a tensor for each image."""
    torch.manual_seed(0)
    model = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=8, axes_dims=[4, 2, 2], axes_lens=[64, 8, 8],
    )
    for token in (model.x_pad_token, model.cap_pad_token):
        nn.init.ones_(token)
    add(model, ["to_q", "to_v"])
    pipe = diffusers.ZImagePipeline(
        vae=decoder(), text_encoder=None, tokenizer=None, transformer=model,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_prompts():
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name in PROMPTS:
        embeds = torch.randn(1, 5, 8, generator=generator)
        made[name] = [{"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds), "num_frames": 1}]
    return made


def write_adapters(pipe, root, *names):
    """Save some of a pipeline's adapters, each in a folder of its own; the pipeline holds none any more."""
    from nsc_merge.integrations.diffusers import save

    for name in names:
        save(pipe, name, root / name)
    pipe.unload_lora_weights()
