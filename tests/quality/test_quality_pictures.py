"""The pictures, questions and answers of the vision-language suite."""

from __future__ import annotations

import torch
from quality_cases import PICTURES

from bench.quality.suites import llava
from nsc_merge.demo.data import digit_split


def test_pictures_show_what_is_said_of_them():
    pictures = llava.make_pictures(40, "val")
    assert torch.equal(pictures.pixels, llava.make_pictures(40, "val").pixels)
    assert not torch.equal(pictures.pixels, llava.make_pictures(40, "val", seed=1).pixels)
    assert torch.equal(pictures.digits < 0, pictures.colours < 0)
    assert (pictures.digits >= 0).any(1).all()
    pixels = pictures.pixels * 0.3 + 0.3
    palette = torch.tensor(list(llava.COLOURS.values()))
    for half in range(2):
        part = pixels[..., : llava.SIZE // 2] if half == 0 else pixels[..., llava.SIZE // 2 :]
        for image, colour in zip(part, pictures.colours[:, half].tolist(), strict=True):
            brightest = image.flatten(1)[:, image.sum(0).argmax()]
            if colour < 0:
                assert image.max() <= 0.25 + 1e-6
            else:
                assert (palette - brightest).abs().sum(1).argmin() == colour
    splits = [set(indices.tolist()) for indices in digit_split().values()]
    assert not any(one & two for number, one in enumerate(splits) for two in splits[number + 1 :])


def test_answers():
    pictures = llava.Pictures(
        torch.zeros(3, 3, 24, 24),
        torch.tensor([[7, 2], [-1, 3], [4, -1]]),
        torch.tensor([[0, 2], [-1, 1], [3, -1]]),
    )

    def answers(task: str) -> list[str]:
        labels = llava.make_examples(task, pictures).labels
        return [" ".join(llava.WORDS[token] for token in row) for row in labels.view(3, -1).tolist()]

    assert answers("digit") == ["7", "nothing", "4"]
    assert answers("colour") == ["blue", "green", "nothing"]
    assert answers("count") == ["2", "1", "1"]
    assert answers("larger") == ["yes", "no", "yes"]
    assert answers("describe") == [
        "red 7 blue 2 <end>",
        "nothing nothing green 3 <end>",
        "yellow 4 nothing nothing <end>",
    ]
    assert answers("caption") == [
        "2 blue 7 red <end>",
        "3 green nothing nothing <end>",
        "nothing nothing 4 yellow <end>",
    ]


def test_a_caption_is_right_where_greedy_decoding_writes_it(language_work):
    suite = llava.load(language_work, 0, log=lambda line: None, progress=False, settings=PICTURES)
    inputs, labels = suite.labelled("caption", "test")[0]
    prompt = inputs["input_ids"].shape[1] - labels.shape[1] + 1
    written = inputs["input_ids"][:, :prompt]
    with torch.no_grad():
        for _ in range(labels.shape[1]):
            logits = suite.model(input_ids=written, pixel_values=inputs["pixel_values"]).logits
            written = torch.cat([written, logits[:, -1].argmax(-1)[:, None]], 1)
        # The same with what was written in place of the labels, so that some are right.
        half = len(labels) // 2
        wanted = torch.cat([written[:half, prompt:], labels[half:]])
        inputs["input_ids"] = torch.cat([written[:, :prompt], wanted[:, :-1]], 1)
        quality = suite.quality("caption", suite.output("caption", suite.model, inputs), wanted)
    assert quality[:half].all()
    assert torch.equal(quality.bool(), (written[:, prompt:] == wanted).all(1))
    # Calibration stops at the prompt: what follows is a label.
    assert suite.calibration(4, 1)["caption"][0]["input_ids"].shape == (4, prompt)
