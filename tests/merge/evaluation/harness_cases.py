"""A tiny language model with a tokenizer, two adapters, and task files for the lm-evaluation-harness."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo import build, write_adapter

WORDS = [f"w{number}" for number in range(6, 64)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, with as many as the model has."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<4>", "<5>"]
    known = {word: number for number, word in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def questions(seed: int, count: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {
            "question": " ".join(draw.choices(WORDS, k=draw.randint(2, 6))),
            "choices": [" ".join(draw.sample(WORDS, k=2)) for _ in range(3)],
            "answer": draw.randrange(3),
        }
        for _ in range(count)
    ]


def lay_out(place: Path) -> dict[str, Any]:
    """``base``, ``adapters``, ``my_tasks`` with their data; returns a recipe of them."""
    base = build("llama")
    base.save_pretrained(place / "base")
    tokenizer().save_pretrained(place / "base")
    for seed, task in enumerate(("quiz", "text"), 1):
        write_adapter(base, place / "adapters" / task, seed, r=4, target_modules=["q_proj", "v_proj"])
    (place / "my_tasks").mkdir()
    files = {}
    for split, seed, count in (("train", 1, 4), ("validation", 2, 6), ("test", 3, 12)):
        file = place / "my_tasks" / f"{split}.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in questions(seed, count)))
        files[split] = str(file)
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    quiz = {
        **common,
        "task": "quiz",
        "training_split": "train",
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1.5},
    }
    text = {
        **common,
        "task": "text",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    for config in (quiz, text):
        (place / "my_tasks" / f"{config['task']}.yaml").write_text(yaml.safe_dump(config))
    recipe = {
        "model": "base",
        "tasks": {
            "quiz": {"adapter": "adapters/quiz", "lm_eval": "quiz", "limit": 10},
            "text": {"adapter": "adapters/text", "lm_eval": "text"},
        },
        "methods": [{"method": "task_arithmetic", "name": "TA", "options": {"scale": 0.4}}],
        "lm_eval": {"include_path": "my_tasks", "batch_size": 8},
        "output": {"dir": "out", "plots": False},
    }
    (place / "eval.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return recipe
