"""Adapters of models of diffusers: given in memory, merged, saved, loaded again."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import nsc_merge
from nsc_merge.adapters import outline_of
from nsc_merge.adapters.formats.diffusers_file import FILE
from nsc_merge.integrations.peft import merge
from nsc_merge.results.hub import pushed_files

diffusers = pytest.importorskip("diffusers")

BLOCKS = {"layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
HEADS = {"num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "pos_embed_max_size": 8}
WIDTHS = dict.fromkeys(("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim"), 8)


def unet():
    torch.manual_seed(0)
    made = diffusers.UNet2DConditionModel(
        sample_size=8, **BLOCKS, down_block_types=DOWN, up_block_types=UP, cross_attention_dim=8
    )
    return made.double()


def transformer():
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(sample_size=8, in_channels=4, out_channels=4, **HEADS, **WIDTHS).double()


def output(model):
    generator = torch.Generator().manual_seed(9)
    image, text = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((1, 4, 8, 8), (1, 3, 8)))
    call = {"encoder_hidden_states": text, "timestep": torch.tensor([5])}
    if isinstance(model, diffusers.SD3Transformer2DModel):
        call["pooled_projections"] = text[:, 0]
    with torch.no_grad():
        return model.eval()(image, **call).sample


def adapted(make, *names, targets=("to_q", "to_v"), **settings):
    model = make()
    for seed, name in enumerate(names):
        config = LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False, **settings)
        model.add_adapter(config, adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("make", [unet, transformer])
def test_models_of_diffusers_are_merged_saved_and_loaded_again(tmp_path, make):
    both = adapted(make, "a", "b")
    both.set_adapters(["a", "b"], [0.5, 0.5])
    wanted = output(both)
    # The weights are part of the scalings that the layers run, which count.
    both.set_adapters(["a", "b"], [1.0, 1.0])
    base = make()
    assert (output(base) - wanted).abs().max() > 1e-4
    result = nsc_merge.merge(base, {"a": both, "b": both}, method="task_arithmetic", scale=0.5)
    result.save(tmp_path / "whole", format="model")
    result.save(tmp_path / "shards", format="model", max_shard_size=10_000)
    result.save(tmp_path / "lora", format="lora")
    assert len(list((tmp_path / "shards").glob("diffusion_pytorch_model-*.safetensors"))) > 1
    for folder in ("whole", "shards"):
        read = type(base).from_pretrained(tmp_path / folder, torch_dtype=torch.float64)
        torch.testing.assert_close(output(read), wanted, rtol=1e-10, atol=1e-10)
    again = nsc_merge.merge(make(), {"m": tmp_path / "lora"}, method="task_arithmetic", scale=1.0)
    # The factors are written in float32.
    torch.testing.assert_close(output(again.apply(again.model)), wanted, rtol=1e-5, atol=1e-7)


def test_a_merge_saved_over_another_is_the_one_that_is_loaded_and_pushed(tmp_path):
    both = adapted(unet, "a", "b")
    first, second = (nsc_merge.merge(unet(), {"a": both, "b": both}, method="task_arithmetic", scale=scale)
                     for scale in (0.5, 0.1))  # fmt: skip
    first.save(tmp_path, "model", max_shard_size=10_000)
    shards = {file.name for file in tmp_path.iterdir()}
    assert set(pushed_files(tmp_path, "owner/name")) == shards
    # diffusers reads the shards of an index rather than the file beside it.
    second.save(tmp_path, "model")
    whole = {file.name for file in tmp_path.iterdir()}
    assert whole == {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "recipe.yaml"}
    assert set(pushed_files(tmp_path, "owner/name")) == whole
    read = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    torch.testing.assert_close(output(read), output(second.apply(unet())), rtol=1e-10, atol=1e-10)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: diffusers\n" in card
    assert "tokenizer" not in card


@pytest.mark.parametrize("make", [unet, transformer])
@pytest.mark.parametrize("targets", [("to_q", "to_v"), ("to_q", "to_k", "conv1", "proj_out")])
def test_pipelines_load_a_merged_adapter_from_its_folder(tmp_path, make, targets):
    """Of unequal ranks, and in the place of PEFT's file beside it, in which they find no key that is theirs."""
    first, second = adapted(make, "a", targets=targets), adapted(make, "b", targets=("to_q",))
    make().save_pretrained(tmp_path / "base")
    base = type(first).from_pretrained(tmp_path / "base", torch_dtype=torch.float64)
    result = nsc_merge.merge(base, {"a": first, "b": second}, method="task_arithmetic", scale=0.5)
    out = result.save(tmp_path / "out", "lora")
    # It goes to the hub as it is.
    assert str(tmp_path).encode() in (out / "adapter_config.json").read_bytes()
    assert str(tmp_path).encode() not in (out / FILE).read_bytes()
    found = make()
    if make is unet:
        pipeline = diffusers.StableDiffusionPipeline
        state, alphas, metadata = pipeline.lora_state_dict(out, return_lora_metadata=True, use_safetensors=True)
        pipeline.load_lora_into_unet(state, alphas, found, metadata=metadata)
    else:
        pipeline = diffusers.StableDiffusion3Pipeline
        state, metadata = pipeline.lora_state_dict(out, return_lora_metadata=True, use_safetensors=True)
        pipeline.load_lora_into_transformer(state, found, metadata=metadata)
    wanted = output(result.apply(make()))
    assert (output(make()) - wanted).abs().max() > 1e-4
    torch.testing.assert_close(output(found.double()), wanted, rtol=1e-5, atol=1e-7)
    assert "`pipe.load_lora_weights`" in (out / "README.md").read_text()
    assert "pytorch_lora_weights.safetensors" in pushed_files(out, "owner/name")
    again = nsc_merge.merge(make(), {"m": out}, method="task_arithmetic", scale=1.0)
    torch.testing.assert_close(output(again.apply(again.model)), wanted, rtol=1e-5, atol=1e-7)


def test_nothing_is_written_for_pipelines_of_what_they_load_no_adapters_into(tmp_path):
    """A pipeline would put it into the transformer, whose modules have the same names."""
    def control():
        torch.manual_seed(0)
        return diffusers.SD3ControlNetModel(sample_size=8, in_channels=4, **HEADS, **WIDTHS)

    out = nsc_merge.merge(control(), {"a": adapted(control, "a")}, method="linear").save(tmp_path / "out", "lora")
    assert (out / "adapter_model.safetensors").exists()
    assert not (out / FILE).exists()
    assert "load_lora_weights" not in (out / "README.md").read_text()


def test_adapters_in_a_model_are_merged_beside_each_other():
    model = adapted(unet, "a", "b")
    model.set_adapters(["a", "b"], [0.5, 0.5])
    wanted = output(model)
    model.set_adapters(["a", "b"], [1.0, 1.0])
    model.set_adapters(["a"])
    before, trained = output(model), [one.requires_grad for one in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    made = merge(model, ["a", "b"], [0.5, 0.5], "merged", method="task_arithmetic")
    assert torch.equal(output(model), before)
    after = dict(model.named_parameters())
    assert [after[name].requires_grad for name in names] == trained
    assert not any(one.requires_grad for name, one in after.items() if ".merged." in name)
    model.set_adapter(made.adapter_name)
    torch.testing.assert_close(output(model), wanted, rtol=1e-10, atol=1e-10)


def of_pipeline(folder, model, **others):
    """As pipelines save an adapter of ``model`` called ``a``."""
    state = {key: value.contiguous() for key, value in get_peft_model_state_dict(model, adapter_name="a").items()}
    if isinstance(model, diffusers.SD3Transformer2DModel):
        diffusers.StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=state, **others)
    else:
        diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state, **others)
    return folder


def reloaded(make, folder):
    """The output with the adapter, as diffusers reads it."""
    model = make()
    prefix = "unet" if make is unet else "transformer"
    model.load_lora_adapter(folder, prefix=prefix, weight_name=FILE, use_safetensors=True)
    return output(model.double())


def merged(make, source):
    result = nsc_merge.merge(make(), {"a": source}, method="task_arithmetic", scale=1.0)
    return output(result.apply(copy.deepcopy(result.model))), result


@pytest.mark.parametrize("make", [unet, transformer])
@pytest.mark.parametrize("settings", [True, False])
def test_the_file_of_a_pipeline_is_read_as_diffusers_reads_it(tmp_path, make, settings):
    held = adapted(make, "a")
    told = {"unet" if make is unet else "transformer": held.peft_config["a"].to_dict()} if settings else {}
    of_pipeline(tmp_path, held, **{f"{part}_lora_adapter_metadata": config for part, config in told.items()})
    found, result = merged(make, tmp_path)
    torch.testing.assert_close(found, reloaded(make, tmp_path), rtol=1e-10, atol=1e-10)
    assert {one.scaling for one in result.adapters["a"].factors.values()} == {2.0 if settings else 1.0}
    # The settings are those of training, and without them diffusers itself takes 1.
    close = float((found - output(held)).abs().max()) < 1e-6
    assert close is settings
    assert list(nsc_merge.load_adapter(tmp_path, "a").sha256) == [FILE]
    factors = outline_of(tmp_path, "a")[0].factors
    assert {path: one.A.shape for path, one in factors.items()} == {
        path: one.A.shape for path, one in result.adapters["a"].factors.items()
    }
    assert all(one.A.is_meta for one in factors.values())


@pytest.mark.parametrize("kind", ["use_dora", "lora_bias"])
def test_what_else_is_trained_is_seen_by_its_tensors_where_there_are_no_settings(tmp_path, kind):
    held = adapted(unet, "a", targets=("to_out.0",), **{kind: True})
    of_pipeline(tmp_path, held)
    torch.testing.assert_close(merged(unet, tmp_path)[0], reloaded(unet, tmp_path), rtol=1e-10, atol=1e-10)


def test_settings_of_another_model_alone_are_none_of_this_one(tmp_path):
    text = {"text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1, 4)}
    told = {"r": 1, "lora_alpha": 32, "target_modules": ["q_proj"]}
    of_pipeline(tmp_path, adapted(unet, "a"), text_encoder_lora_layers=text, text_encoder_lora_adapter_metadata=told)
    assert {one.scaling for one in nsc_merge.load_adapter(tmp_path, "a").factors.values()} == {1.0}
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, {"lora_adapter_metadata": "[1]"})
    with pytest.raises(ValueError, match=r"lora_adapter_metadata: expected a JSON object, found \[1\]"):
        nsc_merge.load_adapter(tmp_path, "a")


def test_the_file_of_a_model_alone_is_read_as_diffusers_reads_it(tmp_path):
    held = adapted(unet, "a")
    held.save_lora_adapter(tmp_path, adapter_name="a")
    torch.testing.assert_close(merged(unet, tmp_path)[0], output(held), rtol=1e-10, atol=1e-10)


def test_earlier_keys_ranks_and_alphas_are_read_as_diffusers_reads_them(tmp_path):
    state = get_peft_model_state_dict(adapted(unet, "a"), adapter_name="a")
    earlier, narrow = {}, next(iter(state)).split(".lora_")[0]
    for key, value in state.items():
        value = value if not key.startswith(narrow) else value[:1] if ".lora_A" in key else value[:, :1]
        earlier["unet." + key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")] = value.contiguous()
    save_file(earlier, tmp_path / FILE)
    torch.testing.assert_close(merged(unet, tmp_path)[0], reloaded(unet, tmp_path), rtol=1e-10, atol=1e-10)
    alphas = {key.replace("lora.down.weight", "alpha"): torch.tensor(3.0) for key in earlier if ".lora.down." in key}
    save_file({**earlier, **alphas}, tmp_path / FILE)
    adapter = merged(unet, tmp_path)[1].adapters["a"]
    factors = adapter.factors
    assert any("alpha beside the factors counts" in note for note in adapter.notes)
    assert {path: one.scaling for path, one in factors.items()} == {
        path: 3.0 if path == narrow else 1.5 for path in factors
    }


def test_what_a_file_holds_of_other_models_is_noted_or_refused(tmp_path):
    held = adapted(unet, "a")
    text = {"text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1, 4)}
    of_pipeline(tmp_path, held, text_encoder_lora_layers=text)
    adapter = nsc_merge.load_adapter(tmp_path, "a")
    assert adapter.notes == (
        f"{FILE}: text_encoder has an adapter, too, which is left out; to merge it, load the file into the pipeline "
        "(pipe.load_lora_weights) and give pipe.text_encoder as adapter",
    )
    save_file({**load_file(tmp_path / FILE), "blocks.0.to_q.lora_A.weight": torch.ones(1, 4)}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"found those of \['a model without a name', 'text_encoder', 'unet'\]"):
        nsc_merge.load_adapter(tmp_path, "a")
    settings = {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": ["to_q"]}'}
    tensors = {"unet.to_q.lora_A.weight": torch.ones(2, 4), "unet.to_q.alpha": torch.ones(())}
    save_file(tensors, tmp_path / FILE, settings)
    with pytest.raises(ValueError, match=r"to_q.alpha is given beside the settings in the header"):
        nsc_merge.load_adapter(tmp_path, "a")
    state = load_file(of_pipeline(tmp_path / "b", held) / FILE)
    save_file({**state, "unet.conv_in.alpha": torch.ones(())}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"1 of \d+ tensors would be ignored.*conv_in\.alpha"):
        nsc_merge.load_adapter(tmp_path, "a")
    several = {f"text_encoder{end}.{key}": value.clone() for key, value in text.items() for end in ("", "_2")}
    save_file(several, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"'a'.*one model, found those of \['text_encoder', 'text_encoder_2'"):
        nsc_merge.load_adapter(tmp_path, "a")


def test_keys_that_diffusers_translates_are_refused_with_a_way_that_works(tmp_path):
    held = adapted(unet, "a")
    state = get_peft_model_state_dict(held, adapter_name="a")
    kohya = {"lora_unet_" + key.replace(".", "_"): value.contiguous() for key, value in state.items()}
    save_file(kohya, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"'a'.*is no key of PEFT's layers.*kohya.*model.load_lora_adapter"):
        nsc_merge.load_adapter(tmp_path, "a")
    comfyui = {"diffusion_model." + key: value.contiguous() for key, value in state.items()}
    save_file(comfyui, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"'diffusion_model\..*is no key of PEFT's layers.*ComfyUI"):
        nsc_merge.load_adapter(tmp_path, "a")
    with pytest.raises(FileNotFoundError, match=f"expected the folder of an adapter, .* or with {FILE}"):
        nsc_merge.load_adapter(tmp_path / FILE, "a")
    held.save_lora_adapter(tmp_path, adapter_name="a")
    loaded = unet()
    loaded.load_lora_adapter(tmp_path, prefix=None, weight_name=FILE)
    torch.testing.assert_close(merged(unet, loaded)[0], output(held), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [unet, transformer])
def test_peft_folders_whose_keys_begin_with_the_models_name_in_a_pipeline(tmp_path, make):
    held = adapted(make, "a")
    wanted = output(held)
    name = "unet" if make is unet else "transformer"
    weights = {
        f"base_model.model.{name}.{key}": value.contiguous()
        for key, value in get_peft_model_state_dict(held, adapter_name="a").items()
    }
    save_file(weights, tmp_path / "adapter_model.safetensors")
    held.peft_config["a"].save_pretrained(tmp_path)
    torch.testing.assert_close(merged(make, tmp_path)[0], wanted, rtol=1e-10, atol=1e-10)


CONVOLUTIONS = ["conv_in", "conv1", "conv2", "conv_shortcut", "conv", "conv_out", "proj_in", "to_k", "time_emb_proj"]


def test_convolutions_of_a_unet_are_merged(tmp_path):
    held = adapted(unet, "a", targets=CONVOLUTIONS)
    found, result = merged(unet, held)
    torch.testing.assert_close(found, output(held), rtol=1e-10, atol=1e-10)
    assert {path.rsplit(".", 1)[-1] for path in result.paths} == set(CONVOLUTIONS)
    result.save(tmp_path / "model", format="model")
    read = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "model", torch_dtype=torch.float64)
    torch.testing.assert_close(output(read), output(held), rtol=1e-10, atol=1e-10)
    result.save(tmp_path / "lora", format="lora")
    torch.testing.assert_close(merged(unet, tmp_path / "lora")[0], output(held), rtol=1e-5, atol=1e-6)


def flux():
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, **sizes, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=[4, 4, 8]
    )


def wan():
    sizes = {"num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2, "ffn_dim": 8, "text_dim": 8}
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), in_channels=4, out_channels=4, **sizes, freq_dim=8, rope_max_seq_len=16
    )


def sdxl():
    return diffusers.UNet2DConditionModel(
        sample_size=8, **{**BLOCKS, "attention_head_dim": (2, 4)}, down_block_types=DOWN, up_block_types=UP,
        cross_attention_dim=8, use_linear_projection=True, transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=56,
    )


# Kind -> model, inputs by their shapes, what is adapted.
OTHERS = {
    "Flux": (
        flux,
        {
            "hidden_states": (1, 16, 4), "encoder_hidden_states": (1, 5, 8), "pooled_projections": (1, 8),
            "timestep": (1,), "img_ids": (16, 3), "txt_ids": (5, 3),
        },
        ["to_q", "to_v", "to_out.0", "add_k_proj", "proj_mlp", "proj_out", "linear", "x_embedder"],
    ),
    "Wan": (
        wan,
        {"hidden_states": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, 5, 8), "timestep": (1,)},
        ["to_q", "to_v", "to_out.0", "ffn.net.0.proj", "patch_embedding"],
    ),
    "SDXL": (
        sdxl,
        {"sample": (1, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (1, 3, 8), "text_embeds": (1, 8),
         "time_ids": (1, 6)},
        ["to_q", "to_v", "proj_in", "ff.net.0.proj", "conv1", "linear_1"],
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_are_merged_as_peft_runs_them(kind):
    make, shapes, targets = OTHERS[kind]
    generator = torch.Generator().manual_seed(3)
    inputs = {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in shapes.items()}
    if kind == "SDXL":
        inputs["added_cond_kwargs"] = {key: inputs.pop(key) for key in ("text_embeds", "time_ids")}

    def run(model):
        with torch.no_grad():
            return model.eval()(**inputs).sample

    def made():
        torch.manual_seed(0)
        return make().double()

    held = adapted(made, "a", "b", targets=targets)
    base = made()
    before = run(base)
    held.set_adapters(["a", "b"])
    wanted = run(held)
    assert (wanted - before).abs().max() > 1e-3
    result = nsc_merge.merge(base, {"a": held, "b": held}, method="task_arithmetic", scale=1.0)
    torch.testing.assert_close(run(result.apply(base)), wanted, rtol=1e-10, atol=1e-10)
