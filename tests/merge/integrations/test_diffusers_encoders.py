"""Merges of a pipeline's text encoders by what the pipeline reads of them."""

from types import SimpleNamespace

import pytest
import torch
from pipeline_cases import FEW, PROMPTS, stable_diffusion, stable_diffusion_xl

from nsc_merge.integrations.diffusers import calibration_data, merge
from nsc_merge.integrations.diffusers.merging import _embedded


def last_states(found):
    return found.last_hidden_state


def last_but_one(found):
    return found.hidden_states[-2]


def last_but_one_and_whole(found):
    return torch.cat([found.hidden_states[-2], found.text_embeds[:, None]], 1)


# As encode_prompt has it: SD takes the last states, SDXL the last but one of both and what the second projects.
READ = [
    (stable_diffusion, "text_encoder", last_states),
    (stable_diffusion_xl, "text_encoder", last_but_one),
    (stable_diffusion_xl, "text_encoder_2", last_but_one_and_whole),
]


@pytest.mark.parametrize(("make", "part", "read"), READ)
def test_distillation_starts_at_the_distance_of_what_a_pipeline_reads(make, part, read):
    """By a computation of its own: the mean square of the difference over the variance of the adapter's own values."""
    pipe = make()
    model = getattr(pipe, part)
    data = calibration_data(pipe, PROMPTS, calls=1, **FEW)
    names = list(PROMPTS)
    common = {"distance": "divergence", "init": 0.3, "data": data, "steps": 1, "progress": False}
    first = merge(pipe, names, None, "found", "distill", **common)[part].result.history[0]
    merge(pipe, names, [0.3, 0.3], "mean")

    def values(name, task):
        pipe.set_adapters(name)
        with torch.no_grad():
            return read(model(**data[task][part][0])).flatten(0, -2).double()

    for task in names:
        own, mean = values(task, task), values("mean", task)
        wanted = float((mean - own).square().mean() / own.var(0, False).mean())
        assert wanted > 1e-3
        assert first["loss"][task] == pytest.approx(wanted, rel=1e-4)


def test_what_stands_between_text_and_denoiser_is_read_for_the_video_and_its_sound():
    """LTX-2's connectors, which give a mask as the third."""
    video, sound, mask = torch.ones(1, 3, 4), torch.zeros(1, 2, 4), torch.ones(1, 3)
    assert torch.equal(_embedded(lambda: (video, sound, mask), {}), torch.cat([video, sound], 1))
    assert _embedded(lambda: (video, sound[..., :2], mask), {}) is video


def test_of_an_encoder_that_projects_to_another_width_the_states_are_read():
    states, wide = torch.ones(1, 3, 4), torch.zeros(1, 6)
    found = SimpleNamespace(last_hidden_state=states, hidden_states=None, text_embeds=wide)
    assert _embedded(lambda **call: found if call == {"input_ids": 1} else None, {"input_ids": 1}) is states


def test_one_adapter_takes_its_weights_in_a_dictionary():
    """As ``set_adapters`` does, for data and for the merge; of several adapters it would be the first one's alone."""
    pipe = stable_diffusion()
    weights = {"unet": 0.5, "text_encoder": 0.25}
    data = calibration_data(pipe, {"ink": PROMPTS["ink"]}, weights, calls=1, **FEW)
    other = calibration_data(pipe, {"ink": PROMPTS["ink"]}, [weights], calls=1, **FEW)
    plain = calibration_data(pipe, {"ink": PROMPTS["ink"]}, calls=1, **FEW)
    states = [one["ink"]["unet"][0]["encoder_hidden_states"] for one in (data, other, plain)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    merged = merge(pipe, ["ink"], weights)
    scalings = {part: set(one.result.adapters["ink"].factors.values()) for part, one in merged.items()}
    # Alpha 4 by rank 2 times the weight.
    found = {part: {factor.scaling for factor in factors} for part, factors in scalings.items()}
    assert found == {"unet": {1.0}, "text_encoder": {0.5}}


def test_calls_are_of_the_adapters_that_a_model_holds():
    """An adapter that one model lacks is merged in the others, and asks for no calls there."""
    pipe = stable_diffusion()
    pipe.text_encoder.delete_adapter("toy")
    data = calibration_data(pipe, PROMPTS, calls=1, **FEW)
    assert {name: set(parts) for name, parts in data.items()} == {"ink": {"unet", "text_encoder"}, "toy": {"unet"}}
    merged = merge(pipe, ["ink", "toy"], method="match", data=data, steps=1, progress=False)
    held = {part: {name for one in found.coefficients.values() for name in one} for part, found in merged.items()}
    assert held == {"unet": {"ink", "toy"}, "text_encoder": {"ink"}}
