"""Merges of a pipeline's adapters by what its models are called with while it makes images by each of them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoKrConfig
from pipeline_cases import FEW, PROMPTS, diffusers, stable_diffusion, stable_diffusion_xl, wan, wan_prompts, z_image

import nsc_merge
from nsc_merge.integrations.diffusers import calibration_data, merge, save
from nsc_merge.methods.task_outputs import output_in, predicted_latents
from nsc_merge.models.bases.adapted import without_adapters
from nsc_merge.models.block_finding import described


def recorded(pipe, **options):
    prompts = wan_prompts() if isinstance(pipe, diffusers.WanPipeline) else PROMPTS
    return calibration_data(pipe, prompts, **{**FEW, **options})


def latents(pipe, prompt="ink tower", **arguments):
    given = {**FEW, "output_type": "latent", "generator": torch.Generator().manual_seed(5), **arguments}
    if isinstance(pipe, diffusers.WanPipeline):
        return pipe(**wan_prompts()["ink"][0], **given).frames
    return pipe(prompt, **given).images


EVERY = [stable_diffusion, stable_diffusion_xl, wan]


@pytest.mark.parametrize("make", EVERY)
def test_recorded_are_the_calls_of_each_adapter_alone(make):
    pipe = make()
    pipe.set_adapters(["ink", "toy"], [0.2, 0.9])
    before = latents(pipe)
    weight = dict.fromkeys(pipe.get_list_adapters(), 0.5)
    data = recorded(pipe, weights=[weight, 2.0], calls=None, seed=7)
    assert torch.equal(latents(pipe), before)
    for name, value in (("ink", weight), ("toy", 2.0)):
        pipe.set_adapters([name], [value])
        seen = {component: [] for component in pipe.get_list_adapters()}
        handles = [
            getattr(pipe, component).register_forward_hook(
                lambda _, __, ___, output, to=found: to.append(copy.deepcopy(output)), with_kwargs=True
            )
            for component, found in seen.items()
        ]
        prompts = wan_prompts()[name] if make is wan else [{"prompt": one} for one in PROMPTS[name]]
        for number, prompt in enumerate(prompts):
            pipe(**prompt, **FEW, output_type="latent", generator=torch.Generator().manual_seed(7 + number))
        for handle in handles:
            handle.remove()
        assert set(data[name]) == set(seen)
        for component, found in seen.items():
            assert len(data[name][component]) == len(found) > 0
            for call, output in zip(data[name][component], found, strict=True):
                with torch.no_grad():
                    again = getattr(pipe, component)(**call)
                torch.testing.assert_close(again[0], output[0], rtol=0, atol=0)


def test_calls_are_drawn_from_all_parts_of_the_way():
    pipe = stable_diffusion()
    every = recorded(pipe, calls=None)["ink"]
    few, again = (recorded(pipe, calls=2)["ink"] for _ in range(2))
    assert [len(every[one]) for one in ("unet", "text_encoder")] == [2 * 4, 2 * 2]
    assert [len(few[one]) for one in ("unet", "text_encoder")] == [2 * 2, 2 * 2]
    times = [int(call["timestep"]) for call in few["unet"]]
    assert times == [int(call["timestep"]) for call in again["unet"]]
    way = [int(call["timestep"]) for call in every["unet"][:4]]
    assert way == sorted(way, reverse=True)
    assert all(times[start] in way[:2] and times[start + 1] in way[2:] for start in (0, 2))
    # Other noise for every prompt.
    assert not torch.equal(every["unet"][0]["sample"], every["unet"][4]["sample"])
    assert {one.device.type for call in every["unet"] for one in call.values()} == {"cpu"}


def test_adapters_that_are_disabled_are_recorded_and_stay_disabled():
    pipe = stable_diffusion()
    wanted = recorded(pipe)["ink"]["unet"][-1]["sample"]
    pipe.disable_lora()
    bare, frozen = latents(pipe), [one.requires_grad for one in pipe.unet.parameters()]
    torch.testing.assert_close(recorded(pipe)["ink"]["unet"][-1]["sample"], wanted, rtol=0, atol=0)
    assert torch.equal(latents(pipe), bare)
    assert [one.requires_grad for one in pipe.unet.parameters()] == frozen


@pytest.mark.parametrize("make", EVERY)
def test_what_nsc_measures_is_no_attention_to_the_prompt(make):
    pipe = make()
    model = pipe.transformer if make is wan else pipe.unet
    held = nsc_merge.load_adapter(model, "ink").factors
    # Their projections of the time are adapted as well, in lists that are as long.
    found = described(without_adapters(model), [*held, *([] if make is wan else every_projection(model))])
    assert found["score_modules"][0].endswith("attn1.to_v")
    assert not any("attn2" in one for one in found["score_modules"])


def every_projection(model):
    return [path for path, _ in model.named_modules() if path.endswith("time_emb_proj")]


def test_a_second_attention_to_the_images_themselves_is_measured():
    """diffusers' blocks of motion have two of these."""
    model = diffusers.UNetMotionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"), num_attention_heads=2,
        up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"), motion_num_attention_heads=2,
    )
    assert described(model)["score_modules"][0] == "transformer_blocks.0.attn2.to_v"


SMALL = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
MEASURED = {
    # Of a block that has a video attend to its sound as well, and the sound to both.
    "LTX2VideoTransformer3DModel": (
        {**SMALL, "in_channels": 4, "cross_attention_dim": 16, "audio_in_channels": 4, "audio_num_attention_heads": 2,
         "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8, "caption_channels": 8},
        "transformer_blocks", "attn1.to_v",
    ),
    "Kandinsky5Transformer3DModel": (
        {"in_visual_dim": 4, "in_text_dim": 8, "in_text_dim2": 8, "time_dim": 8, "out_visual_dim": 4, "model_dim": 8,
         "ff_dim": 16, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (2, 4, 2)},
        "visual_transformer_blocks", "self_attention.to_value",
    ),
    "Flux2Transformer2DModel": (
        {**SMALL, "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 8,
         "axes_dims_rope": [2, 2, 2, 2]},
        "single_transformer_blocks", "attn.to_qkv_mlp_proj",
    ),
    # Whose projections of the prompt are a longer list than its blocks.
    "HiDreamImageTransformer2DModel": (
        {**SMALL, "patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "text_emb_dim": 8,
         "caption_channels": [8, 8], "num_routed_experts": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8),
         "llama_layers": (0, 1, 1)},
        "single_stream_blocks", "block.attn1.to_v",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MEASURED)
def test_measured_are_the_values_of_the_images_or_all_that_is_in_one_weight_with_them(kind):
    settings, blocks, measured = MEASURED[kind]
    with torch.device("meta"):
        found = described(getattr(diffusers, kind)(**settings))
    assert found["block"] == rf"^(?:{blocks})\.(\d+)\."
    assert found["score_modules"][0] == measured


FEW_STEPS = {"steps": 3, "progress": False}
METHODS = [("nsc", FEW_STEPS), ("match", FEW_STEPS), ("distill", FEW_STEPS), ("regmean", {}), ("fisher", {"rank": 5})]


@pytest.mark.parametrize("make", EVERY)
def test_methods_that_need_data_merge_every_model_and_are_saved(tmp_path, make):
    pipe = make()
    data = recorded(pipe, calls=2)
    pipe.set_adapters("toy", 0.4)
    before = latents(pipe)
    for method, options in METHODS:
        merged = merge(pipe, ["ink", "toy"], [1.0, 0.5], method, method, data=data, **options)
        assert set(merged) == set(pipe.get_list_adapters())
        assert torch.equal(latents(pipe), before)
        for one in merged.values():
            assert one.result.method == method
            assert all(set(values) == {"ink", "toy"} for values in one.coefficients.values())
    pipe.set_adapters("distill")
    wanted = latents(pipe)
    assert (wanted - before).abs().max() > 1e-3
    assert save(pipe, "distill", tmp_path / "out") == tmp_path / "out"
    other = make()
    other.load_lora_weights(tmp_path / "out", adapter_name="read")
    if make is wan:
        other.load_lora_weights(tmp_path / "out" / "transformer_2", adapter_name="read", load_into_transformer_2=True)
    other.set_adapters("read")
    torch.testing.assert_close(latents(other), wanted, rtol=1e-5, atol=1e-5)


def predicted(model, call, name, weight):
    model.set_adapters([name], [weight])
    with torch.no_grad():
        return model(**call).sample


@pytest.mark.parametrize("make", [stable_diffusion_xl, wan])
def test_distillation_starts_at_and_lowers_the_distance_to_what_each_adapter_alone_predicts(make):
    """By a computation of its own: the mean square of the difference, of latents with their channels as values, over
    the variance of the adapter's own predictions."""
    pipe = make()
    part = "transformer" if make is wan else "unet"
    model = getattr(pipe, part)
    data = recorded(pipe, calls=2)
    every = {name: every[part] for name, every in data.items()}
    weights = {"ink": 1.0, "toy": 0.5}
    wanted = {name: [predicted(model, call, name, weights[name]) for call in calls] for name, calls in every.items()}
    common = {"distance": "divergence", "init": 0.3, "data": data, "progress": False}
    found = merge(pipe, list(weights), [*weights.values()], "found", "distill", steps=40, lr=0.05, **common)[part]
    merge(pipe, list(weights), [0.3 * one for one in weights.values()], "mean")

    def distances(name):
        total = {}
        for task, calls in every.items():
            rows = [(predicted(model, call, name, 1.0) - own) for call, own in zip(calls, wanted[task], strict=True)]
            own = torch.cat([one.movedim(1, -1).flatten(0, -2) for one in wanted[task]]).double()
            total[task] = float(torch.stack([one.square().mean() for one in rows]).mean() / own.var(0, False).mean())
        return total

    before, after = distances("mean"), distances("found")
    first = found.result.history[0]
    # Of the first batch of each task, by the variance within it.
    for task, calls in every.items():
        own = wanted[task][0].movedim(1, -1).flatten(0, -2).double()
        away = predicted(model, calls[0], "mean", 1.0) - wanted[task][0]
        assert first["loss"][task] == pytest.approx(float(away.square().mean() / own.var(0, False).mean()), rel=1e-4)
    assert sum(after.values()) < sum(before.values())


def test_images_that_come_in_a_list_are_compared():
    pipe = z_image()
    text = {name: [{"prompt_embeds": [torch.full((3, 8), value)]}] for name, value in (("ink", 0.3), ("toy", -0.2))}
    data = calibration_data(pipe, text, calls=1, guidance_scale=0.0, **FEW)
    found = {}
    common = {"data": data, "init": 0.3, "steps": 2, "progress": False}
    for method, options in (("match", {}), ("distill", {"distance": "divergence"})):
        merged = merge(pipe, ["ink", "toy"], None, method, method, **common, **options)
        found[method] = merged["transformer"].result.history
    merge(pipe, ["ink", "toy"], [0.3, 0.3], "mean")
    for task, calls in data.items():
        own, mean = (
            torch.stack(predicted(pipe.transformer, calls["transformer"][0], name, 1.0)).movedim(1, -1)
            for name in (task, "mean")
        )
        away = float((mean - own).square().mean())
        assert found["match"][0]["loss"][task] == pytest.approx(away, rel=1e-4)
        spread = float(own.flatten(0, -2).double().var(0, False).mean())
        assert found["distill"][0]["loss"][task] == pytest.approx(away / spread, rel=1e-4)


def test_the_sound_of_a_video_is_compared_with_it_where_it_is_as_wide():
    video, sound = torch.ones(1, 3, 4), torch.zeros(1, 2, 4)
    whole = predicted_latents(SimpleNamespace(sample=video, audio_sample=sound))
    assert torch.equal(whole, torch.cat([video, sound], 1))
    assert predicted_latents(SimpleNamespace(sample=video, audio_sample=sound[..., :2])) is video
    assert predicted_latents(SimpleNamespace(sample=[video, video[:, :2]])) is None


def test_one_adapter_is_found_again_with_its_weight():
    pipe = stable_diffusion()
    data = recorded(pipe, weights=[1.5, 1.0], calls=2)
    merge(pipe, ["ink"], [1.5], "found", "distill", data=data, steps=150, lr=0.05, progress=False)
    pipe.set_adapters("ink", 1.5)
    wanted = latents(pipe)
    pipe.set_adapters("ink", 0.6)
    start = (latents(pipe) - wanted).norm()
    pipe.set_adapters("found")
    assert (latents(pipe) - wanted).norm() < 0.05 * start


def test_batches_with_tensors_in_dictionaries_are_run_one_by_one():
    """Two of them do not say whether they agree."""
    pipe = stable_diffusion_xl()
    data = recorded(pipe, calls=1)
    for calls in data.values():
        for call in calls["unet"]:
            call["timestep"] = call["timestep"].expand(len(call["sample"]))
    merged = merge(pipe, ["ink", "toy"], None, "found", "nsc", data=data, steps=2, progress=False)
    assert set(merged) == {"unet", "text_encoder", "text_encoder_2"}


def test_bad_input_is_refused_before_an_image_is_made(tmp_path, monkeypatch):
    pipe = stable_diffusion()
    data = recorded(pipe, calls=1)

    def never(*_, **__):
        raise AssertionError("an image was made")

    monkeypatch.setattr(type(pipe.unet), "forward", never)
    for prompts, options, message in (
        ({"x": ["a"]}, {}, r"prompts: expected a mapping with some of the adapters \['ink', 'toy'\], found \['x'\]"),
        (["ink"], {}, "prompts: expected a mapping with some of the adapters"),
        ({"ink": "a tower"}, {}, r"prompts\['ink'\]: expected a list of prompts"),
        ({"ink": []}, {}, r"prompts\['ink'\]: expected a list of prompts"),
        ({"ink": [1]}, {}, r"prompts\['ink'\]: expected a list of prompts"),
        (PROMPTS, {"calls": 0}, "calls: expected a whole number of at least 1, or None, found 0"),
        (PROMPTS, {"weights": [1.0]}, r"weights: expected one for each of \['ink', 'toy'\], found 1"),
        (PROMPTS, {"weights": {"unet": 0.5}}, "weights: expected a list with an entry for each adapter"),
        (PROMPTS, {"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs: its scale is one of adapters"),
        (
            {"ink": ["ink"], "toy": [{"prompt": "toy", "cross_attention_kwargs": {"scale": 0.5}}]},
            {},
            "cross_attention_kwargs: its scale is one of adapters",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            calibration_data(pipe, prompts, **options)
    given = {name: {"unet": calls["unet"]} for name, calls in data.items()}
    with pytest.raises(ValueError, match=r"data: method 'nsc' needs calls of text_encoder for each .*'ink', 'toy'\]"):
        merge(pipe, ["ink", "toy"], method="nsc", data=given)
    with pytest.raises(ValueError, match=r"adapter_name: expected one of \['ink', 'toy'\], found 'x'"):
        save(pipe, "x", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pipe.text_encoder.add_adapter(LoKrConfig(r=2, target_modules=["q_proj"]), adapter_name="k")
    with pytest.raises(ValueError, match=r"adapter_name: 'k' is no LoRA in \['text_encoder'\]"):
        save(pipe, "k", tmp_path / "out")


def test_models_that_do_not_compute_what_their_adapters_say_are_refused():
    pipe = stable_diffusion()
    data = recorded(pipe, calls=1)
    pipe.unet.fuse_qkv_projections()
    for run in (lambda: recorded(pipe), lambda: merge(pipe, ["ink"], method="match", data=data)):
        with pytest.raises(ValueError, match=r"pipe.unet with fused .* pipe.unet.unfuse_qkv_projections\(\) first"):
            run()
    pipe.unet.unfuse_qkv_projections()
    other = wan()
    other.transformer.enable_cache(diffusers.FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"pipe.transformer with a cache .* pipe.transformer.disable_cache\(\) first"):
        calibration_data(other, {"ink": ["a tower"]})


@pytest.mark.parametrize("method", ["nsc", "distill"])
def test_a_model_that_recomputes_its_blocks_is_merged_as_any_other(method):
    pipe = stable_diffusion()
    data = recorded(pipe, calls=1)
    options = {"data": data, "steps": 1, "progress": False}
    wanted = merge(pipe, ["ink", "toy"], None, "a", method, **options)["unet"]
    pipe.unet.enable_gradient_checkpointing()
    found = merge(pipe, ["ink", "toy"], None, "b", method, **options)["unet"]
    assert pipe.unet.is_gradient_checkpointing
    assert found.coefficients == wanted.coefficients


def test_models_that_are_stored_in_eight_bits_are_refused_where_data_are_needed():
    pipe = stable_diffusion()
    data = recorded(pipe, calls=1)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for call in (lambda: recorded(pipe), lambda: merge(pipe, ["ink", "toy"], method="nsc", data=data)):
        with pytest.raises(ValueError, match=r"found pipe.unet in layerwise casting.*without enable_layerwise_casting"):
            call()


@pytest.mark.parametrize(
    ("shape", "config", "found"),
    [
        ((2, 4, 8, 9), {"out_channels": 4}, (2, 8, 9, 4)),
        ((2, 4, 3, 8, 9), {"out_channels": 4}, (2, 3, 8, 9, 4)),
        ((2, 3, 4, 8, 9), {"out_channels": 4}, (2, 3, 8, 9, 4)),
        ((2, 3, 8, 9, 4), {"out_visual_dim": 4}, (2, 3, 8, 9, 4)),
        ((2, 4, 8, 9), {}, (2, 8, 9, 4)),
        ((2, 4, 4, 8), {"out_channels": 4}, (2, 4, 8, 4)),
        ((2, 7, 4), {"out_channels": 7}, (2, 7, 4)),
    ],
)
def test_channels_are_the_values_of_a_position(shape, config, found):
    """Images, videos, those of CogVideoX and Kandinsky 5, models that do not say, and tokens."""
    latents = torch.arange(float(torch.Size(shape).numel())).view(shape)
    model = SimpleNamespace(config=SimpleNamespace(**config))
    taken = output_in(SimpleNamespace(sample=latents), model, {}, values=True)
    assert taken.shape == found
    last = shape.index(found[-1], 1) if len(shape) > 3 else 2
    assert torch.equal(taken[0].flatten(0, -2)[0], latents[0].movedim(last - 1, -1).flatten(0, -2)[0])


def test_models_that_were_never_called_are_named():
    pipe = stable_diffusion()
    embedded = [{"prompt_embeds": torch.zeros(1, 6, 8), "negative_prompt_embeds": torch.zeros(1, 6, 8)}]
    assert set(calibration_data(pipe, {"ink": embedded}, **FEW)["ink"]) == {"unet"}
    pipe.unet.delete_adapters("toy")
    with pytest.raises(ValueError, match=r"prompts\['toy'\]: expected calls of \['text_encoder'\], found none"):
        calibration_data(pipe, {"toy": embedded}, **FEW)
