"""Answers of tasks' own models against transformers' generation, and distillation along them."""

from __future__ import annotations

import types

import pytest
import torch
import zoo
from architectures import ARCHITECTURES
from own_cases import merge, merged, problem_of
from torch import nn

from nsc_merge.calibration.forward_passes import Pass
from nsc_merge.methods import Problem
from nsc_merge.methods.gradient.own_answers import Writing, end_tokens, writing_after
from nsc_merge.models.traits import places_of


def generated(model, batch, most):
    """Row by row, without padding, by transformers."""
    rows = []
    for row in range(len(batch["input_ids"])):
        real = batch["attention_mask"][row].bool()
        others = {name: value[row : row + 1] for name, value in batch.items() if name != "attention_mask"}
        inputs = {**others, "input_ids": batch["input_ids"][row, real][None]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        found = model.generate(**inputs, max_new_tokens=most, do_sample=False)
        rows.append(found[0, inputs["input_ids"].shape[1] :].tolist())
    return rows


def pass_of(batch):
    return Pass(batch, (batch,), ((0,),))


def end_within(model, batch, most=4):
    """Makes the second token of the first row's answer the end, so that rows end apart."""
    model.generation_config.eos_token_id = None
    model.generation_config.eos_token_id = [generated(model, batch, most)[0][1]]


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("front", [False, True], ids=["padded at the end", "padded in front"])
@pytest.mark.parametrize("most", [2, 4])
@pytest.mark.parametrize("kept", [False, True])
def test_answers_are_those_of_generation(kind, front, most, kept):
    model, batch = zoo.build(kind), zoo.KINDS[kind].inputs(3)
    if front:
        for name in ("input_ids", "attention_mask"):
            batch[name][1] = batch[name][1].roll(2)
    end_within(model, batch)
    expected = generated(model, batch, most)
    assert len({len(answer) for answer in expected}) > 1 or most == 2
    writing = Writing("input_ids", "attention_mask", end_tokens(model))
    found = writing(lambda inputs: model(**inputs).logits, pass_of(batch), most, model if kept else None)
    ids, mask = found.inputs["input_ids"], found.inputs["attention_mask"]
    logits = model(**{**batch, **found.inputs}).logits
    weights = torch.zeros(found.predicts.shape)
    weights[found.predicts] = found.weights
    for row, answer in enumerate(expected):
        own, before = batch["attention_mask"][row].bool(), mask[row].bool()
        # An answer's last token is predicted, and not read.
        assert ids[row, before].tolist() == [*batch["input_ids"][row, own].tolist(), *answer[:-1]]
        assert logits[row, found.predicts[row]].argmax(-1).tolist() == answer
        torch.testing.assert_close(weights[row, found.predicts[row]], torch.full((len(answer),), 1 / 3 / len(answer)))
    assert ids.shape[1] == 7 or mask[:, -1].any(), "no wider than the longest row"


LONG = 9
DECODERS = [name for name, one in ARCHITECTURES.items() if one.model.endswith(("ForCausalLM", "LMHeadModel"))]
# Those that do not look a number of places back, and take positions as they are told.
KEEPING = ("GPT-2", "Llama", "Qwen2", "Qwen3", "Phi", "Mixtral")


@pytest.mark.parametrize("even", [False, True], ids=["padded", "of one length"])
@pytest.mark.parametrize("name", DECODERS)
def test_what_a_model_keeps_changes_no_answer(name, even):
    """Of every decoder, whatever it makes of padding between a text and its answer."""
    model = ARCHITECTURES[name].build()
    ids = torch.randint(5, 80, (4, 8), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(8) < torch.tensor([8, 3, 5, 8])[:, None]).long() | int(even)
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    read = []

    def note(_, given, named):
        read.append(named["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    writing = Writing("input_ids", "attention_mask", ())
    expected = writing(lambda inputs: model(**inputs).logits, pass_of(batch), LONG)
    assert len(read) == LONG - 1
    read.clear()
    found = writing(lambda inputs: model(**inputs).logits, pass_of(batch), LONG, model)
    hook.remove()
    assert torch.equal(found.inputs["input_ids"], expected.inputs["input_ids"])
    assert torch.equal(found.inputs["attention_mask"], expected.inputs["attention_mask"])
    if name in KEEPING:
        # The text, and once more with the first token of the answer; every token by itself.
        assert read == [8, 1, 9, *[1] * (LONG - 3)]


@pytest.mark.parametrize("asked", [1, 3])
def test_a_decoder_answers_from_its_start_whatever_the_encoder_reads(asked):
    """Of one length as the decoder's, too."""
    model = ARCHITECTURES["T5"].build()
    batch = {"input_ids": torch.arange(4, 4 + 2 * asked).view(2, asked), "decoder_input_ids": torch.full((2, 1), 7)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    writing = Writing("decoder_input_ids", "decoder_attention_mask", ())
    found = writing(lambda inputs: model(**inputs).logits, pass_of(batch), 4, model)
    encoded = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model.generation_config.eos_token_id = None
    written = model.generate(**encoded, decoder_start_token_id=7, max_new_tokens=3)
    assert torch.equal(found.inputs["decoder_input_ids"], written)
    assert set(found.inputs) == {"decoder_input_ids", "decoder_attention_mask"}


# With a value for every token beside its number: of Qwen it says where images are, whose positions are apart.
OTHERS = {"Qwen2-VL": "mm_token_type_ids", "Qwen3-VL": "mm_token_type_ids", "Gemma 3 with images": "token_type_ids"}


@pytest.mark.parametrize("name", [*OTHERS, "PaliGemma"])
@pytest.mark.parametrize("padding", [0, 2])
def test_what_every_token_has_goes_on_as_in_generation(name, padding):
    model, batch = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()
    model.generation_config.eos_token_id = None
    if name == "PaliGemma":
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    other = OTHERS.get(name, "token_type_ids")
    expected = model.generate(**batch, max_new_tokens=4, do_sample=False)[0].tolist()
    ends = torch.nn.functional.pad
    padded = {key: ends(batch[key], (0, padding)) for key in ("input_ids", "attention_mask", other)}
    writing = writing_after(model, "input_ids", "attention_mask")
    found = writing(lambda inputs: model(**inputs).logits, pass_of({**batch, **padded}), 5, model)
    assert found.inputs["input_ids"][0, : len(expected)].tolist() == expected
    own = 1 if name == "PaliGemma" else 0
    assert found.inputs[other][0].tolist() == [*batch[other][0].tolist(), *[own] * 4]


def test_the_place_of_an_image_ends_an_answer():
    model, batch = ARCHITECTURES["Idefics3"].build(), ARCHITECTURES["Idefics3"].inputs()
    image, writing = model.config.image_token_id, writing_after(model, "input_ids", "attention_mask")

    def predict(inputs):
        return torch.nn.functional.one_hot(torch.full(inputs["input_ids"].shape, image), 96).float()

    found = writing(predict, pass_of(batch), 4)
    assert torch.equal(found.inputs["input_ids"], batch["input_ids"])
    assert found.predicts.sum() == 1


def test_an_input_of_many_numbers_for_every_token_goes_on_as_the_last(tmp_path):
    """As Mllama's says which images a token sees."""
    model, batch = zoo.build("llama"), zoo.KINDS["llama"].inputs(3)
    sees = torch.arange(batch["input_ids"].numel() * 2).view(*batch["input_ids"].shape, 1, 2)
    read = []

    def predict(inputs):
        read.append(inputs["cross_attention_mask"])
        return model(**{name: value for name, value in inputs.items() if name != "cross_attention_mask"}).logits

    model.generation_config.eos_token_id = None
    writing = writing_after(model, "input_ids", "attention_mask")
    found = writing(predict, pass_of({**batch, "cross_attention_mask": sees}), 3)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        own = sees[row, mask]
        wanted = torch.cat([own, own[-1:], own[-1:]])
        assert torch.equal(found.inputs["cross_attention_mask"][row, : len(wanted)], wanted)
    assert [one.shape[1] for one in read] == [7, 8][: len(read)]


@pytest.mark.parametrize("distance", ["bounded", "divergence"])
@pytest.mark.parametrize("normalise", ["variance", "task"])
def test_distillation_along_answers_is_the_explicit_distance(tmp_path, distance, normalise):
    problem = problem_of("llama", tmp_path)
    own = {task: merged(problem, {one: float(one == task) for one in ("a", "b")}) for task in ("a", "b")}
    end_within(own["a"], problem.calibration["a"][0])
    problem.model.generation_config.eos_token_id = own["a"].generation_config.eos_token_id
    own["b"].generation_config.eos_token_id = own["a"].generation_config.eos_token_id
    result = merge(problem, "distill", steps=1, new_tokens=4, distance=distance, normalise=normalise)
    both = merged(problem, {"a": 0.4, "b": 0.4})

    def mean(model, task):
        """Over the rows, of the mean along the answer of each, of the distance from the task's own model."""
        batch, rows = problem.calibration[task][0], []
        for row, answer in enumerate(generated(own[task], batch, 4)):
            prompt = batch["input_ids"][row, batch["attention_mask"][row].bool()].tolist()
            ids = torch.tensor([[*prompt, *answer[:-1]]])
            with torch.no_grad():
                logits = [one(input_ids=ids).logits[0, len(prompt) - 1 :].double() for one in (own[task], model)]
            p, q = (one.softmax(-1) for one in logits)
            kept = (p - q).abs().sum(-1) / 2 if distance == "bounded" else (p * (p.log() - q.log())).sum(-1)
            assert len(kept) == len(answer)
            rows.append(kept.mean())
        return torch.stack(rows).mean().item()

    for task in ("a", "b"):
        base = mean(problem.model, task) if normalise == "task" else 1.0
        assert result.history[0]["loss"][task] == pytest.approx(mean(both, task) / base, rel=2e-4)


def test_one_token_is_what_follows_the_input(tmp_path):
    problem = problem_of("llama", tmp_path)
    plain, one = merge(problem, "distill", steps=2), merge(problem, "distill", steps=2, new_tokens={"a": 1})
    assert plain.coefficients == one.coefficients


def test_tasks_with_functions_write_where_a_mapping_names_them(tmp_path):
    problem = problem_of("llama", tmp_path)
    all_of_it = merge(problem, "distill", steps=1, new_tokens=3)

    def logits(model, batch):
        return model(**batch).logits

    mapped = merge(problem, "distill", steps=1, new_tokens={"a": 3}, outputs={"a": logits})
    number = merge(problem, "distill", steps=1, new_tokens=3, outputs={"a": logits})
    first = merge(problem, "distill", steps=1)
    losses = [one.history[0]["loss"] for one in (all_of_it, mapped, number, first)]
    assert losses[1] == {"a": losses[0]["a"], "b": losses[3]["b"]}
    assert losses[2]["b"] == losses[0]["b"] != losses[3]["b"]


def test_tasks_that_write_nothing_need_no_tokens(tmp_path):
    problem = problem_of("llama", tmp_path)
    expected = merge(problem, "distill", steps=1, new_tokens={"a": 3})
    embed = problem.model.get_input_embeddings()
    batches = {
        "a": problem.calibration["a"],
        "b": [
            {"inputs_embeds": embed(batch["input_ids"]).detach(), "attention_mask": batch["attention_mask"]}
            for batch in problem.calibration["b"]
        ],
    }
    found = merge(Problem(problem.model, problem.adapters, batches), "distill", steps=1, new_tokens={"a": 3})
    assert found.history[0]["loss"] == pytest.approx(expected.history[0]["loss"], rel=1e-5)


def test_an_answer_is_written_once_for_every_batch(tmp_path):
    problem = problem_of("llama", tmp_path, count=2)
    problem.model.generation_config.eos_token_id = None
    problem.model.config.eos_token_id = None
    calls = []
    hook = problem.model.model.register_forward_hook(lambda *_: calls.append(1))
    merge(problem, "distill", steps=4, new_tokens=3)
    hook.remove()
    # Of both batches of both tasks: two tokens written and one forward along them; four steps, and the comparison's
    # two ends on every batch.
    assert len(calls) == 2 * 2 * (2 + 1) + 2 * 4 + 2 * 2 * 2


def test_where_answers_end():
    model = zoo.build("llava")
    assert end_tokens(model) == [2]
    model.generation_config.eos_token_id = None
    assert end_tokens(model) == [2], "that of the text's config"
    model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(model) == [7, 9]
    assert end_tokens(nn.Linear(1, 1)) == []
    plain = nn.Linear(1, 1)
    plain.config = types.SimpleNamespace(eos_token_id=4)
    assert end_tokens(plain) == [4]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"new_tokens": 0}, "new_tokens: expected a whole number of at least 1, found 0"),
        ("llama", {"new_tokens": {"a": 2.5}}, r"new_tokens\['a'\]: expected a whole number of at least 1, found 2.5"),
        ("llama", {"new_tokens": {"c": 2}}, r"new_tokens: expected counts for some of \['a', 'b'\], found one for 'c'"),
        ("llama", {"new_tokens": 2, "positions": "all"}, "positions: along an answer expected None or 'last'"),
        ("llama", {"new_tokens": {"a": 2}, "likelihood": "gaussian"}, "new_tokens: the output of task 'a' is values"),
        ("llama", {"new_tokens": 2, "likelihood": "gaussian"}, "new_tokens: 2 is for tasks that are compared by"),
        ("vit", {"new_tokens": 2}, "new_tokens: ViTForImageClassification writes no answers; expected 1, found 2"),
        ("llama-cls", {"new_tokens": 2}, r"new_tokens: answers are written from logits \[N, T, V\] .* found \[3, 3\]"),
    ],
)
def test_what_is_wrong_with_new_tokens_is_named(tmp_path, kind, options, message):
    problem = problem_of(kind, tmp_path)
    if kind == "llama-cls":
        problem.model.config.pad_token_id = 0
    with pytest.raises(ValueError, match=message):
        merge(problem, "distill", steps=1, **options)


def test_batches_that_answers_cannot_be_written_after(tmp_path):
    problem = problem_of("llama", tmp_path)
    with_positions = {
        task: [{**batch, "position_ids": torch.arange(7).expand(3, 7)} for batch in batches]
        for task, batches in problem.calibration.items()
    }
    with pytest.raises(ValueError, match=r"found 'position_ids' with a value for every token, \[3, 7\]"):
        merge(Problem(problem.model, problem.adapters, with_positions), "distill", steps=1, new_tokens=2)
    embedded = {
        task: [{"inputs_embeds": torch.zeros(3, 7, 32)} for _ in batches]
        for task, batches in problem.calibration.items()
    }
    with pytest.raises(ValueError, match=r"answers are written after input_ids, found only \['inputs_embeds'\]"):
        merge(Problem(problem.model, problem.adapters, embedded), "distill", steps=1, new_tokens=2)


def test_the_place_of_audio_ends_an_answer():
    model = types.SimpleNamespace(config=types.SimpleNamespace(audio_token_index=7, eos_token_id=2, model_type="heard"))
    assert writing_after(model, "input_ids", "attention_mask").ends == [2, 7]
    assert places_of(model) == {"input_features": 7, "input_values": 7, "audio_input_features": 7}
    model.config = types.SimpleNamespace(audio_token_id=0, image_token_id=3)
    assert set(places_of(model).items()) > {("pixel_values", 3), ("input_features", 0)}
