"""Pipelines of diffusers with several LoRA adapters: fused, and merged into one, against diffusers' own output."""

import runpy
from pathlib import Path

import pytest
import torch
from peft import LoKrConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from pipeline_cases import add, decoder, diffusers, unet
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import nsc_merge
from nsc_merge.integrations.diffusers import accelerate, merge

EXAMPLE = Path(__file__).parents[3] / "examples" / "integrations" / "diffusers_loras.py"
NAMES = ["a", "b", "c"]
TARGETS = ["to_q", "to_v", "to_out.0", "add_k_proj", "proj_mlp", "proj_out", "linear"]
SIZE = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}


def unet_pipeline():
    """Stable Diffusion's, with LoRA on convolutions as well, and in its text encoder of some adapters."""
    torch.manual_seed(0)
    model = unet(cross_attention_dim=8)
    config = CLIPTextConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
    )
    add(model, ["to_q", "to_v", "conv1"], NAMES, 0.2)
    text = CLIPTextModel(config)
    add(text, ["q_proj", "v_proj"], NAMES[:2], 0.2)
    pipe = diffusers.StableDiffusionPipeline(
        vae=decoder(), text_encoder=text, tokenizer=None, unet=model,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit_pipeline():
    """Flux's, of a transformer alone."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=[4, 4, 8],
    )
    add(transformer, TARGETS, NAMES, 0.2)
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=decoder(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe, **arguments):
    generator = torch.Generator().manual_seed(2)
    if isinstance(pipe, diffusers.FluxPipeline):
        text = {"prompt_embeds": torch.randn(1, 4, 8, generator=generator)}
        text["pooled_prompt_embeds"] = text["prompt_embeds"][:, 0]
    else:
        tokens = torch.randint(2, 16, (1, 8), generator=generator)
        with torch.no_grad():
            embeds = pipe.text_encoder(tokens).last_hidden_state
        text = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds)}
    return torch.from_numpy(pipe(**text, **SIZE, generator=generator, **arguments).images)


def alike(found, wanted):
    """To float32's rounding, in pixels from 0 to 1."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)


BLOCKWISE = {"unet": {"down": 0.5, "mid": 0.2, "up": {"block_0": [0.9, 0.1]}}, "text_encoder": 0.3}
WEIGHTS = {
    unet_pipeline: [None, 0.6, [0.7, 0.5, -0.4], [BLOCKWISE, 0.5, {"unet": 0.0}]],
    dit_pipeline: [None, 0.6, [0.7, 0.5, -0.4], [{"transformer": 0.3}, 0.5, None]],
}
CASES = [(make, weights) for make, every in WEIGHTS.items() for weights in every]


@pytest.mark.parametrize(("make", "weights"), CASES)
def test_images_are_those_of_set_adapters(make, weights):
    pipe = make()
    pipe.set_adapters("b", 0.9)
    alone = image(pipe)
    pipe.set_adapters(NAMES, weights)
    wanted = image(pipe)
    assert (wanted - alone).abs().max() > 1e-3
    with accelerate(pipe) as running:
        alike(image(pipe), wanted)
        pipe.set_adapters("b", 0.9)
        alike(image(pipe), alone)
        assert set(running.layers) == set(pipe.get_list_adapters())
    assert not any("forward" in vars(module) for model in pipe.components.values() if isinstance(model, nn.Module)
                   for module in model.modules())
    required = {one: one.requires_grad for model in adapted(pipe) for one in model.parameters()}
    merged = merge(pipe, NAMES, weights)
    assert set(merged) == set(running.layers)
    assert all(set(one.errors.values()) == {0.0} for one in merged.values())
    # Beside the others, of which none changed.
    assert torch.equal(image(pipe), alone)
    assert all(one.requires_grad == before for one, before in required.items())
    pipe.set_adapters("merged")
    alike(image(pipe), wanted)
    with accelerate(pipe):
        alike(image(pipe), wanted)
    pipe.set_adapters(NAMES, weights)
    alike(image(pipe), wanted)
    pipe.set_adapters("merged")
    pipe.fuse_lora(components=list(merged), adapter_names=["merged"])
    alike(image(pipe), wanted)


def adapted(pipe):
    return [getattr(pipe, component) for component in pipe.get_list_adapters()]


@pytest.mark.parametrize("make", [unet_pipeline, dit_pipeline])
def test_accelerated_layers_call_the_operator_once_each(make, monkeypatch):
    """Three adapters of a linear are one call, also under a scale of the call and while fused by diffusers."""
    from nsc_kernels.integrations import peft as fused

    pipe, calls = make(), []
    wanted_calls = fused.merged_lora
    monkeypatch.setattr(fused, "merged_lora", lambda *arguments: calls.append(1) or wanted_calls(*arguments))
    pipe.set_adapters(NAMES, [0.7, 0.5, -0.4])
    scaled = {"joint_attention_kwargs" if make is dit_pipeline else "cross_attention_kwargs": {"scale": 0.5}}
    wanted = image(pipe, **scaled)
    model = pipe.transformer if make is dit_pipeline else pipe.unet
    with accelerate(pipe) as running:
        fits = next(iter(running.layers.values()))
        layers = [one for one in model.modules() if isinstance(one, LoraLayer)]
        assert fits == sum(isinstance(one.base_layer, nn.Linear) for one in layers)
        alike(image(pipe, **scaled), wanted)
        assert len(calls) == fits * SIZE["num_inference_steps"] + running.layers.get("text_encoder", 0)
        calls.clear()
        plain = image(pipe)
        pipe.fuse_lora(components=list(running.layers))
        calls.clear()
        alike(image(pipe), plain)
        assert not calls
        pipe.unfuse_lora(components=list(running.layers))
    running.remove()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ties", {"rank": 4, "density": 0.5}),
        ("knots_ties", {}),
        ("core_space", {"merge": "ties"}),
        ("magnitude_prune", {"rank": 3, "density": 0.5}),
        ("svd", {"rank": 2}),
    ],
)
@pytest.mark.parametrize("make", [dit_pipeline, unet_pipeline])
def test_other_methods_merge_what_the_weights_make_of_the_adapters(make, method, options):
    pipe = make()
    pipe.set_adapters(NAMES)
    before = image(pipe)
    merged = merge(pipe, NAMES, [0.5, 0.4, 0.3], "mine", method=method, **options)
    assert torch.equal(image(pipe), before)
    for component, one in merged.items():
        weights = [0.5, 0.4, 0.3][: len(one.result.adapters)]
        for number, (weight, adapter) in enumerate(zip(weights, one.result.adapters.values(), strict=True)):
            assert {factor.scaling for factor in adapter.factors.values()} == {weight * 4 / (2 + number)}
        layer = next(part for part in getattr(pipe, component).modules() if isinstance(part, LoraLayer))
        assert layer.scaling["mine"] == 1
        most = options.get("rank") or sum(2 + number for number in range(len(weights)))
        assert layer.r["mine"] == min(most, *layer.base_layer.weight.flatten(1).shape)
    pipe.set_adapters("mine")
    assert (image(pipe) - before).abs().max() > 1e-3


@pytest.mark.parametrize(("method", "options"), [("knots_ties", {}), ("ties", {"rank": 4})])
def test_a_model_whose_update_is_zero_does_not_keep_the_others_from_being_merged(method, options):
    pipe = unet_pipeline()
    weights = [{"unet": 0.7, "text_encoder": 0.0}, {"unet": 0.5, "text_encoder": 0.0}]
    assert list(merge(pipe, NAMES[:2], weights, method=method, **options)) == ["unet"]
    assert pipe.get_list_adapters()["text_encoder"] == NAMES[:2]
    pipe.set_adapters("merged")
    merged = image(pipe)
    pipe.text_encoder.disable_adapters()
    assert torch.equal(image(pipe), merged)
    with pytest.raises(ValueError, match="is zero, there is nothing to register"):
        merge(pipe, NAMES[:2], [0.0, 0.0], "none", method=method, **options)


def test_what_a_merge_gives_is_shown_without_its_tensors():
    shown = repr(merge(dit_pipeline(), NAMES))
    assert "adapter_name='merged'" in shown
    assert "tensor(" not in shown


def test_bad_input_is_refused_before_anything_changes(monkeypatch):
    pipe = unet_pipeline()
    pipe.set_adapters("a", 0.3)
    before, loaded = image(pipe), pipe.get_list_adapters()
    for arguments, message in (
        ((["a", "x"],), r"adapters: expected different names among \['a', 'b', 'c'\], found \['a', 'x'\]"),
        (([],), "adapters: expected different names"),
        ((NAMES, None, "b"), "adapter_name: 'b' is already loaded"),
        ((NAMES, None, "x.y"), "adapter_name: expected a name that PEFT takes"),
        ((["a", "b"], {"unet": 0.5}), "weights: expected a list with an entry for each adapter"),
        ((NAMES, [0.5]), "Length of adapter names 3"),
        ((NAMES, None, "new", "nsc"), r"data: method 'nsc' needs some, found NoneType; .*calibration_data\(pipe"),
        ((NAMES, None, "new", "finetuned"), "method: 'finetuned' gives every task"),
        ((NAMES, None, "new", "ties"), "output: the update of method 'ties' is of full rank"),
        ((NAMES, None, "new", "mean"), "method: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(pipe, *arguments)
        assert pipe.get_list_adapters() == loaded
        assert torch.equal(image(pipe), before)
    with pytest.raises(TypeError, match="pipe: expected a pipeline of diffusers that loads LoRA, found UNet2DCond"):
        merge(pipe.unet, ["a"])
    pipe.fuse_lora(components=["unet"])
    with pytest.raises(ValueError, match=r"\['a'\] are merged into its weights.*unfuse_lora\(\)"):
        merge(pipe, NAMES)
    pipe.unfuse_lora(components=["unet"])
    # What fails in the second model leaves nothing in the first.
    with torch.no_grad():
        next(value for key, value in pipe.text_encoder.named_parameters() if "lora_B.b" in key).fill_(float("inf"))
    with pytest.raises(ValueError, match="finite"):
        merge(pipe, NAMES, method="knots_ties")
    assert pipe.get_list_adapters() == loaded
    assert not any("merged" in layer.lora_A for layer in pipe.unet.modules() if isinstance(layer, LoraLayer))


def test_weights_may_be_a_tuple():
    pipe = dit_pipeline()
    merge(pipe, NAMES, (0.7, 0.5, -0.4))
    pipe.set_adapters(NAMES, [0.7, 0.5, -0.4])
    wanted = image(pipe)
    pipe.set_adapters("merged")
    alike(image(pipe), wanted)


def test_a_dictionary_for_several_adapters_is_the_first_ones_alone_in_diffusers():
    """Why such weights are refused."""
    pipe = unet_pipeline()
    pipe.set_adapters(["a", "b"], {"unet": 0.5})
    layer = next(one for one in pipe.unet.modules() if isinstance(one, LoraLayer))
    assert [layer.scaling[name] for name in ("a", "b")] == [0.5 * 4 / 2, 4 / 3]


def test_adapters_beside_lora_stay_active():
    pipe = dit_pipeline()
    inject_adapter_in_model(LoKrConfig(r=2, target_modules=["add_q_proj"], init_weights=False), pipe.transformer, "k")
    pipe.set_adapters(["a", "k"], [0.7, 0.5])
    before = image(pipe)
    pipe.set_adapters("a", 0.7)
    assert (image(pipe) - before).abs().max() > 1e-5
    pipe.set_adapters(["a", "k"], [0.7, 0.5])
    merge(pipe, ["a", "b"], [0.3, 0.2])
    assert torch.equal(image(pipe), before)


def test_a_compiled_model_that_diffusers_passes_over_is_refused():
    pipe = unet_pipeline()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    # Otherwise the text encoder alone would be merged.
    assert list(pipe.get_list_adapters()) == ["text_encoder"]
    for call in (accelerate, lambda pipe: merge(pipe, ["a"])):
        with pytest.raises(ValueError, match=r"found pipe.unet in the wrapper of torch.compile.*pipe.unet.compile\(\)"):
            call(pipe)


def offload(model, **options):
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **options)


@pytest.mark.parametrize("groups", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}])
def test_models_offloaded_in_groups_are_merged_and_the_new_adapter_is_offloaded(groups):
    pipe = dit_pipeline()
    pipe.set_adapters(NAMES[:2], [0.7, -0.4])
    wanted = image(pipe)
    offload(pipe.transformer, **groups)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    hooks = {name for name, module in layer.named_modules() if hasattr(module, "_diffusers_hook")}
    made = merge(pipe, NAMES[:2], [0.7, -0.4])["transformer"]
    hooked = {name for name, module in layer.named_modules() if hasattr(module, "_diffusers_hook")}
    leaves = {name.replace(".b", ".merged") for name in hooks if name.endswith(".b")}
    assert bool(leaves) is ("offload_type" in groups)
    assert hooked == hooks | leaves
    pipe.set_adapters("merged")
    alike(image(pipe), wanted)
    pipe.disable_lora()
    bare = image(pipe)
    # With the adapters, in what the base is a copy around, active again.
    pipe.enable_lora()
    pipe.transformer = made.result.model
    alike(image(pipe), bare)


def test_models_offloaded_to_disk_hold_nothing_to_merge(tmp_path):
    pipe = dit_pipeline()
    base = dit_pipeline().transformer
    offload(pipe.transformer, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    for call in (
        lambda: merge(pipe, NAMES),
        lambda: nsc_merge.merge(base, {"a": pipe.transformer}, method="ties"),
        lambda: nsc_merge.merge(pipe.transformer, {"a": base}, method="ties"),
    ):
        with pytest.raises(ValueError, match=r"^(adapters\['a'\]|model|pipe\.transformer): .*group offloading to disk"):
            call()
    assert pipe.get_list_adapters() == {"transformer": NAMES}


def test_a_merge_in_a_model_that_is_stored_in_eight_bits_is_not_rounded_to_them():
    pipe = dit_pipeline()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    pipe.set_adapters(NAMES, [0.7, 0.5, -0.4])
    wanted = image(pipe)
    merge(pipe, NAMES, [0.7, 0.5, -0.4])
    pipe.set_adapters("merged")
    alike(image(pipe), wanted)


def test_pipelines_without_adapters_are_refused():
    pipe = unet_pipeline()
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="pipe: expected LoRA on linears, found no adapters"):
        accelerate(pipe)
    with pytest.raises(ValueError, match=r"adapters: expected different names among \[\], found \['a'\]"):
        merge(pipe, ["a"])


@pytest.mark.filterwarnings("error:The configuration file of this scheduler:FutureWarning")
def test_the_example_runs_both_ways_and_with_data(tmp_path, monkeypatch, capsys):
    more = ["--method", "regmean", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["diffusers_loras.py", "--steps", "1", *more])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    for way in ("accelerated", "merged"):
        assert float(said.split(f"{way}: differs by ")[1].split()[0]) < 1e-5
    assert f"regmean is in {tmp_path / 'out'}" in said
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_norms_that_diffusers_writes_into_the_base_are_named():
    pipe = dit_pipeline()
    assert nsc_merge.load_adapter(pipe.transformer, "a").notes == ()
    block = "transformer.transformer_blocks.0.attn"
    norm = torch.full((16,), 2.0)
    factors = {f"{block}.to_q.lora_A.weight": torch.ones(2, 32), f"{block}.to_q.lora_B.weight": torch.ones(32, 2)}
    pipe.load_lora_weights({**factors, f"{block}.norm_q.weight": norm}, adapter_name="normed")
    assert torch.equal(pipe.transformer.transformer_blocks[0].attn.norm_q.weight, norm)
    (note,) = nsc_merge.load_adapter(pipe.transformer, "normed").notes
    assert note.startswith("norms of a LoRA are in the weights of the base, where diffusers has written them")
