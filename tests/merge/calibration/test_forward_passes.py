"""Batches of unequal lengths in one pass, and batches restricted to text or images."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from loop_cases import (
    IMAGE_TOKEN,
    TASKS,
    adapters_for,
    image_batches,
    llama,
    llava,
    same_course,
    text_batches,
    trajectory,
    values,
)
from zoo import build

from nsc_merge.calibration.forward_passes import Padding, concatenated, one_by_one
from nsc_merge.calibration.modality import restriction
from nsc_merge.models.families import find_family

START = 1
DECODERS = ("llama", "llama-cls", "mistral", "qwen2", "llava")
# One task pads at the left, one not at all, one at the right.
LENGTHS = {"a": 9, "b": 8, "c": 7}


def calls_of(module):
    seen = []
    module.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


def uneven_batches(kind, count=2):
    """Per task two rows; images, if any, take four tokens in the middle of the row."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for task, length in LENGTHS.items():
        found[task] = []
        for _ in range(count):
            ids = torch.randint(6, 60, (2, length), generator=generator)
            batch = {"input_ids": ids}
            if task != "b":
                mask = torch.ones_like(ids)
                mask[1, slice(2) if task == "a" else slice(-1, None)] = 0
                batch["attention_mask"] = mask
            if kind == "llava":
                ids[:, 2:6] = 5
                batch["pixel_values"] = torch.randn(2, 3, 8, 8, generator=generator)
            found[task].append(batch)
    return found


@pytest.mark.parametrize("include_pad", [False, True])
@pytest.mark.parametrize("kind", DECODERS)
def test_unequal_lengths_take_one_pass_and_the_same_course(kind, include_pad):
    model = build(kind)
    adapters, batches = adapters_for(model), uneven_batches(kind)
    apart = trajectory(model, adapters, batches, include_pad=include_pad)
    seen = calls_of(model)
    together = trajectory(model, adapters, batches, include_pad=include_pad, batch_tasks=True)
    # One pass a step, and as many at either end of the comparison.
    assert len(seen) == len(together.history) + 2 * together.objective["batches"]
    same_course(together, apart)


@pytest.mark.parametrize("options", [{"early_exit": False}, {"checkpointing": True}, {"score_blocks": [0, 2]}])
def test_unequal_lengths_with_the_other_savings(options):
    model = build("qwen2")
    adapters, batches = adapters_for(model), uneven_batches("qwen2")
    apart = trajectory(model, adapters, batches, **options)
    same_course(trajectory(model, adapters, batches, batch_tasks=True, **options), apart)


def passes(inputs, padding=True):
    singles = one_by_one(inputs, torch.device("cpu"))
    return concatenated(singles, Padding("input_ids", "attention_mask", 9) if padding else None)


def ids(rows, length):
    return torch.arange(rows * length).reshape(rows, length)


def test_padding_goes_to_the_end_and_is_marked():
    (one,) = passes([{"input_ids": ids(1, 4)}, {"input_ids": ids(2, 5)}])
    assert one.sizes == (2, 1)
    assert one.tasks == ((1,), (0,))
    assert one.inputs["input_ids"].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 1, 2, 3, 9]]
    expected = [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert one.inputs["attention_mask"].tolist() == expected
    assert one.inside.int().tolist() == expected


@pytest.mark.parametrize(
    "other",
    [
        {"input_ids": ids(1, 3)},  # would add more than a quarter
        {"input_ids": ids(1, 7), "position_ids": ids(1, 7)},
        {"input_ids": ids(1, 7).int()},
        {"input_ids": ids(1, 7), "attention_mask": torch.ones(1, 1, 7, 7)},
        {"input_ids": ids(1, 7), "pixel_values": torch.zeros(1, 3, 8, 8)},
        {"inputs_embeds": torch.zeros(1, 7, 4)},
    ],
)
def test_what_padding_might_change_stays_apart(other):
    batches = [{"input_ids": ids(1, 8)}, other]
    assert len(passes(batches)) == 2
    assert len(passes(batches, padding=False)) == 2


def test_large_batches_are_not_padded_unless_asked():
    singles = one_by_one([{"input_ids": ids(2, 8)}, {"input_ids": ids(2, 7)}], torch.device("cpu"))
    for most, count in ((16, 1), (15, 2), (None, 1)):
        assert len(concatenated(singles, Padding("input_ids", "attention_mask", most=most))) == count


@pytest.mark.parametrize(("rows", "count"), [(2, 1), (20, 3)])
def test_left_to_itself_the_loop_pads_small_batches(rows, count):
    model = build("llama")
    seen = calls_of(model)
    batches = {
        task: [{"input_ids": torch.arange(6, 6 + length).repeat(rows, 1)}] for task, length in LENGTHS.items()
    }
    trajectory(model, adapters_for(model), batches, steps=2, batch_tasks=None)
    # Two steps, and one batch of every task at either end of the comparison. One more, to see how much memory a pass
    # takes, if there is anything to join.
    assert len(seen) == 2 * count + 2 * count + (count == 1)


def test_explicit_positions_of_one_length_still_run_together():
    batch = {"input_ids": ids(1, 8), "position_ids": ids(1, 8)}
    (one,) = passes([batch, dict(batch)])
    assert one.inside is None


def restricted_by_hand(batch, modality):
    """Rows of one length only: the same columns are kept in all of them."""
    tokens = batch["input_ids"]
    image = (tokens == IMAGE_TOKEN).all(0)
    kept = ~image if modality == "text" else image | (tokens == START).all(0)
    by_hand = {"input_ids": tokens[:, kept]}
    return by_hand if modality == "text" else {**by_hand, "pixel_values": batch["pixel_values"]}


def started(batches):
    """A start token in front of every row, and no padding."""
    return {
        task: [
            {
                "input_ids": torch.cat([torch.full((2, 1), START), batch["input_ids"]], 1),
                "pixel_values": batch["pixel_values"],
            }
            for batch in drawn
        ]
        for task, drawn in batches.items()
    }


@pytest.mark.parametrize("name", ["Qwen2-VL", "Gemma 3 with images"])
def test_of_which_kind_tokens_are_is_restricted_with_them(name):
    model, batch = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()
    is_image = batch["input_ids"][0] == model.config.image_token_id
    kinds = "mm_token_type_ids" if name == "Qwen2-VL" else "token_type_ids"
    assert batch[kinds][0].tolist() == is_image.long().tolist()
    for modality, kept in (("text", ~is_image), ("image", is_image)):
        found = restriction(modality, find_family(model), model)(batch)
        assert torch.equal(found["input_ids"], batch["input_ids"][:, kept])
        assert torch.equal(found[kinds], batch[kinds][:, kept])
        assert ("pixel_values" in found) == (modality == "image")
        assert torch.isfinite(model(**found).logits).all()


def test_of_which_kind_tokens_are_is_padded_as_of_text():
    model = ARCHITECTURES["Qwen2-VL"].build()
    image = model.config.image_token_id
    batch = {"input_ids": torch.tensor([[image, image, 5, 6, 0], [7, image, 8, 9, 9]])}
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    batch["mm_token_type_ids"] = (batch["input_ids"] == image).long()
    family = find_family(model)
    found = {modality: restriction(modality, family, model)(batch) for modality in ("text", "image")}
    assert found["text"]["input_ids"].tolist() == [[5, 6, 0, 0], [7, 8, 9, 9]]
    assert found["image"]["input_ids"].tolist() == [[image, image], [image, 0]]
    assert found["text"]["mm_token_type_ids"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert found["image"]["mm_token_type_ids"].tolist() == [[1, 1], [1, 0]]
    with pytest.raises(ValueError, match="modality: 'text' expects batches of input_ids"):
        restriction("text", family, model)({**batch, "mm_token_type_ids": torch.zeros(2, 4)})


@pytest.mark.parametrize(("modality", "length"), [("text", 6), ("image", 5)])
def test_a_modality_is_the_joint_merge_of_inputs_made_by_hand(modality, length):
    model = llava()
    adapters, batches = adapters_for(model), started(image_batches())
    by_hand = {task: [restricted_by_hand(batch, modality) for batch in drawn] for task, drawn in batches.items()}
    assert by_hand["a"][0]["input_ids"].shape == (2, length)
    expected = trajectory(model, adapters, by_hand)
    tower = calls_of(model.model.vision_tower)
    found = trajectory(model, adapters, batches, modality=modality)
    same_course(found, expected)
    assert found.coefficients == expected.coefficients
    assert bool(tower) == (modality == "image")
    joint = trajectory(model, adapters, batches)
    assert (values(joint) - values(found)).abs().max() > 1e-4
    same_course(trajectory(model, adapters, batches, modality=modality, batch_tasks=True), found)


def test_padded_rows_are_restricted_one_by_one():
    model = llava()
    adapters = adapters_for(model)
    image = [IMAGE_TOKEN] * 4
    padded = {
        "input_ids": torch.tensor([[0, 0, START, *image, 7, 8], [START, 9, *image, 10, 11, 12]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]]),
        "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
    }
    text = {
        "input_ids": torch.tensor([[START, 7, 8, 0, 0], [START, 9, 10, 11, 12]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }
    images = {
        "input_ids": torch.tensor([[START, *image], [START, *image]]),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "pixel_values": padded["pixel_values"],
    }
    for modality, by_hand in (("text", text), ("image", images)):
        expected = trajectory(model, adapters, {task: [by_hand] for task in TASKS})
        found = trajectory(model, adapters, {task: [padded] for task in TASKS}, modality=modality)
        assert found.coefficients == expected.coefficients


def test_an_image_in_front_of_its_row_needs_no_start_token():
    model = llava()
    batches = image_batches(1)
    by_hand = {
        task: [{"input_ids": batch["input_ids"][:, :4], "pixel_values": batch["pixel_values"]}]
        for task, (batch,) in batches.items()
    }
    found = trajectory(model, adapters_for(model), batches, modality="image")
    same_course(found, trajectory(model, adapters_for(model), by_hand))


def test_modalities_are_refused_where_there_is_nothing_to_choose(model):
    decoder = llama()
    with pytest.raises(ValueError, match=r"modality: expected 'joint', .*family decoder.*found 'text'"):
        trajectory(decoder, adapters_for(decoder), text_batches(), modality="text")
    with pytest.raises(ValueError, match=r"modality: expected 'joint', .*family ViT.*found 'image'"):
        trajectory(model, adapters_for(model), {task: [{}] for task in TASKS}, modality="image")
    with pytest.raises(ValueError, match=r"modality: expected one of \['joint', 'text', 'image'\], found 'both'"):
        trajectory(decoder, adapters_for(decoder), text_batches(), modality="both")


def test_batches_that_cannot_be_restricted_are_refused():
    model = llava()
    adapters, batches = adapters_for(model), image_batches(1)

    def fails(message, modality, **changes):
        changed = {**batches, "b": [{**batches["b"][0], **changes}]}
        with pytest.raises(ValueError, match=message):
            trajectory(model, adapters, changed, modality=modality)

    whole = torch.full((2, 9), IMAGE_TOKEN)
    mask = torch.ones(2, 9, dtype=torch.long)
    fails(r"modality: 'text' expects a text token.*in rows \[0, 1\]", "text", input_ids=whole, attention_mask=mask)
    words = torch.arange(18).reshape(2, 9)
    fails(r"modality: 'image' expects an image token.*in rows \[0, 1\]", "image", input_ids=words, attention_mask=mask)
    fails(r"modality: 'text' expects batches of input_ids.*position_ids", "text", position_ids=words)
    fails(r"attention_mask: expected the shape of input_ids, \[2, 9\], found", "text", attention_mask=mask[:, 1:])
