"""Values that a model type of pictures, sound, video or series asks for beyond its small configuration."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_AHEAD = {"prediction_length": 4, "context_length": 16, "num_time_features": 2}
_FOUR = {"image_size": 64, "patch_size": 16}
# More blocks than its decoder has of anything.
_SAM = {"num_hidden_layers": 6, "global_attn_indexes": [2, 5], "image_size": 256}
VALUES: dict[str, dict[str, Any]] = {
    "autoformer": _AHEAD,
    "blip-2": {"image_token_index": 190},
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
    "glm4v_text": {"rope_parameters": _ROPE},
    "glm_ocr_text": {"rope_parameters": _ROPE},
    "idefics3_vision": _FOUR,
    "informer": _AHEAD,
    "instructblip": {"image_token_index": 190},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "modernvbert_vision": _FOUR,
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2], "vit_layers": [-1, -2]},
    "qwen2_5_vl_text": {"rope_parameters": _ROPE},
    "qwen2_vl_text": {"rope_parameters": _ROPE},
    "sam": {"vision_config": _SAM, "prompt_encoder_config": {"image_size": 256}},
    "sam_hq": {"vision_config": _SAM, "prompt_encoder_config": {"image_size": 256}},
    "sam_hq_vision_model": _SAM,
    "sam_vision_model": _SAM,
    "shieldgemma2": {"mm_tokens_per_image": 49},
    "smolvlm_vision": _FOUR,
    "time_series_transformer": _AHEAD,
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "wav2vec2-bert": {"vocab_size": 200},
    "wav2vec2-conformer": {"vocab_size": 200},
}
# Images of 1,024 pixels and more, whose attention in float64 takes minutes and gigabytes.
TOO_LARGE = (
    *("sam_hq", "sam2", "sam2_video", "sam3", "sam3_video", "sam3_tracker", "sam3_tracker_video", "sam3_lite_text"),
    *("sam2_hiera_det_model", "sam2_vision_model", "sam3_vision_model", "sam3_vit_model", "sam_hq_vision_model"),
)
