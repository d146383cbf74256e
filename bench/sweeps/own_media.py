"""Values that a model type of pictures, sound, video or series asks for beyond its small configuration."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_AHEAD = {"prediction_length": 4, "context_length": 16, "num_time_features": 2}
_FOUR = {"image_size": 64, "patch_size": 16}
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_TRANSFORMER = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "out_features": _STAGES}
_DINO = {"model_type": "dinov2", **_TRANSFORMER, "reshape_hidden_states": False, "image_size": 56, "patch_size": 14}
_SWIN = {"model_type": "swin", "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "image_size": 128,
         "window_size": 4, "out_features": _STAGES}
_NECK = {"neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 16}
_MASKS = {"backbone_config": _SWIN, "hidden_dim": 32, "encoder_layers": 2, "num_attention_heads": 4, "num_queries": 10}
_BOXES = {"backbone_config": {**_SWIN, "out_features": _STAGES[1:]}, "d_model": 64, "num_queries": 10,
          "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 2, "decoder_layers": 2}
_RESNET: dict[str, Any] = {"use_timm_backbone": False, "use_pretrained_backbone": False,
           "backbone_config": {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 32, 64],
                               "depths": [1, 1, 1, 1], "out_features": ["stage4"]}}
# More blocks than its decoder has of anything.
_SAM = {"num_hidden_layers": 6, "global_attn_indexes": [2, 5], "image_size": 256}
_HIERA = {"image_size": [256, 256], "blocks_per_stage": [1, 1, 2, 1]}
_SAM2 = {"backbone_config": {"model_type": "sam2_hiera_det_model", **_HIERA},
         "backbone_feature_sizes": [[64, 64], [32, 32], [16, 16]]}
VALUES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "autoformer": _AHEAD,
    "blip-2": {"image_token_index": 190, "num_query_tokens": 4},
    "chameleon": {"vocabulary_map": {"<image>": 190, **{f"IMGIMG{'ABCDEFGH'[n]}Z": 100 + n for n in range(8)}},
                  "vq_config": {"num_embeddings": 8}},
    "chmv2": {"backbone_config": {"model_type": "dinov3_vit", **_TRANSFORMER, "intermediate_size": 96, "image_size": 64,
                                  "return_class_token": True}, "post_process_channels": [16, 16, 32, 32],
              "fusion_hidden_size": 16, "head_hidden_size": 16},
    "clap_audio_model": {"hidden_size": 512, "patch_embeds_hidden_size": 64, "projection_dim": 64},
    "conditional_detr": _RESNET,
    "dab-detr": _RESNET,
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 64], "image_size": 256},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_routed_experts": 4,
                           "moe_intermediate_size": 32},
    "deformable_detr": _RESNET,
    "depth_anything": {"backbone_config": _DINO, "reassemble_hidden_size": 64, **_NECK},
    "detr": {**_RESNET, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
             "backbone_config": {**_RESNET["backbone_config"], "out_features": _STAGES}},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "image_size": 64, **_NECK},
    "eomt": {"num_blocks": 1, "image_size": 64, "num_queries": 10},
    "eomt_dinov3": {"num_blocks": 1, "image_size": 64, "num_queries": 10},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "fast_vlm": {"vision_config": {"hidden_size": 2048}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3": {"mm_tokens_per_image": 49},
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
    "glm4v_text": {"rope_parameters": _ROPE},
    "glm_ocr_text": {"rope_parameters": _ROPE},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2",
                        "image_grid_pinpoints": [[448, 224]], "vision_config": {"image_size": 224, "patch_size": 28}},
    "grounding-dino": _BOXES,
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}},
    "idefics3_vision": _FOUR,
    "informer": _AHEAD,
    "inkling_vision": {"n_layers": 4},
    "instructblip": {"image_token_index": 190, "num_query_tokens": 4},
    "instructblipvideo": {"video_token_index": 190, "num_query_tokens": 4},
    "kosmos_2_5_vision_model": {"patch_embed_hidden_size": 768},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "llava_next": {"image_grid_pinpoints": [[448, 224]]},
    "llava_next_video": {"image_grid_pinpoints": [[448, 224]]},
    "llava_onevision": {"image_grid_pinpoints": [[448, 224]]},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "mask2former": {**_MASKS, "feature_size": 32, "mask_feature_size": 32, "decoder_layers": 3, "num_labels": 5},
    "mimi": {"upsample_groups": 64},
    "mistral4": {"head_dim": 16},
    "mm-grounding-dino": _BOXES,
    "modernvbert_vision": _FOUR,
    "molmo2_adapter": {"vision_feature_layer": [-1, -2], "vit_layers": [-1, -2]},
    "molmo2_vision": {"image_size": [56, 56]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "muse_spark_audio": {"num_hidden_layers": 2, "patch_sizes": [16, 2], "hidden_sizes": [32, 64], "depths": [1, 1]},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}, "image_token_id": 190},
    "oneformer": {**_MASKS, "conv_dim": 32, "mask_dim": 32, "decoder_layers": 3, "num_labels": 5},
    "paddleocr_vl_text": {"rope_parameters": _ROPE},
    "perception_lm": {
        "vision_config": {"architecture": "vit_pe_core_tiny_patch16_384",
                          "model_args": {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": [64, 64],
                                         "global_pool": ""}},
        "projector_pooling_ratio": 2},
    "prompt_depth_anything": {"backbone_config": _DINO, "reassemble_hidden_size": 64, **_NECK},
    "qwen2_5_omni_text": {"rope_parameters": _ROPE},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 180},
    "qwen2_5_vl_text": {"rope_parameters": _ROPE},
    "qwen2_vl_text": {"rope_parameters": _ROPE},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 180},
    "sam": {"vision_config": _SAM, "prompt_encoder_config": {"image_size": 256}},
    "sam2": {"vision_config": _SAM2, "prompt_encoder_config": {"image_size": 256}},
    "sam2_hiera_det_model": _HIERA,
    "sam2_vision_model": _SAM2,
    "sam3_tracker": {"prompt_encoder_config": {"image_size": 112}},
    "sam3_vision_model": {"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]},
    "sam3_vit_model": {"image_size": 112, "pretrain_image_size": 112, "window_size": 4, "global_attn_indexes": [1]},
    "sam_hq_vision_model": _SAM,
    "sam_vision_model": _SAM,
    "smolvlm_vision": _FOUR,
    "step3p5": {"sliding_window": 8},
    "table-transformer": _RESNET,
    "time_series_transformer": _AHEAD,
    "tipsv2_dpt": {"backbone_config": {**_DINO, "model_type": "tipsv2_vision_model"}, **_NECK},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [32, 64], "image_size": 256},
    "upernet": {"backbone_config": _SWIN, "hidden_size": 64, "auxiliary_in_channels": 64, "pool_scales": [1, 2]},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "wav2vec2-bert": {"vocab_size": 200},
    "wav2vec2-conformer": {"vocab_size": 200},
    "zoedepth": {"backbone_config": {"model_type": "beit", **_TRANSFORMER, "reshape_hidden_states": False, **_FOUR},
                 "bottleneck_features": 16, "bin_embedding_dim": 16, **_NECK},
}
# Images of 1,024 pixels and more, whose attention in float64 takes minutes and gigabytes.
TOO_LARGE = ("sam2_video", "sam3_video", "sam3_tracker_video")
