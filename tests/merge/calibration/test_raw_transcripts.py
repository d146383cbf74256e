"""Images for an encoder behind which a decoder writes (TrOCR, Donut, Florence-2), and what the decoder reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from raw_cases import WORDS, picture, tokenizer
from zoo import write_adapter

import nsc_merge
from nsc_merge.calibration.forward_passes import Pass
from nsc_merge.calibration.raw.reading import batches_of
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.commands.main import main
from nsc_merge.methods.gradient.own_answers import writing_of
from nsc_merge.models.families import find_family
from nsc_merge.utils.yaml_text import from_yaml

SAID = ["a b c", "d", "e f g h", "a"]


def build() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    seen = tf.ViTConfig(**sizes, image_size=8, patch_size=4)
    written = tf.TrOCRConfig(
        vocab_size=len(WORDS), d_model=8, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=8,
        max_position_embeddings=20, is_decoder=True, add_cross_attention=True, cross_attention_hidden_size=8,
    )  # fmt: skip
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(seen, written)
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    return tf.VisionEncoderDecoderModel(config=config).eval()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    model = build()
    model.save_pretrained(tmp_path / "base")
    tokenizer(chat=None).save_pretrained(tmp_path / "base")
    tf.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "base")
    for n, task in enumerate(("one", "two")):
        write_adapter(model, tmp_path / "adapters" / task, n, r=2, target_modules=["q_proj", "v_proj"])
    return tmp_path / "base"


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [{"image": picture(number), "text": said} for number, said in enumerate(SAID)]


def made(source: Any, place: Path, batch_size: int = 2, **settings: Any) -> Any:
    return batches_of(source, str(place), DataSettings(**settings), batch_size, "calibration.a")


def test_the_decoder_reads_the_moved_text_beside_its_own_image(place, rows):
    model, tool = build(), tf.ViTImageProcessor(size={"height": 8, "width": 8})
    batches = made(rows, place, 3, target="text")
    pixels = tool([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
    seen = []
    for batch in batches:
        logits = model(**batch).logits
        for row, (image, ids, mask) in enumerate(
            zip(batch["pixel_values"], batch["decoder_input_ids"], batch["decoder_attention_mask"], strict=True)
        ):
            number = next(n for n in range(len(rows)) if torch.equal(image, pixels[n]))
            labels = torch.tensor([tokenizer(chat=None)(SAID[number])["input_ids"]])
            assert ids[mask == 1].tolist() == model.prepare_decoder_input_ids_from_labels(labels)[0].tolist()
            alone = model(pixel_values=image[None], decoder_input_ids=ids[mask == 1][None]).logits[0]
            torch.testing.assert_close(logits[row][mask == 1], alone, rtol=1e-4, atol=1e-5)
            seen.append(number)
    assert sorted(seen) == [0, 1, 2, 3]
    assert batches.first.startswith("an image: </s>")


def test_without_a_target_an_answer_begins(place, rows):
    for batch in made(rows, place):
        assert batch["decoder_input_ids"].tolist() == [[2], [2]]
        assert batch["pixel_values"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("method", ["nsc", "match", "distill", "regmean"])
def test_padding_of_the_decoder_counts_nowhere(place, rows, method):
    """The mask is of what the decoder reads; what the encoder sees has none."""
    batch = next(iter(made(rows[:1], place, target="text")))
    longer = {name: torch.nn.functional.pad(batch[name], (0, 5)) for name in batch if name.startswith("decoder_")}
    adapters = {task: str(place.parent / "adapters" / task) for task in ("one", "two")}
    options = {"regmean": {"ridge": 1e-2}}.get(method, {"steps": 2, "progress": False})
    found = [
        nsc_merge.merge(build(), adapters, {task: [one] for task in adapters}, method, **options)
        for one in (batch, {**batch, **longer})
    ]
    if method != "regmean":
        losses = [one.history[0]["omega" if method == "nsc" else "loss"] for one in found]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for path in found[0].paths:
        torch.testing.assert_close(found[1].delta(path), found[0].delta(path), rtol=1e-3, atol=1e-5)


def test_answers_are_those_of_generate(place, rows):
    model, batches = build(), made(rows, place)
    writing = writing_of(model, find_family(model), 4)
    assert writing is not None
    for batch in batches:
        found = writing(lambda inputs: model(**inputs).logits, Pass(batch, (batch,), ((0,),)), 4, model)
        model.generation_config.eos_token_id = None
        written = model.generate(
            pixel_values=batch["pixel_values"], decoder_start_token_id=2, max_new_tokens=3, do_sample=False
        )
        assert torch.equal(found.inputs["decoder_input_ids"], written)


def test_a_first_recipe_knows_the_transcripts(place, rows, monkeypatch):
    folder = place.parent / "lines"
    folder.mkdir()
    for number, row in enumerate(rows):
        row["image"].save(folder / f"{number}.png")
    lines = "".join(f"{number}.png,{said}\n" for number, said in enumerate(SAID))
    (folder / "metadata.csv").write_text(f"file_name,text\n{lines}", encoding="utf-8")
    monkeypatch.chdir(place.parent)
    assert main(["init", "adapters/one", "adapters/two", "--base", "base", "--data", "lines"]) == 0
    document = from_yaml(Path("recipe.yaml").read_text(encoding="utf-8"))
    assert document["data"]["target"] == "text"
    assert main(["run", "recipe.yaml", "options.steps=2"]) == 0
    assert (Path("merged") / "model" / "preprocessor_config.json").is_file()


@pytest.fixture
def florence(tmp_path: Path) -> Path:
    """Whose processor puts the image in front of the prompt by itself, and turns names of tasks into prompts."""
    words = tokenizer(chat=None, extra={"image_token": "<im>"})
    images = tf.CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5
    sides = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    numbers = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = tf.Florence2Config(
        text_config={
            "model_type": "bart", "d_model": 8, "vocab_size": 32, "max_position_embeddings": 64,
            "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, **sides, **numbers,
        },
        vision_config={
            "embed_dim": [8, 8, 8, 16], "depths": [1] * 4, "num_heads": [1, 1, 1, 2], "num_groups": [1, 1, 1, 2],
            "window_size": 2, "projection_dim": 8,
        },
        image_token_id=words.convert_tokens_to_ids("<im>"),
        architectures=["Florence2ForConditionalGeneration"],
    )
    config.save_pretrained(tmp_path / "florence")
    tf.Florence2Processor(images, words).save_pretrained(tmp_path / "florence")
    return tmp_path / "florence"


def test_florence_reads_the_prompt_of_its_processor(florence):
    model = tf.Florence2ForConditionalGeneration(tf.AutoConfig.from_pretrained(florence)).eval()
    tool = tf.AutoProcessor.from_pretrained(florence)
    rows = [{"image": picture(n), "prompt": asked, "said": SAID[n]} for n, asked in enumerate(("a b", "d", "<OD>"))]
    expected = [dict(tool(text=[row["prompt"]], images=[row["image"]], return_tensors="pt")) for row in rows]
    seen = []
    for batch in made(rows, florence, target="said"):
        logits = model(**batch).logits
        for row, mask in enumerate(batch["attention_mask"]):
            ids = batch["input_ids"][row][mask == 1]
            number = next(n for n, one in enumerate(expected) if torch.equal(one["input_ids"][0], ids))
            assert torch.equal(batch["pixel_values"][row], expected[number]["pixel_values"][0])
            decoded = batch["decoder_input_ids"][row][batch["decoder_attention_mask"][row] == 1]
            labels = tokenizer(chat=None)(SAID[number])["input_ids"]
            assert decoded.tolist() == [2, *labels[:-1]]
            alone = model(**expected[number], decoder_input_ids=decoded[None]).logits[0]
            torch.testing.assert_close(logits[row][: len(alone)], alone, rtol=1e-4, atol=1e-5)
            seen.append(number)
    assert sorted(seen) == [0, 1, 2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "holds text alone, and the base takes an image beside it; expected both in a row"),
        ({"image": [picture(0), picture(1)], "prompt": "a"}, "row 1: expected a text and one image, found 2 images"),
        ({"image": picture(0), "messages": [{"role": "user", "content": "a"}]}, "expected a text and one image"),
    ],
)
def test_florence_takes_one_image_and_a_prompt(florence, row, message):
    with pytest.raises(ValueError, match=message):
        made([row], florence)
