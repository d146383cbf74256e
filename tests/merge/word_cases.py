"""Models that classify tokens, with tokenizers of pieces of words, and what transformers' run_ner.py makes of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
import zoo
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
ROWS = [
    {"tokens": ["Peter", "Blackburn"], "ner_tags": ["B-PER", "I-PER"]},
    {"tokens": ["EU", "rejects", "German", "call", "to", "boycott", "lamb", "."], "ner_tags": ["B-LOC", *["O"] * 7]},
    {"tokens": ["Brussels", ",", "1996-08-22"], "ner_tags": ["B-LOC", "O", "O"]},
    {"tokens": ["He", "said", "so", "in", "New", "York"], "ner_tags": ["O", "O", "O", "O", "B-LOC", "I-LOC"]},
]
_SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
_LETTERS = [chr(number) for number in range(ord("a"), ord("z") + 1)]


def bert_words() -> Any:
    """Of pieces: letters, and some of their pairs."""
    pieces = [*_LETTERS, "er", "re", "to", "so", *"0123456789.,-"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *pieces, *(f"##{piece}" for piece in pieces)]
    return tf.BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def roberta_words() -> Any:
    """Of bytes, and some of their pairs; it puts no space in front of a text by itself."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    merges = [("Ġ", "t"), ("e", "r"), ("Ġ", "B"), ("Ġt", "o"), ("s", "a")]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    return tf.RobertaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=merges)


def bert(**changed: Any) -> Any:
    settings = {"vocab_size": len(bert_words()), "max_position_embeddings": 64, "num_labels": len(TAGS), **_SIZES}
    torch.manual_seed(0)
    return tf.BertForTokenClassification(tf.BertConfig(**{**settings, **changed})).eval()


def roberta(**changed: Any) -> Any:
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    settings = {"vocab_size": len(roberta_words()), "max_position_embeddings": 64, "num_labels": len(TAGS), **special}
    torch.manual_seed(0)
    return tf.RobertaForTokenClassification(tf.RobertaConfig(**{**settings, **_SIZES, **changed})).eval()


KINDS = {"bert": (bert, bert_words, {}), "roberta": (roberta, roberta_words, {"add_prefix_space": True})}


def word_base(folder: Path, kind: str, **changed: Any) -> Path:
    """A base and its tokenizer, as they are saved."""
    model, words, _ = KINDS[kind]
    model(**changed).save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def word_adapter(folder: Path, kind: str, seed: int, num_labels: int = len(TAGS)) -> Path:
    """LoRA with a classifier of its own, as PEFT's example trains it."""
    settings = {"r": 2, "target_modules": ["query", "value"], "task_type": "TOKEN_CLS"}
    zoo.write_adapter(KINDS[kind][0](num_labels=num_labels), folder, seed, **settings)
    return folder


def run_ner(folder: Path, kind: str, rows: Sequence[Mapping[str, Any]], **given: Any) -> list[dict[str, list[int]]]:
    """Inputs and labels of rows, as ``tokenize_and_align_labels`` of run_ner.py makes them, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **KINDS[kind][2])
    tokenizer.truncation_side = given.pop("truncation_side", "right")
    made = tokenizer([row["tokens"] for row in rows], is_split_into_words=True, truncation=True, **given)
    found = []
    for number, row in enumerate(rows):
        labels, previous = [], None
        for word in made.word_ids(batch_index=number):
            if word is None or word == previous:
                labels.append(-100)
            else:
                tag = row["ner_tags"][word]
                labels.append(TAGS.index(tag) if isinstance(tag, str) else tag)
            previous = word
        found.append({**{name: made[name][number] for name in made}, "labels": labels})
    return found
