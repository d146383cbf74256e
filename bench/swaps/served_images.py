"""A merged LLaVA in a whole server on a CPU: what vLLM answers about images, held to transformers and PEFT.

    python -m bench.swaps.served_images --out bench/results/serving

A LLaVA is made, tiny and with random weights, whose file names its vision tower as those on the hub do, and adapters of
it by PEFT, some of which ``nsc_merge`` merges. vLLM (a build for CPUs, with torchvision, installed beside this package)
generates twelve tokens for each of two images. What a row says is as in ``bench.swaps.servers``; the case "model" is
the first merge saved as a model, which is served without an adapter; two cases are served again with vLLM's flag for
LoRA outside the language model.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor

import nsc_merge
from bench.merging.cost_rows import environment, write_rows
from bench.swaps.servers import ROUNDING, drawn, effects, version_of
from bench.swaps.vllm_answers import TOKENS, TOP, Step, steps_of, vllm_engine
from nsc_merge.integrations.serving import check

SIZE, PATCH, VOCABULARY = 32, 8, 300
PLACES = (SIZE // PATCH) ** 2
IMAGE = 3
FLAG = "--enable-tower-connector-lora"
LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"
# Adapters that are merged, or of which the one is served as PEFT wrote it.
CASES: dict[str, list[dict[str, Any]]] = {
    "language model": [{"r": 4, "target_modules": LANGUAGE}, {"r": 6, "target_modules": LANGUAGE}],
    "connector too": [{"r": 4, "target_modules": r".*(multi_modal_projector\.linear_1|language_model.*\.q_proj)"}] * 2,
    "vision tower too": [{"r": 4, "target_modules": r".*(language_model|vision_tower).*\.(q_proj|v_proj)"}] * 2,
    "rsLoRA, unmerged": [{"r": 4, "target_modules": LANGUAGE, "use_rslora": True}],
    "alpha_pattern and rank_pattern, unmerged": [
        {
            "r": 4, "target_modules": LANGUAGE, "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 32},
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 8},
        }
    ],
}  # fmt: skip


def write_base(folder: Path) -> None:
    import transformers as tf
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<image>"]
    words = {word: number for number, word in enumerate([*special, *map(str, range(VOCABULARY - len(special)))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(special)
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    images = tf.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    tf.LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
    layers = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = tf.LlamaConfig(
        **layers, vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0
    )
    eyes = tf.CLIPVisionConfig(**layers, image_size=SIZE, patch_size=PATCH)
    torch.manual_seed(0)
    config = tf.LlavaConfig(vision_config=eyes, text_config=text, image_token_index=IMAGE, image_seq_length=PLACES)
    model = tf.LlavaForConditionalGeneration(config)
    for value in model.parameters():
        if value.dim() > 1:
            torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(folder)
    # Of one that it makes anew, transformers names the tower in a way that vLLM does not know.
    file = folder / "model.safetensors"
    named = {name.replace("vision_tower.", "vision_tower.vision_model."): one for name, one in load_file(file).items()}
    save_file(named, file, metadata={"format": "pt"})


def loaded(folder: Path, lora: Path | None = None) -> Any:
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return PeftModel.from_pretrained(model, str(lora)).eval() if lora else model


def adapters(base: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Case, and the adapter's folder; beside the first merge's, the same as a model."""
    from peft import LoraConfig, get_peft_model

    for case, settings in CASES.items():
        place = folder / case.replace(" ", "-").replace(",", "")
        for seed, given in enumerate(settings, 1):
            torch.manual_seed(seed)
            tuned = get_peft_model(loaded(base), LoraConfig(**({"lora_alpha": 8} | given)))
            drawn(tuned, 0.1).save_pretrained(str(place / str(seed)))
        if len(settings) == 1:
            yield case, place / "1"
            continue
        tasks = {f"task{seed}": place / str(seed) for seed in range(1, len(settings) + 1)}
        merged = nsc_merge.merge(loaded(base), tasks, method="task_arithmetic", scale=0.7)
        merged.save(place / "merged", format="lora")
        merged.save(place / "model", format="model")
        yield case, place / "merged"


def asked() -> list[tuple[list[int], Any]]:
    """Tokens of a prompt, the image as one of them, and the image."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    found = []
    for length in (5, 11):
        words = torch.randint(IMAGE + 1, VOCABULARY, (length,), generator=generator).tolist()
        pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
        found.append(([1, IMAGE, *words], Image.fromarray(pixels.numpy())))
    return found


def by_vllm(folder: Path, loras: Mapping[str, Path | None], **flags: bool) -> Iterator[tuple[str, Any]]:
    """Case -> for each prompt its steps, or the error in words."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    engine = vllm_engine(folder, limit_mm_per_prompt={"image": 1}, **flags)
    # No token that stands for an image is generated; the numbers given are those before it is forbidden.
    wanted = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=TOP, ignore_eos=True, logit_bias={IMAGE: -100.0})
    given: list[Any] = [{"prompt_token_ids": ids, "multi_modal_data": {"image": image}} for ids, image in asked()]
    for number, (case, lora) in enumerate(loras.items(), 1):
        request = LoRARequest(case, number, str(lora)) if lora else None
        try:
            answers = engine.generate(given, wanted, use_tqdm=False, lora_request=request)
        except Exception as error:
            yield case, f"{type(error).__name__}: {error}"
            continue
        for answer in answers:
            places = answer.prompt_token_ids.count(IMAGE)
            assert places == PLACES, f"vLLM sees an image as {places} tokens"
        yield case, [steps_of(answer) for answer in answers]


@torch.no_grad()
def logarithms(model: Any, folder: Path, prompts: list[list[Step]]) -> Tensor:
    """What transformers finds for all that a server gave a number of."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    found = []
    for steps, (_, image) in zip(prompts, asked(), strict=True):
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        for step in steps:
            logits = model(input_ids=torch.tensor([step.before]), pixel_values=pixels).logits[0, -1]
            found.append(logits.float().log_softmax(-1)[[*step.likely]])
    return torch.cat(found)


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    base = folder / "base"
    write_base(base)
    loras: dict[str, Path | None] = {"base": None, **dict(adapters(base, folder))}
    whole = folder / "language-model" / "model"
    flagged = {f"{case}, {FLAG}": loras[case] for case in ("connector too", "vision tower too")}
    answers = [*by_vllm(base, loras), *(("model", one) for _, one in by_vllm(whole, {"base": None}))]
    for case, lora in flagged.items():  # each by an engine of its own, which it may end
        answers += by_vllm(base, {case: lora}, enable_tower_connector_lora=True)
    loras |= flagged
    alone = 0.0
    for case, answered in answers:
        lora = loras.get(case)
        row: dict[str, Any] = {"server": "vllm", "family": "Llava", "case": case}
        if lora:
            row["rule"] = effects(check(lora, "vllm", base))
        if isinstance(answered, str):
            yield row | {"said": answered.replace(f"{folder}/", "")[:300]}
            continue
        served = torch.tensor([number for steps in answered for step in steps for number in step.likely.values()])
        right = logarithms(loaded(whole if case == "model" else base, lora), base, answered)
        row["differs"] = float((served - right).abs().max())
        if case == "base":
            alone = row["differs"]
        else:
            row["moved"] = float((logarithms(loaded(base), base, answered) - right).abs().max())
            row["served"] = row["differs"] <= ROUNDING * row["moved"] + 2 * alone
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the rows")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = []
        for row in rows(Path(place)):
            found.append(row)
            print(json.dumps(row), flush=True)
    if arguments.out:
        named = environment(server=version_of(None), peft=version("peft"))
        write_rows(arguments.out / "vllm-images.jsonl", [named, *found])


if __name__ == "__main__":
    main()
