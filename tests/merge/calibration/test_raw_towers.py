"""Text and images for models that read them beside each other (CLIP, SigLIP): what their processors make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from raw_cases import PATCH, SIZE, WORDS, tokenizer, write_pictures, write_rows

from nsc_merge.calibration.raw.reading import batches_of
from nsc_merge.calibration.raw.settings import DataSettings

TEXTS = ["a b c", "b", "d e f g", "h a"]
POSITIONS = 8
WIDTH = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
KINDS: dict[str, tuple[Any, Any, Any]] = {
    "CLIP": (tf.CLIPConfig, tf.CLIPImageProcessor, tf.CLIPProcessor),
    "Siglip": (tf.SiglipConfig, tf.SiglipImageProcessor, tf.SiglipProcessor),
}


def base(folder: Path, kind: str) -> Any:
    """Its processor, which is written to the folder with the configuration."""
    config, images, processor = KINDS[kind]
    text = {**WIDTH, "vocab_size": len(WORDS), "max_position_embeddings": POSITIONS, "eos_token_id": 2}
    vision = {**WIDTH, "image_size": SIZE, "patch_size": PATCH}
    config(text_config=text, vision_config=vision, architectures=[f"{kind}Model"]).save_pretrained(folder)
    crop = {"crop_size": {"height": SIZE, "width": SIZE}} if kind == "CLIP" else {}
    # As on the hub, where SigLIP's texts have no mask.
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    inputs = ["input_ids", *["attention_mask"] * (kind == "CLIP")]
    words = tokenizer(chat=None).backend_tokenizer
    texts = tf.PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=inputs, **names)
    made = processor(images(size={"height": SIZE, "width": SIZE}, **crop), texts)
    made.save_pretrained(folder)
    return made


@pytest.fixture
def file(tmp_path):
    pictures = write_pictures(tmp_path / "photos", len(TEXTS))
    rows = [{"image": f"photos/{one.name}", "text": text} for one, text in zip(pictures, TEXTS, strict=True)]
    return write_rows(tmp_path / "rows.jsonl", rows)


def made(file, folder, batch_size, **settings):
    return batches_of(file, str(folder), DataSettings(**settings), batch_size, "calibration.a")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_are_those_of_the_processor(file, tmp_path, kind, batch_size):
    from PIL import Image

    processor = base(tmp_path / "base", kind)
    config = tf.AutoConfig.from_pretrained(tmp_path / "base")
    model = getattr(tf, f"{kind}Model")(config)
    seen = []
    for batch in made(file, tmp_path / "base", batch_size):
        texts = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        images = [Image.open(tmp_path / "photos" / f"{TEXTS.index(text)}.png") for text in texts]
        # transformers' pipeline fills SigLIP's texts up to all that it has positions for.
        filled = {"padding": "max_length", "max_length": POSITIONS} if kind == "Siglip" else {"padding": True}
        expected = processor(text=texts, images=images, return_tensors="pt", **filled)
        assert set(batch) == set(expected)
        assert ("attention_mask" in batch) == (kind == "CLIP")
        for name, value in batch.items():
            assert torch.equal(value, expected[name]), name
        assert torch.isfinite(model(**batch).logits_per_image).all()
        seen += texts
    assert sorted(seen) == sorted(TEXTS)


def test_texts_of_siglip_are_filled_and_cut_at_its_positions_alone(tmp_path):
    base(tmp_path / "base", "Siglip")
    config = tf.AutoConfig.from_pretrained(tmp_path / "base").text_config
    config.architectures = ["SiglipTextModel"]
    config.save_pretrained(tmp_path / "base")
    long = " ".join(["a"] * 20)
    file = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in (*TEXTS, long)])
    (batch,) = made(file, tmp_path / "base", 9, max_length=4)
    assert set(batch) == {"input_ids"}
    assert batch["input_ids"].shape == (5, POSITIONS)
    with pytest.raises(ValueError, match=f"expected at most {POSITIONS} tokens, found 21; give truncation: true$"):
        made(file, tmp_path / "base", 9, truncation=False)


def test_texts_alone_and_rows_without_an_image_are_refused(file, tmp_path):
    base(tmp_path / "base", "CLIP")
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    with pytest.raises(ValueError, match=r"^calibration.a: holds text alone, and the base takes an image beside it"):
        made(texts, tmp_path / "base", 2)
    rows = write_rows(tmp_path / "some.jsonl", [{"text": "a", "image": "photos/0.png"}, {"text": "b", "image": None}])
    with pytest.raises(ValueError, match=r"some.jsonl, row 2: expected one image, found 0$"):
        made(rows, tmp_path / "base", 2)
