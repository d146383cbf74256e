"""Tiny random models of the architectures that docs/architectures.md lists, with inputs and the usual targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Inputs = Callable[[], dict[str, Tensor]]
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TOKENS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**WIDTH, **TOKENS, "num_key_value_heads": 1, "max_position_embeddings": 64}
HEADS = {**GROUPED, "num_key_value_heads": 2, "head_dim": 16}
PATCHES = {"image_size": 8, "patch_size": 4}
IMAGE_TOKEN = 90
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj"]
FIRST_TWO = ["q_proj", "v_proj"]
OUT = ["q_proj", "k_proj", "v_proj", "out_proj"]


class Architecture(NamedTuple):
    """A class of transformers by name, the keywords of its configuration, a batch, and what LoRA usually touches."""

    model: str
    config: dict[str, Any]
    inputs: Inputs
    targets: list[str] | str

    def build(self) -> nn.Module:
        """The model with random numbers, the same each time."""
        import transformers

        kind = getattr(transformers, self.model)
        torch.manual_seed(0)
        return kind(config=kind.config_class(**self.config)).eval()


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def text() -> dict[str, Tensor]:
    ids = torch.randint(3, 80, (2, 7), generator=_seeded())
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def two_texts() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": torch.randint(3, 80, (2, 5), generator=_seeded())}


def pixels(size: int = 8) -> Inputs:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size, generator=_seeded())}


def sound() -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(2, 8, 16, generator=_seeded()),
        "decoder_input_ids": torch.randint(3, 80, (2, 5), generator=_seeded()),
    }


def wave() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 200, generator=_seeded()), "attention_mask": torch.ones(2, 200).long()}


def seen() -> dict[str, Tensor]:
    return {**pixels()(), "decoder_input_ids": torch.randint(3, 80, (2, 5), generator=_seeded())}


def text_and_image(places: int, **more: Callable[[], Tensor]) -> Inputs:
    """A row of text with ``places`` tokens that stand for its image."""

    def inputs() -> dict[str, Tensor]:
        ids = torch.randint(3, 80, (1, 5 + places), generator=_seeded())
        ids[:, 1 : 1 + places] = IMAGE_TOKEN
        kinds = {name: make() for name, make in more.items()}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kinds}

    return inputs


def images(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, generator=_seeded())


def grid(*sides: int) -> Callable[[], Tensor]:
    return lambda: torch.tensor([sides])


def kinds_of_tokens(places: int) -> Callable[[], Tensor]:
    return lambda: torch.tensor([[0] + places * [1] + 4 * [0]])


_CLIP = {"model_type": "clip_vision_model", **WIDTH, **PATCHES}
_SIGLIP = {"model_type": "siglip_vision_model", **WIDTH, **PATCHES, "vision_use_head": False}
_TEXT = {**GROUPED, "model_type": "llama"}
_TROCR = {
    "encoder": {"model_type": "vit", **WIDTH, **PATCHES},
    "decoder": {"model_type": "trocr", **TOKENS, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2,
                "decoder_ffn_dim": 48, "max_position_embeddings": 16, "is_decoder": True, "add_cross_attention": True,
                "cross_attention_hidden_size": 32},
    "decoder_start_token_id": 2, "pad_token_id": 0,
}
_ROPE = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
_QWEN = {**GROUPED, "rope_parameters": _ROPE}
_QWEN_TOKENS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 91, "vision_start_token_id": 92,
                "vision_end_token_id": 93}
_QWEN_INPUTS = {"image_grid_thw": grid(1, 4, 4), "mm_token_type_ids": kinds_of_tokens(4)}
_LANGUAGE = r".*language_model.*\.(q_proj|v_proj)"
_TOWERS = {"depths": [2, 2], "num_heads": [1, 2], "embed_dim": 16, "window_size": 2, "image_size": 16, "patch_size": 2}

ARCHITECTURES = {
    "LLaMA": Architecture("LlamaForCausalLM", GROUPED, text, LLAMA),
    "Mistral": Architecture("MistralForCausalLM", GROUPED, text, LLAMA),
    "Qwen2": Architecture("Qwen2ForCausalLM", GROUPED, text, LLAMA),
    "Qwen3": Architecture("Qwen3ForCausalLM", HEADS, text, LLAMA),
    "Gemma": Architecture("GemmaForCausalLM", HEADS, text, LLAMA),
    "Gemma 2": Architecture("Gemma2ForCausalLM", {**HEADS, "sliding_window": 8}, text, LLAMA),
    "Gemma 3": Architecture("Gemma3ForCausalLM", {**HEADS, "sliding_window": 8}, text, LLAMA),
    "Phi-3/4": Architecture("Phi3ForCausalLM", GROUPED, text, ["qkv_proj", "o_proj"]),
    "Phi": Architecture("PhiForCausalLM", {**GROUPED, "num_key_value_heads": 2}, text, ["q_proj", "v_proj", "dense"]),
    "OPT": Architecture(
        "OPTForCausalLM",
        {**WIDTH, **TOKENS, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
        text,
        FIRST_TWO,
    ),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", {**WIDTH, **TOKENS}, text, ["query_key_value"]),
    "GPT-2": Architecture(
        "GPT2LMHeadModel", {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}, text, ["c_attn"]
    ),
    "Falcon": Architecture("FalconForCausalLM", {**WIDTH, **TOKENS}, text, ["query_key_value"]),
    "StableLM": Architecture("StableLmForCausalLM", HEADS, text, LLAMA),
    "Granite": Architecture("GraniteForCausalLM", GROUPED, text, LLAMA),
    "OLMo": Architecture("OlmoForCausalLM", GROUPED, text, LLAMA),
    "OLMo 2": Architecture("Olmo2ForCausalLM", GROUPED, text, LLAMA),
    "Mixtral": Architecture(
        "MixtralForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, text, FIRST_TWO
    ),
    "Qwen3-MoE": Architecture(
        "Qwen3MoeForCausalLM",
        {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        text,
        FIRST_TWO,
    ),
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": 2 * ["full_attention"],
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        text,
        FIRST_TWO,
    ),
    "Jamba": Architecture(
        "JambaForCausalLM",
        {**GROUPED, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4,
         "num_experts_per_tok": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        text,
        ["q_proj", "v_proj", "in_proj"],
    ),
    "OLMo Hybrid": Architecture(
        "OlmoHybridForCausalLM",
        {**HEADS, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
         "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        text,
        LLAMA,
    ),
    "BERT": Architecture("BertForMaskedLM", {**WIDTH, **TOKENS}, text, ["query", "value"]),
    "RoBERTa": Architecture("RobertaForMaskedLM", {**WIDTH, **TOKENS}, text, ["query", "value"]),
    "DeBERTa-v3": Architecture(
        "DebertaV2ForSequenceClassification",
        {**WIDTH, **TOKENS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
         "share_att_key": True, "norm_rel_ebd": "layer_norm", "max_position_embeddings": 64, "initializer_range": 0.2},
        text,
        ["query_proj", "key_proj", "value_proj"],
    ),
    "ModernBERT": Architecture(
        "ModernBertForMaskedLM",
        {**WIDTH, **TOKENS, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2},
        text,
        ["Wqkv"],
    ),
    "T5": Architecture(
        "T5ForConditionalGeneration",
        {"vocab_size": 96, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2},
        two_texts,
        ["q", "v"],
    ),
    "BART": Architecture(
        "BartForConditionalGeneration",
        {**TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
         "decoder_start_token_id": 2, "forced_eos_token_id": None},
        two_texts,
        FIRST_TWO,
    ),
    "Whisper": Architecture(
        "WhisperForConditionalGeneration",
        {**TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
         "max_source_positions": 8, "max_target_positions": 16, "decoder_start_token_id": 1,
         "suppress_tokens": None, "begin_suppress_tokens": None},
        sound,
        FIRST_TWO,
    ),
    "wav2vec 2.0": Architecture(
        "Wav2Vec2ForCTC",
        {**WIDTH, "vocab_size": 32, "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8),
         "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
         "feat_extract_norm": "layer"},
        wave,
        FIRST_TWO,
    ),
    "AST": Architecture(
        "ASTForAudioClassification",
        {**WIDTH, "num_mel_bins": 8, "max_length": 16, "patch_size": 4, "frequency_stride": 4, "time_stride": 4},
        lambda: {"input_values": torch.randn(2, 16, 8, generator=_seeded())},
        FIRST_TWO,
    ),
    "ESM": Architecture(
        "EsmForMaskedLM",
        {**WIDTH, "vocab_size": 96, "pad_token_id": 0, "mask_token_id": 3, "position_embedding_type": "rotary",
         "max_position_embeddings": 64},
        text,
        ["query", "value"],
    ),
    "Mamba 2": Architecture(
        "Mamba2ForCausalLM",
        {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "expand": 2,
         "n_groups": 1, "state_size": 8, "chunk_size": 4},
        text,
        ["in_proj"],
    ),
    "TrOCR": Architecture("VisionEncoderDecoderModel", _TROCR, seen, FIRST_TWO),
    "ViT": Architecture("ViTForImageClassification", {**WIDTH, **PATCHES}, pixels(), FIRST_TWO),
    "Swin": Architecture("SwinForImageClassification", _TOWERS, pixels(16), FIRST_TWO),
    "BEiT": Architecture("BeitForImageClassification", {**WIDTH, **PATCHES}, pixels(), FIRST_TWO),
    "DINOv2": Architecture(
        "Dinov2ForImageClassification",
        {**WIDTH, **PATCHES, "mlp_ratio": 2},
        pixels(),
        r".*\.(q_proj|v_proj|query|value)",
    ),
    "DINOv3": Architecture("DINOv3ViTModel", {**WIDTH, **PATCHES}, pixels(), FIRST_TWO),
    "CLIP vision": Architecture("CLIPVisionModel", {**WIDTH, **PATCHES}, pixels(), OUT),
    "CLIP": Architecture(
        "CLIPModel",
        {"text_config": {**WIDTH, **TOKENS, "max_position_embeddings": 16}, "vision_config": {**WIDTH, **PATCHES},
         "projection_dim": 16},
        lambda: {**text(), **pixels()()},
        FIRST_TWO,
    ),
    "SigLIP": Architecture(
        "SiglipModel",
        {"text_config": {**WIDTH, **TOKENS, "max_position_embeddings": 16}, "vision_config": {**WIDTH, **PATCHES}},
        lambda: {**text(), **pixels()()},
        FIRST_TWO,
    ),
    "LLaVA": Architecture(
        "LlavaForConditionalGeneration",
        {"vision_config": _CLIP, "text_config": _TEXT, "image_token_index": IMAGE_TOKEN, "image_token_id": IMAGE_TOKEN},
        text_and_image(4, pixel_values=images(1, 3, 8, 8)),
        _LANGUAGE,
    ),
    "LLaVA-NeXT": Architecture(
        "LlavaNextForConditionalGeneration",
        {"vision_config": _CLIP, "text_config": _TEXT, "image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN,
         "image_grid_pinpoints": [[8, 8]]},
        text_and_image(10, pixel_values=images(1, 2, 3, 8, 8), image_sizes=grid(8, 8)),
        _LANGUAGE,
    ),
    "LLaVA-OneVision": Architecture(
        "LlavaOnevisionForConditionalGeneration",
        {"vision_config": _SIGLIP, "text_config": {**_TEXT, "model_type": "qwen2"}, "image_token_id": IMAGE_TOKEN,
         "image_token_index": IMAGE_TOKEN, "video_token_id": 91, "video_token_index": 91,
         "image_grid_pinpoints": [[8, 8]]},
        text_and_image(10, pixel_values=images(1, 2, 3, 8, 8), image_sizes=grid(8, 8)),
        _LANGUAGE,
    ),
    "Qwen2-VL": Architecture(
        "Qwen2VLForConditionalGeneration",
        {"text_config": _QWEN, **_QWEN_TOKENS,
         "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
                           "patch_size": 4, "temporal_patch_size": 2}},
        text_and_image(4, pixel_values=images(16, 96), **_QWEN_INPUTS),
        _LANGUAGE,
    ),
    "Qwen2.5-VL": Architecture(
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": _QWEN, **_QWEN_TOKENS,
         "vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2,
                           "intermediate_size": 48, "patch_size": 4, "temporal_patch_size": 2, "window_size": 16,
                           "fullatt_block_indexes": [1]}},
        text_and_image(4, pixel_values=images(16, 96), **_QWEN_INPUTS),
        _LANGUAGE,
    ),
    "Qwen3-VL": Architecture(
        "Qwen3VLForConditionalGeneration",
        {"text_config": {**HEADS, "rope_parameters": _ROPE}, **_QWEN_TOKENS,
         "vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2,
                           "intermediate_size": 48, "patch_size": 4, "temporal_patch_size": 2,
                           "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
        text_and_image(4, pixel_values=images(16, 96), **_QWEN_INPUTS),
        _LANGUAGE,
    ),
    "PaliGemma": Architecture(
        "PaliGemmaForConditionalGeneration",
        {"vision_config": _SIGLIP, "text_config": {**HEADS, "model_type": "gemma"}, "image_token_index": IMAGE_TOKEN,
         "image_token_id": IMAGE_TOKEN, "projection_dim": 32, "hidden_size": 32},
        text_and_image(4, pixel_values=images(1, 3, 8, 8)),
        _LANGUAGE,
    ),
    "Gemma 3 with images": Architecture(
        "Gemma3ForConditionalGeneration",
        {"vision_config": _SIGLIP, "text_config": {**HEADS, "model_type": "gemma3_text", "sliding_window": 8},
         "image_token_index": IMAGE_TOKEN, "image_token_id": IMAGE_TOKEN, "mm_tokens_per_image": 4},
        text_and_image(4, pixel_values=images(1, 3, 8, 8), token_type_ids=kinds_of_tokens(4)),
        _LANGUAGE,
    ),
    "Idefics3": Architecture(
        "Idefics3ForConditionalGeneration",
        {"vision_config": {**WIDTH, **PATCHES}, "text_config": _TEXT, "scale_factor": 2, "image_token_id": IMAGE_TOKEN},
        text_and_image(1, pixel_values=images(1, 1, 3, 8, 8)),
        r".*text_model.*\.(q_proj|v_proj)",
    ),
    "Qwen2-Audio": Architecture(
        "Qwen2AudioForConditionalGeneration",
        {"audio_config": {"model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 2,
                          "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 8,
                          "max_source_positions": 8},
         "text_config": {**GROUPED, "model_type": "qwen2"}, "audio_token_index": IMAGE_TOKEN},
        text_and_image(4, input_features=images(1, 8, 16), feature_attention_mask=lambda: torch.ones(1, 16).long()),
        _LANGUAGE,
    ),
}


METHODS = ("task_arithmetic", "nsc", "match")
SCALE = 0.3
OPTIONS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"scale": SCALE},
    "nsc": {"steps": 2, "compile": False, "progress": False},
    "match": {"steps": 2, "warm_up": 0, "progress": False},
}
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def write_adapter(model: nn.Module, folder: Path, seed: int, **config: Any) -> Path:
    """A PEFT folder with random values in everything that PEFT would train."""
    import copy

    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(**{"r": 2, "lora_alpha": 4, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in (value for value in peft_model.parameters() if value.requires_grad):
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What a model says of a batch in float64, in one tensor."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    experts = getattr(model, "set_experts_implementation", None)
    if experts is not None and getattr(model, "_can_set_experts_implementation", lambda: False)():
        experts("eager")  # the grouped product knows no float64
    with torch.no_grad():
        out = model.double().eval()(**wide)
    names = ("logits", "logits_per_image", "last_hidden_state")
    return next(out[name] for name in names if name in out)


def outcome(action: Callable[[], None]) -> str:
    """``yes``, or why not: a refusal, or numbers that are not those expected."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "yes"


def outcomes(architecture: Architecture, folder: Path) -> dict[str, str]:
    """What becomes of two adapters by PEFT in every column of the table; outputs are compared with PEFT's own."""
    import copy

    from peft import PeftModel

    from nsc_merge import merge

    model, inputs = architecture.build(), architecture.inputs()
    model.save_pretrained(folder / "base")
    targets = {"target_modules": architecture.targets}
    adapters = {task: write_adapter(model, folder / task, seed, **targets) for seed, task in enumerate(("a", "b"))}
    data = {task: [inputs] for task in adapters}
    results: dict[str, Any] = {}

    def merged(method: str) -> None:
        results[method] = merge(model, adapters, data, method, **OPTIONS[method])

    cells = {method: outcome(lambda method=method: merged(method)) for method in METHODS}
    if "nsc" in results:
        cells["measured"] = ", ".join(f"`{path}`" for path in results["nsc"].options["scored"])
    for method in METHODS[1:]:
        if method in results:
            # All begin at one number.
            found = {value for row in results[method].coefficients.values() for value in row.values()}
            cells[method] = cells[method] if len(found) > 1 else "no coefficient moved"
    if "task_arithmetic" not in results:
        return {**cells, "adapter": "nothing to export", "model": "nothing to export"}
    held = PeftModel.from_pretrained(copy.deepcopy(model), folder / "a", adapter_name="a")
    held.load_adapter(folder / "b", "b")
    held.base_model.set_adapter(["a", "b"])
    for layer in held.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling = {task: value * SCALE for task, value in layer.scaling.items()}
    expected = output(held, inputs)
    base = output(copy.deepcopy(model), inputs)

    def exported(kind: str) -> None:
        saved = results["task_arithmetic"].save(folder / kind, kind)
        if kind == "lora":
            found = output(PeftModel.from_pretrained(copy.deepcopy(model), saved), inputs)
        else:
            found = output(type(model).from_pretrained(saved), inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (found - base).abs().max() > 1e-4, "the merge changed nothing"

    return {**cells, "adapter": outcome(lambda: exported("lora")), "model": outcome(lambda: exported("model"))}


COLUMNS = {
    "task_arithmetic": "task_arithmetic",
    "nsc": "nsc",
    "match": "match",
    "adapter": "exported as an adapter, reloaded by PEFT",
    "model": "exported as a model, reloaded",
    "measured": "NSC measures the input of",
}


def row(name: str, cells: dict[str, str]) -> str:
    """A line of the table."""
    return f"| {name} | {' | '.join(cells.get(column, '') for column in COLUMNS)} |"


def table(rows: list[str]) -> str:
    """The table of docs/architectures.md."""
    return "\n".join([f"| | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|", *rows])


def refresh() -> None:
    """Write the table of the page anew, from what happens."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        rows = [row(name, outcomes(one, Path(folder, str(n)))) for n, (name, one) in enumerate(ARCHITECTURES.items())]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")


BEGIN, END = "<!-- made by python tests/merge/architectures.py -->", "<!-- end -->"

if __name__ == "__main__":
    refresh()
