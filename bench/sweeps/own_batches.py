"""What a batch of a model type has beside, or shaped otherwise than, what the names of its arguments say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def _tiles(count: int, *beside: str) -> Callable[[Batch, Any], Batch]:
    """So many pictures a row, of which these masks say that every one is real."""

    def change(batch: Batch, _: Any) -> Batch:
        pictures = batch["pixel_values"][:, None].repeat(1, count, 1, 1, 1)
        masks = {name: torch.ones(len(pictures), count).bool() for name in beside}
        return {**batch, "pixel_values": pictures, **masks}

    return change


def _squares(size: int) -> Callable[[Batch, Any], Batch]:
    """Patches that are not flat."""

    def change(batch: Batch, _: Any) -> Batch:
        patches = batch["pixel_values"].reshape(16, -1, size, size)
        return {**batch, "pixel_values": patches}

    return change


def _all_seen(batch: Batch, config: Any) -> Batch:
    """One picture, which every token reads."""
    return {**_tiles(1)(batch, config), "image_attention_mask": torch.ones(*batch["input_ids"].shape, 1).long()}


def _high_resolution(batch: Batch, config: Any) -> Batch:
    size = config.high_res_vision_config.image_size
    return {**batch, "high_res_pixel_values": torch.randn(1, 3, size, size)}


def _robot(batch: Batch, config: Any) -> Batch:
    state = torch.randn(1, config.max_state_dim)
    noise, time = torch.randn(1, config.chunk_size, config.max_action_dim), torch.tensor([0.5])
    return {**_tiles(1, "pixel_attention_mask")(batch, config), "state": state, "noise": noise, "timestep": time}


def _tokens(batch: Batch, _: Any) -> Batch:
    """Pictures as squares of two by two patches, each a token of the text."""
    return {**batch, "pixel_values": torch.randn(4, 40, 40, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])}


def _pooled(batch: Batch, _: Any) -> Batch:
    """Four patches of a crop in a token of the text."""
    places = {"image_token_pooling": torch.arange(16).reshape(4, 4), "image_grids": torch.tensor([[2, 2, 0, 0]])}
    return {**batch, "pixel_values": torch.randn(1, 16, 588), **places}


def _grid(batch: Batch, config: Any) -> Batch:
    patches = torch.randn(16, 3 * config.vision_config.patch_size**2)
    return {**batch, "pixel_values": patches, "image_grid_hw": torch.tensor([[4, 4]])}


def _with(*without: str, **made: Callable[[Any], Tensor]) -> Callable[[Batch, Any], Batch]:
    """Some tensors by the configuration, in place of those of the same names, and without some."""

    def change(batch: Batch, config: Any) -> Batch:
        kept = {name: value for name, value in batch.items() if name not in without}
        return {**kept, **{name: make(config) for name, make in made.items()}}

    return change


def _few(batch: Batch, _: Any) -> Batch:
    """Of a vocabulary of letters."""
    return {**batch, "input_ids": batch["input_ids"] % 30 + 3}


def _asked(batch: Batch, config: Any) -> Batch:
    ids = batch["input_ids"].clone()
    ids[:, 3] = config.question_token_id
    return {**batch, "input_ids": ids}


def _pictures(*shape: int) -> Callable[[Batch, Any], Batch]:
    return _with(pixel_values=lambda _: torch.randn(shape))


BATCHES: dict[str, Callable[[Batch, Any], Batch]] = {
    "blip_2_qformer": _with(
        query_embeds=lambda config: torch.randn(2, 8, config.hidden_size),
        encoder_hidden_states=lambda config: torch.randn(2, 9, config.encoder_hidden_size),
    ),
    "clap": _with(input_features=lambda _: torch.randn(1, 1, 1001, 64)),
    "colqwen2": _with(pixel_values=lambda _: torch.randn(1, 16, 1176)),
    "decision_transformer": _with(
        states=lambda config: torch.randn(2, 5, config.state_dim),
        actions=lambda config: torch.randn(2, 5, config.act_dim),
        rewards=lambda _: torch.randn(2, 5, 1),
        returns_to_go=lambda _: torch.randn(2, 5, 1),
        timesteps=lambda _: torch.arange(5).repeat(2, 1),
    ),
    "deepseek_vl_hybrid": _high_resolution,
    "detr": _pictures(2, 3, 128, 128),
    "dia": _with(decoder_input_ids=lambda config: torch.randint(3, 80, (2, 5, config.decoder_config.num_channels))),
    "fastspeech2_conformer": _few,
    "fastspeech2_conformer_with_hifigan": _few,
    "fun_asr_nano": _with(input_features=lambda _: torch.randn(1, 64, 560)),
    "granite4_vision": _tiles(3),
    "granite_docling": _tiles(1, "pixel_attention_mask"),
    "idefics": _all_seen,
    "imagegpt": _with("pixel_values", input_ids=lambda _: torch.randint(3, 80, (2, 20))),
    "inkling2": _tokens,
    "inkling2_vision": _tokens,
    "kimi_k25": _squares(14),
    "kimi_k25_vision": _squares(14),
    "layoutlmv3": _pictures(1, 3, 224, 224),
    "lightglue": _pictures(2, 2, 1, 64, 64),
    "llava_next": _tiles(3),
    "llava_next_video": _tiles(3),
    "llava_onevision": _tiles(3),
    "lxmert": _with(
        visual_feats=lambda config: torch.randn(2, 6, config.visual_feat_dim), visual_pos=lambda _: torch.rand(2, 6, 4)
    ),
    "molmo2": _pooled,
    "nemotron_h_omni": _grid,
    "oneformer": lambda batch, _: {**batch, "task_inputs": torch.randint(3, 80, (len(batch["pixel_values"]), 77))},
    "paddleocr_vl": _squares(14),
    "perception_lm": _tiles(1),
    "pi0": _robot,
    "pop2piano": _with(
        "input_ids", "attention_mask", input_features=lambda config: torch.randn(2, 9, config.d_model)
    ),
    "qwen3_asr_encoder": _with(
        input_features=lambda config: torch.randn(2, config.num_mel_bins, 200),
        input_features_mask=lambda _: torch.ones(2, 200).long(),
    ),
    "rf_detr": _pictures(2, 3, 448, 448),
    "seggpt": _with(
        pixel_values=lambda _: torch.randn(2, 3, 448, 448),
        prompt_pixel_values=lambda _: torch.randn(2, 3, 448, 448), prompt_masks=lambda _: torch.randn(2, 3, 448, 448)
    ),
    "speech-encoder-decoder": _with("input_features", input_values=lambda _: torch.randn(2, 4000)),
    "splinter": _asked,
    "superglue": _pictures(2, 2, 1, 64, 64),
    "timesfm": _with(past_values=lambda _: torch.randn(2, 512)),
    "timesfm2_5": _with(past_values=lambda _: torch.randn(2, 64)),
    "tvp": _pictures(1, 1, 3, 448, 448),
    "video_llama_3": _with(image_merge_sizes=lambda _: torch.tensor([2])),
    "video_llama_3_vision": _with(merge_sizes=lambda _: torch.tensor([2])),
    "vision-encoder-decoder": _pictures(2, 3, 224, 224),
    "vits": _few,
    "wav2vec2-bert": _with(input_features=lambda _: torch.randn(2, 64, 160)),
}
