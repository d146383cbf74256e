"""Every family: the merged forward against peft and a dense merge, and every format back through its loader."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import PeftModel
from zoo import DINOV2, KINDS, build, llava_config, outputs, write_adapter

import nsc_merge
from nsc_merge.models.families import family_of, frozen_tower, scored_paths

TOLERANCE = {"rtol": 5e-5, "atol": 5e-5}
TASKS = ("plain", "mixed", "partial")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def base(kind):
    return build(kind)


@pytest.fixture
def folders(kind, base, tmp_path):
    """Plain; rsLoRA with other ranks in places, and biases where peft allows them; absent from some modules."""
    targets = KINDS[kind].targets
    some = r".*layers?\.[02]\..*(v_proj|value)"
    some = r".*language_model\.layers\.[02]\..*v_proj" if kind == "llava" else some
    bias = {"lora_bias": True} if KINDS[kind].has_bias else {}
    patterns = {"rank_pattern": {r".*\.1\..*(v_proj|value)": 5}, "alpha_pattern": {"q_proj": 2, "query": 2}}
    return {
        "plain": write_adapter(base, tmp_path / "plain", 1, r=4, lora_alpha=6, target_modules=targets),
        "mixed": write_adapter(
            base,
            tmp_path / "mixed",
            2,
            r=3,
            lora_alpha=5,
            use_rslora=True,
            target_modules=targets,
            **patterns,
            **bias,
        ),
        "partial": write_adapter(base, tmp_path / "partial", 3, r=2, lora_alpha=2, target_modules=some),
    }


@pytest.fixture
def result(kind, base, folders):
    """Coefficients of all sizes and signs, as no method would choose them."""
    found = nsc_merge.merge(base, folders, method="task_arithmetic")
    generator = torch.Generator().manual_seed(7)
    for path, row in found.coefficients.items():
        for task in row:
            if path in found.adapters[task].factors:
                row[task] = float(torch.randn((), generator=generator))
    return found


def peft_model(base, folders):
    """peft's own model with several active adapters."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), folders[TASKS[0]], adapter_name=TASKS[0])
    for task in TASKS[1:]:
        model.load_adapter(folders[task], adapter_name=task)
    model.base_model.set_adapter(list(TASKS))
    return model.eval()


def peft_forward(base, folders, result, inputs):
    """peft's own forward, scaled by the coefficients."""
    model = peft_model(base, folders)
    for path, row in result.coefficients.items():
        layer = model.base_model.model.get_submodule(path)
        for task in layer.scaling:
            layer.scaling[task] *= row[task]
    return outputs(model, inputs)


def attached_forward(base, result, inputs):
    with nsc_merge.attach(base, result.adapters, 0.4) as merged, torch.no_grad():
        for path, module in merged.items():
            module.lam.copy_(torch.tensor(list(result.coefficients[path].values())))
        return outputs(base, inputs)


def test_all_ways_to_the_merged_outputs_agree(kind, base, folders, result, tmp_path):
    inputs = KINDS[kind].inputs(11)
    expected = peft_forward(base, folders, result, inputs)
    before = outputs(base, inputs)
    assert (expected - before).abs().max() > 0.05
    torch.testing.assert_close(attached_forward(base, result, inputs), expected, **TOLERANCE)
    torch.testing.assert_close(outputs(base, inputs), before, rtol=0, atol=0)

    lora = PeftModel.from_pretrained(copy.deepcopy(base), result.save(tmp_path / "out", "lora"))
    torch.testing.assert_close(outputs(lora, inputs), expected, **TOLERANCE)

    biased = any(factor.bias is not None for factor in result.adapters["mixed"].factors.values())
    linears = [base.get_submodule(path) for path in result.coefficients]
    assert biased == (KINDS[kind].has_bias and all(linear.bias is not None for linear in linears))
    torch.testing.assert_close(outputs(result.apply(copy.deepcopy(base)), inputs), expected, **TOLERANCE)
    folder = result.save(tmp_path / "model", "model", max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    reloaded = type(base).from_pretrained(folder, use_safetensors=True)
    torch.testing.assert_close(outputs(reloaded, inputs), expected, **TOLERANCE)
    assert (folder / "README.md").is_file()
    assert (folder / "recipe.yaml").is_file()


def test_gradients_of_all_coefficients_are_those_of_peft(kind, base, folders, result):
    """In float64, with tensors as peft's scalings."""
    base = base.double()
    inputs = {
        name: value.double() if value.is_floating_point() else value
        for name, value in KINDS[kind].inputs(13).items()
    }
    weighting = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(model):
        out = model(**inputs)
        values = out.logits if hasattr(out, "logits") else out.last_hidden_state
        return (values * weighting[: values.shape[-1]]).sum()

    oracle = peft_model(base, folders)
    lams = {}
    for path, row in result.coefficients.items():
        layer = oracle.base_model.model.get_submodule(path)
        lams[path] = {task: torch.tensor(row[task], dtype=torch.float64, requires_grad=True) for task in row}
        for task in layer.scaling:
            layer.scaling[task] = lams[path][task] * layer.scaling[task]
    expected = loss(oracle)
    expected.backward()
    with nsc_merge.attach(base, result.adapters, 0.4) as merged:
        with torch.no_grad():
            for path, module in merged.items():
                module.lam.copy_(torch.tensor(list(result.coefficients[path].values())))
        found = loss(base)
        found.backward()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        for path, module in merged.items():
            for index, task in enumerate(TASKS):
                if path in result.adapters[task].factors:
                    wanted = lams[path][task].grad
                    torch.testing.assert_close(module.lam.grad[index], wanted, rtol=1e-5, atol=1e-5)


def test_one_adapter_at_one_is_that_adapter(kind, base, folders, tmp_path):
    inputs = KINDS[kind].inputs(12)
    for task, folder in folders.items():
        expected = outputs(PeftModel.from_pretrained(copy.deepcopy(base), folder), inputs)
        alone = nsc_merge.merge(base, {task: folder}, method="task_arithmetic", scale=1.0)
        torch.testing.assert_close(outputs(alone.apply(copy.deepcopy(base)), inputs), expected, **TOLERANCE)
        again = PeftModel.from_pretrained(copy.deepcopy(base), alone.save(tmp_path / f"{task}-out", "lora"))
        torch.testing.assert_close(outputs(again, inputs), expected, **TOLERANCE)


def test_nsc_measures_the_last_quarter_and_lowers_its_ratio(kind, base, folders):
    folders = {task: folders[task] for task in ("plain", "mixed")}
    batches = {task: [KINDS[kind].inputs(seed)] for seed, task in enumerate(folders)}
    result = nsc_merge.merge(base, folders, batches, steps=8, lr=0.02, progress=False)
    output = DINOV2[-1].rsplit(".", 1)[-1]
    measured = {"vit": "o_proj", "clip": "out_proj", "siglip": "out_proj", "dinov2": output}.get(kind, "v_proj")
    assert [path.rsplit(".", 1)[-1] for path in result.options["scored"]] == [measured]
    assert ".2." in result.options["scored"][0]
    assert result.history[-1]["objective"] < result.history[0]["objective"]


def test_every_family_has_its_blocks_and_llava_not_those_of_its_tower(kind, base):
    family = family_of(base)
    paths = [path for path, _ in base.named_modules()]
    scored = scored_paths(family, base, paths, None, 1)
    assert scored
    assert all(".2." in path and "vision_tower" not in path for path in scored)
    tower = frozen_tower(family, base, scored)
    assert tower == ("model.vision_tower" if kind == "llava" else None)
    assert frozen_tower(family, base, ["model.vision_tower.encoder.layers.0.self_attn.q_proj"]) is None


def test_the_tower_is_found_without_the_head_too():
    from transformers import LlavaModel

    model = LlavaModel(llava_config())
    assert frozen_tower(family_of(model), model, []) == "vision_tower"


def test_a_trunk_that_needs_more_than_the_model_takes_is_not_run_alone(tmp_path):
    """TimesFM's takes a mask of padding, which the model makes itself."""
    config = transformers.TimesFmConfig(
        hidden_size=32, intermediate_size=48, head_dim=16, num_attention_heads=2, num_hidden_layers=2,
        patch_length=4, context_length=16, horizon_length=4,
    )
    model = transformers.TimesFmModelForPrediction(config).eval()
    assert family_of(model).prefill == ""
    folders = {task: write_adapter(model, tmp_path / task, n, target_modules=["v_proj"]) for n, task in enumerate("ab")}
    series = {"past_values": torch.randn(3, 16), "freq": torch.zeros(3, dtype=torch.long)}
    data = {task: [series] for task in folders}
    result = nsc_merge.merge(model, folders, data, "match", steps=1, progress=False)
    assert result.paths


def test_two_towers_beneath_a_head_are_both_measured_and_no_mask_speaks_of_images(tmp_path):
    """OWL-ViT detects by several texts to an image, whose mask is of the texts alone."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.OwlViTConfig(
        text_config={**sizes, "vocab_size": 60, "max_position_embeddings": 16},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    model = transformers.OwlViTForObjectDetection(config).eval()
    adapted = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "v_proj"))]
    family = family_of(model, adapted)
    assert family.unmasked == "owlvit.vision_model"
    ends = [f"owlvit.{part}_model.encoder.layers.1.self_attn.v_proj" for part in ("text", "vision")]
    assert scored_paths(family, model, adapted, None, "last_quarter") == ends
    targets = {"target_modules": ["q_proj", "v_proj"]}
    folders = {task: write_adapter(model, tmp_path / task, n, **targets) for n, task in enumerate("ab")}
    ids = torch.randint(3, 59, (4, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": ids, "attention_mask": mask}
    data = {task: [batch] for task in folders}
    result = nsc_merge.merge(model, folders, data, "nsc", steps=2, progress=False)
    moved = {path.split(".")[1] for path, row in result.coefficients.items() if set(row.values()) != {0.4}}
    assert moved == {"text_model", "vision_model"}


def test_towers_that_call_their_values_by_other_names_are_both_measured():
    """BERT's ``value`` beside CLIP's ``v_proj``."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.ChineseCLIPConfig(text_config=sizes, vision_config={**sizes, "num_hidden_layers": 6})
    with torch.device("meta"):
        model = transformers.ChineseCLIPModel(config)
    adapted = [path for path, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    family = family_of(model, adapted)
    text = "text_model.encoder.layer.1.attention.self.value"
    images = [f"vision_model.encoder.layers.{number}.self_attn.v_proj" for number in (4, 5)]
    assert scored_paths(family, model, adapted, None, "last_quarter") == [text, *images]
    # Where one of them has no adapter in its last blocks, the other is measured.
    assert scored_paths(family, model, [*images], None, "last_quarter") == images


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.mark.parametrize(
    ("name", "config", "measured"),
    [
        # One that generates has no towers beside each other, though no token says where the image is.
        ("Blip", {"text_config": SMALL, "vision_config": SMALL},
         ["text_decoder.bert.encoder.layer.1.attention.self.value"]),
        # Not its values of the encoder's positions.
        ("Pix2Struct", {"text_config": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24, "d_kv": 8},
                        "vision_config": SMALL},
         ["decoder.layer.1.self_attention.attention.value"]),
    ],
)  # fmt: skip
def test_a_decoder_behind_an_image_is_measured_where_it_attends_to_itself(name, config, measured):
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    with torch.device("meta"):
        model = kind(kind.config_class(**config))
    adapted = [path for path, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    assert scored_paths(family_of(model, adapted), model, adapted, None, "last_quarter") == measured


def test_what_lies_between_two_towers_is_neither():
    images = {**SMALL, "mit_hidden_size": 16, "mit_num_hidden_layers": 3, "mit_intermediate_size": 24,
              "mit_num_attention_heads": 2}
    with torch.device("meta"):
        model = transformers.XCLIPModel(transformers.XCLIPConfig(text_config=SMALL, vision_config=images))
    adapted = [path for path, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    scored = scored_paths(family_of(model, adapted), model, adapted, None, "last_quarter")
    assert {path.partition(".")[0] for path in scored} == {"text_model", "vision_model"}


@pytest.mark.parametrize(
    ("name", "config", "measured"),
    [
        ("CTRLLMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "dff": 24}, "multi_head_attention.Wv"),
        ("FunnelModel", {"block_sizes": [2], "d_model": 16, "n_head": 2, "d_inner": 24}, "attention.v_head"),
        ("CvtModel", {}, "attention.attention.projection_value"),
        ("LevitModel", {}, "module.queries_keys_values.linear"),
        ("MoshiForCausalLM",
         {**SMALL, "ffn_dim": 24, "audio_vocab_size": 8, "depth_decoder_config": {**SMALL, "ffn_dim": 24}},
         "self_attn.v_proj.linear"),
        ("Wav2Vec2ConformerModel", {**SMALL, "conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (4,)},
         "self_attn.linear_v"),
    ],
)  # fmt: skip
def test_values_are_found_whatever_they_are_called(name, config, measured):
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class(**config))
    adapted = [path for path, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    scored = scored_paths(family_of(model, adapted), model, adapted, None, "last_quarter")
    assert scored
    assert all(path.endswith(f".{measured}") for path in scored), scored
