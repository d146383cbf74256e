"""Images, and pairs of images and text, as a person would encode them by hand with transformers, to the bit."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from raw_cases import (
    IMAGE_TOKENS,
    PARTS,
    SIZE,
    WORDS,
    gemma_base,
    llava_base,
    paligemma_base,
    picture,
    processor,
    text_base,
    vision_base,
    write_pictures,
    write_rows,
)
from transformers import AutoProcessor, Gemma3Processor, ViTImageProcessor

from nsc_merge.calibration.raw.drawing import place_of
from nsc_merge.calibration.raw.inputs import images as inputs_of_images
from nsc_merge.calibration.raw.inputs import pairs as pairs_with_images
from nsc_merge.calibration.raw.reading import batches_of
from nsc_merge.calibration.raw.settings import DataSettings

IMAGE, PAD = WORDS.index("<image>"), 0


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return vision_base(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return llava_base(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A LLaVA without a chat template."""
    return llava_base(tmp_path_factory.mktemp("plain"), chat=None)


def made(source, base, batch_size=3, **settings):
    return batches_of(source, str(base), DataSettings(**settings), batch_size, "calibration.a")


def order(count, seed=0):
    return sorted(range(count), key=lambda number: place_of(seed, number))


def pixels(images):
    tool = ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    return tool(images, return_tensors="pt")["pixel_values"]


def stacked(batches):
    return torch.cat([batch["pixel_values"] for batch in batches])


@pytest.mark.parametrize("at_once", [32, 2])
def test_a_folder_of_images_is_encoded_as_by_hand(tmp_path, vit, monkeypatch, at_once):
    monkeypatch.setattr(inputs_of_images, "_AT_ONCE", at_once)
    files = write_pictures(tmp_path / "photos", 7)
    (tmp_path / "photos" / "labels.txt").write_text("a")
    batches = made(tmp_path / "photos", vit)
    assert [list(batch) for batch in batches] == [["pixel_values"]] * 3
    assert [len(batch["pixel_values"]) for batch in batches] == [3, 3, 1]
    by_name = sorted(files, key=lambda file: file.name)
    expected = pixels([Image.open(by_name[number]) for number in order(7)])
    assert torch.equal(stacked(batches), expected)
    assert stacked(batches).dtype is torch.float32
    assert batches.first == by_name[order(7)[0]].name


def test_images_of_classes_are_one_set_and_hidden_ones_are_none(tmp_path, vit):
    for name, count in (("cats", 2), ("dogs/small", 3), (".cache", 1)):
        write_pictures(tmp_path / name, count)
    (tmp_path / "cats" / "._0.png").write_bytes(b"x")
    assert torch.equal(
        stacked(made(tmp_path, vit)),
        pixels([(picture(0), picture(1), picture(0), picture(1), picture(2))[number] for number in order(5)]),
    )


def test_a_table_beside_images_is_named_where_images_alone_do_not_do(tmp_path, llava):
    write_pictures(tmp_path / "images", 2)
    write_rows(tmp_path / "data.jsonl", [{"image": "images/0.png", "prompt": "a"}])
    with pytest.raises(ValueError, match=r"\(its images, data.jsonl is not read\): holds images alone"):
        made(tmp_path, llava)
    assert len(made(tmp_path / "data.jsonl", llava)) == 1


def test_images_in_a_list_are_rows(vit):
    images = [picture(number) for number in range(3)]
    assert torch.equal(stacked(made(images, vit)), pixels([images[number] for number in order(3)]))


def test_no_image_of_a_folder_is_passed_over(tmp_path, vit):
    """Folders that are links, as to classes that lie elsewhere, and formats beside the usual ones."""
    write_pictures(tmp_path / "elsewhere" / "cats", 2)
    (tmp_path / "elsewhere" / "cats" / "back").symlink_to(tmp_path / "elsewhere")
    photos = tmp_path / "photos"
    write_pictures(photos / "dogs", 1)
    (photos / "cats").symlink_to(tmp_path / "elsewhere" / "cats")
    (photos / "all").symlink_to(photos)
    assert len(stacked(made(photos, vit))) == 3
    picture(3).save(photos / "a.avif")
    assert len(stacked(made(photos, vit))) == 4
    (photos / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match=r"b\.HEIC cannot be opened as an image: no image that Pillow knows"):
        made(photos, vit)


def test_the_digest_of_a_folder_is_over_names_and_bytes_of_what_is_drawn(tmp_path, vit):
    files = write_pictures(tmp_path / "photos", 6)
    first = made(tmp_path / "photos", vit, samples=4)
    by_hand = hashlib.sha256()
    for number in order(6)[:4]:
        name, raw = files[number].name, files[number].read_bytes()
        by_hand.update(f"{len(name)}:{name}:{len(raw)}:".encode() + raw)
    assert set(first.sha256) == {"images", "samples"}
    assert first.sha256["images"] == by_hand.hexdigest()
    # What is not drawn is not opened.
    files[order(6)[5]].write_bytes(b"damaged")
    assert made(tmp_path / "photos", vit, 2, samples=4).sha256 == first.sha256
    picture(99).save(files[order(6)[0]])
    assert made(tmp_path / "photos", vit, samples=4).sha256["samples"] != first.sha256["samples"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_images_of_any_mode_become_rgb(tmp_path, vit, mode):
    image = picture(3).convert(mode)
    image.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    assert torch.equal(stacked(made(tmp_path, vit)), pixels([image.convert("RGB")]))


def test_images_are_turned_as_their_exif_says(tmp_path, vit):
    image = picture(3)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(stacked(made(tmp_path, vit)), pixels([image.rotate(-90, expand=True)]))


def test_models_of_one_channel_get_grey_images(tmp_path):
    base = vision_base(tmp_path / "base", num_channels=1)
    write_pictures(tmp_path / "photos", 1)
    (batch,) = made(tmp_path / "photos", base)
    tool = ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5], image_std=[0.5])
    assert torch.equal(batch["pixel_values"], tool([picture(0).convert("L")], return_tensors="pt")["pixel_values"])


def test_images_that_cannot_be_right_are_refused_by_name(tmp_path, vit, monkeypatch):
    file = tmp_path / "photos" / "a.png"
    write_pictures(file.parent, 0)

    def refused(message):
        with pytest.raises(ValueError, match=rf"^calibration.a: .*photos, row 1: .*a.png {message}") as caught:
            made(file.parent, vit)
        assert "\n" not in str(caught.value)

    file.write_bytes(b"no image")
    refused("cannot be opened as an image: no image that Pillow knows$")
    picture(0, (64, 64)).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    refused("cannot be opened as an image: ")
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(file)
    refused("has pixels of mode 'I;16'; save it with 8 bits a colour$")
    picture(0).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a.png: Image size \(120 pixels\) exceeds limit of 100 pixels.*; make"):
        made(file.parent, vit)


def test_rows_hold_images_in_many_ways(tmp_path, vit):
    write_pictures(tmp_path / "photos", 1)
    raw = (tmp_path / "photos" / "0.png").read_bytes()
    encoded = f"data:image/png;base64,{base64.b64encode(raw).decode()}"
    expected = pixels([picture(0)])
    rows = [{"photo": "photos/0.png"}, {"photo": str(tmp_path / "photos" / "0.png")}, {"photo": encoded}]
    for row in rows:
        assert torch.equal(stacked(made(write_rows(tmp_path / "a.jsonl", [row]), vit)), expected)
    for value in (picture(0), {"bytes": raw, "path": None}, [picture(0)]):
        assert torch.equal(stacked(made([{"image": value}], vit)), expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("https://a.org/b.png", "https://a.org/b.png is not here; download it and write its path: nothing is fetched$"),
        ("b.png", ".*b.png is missing; paths of images are relative to the file they are in$"),
        ("data:image/png;base64,%", "the image in the row is not base64"),
        (3, r"expected an image, its path, or pixels as a numpy array uint8 \[H, W, 3\], found 3$"),
        (["photos/0.png"] * 2, "expected one image, found 2$"),
        (None, "holds no image in column 'image'$"),
    ],
)
def test_rows_whose_image_is_not_there_are_refused(tmp_path, vit, value, message):
    write_pictures(tmp_path / "photos", 1)
    file = write_rows(tmp_path / "a.jsonl", [{"image": value}])
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^calibration.a: .*a.jsonl, row 1: {message}"):
        made(file, vit)


def test_a_table_beside_images_names_them(tmp_path, vit):
    write_pictures(tmp_path, 3)
    write_rows(tmp_path / "metadata.jsonl", [{"file_name": "2.png", "label": 1}])
    batches = made(tmp_path, vit)
    assert torch.equal(stacked(batches), pixels([picture(2)]))
    assert set(batches.sha256) == {"metadata.jsonl", "images", "samples"}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_table_above_folders_of_splits_is_read_for_the_split_that_is_taken(tmp_path, vit, kind):
    """Of the samples to be held out none is seen."""
    rows = []
    for number, split in enumerate(("test", "train")):
        picture_of = tmp_path / "photos" / split / "deep"
        picture_of.mkdir(parents=True)
        picture(number).save(picture_of / "0.png")
        rows.append({"file_name": f"{split}/deep/0.png", "label": "a"})
    table = tmp_path / "photos" / f"metadata.{kind}"
    if kind == "csv":
        table.write_text("file_name,label\n" + "".join(f"{row['file_name']},a\n" for row in rows))
    else:
        write_rows(table, rows)
    assert torch.equal(stacked(made(tmp_path / "photos", vit)), pixels([picture(1)]))
    assert torch.equal(stacked(made(tmp_path / "photos", vit, split="test")), pixels([picture(0)]))
    assert len(stacked(made(table, vit))) == 2
    table.write_text(table.read_text().replace("train/", "gone/"))
    with pytest.raises(ValueError, match=f"metadata.{kind} names none of the 1 files of the split that is taken"):
        made(tmp_path / "photos", vit)


def test_a_processor_is_needed_and_can_be_named(tmp_path, vit):
    bare = vision_base(tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    write_pictures(tmp_path / "photos", 1)
    with pytest.raises(FileNotFoundError, match=r"^calibration.a: beside the base: .*bare holds no processor"):
        made(tmp_path / "photos", bare)
    assert torch.equal(stacked(made(tmp_path / "photos", bare, processor=str(vit))), pixels([picture(0)]))


def test_images_are_no_text(tmp_path):
    write_pictures(tmp_path / "photos", 1)
    with pytest.raises(ValueError, match=r"^calibration.a: .*photos: holds images alone \(image \('0.png'\)\)"):
        made(tmp_path / "photos", text_base(tmp_path / "base"))


PROMPTS = ["a b c", "d", "e f", "g h a b"]


@pytest.fixture
def pairs(tmp_path):
    write_pictures(tmp_path / "photos", len(PROMPTS))
    rows = [{"image": f"photos/{number}.png", "prompt": text} for number, text in enumerate(PROMPTS)]
    return write_rows(tmp_path / "pairs.jsonl", rows)


def assert_pairs(batches, texts, images, tool, **given):
    """Every batch is what the processor makes of the same rows at once."""
    seen = []
    for batch in batches:
        rows = [
            next(
                number
                for number, image in enumerate(images)
                if torch.equal(tool.image_processor([image], return_tensors="pt")["pixel_values"][0], one)
            )
            for one in batch["pixel_values"]
        ]
        seen += rows
        expected = tool(
            text=[texts[row] for row in rows], images=[images[row] for row in rows], padding=True,
            return_tensors="pt", **given,
        )  # fmt: skip
        assert sorted(batch) == ["attention_mask", "input_ids", "pixel_values"]
        for name, value in batch.items():
            assert torch.equal(value, expected[name]), name
    assert sorted(seen) == list(range(len(texts)))


IMAGES = [picture(number) for number in range(len(PROMPTS))]


@pytest.mark.parametrize("side", ["right", "left"])
def test_pairs_without_a_template_have_the_image_in_front(pairs, plain, side):
    tool = processor(None)
    tool.tokenizer.padding_side = side
    batches = made(pairs, plain, padding_side=side)
    assert_pairs(batches, [f"<image>\n{text}" for text in PROMPTS], IMAGES, tool)
    assert (torch.cat([batch["input_ids"].flatten() for batch in batches]) == IMAGE).sum() == 4 * IMAGE_TOKENS


def test_pairs_go_through_the_chat_template(pairs, llava):
    tool = processor()
    turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in PROMPTS]
    texts = [tool.apply_chat_template(turn) for turn in turns]
    assert texts[0] == "user : <image> a b c "
    batches = made(pairs, llava)
    assert_pairs(batches, texts, IMAGES, tool)
    assert batches.first == "<s> user : <image> " + PROMPTS[order(4)[0]]


def test_prompts_that_have_the_image_in_them_are_taken_as_they_are(tmp_path, llava):
    write_pictures(tmp_path / "photos", 2)
    texts = ["a <image> b", "<s> <image> c"]
    rows = [{"image": f"photos/{number}.png", "text": text} for number, text in enumerate(texts)]
    batches = made(write_rows(tmp_path / "x.jsonl", rows), llava, 1)
    assert_pairs(batches, ["a <image> b", "<image> c"], IMAGES[:2], processor())


LLAVA_CHAT = [{"from": "human", "value": "<image>\na b"}, {"from": "gpt", "value": "c"}]


@pytest.mark.parametrize(
    "row",
    [
        {"image": "photos/0.png", "conversations": LLAVA_CHAT},
        {"image": "photos/0.png", "conversations": [{**LLAVA_CHAT[0], "value": "a b"}, LLAVA_CHAT[1]]},
        {
            "images": ["photos/0.png"],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a b"}, {"type": "image"}]},
                {"role": "assistant", "content": "c"},
            ],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "photos/0.png"}, "a b"]},
                {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
            ],
        },
    ],
    ids=["llava", "image aside", "images", "inside"],
)
def test_chats_with_an_image(tmp_path, llava, row):
    write_pictures(tmp_path / "photos", 1)
    batches = made(write_rows(tmp_path / "x.jsonl", [row]), llava)
    assert_pairs(batches, ["user : <image> a b assistant : c "], IMAGES[:1], processor())
    assert set(batches.sha256) == {"x.jsonl", "images", "samples"}


def test_samples_of_several_images_stand_together_and_of_none_apart(tmp_path, llava):
    write_pictures(tmp_path / "photos", 2)
    rows = [
        {"images": ["photos/0.png", "photos/1.png"], "prompt": "a <image> b <image>"},
        {"images": [], "prompt": "c"},
        {"images": ["photos/0.png"], "prompt": "<image> d"},
        {"images": [], "prompt": "e f"},
    ]
    batches = made(write_rows(tmp_path / "x.jsonl", rows), llava, 4)
    shapes = {(len(b["input_ids"]), len(b.get("pixel_values", ()))) for b in batches}
    assert len(batches) == 2
    assert shapes == {(2, 3), (2, 0)}
    # One image after another, in the order of the rows.
    (seen,) = (b for b in batches if "pixel_values" in b)
    counts = (seen["input_ids"] == IMAGE).sum(1) // IMAGE_TOKENS
    pictures = [Image.open(tmp_path / "photos" / f"{number}.png") for number in (0, 1)]
    in_order = [one for count in counts for one in pictures[:count]]
    assert torch.equal(seen["pixel_values"], processor().image_processor(in_order, return_tensors="pt")["pixel_values"])
    # Where there is no image, there is no chat around the text either.
    tool = processor().tokenizer
    expected = tool(["c", "e f"], padding=True, return_tensors="pt")["input_ids"]
    assert torch.equal(next(b["input_ids"] for b in batches if "pixel_values" not in b), expected)


def test_what_an_image_becomes_is_no_text_where_it_is_another_token(tmp_path):
    base = gemma_base(tmp_path)
    tool = Gemma3Processor.from_pretrained(base)
    rows = [{"image": picture(0), "prompt": "a b c d e f g h"}]
    (whole,) = made(rows, base)
    expected = tool(text=["user : <start_of_image> a b c d e f g h "], images=[picture(0)], return_tensors="pt")
    assert set(whole) == set(expected)
    assert all(torch.equal(whole[name], expected[name]) for name in expected)
    count = IMAGE_TOKENS + 1
    for most in (12, 5):
        (cut,) = made(rows, base, max_length=most)
        assert torch.equal(cut["input_ids"], expected["input_ids"][:, : count + most])
        assert torch.equal(cut["pixel_values"], expected["pixel_values"])


def test_paligemma_reads_the_prompt_right_behind_the_image_and_no_labels(tmp_path):
    base = paligemma_base(tmp_path)
    tool = AutoProcessor.from_pretrained(base)
    (batch,) = made([{"image": picture(0), "prompt": "a b"}], base)
    seen = []
    text_of = pairs_with_images._text_with_places

    def noted(*given):
        seen.append(text_of(*given))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs_with_images, "_text_with_places", noted)
        made([{"image": picture(0), "prompt": "a b"}], base)
    assert [text for text, _ in seen] == ["<image>a b"]
    expected = tool(text=["<image>a b"], images=[picture(0)], return_tensors="pt")
    assert set(batch) == set(expected) - {"labels"}
    assert all(torch.equal(value, expected[name]) for name, value in batch.items())


def test_a_prompt_with_an_image_ends_with_the_prompt_for_an_answer(tmp_path, pairs):
    asking = PARTS + "{% if add_generation_prompt %}assistant :{% endif %}"
    assert made(pairs, llava_base(tmp_path, chat=asking), 1).first.endswith("assistant :")


def test_tokens_of_images_are_not_counted_and_never_cut(pairs, llava, caplog):
    texts = [batch["input_ids"].shape[1] - IMAGE_TOKENS for batch in made(pairs, llava, 1)]
    made(pairs, llava, 1, max_length=max(texts))
    assert not caplog.records
    batches = made(pairs, llava, 1, max_length=5)
    longer = sum(text > 5 for text in texts)
    assert 0 < longer < len(texts)
    assert f"longer than 5 tokens, as are {longer} of the {len(texts)} samples" in caplog.text
    for batch in batches:
        ids = batch["input_ids"][0]
        assert (ids == IMAGE).sum() == IMAGE_TOKENS
        assert len(ids) <= IMAGE_TOKENS + 5
    assert max(batch["input_ids"].shape[1] for batch in batches) == IMAGE_TOKENS + 5
    with pytest.raises(ValueError, match=r"row \d: expected at most 5 tokens, found \d; give a larger max_length"):
        made(pairs, llava, max_length=5, truncation=False)
    with pytest.raises(ValueError, match=r"row \d: 2 tokens of text would cut an image off; expected a larger"):
        made(pairs, llava, max_length=2)


def test_the_models_positions_are_for_text_and_images(tmp_path, pairs, llava):
    base = shutil.copytree(llava, tmp_path / "short")
    config = json.loads((base / "config.json").read_text())

    def of(positions):
        config["text_config"]["max_position_embeddings"] = positions
        (base / "config.json").write_text(json.dumps(config))
        return made(pairs, base, 1)

    found, expected = of(IMAGE_TOKENS + 5), made(pairs, llava, 1, max_length=5)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match=r"row \d: its images are 4 tokens, the model has 4 positions"):
        of(IMAGE_TOKENS)


def test_text_alone_is_text_for_a_model_of_both(tmp_path, llava):
    rows = [{"prompt": "a b"}, {"prompt": "c"}]
    (batch,) = made(write_rows(tmp_path / "x.jsonl", rows), llava)
    expected = processor().tokenizer(["c", "a b"], padding=True, return_tensors="pt")
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    chats = [{"messages": [{"role": "user", "content": "a b"}]}]
    assert made(write_rows(tmp_path / "x.jsonl", chats), llava).first == "user : a b"


REFUSED = {
    "no prompts": ({"image": "photos/0.png"}, "x.jsonl: holds images alone .* takes text beside them: write a .jsonl"),
    "no images": ({"prompt": "<image> a"}, "row 1: its text has a place for an image, and there is no column"),
    "too few": (
        {"image": "photos/0.png", "prompt": "<image> a <image>"},
        "row 1: expected as many images as places for them, found 1 images and 2 times '<image>'",
    ),
    "none inside": (
        {"messages": [{"role": "user", "content": [{"type": "image"}, "a"]}]},
        "row 1: expected as many images as places for them, found 0 images and 1 times '<image>'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_pairs_that_lack_something_say_what(tmp_path, llava, case):
    row, message = REFUSED[case]
    write_pictures(tmp_path / "photos", 1)
    with pytest.raises(ValueError, match=rf"^calibration.a: .*{message}") as caught:
        made(write_rows(tmp_path / "x.jsonl", [row]), llava)
    assert "\n" not in str(caught.value)


def test_half_a_character_beside_an_image_is_refused(llava):
    rows = [{"image": Image.new("RGB", (SIZE, SIZE)), "prompt": "a \ud800"}]
    with pytest.raises(ValueError, match=r"row 1: holds '\\ud800', half of a character"):
        made(rows, llava)


def test_a_chat_without_a_template_is_refused(tmp_path, plain):
    write_pictures(tmp_path / "photos", 1)
    row = {"image": "photos/0.png", "conversations": LLAVA_CHAT}
    with pytest.raises(ValueError, match="row 1: holds a chat, and there is no chat template beside the base"):
        made(write_rows(tmp_path / "x.jsonl", [row]), plain)


def test_a_processor_of_one_kind_alone_is_refused(pairs, llava, vit):
    with pytest.raises(ValueError, match=r"holds a ViTImageProcessor\w* alone; expected a processor"):
        made(pairs, llava, processor=str(vit))


def test_a_processor_of_an_old_release_is_refused(tmp_path, pairs):
    base = llava_base(tmp_path / "base")
    fields = json.loads((base / "processor_config.json").read_text())
    fields["patch_size"] = None
    (base / "processor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="the processor of .*base does not say patch_size, .*; set them and save it"):
        made(pairs, base)


def test_bytes_in_a_row_are_no_file(tmp_path, vit):
    raw = io.BytesIO()
    picture(1).save(raw, "PNG")
    batches = made([{"image": {"bytes": raw.getvalue(), "path": "x/1.png"}}], vit)
    by_hand = hashlib.sha256(f"7:x/1.png:{len(raw.getvalue())}:".encode() + raw.getvalue())
    assert batches.sha256["images"] == by_hand.hexdigest()


def test_a_package_that_an_image_processor_lacks_is_named(monkeypatch, vit):
    class Lacking(type):
        """As transformers' stand-ins for classes whose packages are not installed."""

        def __getattribute__(cls, name):
            raise ImportError("\nAutoImageProcessor requires the Torchvision library\nbut it was not found.")

    monkeypatch.setattr("transformers.AutoImageProcessor", Lacking("AutoImageProcessor", (), {}))
    expected = "the processor of .* cannot be loaded: AutoImageProcessor requires the Torchvision library"
    with pytest.raises(ValueError, match=f"beside the base: {expected}"):
        made([{"image": picture(1)}], vit)


def test_the_place_of_an_image_in_data_for_llava_is_one_for_every_model(tmp_path):
    """It is no word of a model that calls it otherwise, such as Gemma 3."""
    base = gemma_base(tmp_path)
    rows = [
        {"image": picture(0), "text": "<image> a b"},
        {"image": picture(0), "messages": [{"role": "user", "content": "<image>\na b"}]},
        {"image": picture(0), "conversations": [{"from": "human", "value": "<image>\na b"}]},
    ]
    expected = batches_of([{"image": picture(0), "text": "a b"}], str(base), DataSettings(), 1, "a")
    for row in rows:
        assert batches_of([row], str(base), DataSettings(), 1, "a").sha256["samples"] == expected.sha256["samples"]
    # In its place.
    content = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    chat = [{"role": "user", "content": content}]
    behind = [{"image": picture(0), "messages": chat}, {"image": picture(0), "text": "a <image> b"}]
    parts, said = (batches_of([row], str(base), DataSettings(), 1, "a").sha256["samples"] for row in behind)
    assert parts == said
    # Without an image it is what it says.
    (batch,) = batches_of(["<image> a"], str(base), DataSettings(), 1, "a")
    assert IMAGE in batch["input_ids"]


def test_a_processor_of_videos_is_told(tmp_path, monkeypatch):
    """For which the images of several samples are frames of one video."""
    place = vision_base(tmp_path / "base")
    from nsc_merge.calibration.raw import encoding

    def one_video(images, return_tensors):
        return {"pixel_values": torch.zeros(1, len(images), 3, 8, 8)}

    monkeypatch.setattr(encoding, "image_processor_of", lambda *given: one_video)
    with pytest.raises(ValueError, match="row 1 and the next: function makes 1 pixel_values of 2 images, expec"):
        made([{"image": picture(number)} for number in range(2)], place)


@pytest.mark.parametrize("many", [4, 9])
def test_many_images_are_counted(vit, monkeypatch, capsys, many):
    from nsc_merge.calibration.raw.inputs import checks

    monkeypatch.setattr(checks, "_MANY", many)
    made([{"image": picture(number)} for number in range(6)], vit)
    said = [line.partition("  (")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == (["calibration.a: row list: 6/6"] if many == 4 else [])
