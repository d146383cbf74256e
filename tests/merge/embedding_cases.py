"""A model that embeds texts, adapters of it, data that are compared, and embeddings by transformers and PEFT alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(60)), "query", ":"]
PROMPT = "query : "
MODULES = ("Transformer", "Pooling", "Normalize")


def words() -> Any:
    return tf.BertTokenizer(vocab={word: number for number, word in enumerate(_WORDS)}, model_max_length=40)


def write_base(folder: Path, *, modules: bool = True, pooling: str = "mean", kind: Any = tf.BertModel) -> Path:
    """A base as sentence-transformers saves it, or as transformers does."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = tf.BertConfig(vocab_size=len(_WORDS), max_position_embeddings=48, initializer_range=0.5, **sizes)
    kind(config).save_pretrained(folder)
    words().save_pretrained(folder)
    if modules:
        write_modules(folder, pooling)
    return folder


def write_modules(folder: Path, pooling: str = "mean", kinds: Sequence[str] = MODULES, **settings: Any) -> None:
    listed = [
        {"idx": number, "name": str(number), "path": f"{number}_{kind}" if number else "", "type": f"st.models.{kind}"}
        for number, kind in enumerate(kinds)
    ]
    held = {
        "modules.json": listed,
        "config_sentence_transformers.json": {"prompts": {"query": PROMPT, "document": ""}, **settings},
        "sentence_bert_config.json": {"max_seq_length": 32},
        "1_Pooling/config.json": {"embedding_dimension": 16, "pooling_mode": pooling},
    }
    for name, value in held.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))


def write_adapter(base: Path, folder: Path, seed: int) -> Path:
    model = get_peft_model(
        tf.AutoModel.from_pretrained(base),
        LoraConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"),
    )
    torch.manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.5)
    model.save_pretrained(folder)
    return folder


def write_rows(folder: Path, name: str, seed: int, count: int = 24) -> Path:
    """Rows of several texts, of which some are the same, with scores where ``name`` is that of similar texts."""
    generator = torch.Generator().manual_seed(seed)

    def text() -> str:
        numbers = torch.randint(0, 60, (int(torch.randint(3, 9, (1,), generator=generator)),), generator=generator)
        return " ".join(f"w{number}" for number in numbers.tolist())

    columns = {
        "similar": ("sentence1", "sentence2"),
        "found": ("query", "positive"),
        "nearest": ("anchor", "positive", "negative"),
    }
    rows: list[dict[str, Any]] = [{column: text() for column in columns[name]} for _ in range(count)]
    for number, row in enumerate(rows):
        if name == "similar":
            row["score"] = round(float(torch.rand((), generator=generator)) * 5, 2) if number != 3 else None
        if name == "found" and number % 5 == 4:
            # A question that has two documents, and a document of two questions.
            row["query"] = rows[number - 1]["query"]
            row["positive"] = rows[number - 2]["positive"]
    file = folder / f"{name}-{seed}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rows_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def embeddings(
    base: Path, adapters: Mapping[str, float], texts: Sequence[str], pooling: str = "mean"
) -> Tensor:
    """Of texts one by one, in float64, by a model with adapters in it, each by its coefficient."""
    model, tokens = _merged(base, tuple(adapters.items())), words()
    found = []
    with torch.no_grad():
        for text in texts:
            features = model(**tokens(text, return_tensors="pt")).last_hidden_state[0]
            found.append({"mean": features.mean(0), "cls": features[0], "lasttoken": features[-1]}[pooling])
    return torch.stack(found)


@functools.lru_cache(maxsize=8)
def _merged(base: Path, adapters: tuple[tuple[str, float], ...]) -> Any:
    model = tf.AutoModel.from_pretrained(base).double()
    for folder, scale in adapters:
        tuned = PeftModel.from_pretrained(model, folder)
        for module in tuned.modules():
            if hasattr(module, "scaling") and hasattr(module, "lora_A"):
                module.scaling = {name: value * scale for name, value in module.scaling.items()}
        model = tuned.merge_and_unload()
    return model.eval()
