"""What a pipeline is called with while data are recorded."""

from types import SimpleNamespace

import pytest
import torch
from pipeline_cases import FEW, PROMPTS, add, diffusers, stable_diffusion

from nsc_merge.integrations.diffusers import calibration_data


def test_arguments_of_a_prompt_come_before_those_of_all_prompts():
    pipe = stable_diffusion()
    entry = {"prompt": "ink tower", "num_inference_steps": 2, "guidance_scale": 1.0}
    found = calibration_data(pipe, {"ink": [entry, "ink boat"]}, calls=None, seed=7, **FEW)["ink"]["unet"]
    # Two steps without guidance, then four of a prompt and none side by side.
    assert [len(call["sample"]) for call in found] == [1, 1, 2, 2, 2, 2]
    # Each prompt has noise of its own, which begins its way.
    for number, start in ((0, 0), (1, 2)):
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7 + number))
        assert all(torch.equal(one, noise[0]) for one in found[start]["sample"])
    own = {"prompt": "ink tower", "generator": torch.Generator().manual_seed(3)}
    (first, *_) = calibration_data(pipe, {"ink": [own]}, calls=None, seed=7, **FEW)["ink"]["unet"]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first["sample"][0], noise[0])


def test_one_weight_is_every_adapters():
    pipe = stable_diffusion()
    one, each, none = (
        calibration_data(pipe, PROMPTS, weights, calls=1, **FEW) for weights in (0.5, [0.5, 0.5], [0.5, 1.0])
    )
    states = [[data[name]["unet"][0]["encoder_hidden_states"] for name in ("ink", "toy")] for data in (one, each, none)]
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])
    assert not torch.equal(states[0][1], states[2][1])


@pytest.mark.parametrize("calls", [True, 1.5, "2", -1])
def test_calls_are_a_whole_number(calls):
    with pytest.raises(ValueError, match="calls: expected a whole number of at least 1, or None, found"):
        calibration_data(stable_diffusion(), PROMPTS, calls=calls, **FEW)


def test_arguments_that_a_pipeline_does_not_take_are_refused():
    """Also those that the pipeline itself would drop without a word."""
    pipe = stable_diffusion()
    for prompts, settings in ((PROMPTS, {"guidence_scale": 3}), ({"ink": [{"prompt": "a", "guidence_scale": 3}]}, {})):
        with pytest.raises(ValueError, match="guidence_scale: StableDiffusionPipeline takes no such argument"):
            calibration_data(pipe, prompts, **FEW, **settings)


@pytest.mark.parametrize("fails", [False, True])
def test_models_are_left_without_hooks(fails):
    """Which would keep every later call in memory."""
    pipe = stable_diffusion()
    models = [pipe.unet, pipe.text_encoder]
    before, active = [len(model._forward_pre_hooks) for model in models], pipe.get_active_adapters()
    if fails:
        # Of a shape that the pipeline finds to be wrong while it runs.
        with pytest.raises((ValueError, RuntimeError)):
            calibration_data(pipe, {"ink": [{"prompt": "ink", "latents": torch.zeros(1, 3, 8, 8)}]}, **FEW)
    else:
        calibration_data(pipe, PROMPTS, calls=1, **FEW)
    assert [len(model._forward_pre_hooks) for model in models] == before
    assert pipe.get_active_adapters() == active


@pytest.mark.filterwarnings("ignore:Passing `callback:FutureWarning")
def test_two_old_arguments_are_taken_where_a_pipeline_takes_any():
    """As Stable Diffusion's, whose signature has them no more, but whose keywords do."""
    pipe, steps = stable_diffusion(), []
    told = {"callback": lambda step, *_: steps.append(step), "callback_steps": 2}
    calibration_data(pipe, {"ink": ["ink tower"]}, **FEW, **told)
    assert steps == [0, 2]


class _Processor:
    """What Qwen-Image 2.1 asks of one when the prompt is embedded already."""

    tokenizer = SimpleNamespace(encode=lambda text: [3])

    def apply_chat_template(self, messages, **options):
        return [[1, 2]]


def test_no_call_reads_keys_and_values_of_another():
    """Qwen-Image 2.1 keeps those of prompts from its first step, which a step that is computed again would take from
    whatever ran last.
    """
    torch.manual_seed(0)
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=1, context_in_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    add(transformer, ["to_q", "to_v"])
    pipe = diffusers.QwenImage21Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, processor=_Processor(),
        transformer=transformer,
    )
    pipe.latent_channels = 4
    pipe.set_progress_bar_config(disable=True)
    prompt = {"prompt_embeds": torch.randn(1, 5, 8)}
    few = {"height": 64, "width": 64, "num_inference_steps": 2}
    calls = calibration_data(pipe, {"ink": [prompt]}, **few)["ink"]["transformer"]
    assert len(calls) == 2
    assert not any("kv_cache" in call for call in calls)
    words = r"QwenImage21Transformer2DModel that compute everything anew, found kv_cache .*; use_kv_cache=False among"
    with pytest.raises(ValueError, match=words):
        calibration_data(pipe, {"ink": [prompt]}, use_kv_cache=True, **few)


def test_attention_is_that_of_the_model_alone():
    """Perturbed-attention guidance puts other attention in while it draws, for a third of the rows."""
    plain = stable_diffusion()
    pipe = diffusers.StableDiffusionPAGPipeline(**plain.components, pag_applied_layers=["mid"])
    pipe.set_progress_bar_config(disable=True)
    recorded = (calibration_data(one, {"ink": ["ink tower"]}, calls=None, **FEW) for one in (pipe, plain))
    calls, wanted = (data["ink"]["unet"] for data in recorded)
    assert [len(call["sample"]) for call in calls] == [2] * 4
    assert torch.equal(calls[3]["sample"], wanted[3]["sample"])
    with pytest.raises(ValueError, match="UNet2DConditionModel as it is outside .* pag_scale=0 leaves it out"):
        calibration_data(pipe, {"ink": ["ink tower"]}, pag_scale=3.0, **FEW)
