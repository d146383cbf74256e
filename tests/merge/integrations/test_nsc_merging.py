"""NSC's public code with our merge, and with our layers: against the code itself where a checkout is at hand
(NSC_MERGING_REPO; its ``LinearTrainable`` needs peft below 0.19), and with small stand-ins for it.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from transformers import CLIPVisionModelWithProjection, LlamaConfig, LlamaModel

import nsc_merge
from bench.swaps.checkouts import checkout
from bench.swaps.nsc_inputs import LAMBDA, RANK, Settings, arguments, stand_in, their_merge, write_inputs
from nsc_kernels import null_space_ratio
from nsc_merge.integrations.nsc_merging import train_merged_model
from nsc_merge.integrations.nsc_merging_layers import accelerate

TASKS, STEPS = 3, 20
EXAMPLE = Path(__file__).parents[3] / "examples" / "integrations" / "nsc_merging.py"


@pytest.fixture(scope="module")
def theirs():
    repository = checkout("NSC_MERGING_REPO")
    if repository is None:
        pytest.skip("NSC_MERGING_REPO names no checkout")
    if tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 19):
        pytest.skip(f"LinearTrainable of nsc_merging cannot be made with peft {peft.__version__}")
    with their_merge(repository) as merge:
        yield merge


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """With 32 blocks, of which it measures those that have a number from 24 to 31."""
    return write_inputs(tmp_path_factory.mktemp("nsc"), tasks=TASKS, width=64, blocks=32, image=8)


@pytest.fixture(scope="module")
def expected(theirs, inputs):
    return theirs.train_merged_model(arguments(TASKS, STEPS), device="cpu", **inputs)


def apart(found, expected):
    """Largest difference of two merges' coefficients."""
    assert set(found) == set(expected)
    return max(float(abs(found[path] - expected[path]).max()) for path in expected)


def test_coefficients_and_outputs_are_theirs_after_twenty_steps(theirs, inputs, expected):
    found = train_merged_model(arguments(TASKS, STEPS), device="cpu", **inputs, progress=False)
    coefficients = expected.coeffs()
    assert max(abs(values - LAMBDA).max() for values in coefficients.values()) > 0.015
    assert apart(found.coeffs(), coefficients) < 2e-7
    for own, other, loader in zip(found.models, expected.models, inputs["val_loaders"], strict=True):
        with torch.no_grad():
            torch.testing.assert_close(own(loader[0]["image"]), other(loader[0]["image"]), rtol=1e-4, atol=1e-5)


def test_their_loop_on_our_layers_finds_their_coefficients(theirs, inputs, expected, monkeypatch):
    handles = []

    class Fused(theirs.KernelMergeModel):
        def to(self, *args, **named):
            moved = super().to(*args, **named)
            handles.append(accelerate(moved))
            return moved

    monkeypatch.setattr(theirs, "KernelMergeModel", Fused)
    found = theirs.train_merged_model(arguments(TASKS, STEPS), device="cpu", **inputs)
    assert handles[0].layers == 64
    assert apart(found.coeffs(), expected.coeffs()) < 2e-7


def test_outputs_ratios_and_gradients_of_layers_are_theirs(theirs, inputs):
    kwargs = {name: inputs[name] for name in ("cfgs", "model_dirs", "lora_dicts", "preference")}
    model = theirs.KernelMergeModel(**kwargs, coeff_type="linear", scaling_coeff=LAMBDA * TASKS).eval()
    batches = [loader[0]["image"] for loader in inputs["val_loaders"]]
    parameters = [value for value in model.parameters() if value.requires_grad]

    def measured():
        model.loss_cluster.clear()
        outputs = model(batches)
        kept = {
            (task, key): values[0].detach()
            for task, row in model.loss_cluster.kernel_losses.items()
            for key, values in row.items()
        }
        gradients = torch.autograd.grad(model.loss_cluster.return_loss(), parameters, allow_unused=True)
        return torch.stack(outputs).detach(), kept, gradients

    outputs, ratios, gradients = measured()
    with accelerate(model):
        own_outputs, own_ratios, own_gradients = measured()
    torch.testing.assert_close(own_outputs, outputs, rtol=1e-4, atol=1e-5)
    assert len(ratios) == 8 * TASKS
    assert own_ratios.keys() == ratios.keys()
    assert all(float((own_ratios[key] - value).abs()) < 1e-6 for key, value in ratios.items())
    assert [value is None for value in own_gradients] == [value is None for value in gradients]
    stacked = [torch.stack([value for value in found if value is not None]) for found in (own_gradients, gradients)]
    assert float((stacked[0] - stacked[1]).norm() / stacked[1].norm()) < 1e-5
    again = measured()
    assert torch.equal(again[0], outputs)
    assert all(torch.equal(again[1][key], value) for key, value in ratios.items())


def test_where_alpha_is_twice_the_rank_theirs_is_no_number(theirs, tmp_path):
    inputs = write_inputs(tmp_path, tasks=TASKS, width=64, blocks=32, image=8, alpha=2 * RANK)
    expected = theirs.train_merged_model(arguments(TASKS, 2), device="cpu", **inputs)
    assert all(values.size for values in expected.coeffs().values())
    assert any((values != values).any() for values in expected.coeffs().values())
    found = train_merged_model(arguments(TASKS, 2), device="cpu", **inputs, progress=False)
    assert all((values == values).all() for values in found.coeffs().values())
    by_hand = ratio_by_projection(inputs, found.result)
    assert found.result.history[0]["omega"] == pytest.approx(by_hand, rel=1e-5)


def ratio_by_projection(inputs, result):
    """Task -> mean ratio at the initial coefficients, by orthonormal bases of the row spaces, in float64."""
    base = CLIPVisionModelWithProjection.from_pretrained(inputs["cfgs"][0].model.id).double()
    scored = result.options["scored"]
    for path in result.paths:
        delta = sum(LAMBDA * adapter.factors[path].delta() for adapter in result.adapters.values())
        base.get_submodule(path).weight.data += delta
    found = {}
    for (task, adapter), loader in zip(result.adapters.items(), inputs["val_loaders"], strict=True):
        ratios = []

        def measure(layer, given, output, *, rows, ratios=ratios):
            z = given[0]
            ratios.append(((z - z @ rows @ rows.t()).norm(dim=-1) / z.norm(dim=-1)).mean())

        hooks = []
        for path in scored:
            rows = torch.linalg.qr(adapter.factors[path].A.double().t())[0]
            hook = lambda *call, rows=rows, measure=measure: measure(*call, rows=rows)  # noqa: E731
            hooks.append(base.get_submodule(path).register_forward_hook(hook))
        with torch.no_grad():
            base(pixel_values=loader[0]["image"].double())
        for hook in hooks:
            hook.remove()
        found[task] = float(torch.stack(ratios).mean())
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("small"), tasks=TASKS, width=32, blocks=4, image=16)


def test_the_call_is_one_merge_by_nsc_with_their_settings(small):
    with stand_in():
        found = train_merged_model(arguments(TASKS, 3, learning_rate=1e-2), device="cpu", **small, progress=False)
    base = CLIPVisionModelWithProjection.from_pretrained(small["cfgs"][0].model.id)
    calibration = {
        task: [{"pixel_values": batch["image"]} for batch in loader]
        for task, loader in zip(small["lora_dicts"], small["val_loaders"], strict=True)
    }
    expected = nsc_merge.merge(
        base, small["lora_dicts"], calibration, steps=3, lr=1e-2, init=LAMBDA, score_modules=["v_proj"],
        include_pad=True, progress=False,
    )  # fmt: skip
    assert found.result.coefficients == expected.coefficients
    assert found.result.options["scored"] == ["vision_model.encoder.layers.3.self_attn.v_proj"]
    merged = expected.apply(base)
    pixels = small["val_loaders"][0][0]["image"]
    for model in found.models:
        assert not model.training
        with torch.no_grad():
            torch.testing.assert_close(model.vit(pixels).image_embeds, merged(pixels).image_embeds)
        assert model.vit is found.models[0].vit
    path = expected.paths[0]
    values = torch.tensor(list(expected.coefficients[path].values())).repeat_interleave(RANK)
    assert torch.equal(torch.from_numpy(found.coeffs()[path]), values)


def test_batches_of_text_are_model_inputs_as_they_are(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    )
    LlamaModel(config).save_pretrained(tmp_path / "base")
    names = ("mnli", "rte")
    for name in names:
        lora = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        peft.get_peft_model(LlamaModel.from_pretrained(tmp_path / "base"), lora).save_pretrained(tmp_path / name)
    ids = torch.randint(0, 32, (2, 2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batches = {
        f"{name}-sequence_classification": [{"input_ids": ids[number], "attention_mask": mask}]
        for number, name in enumerate(names)
    }
    folders = {task: str(tmp_path / task.split("-")[0]) for task in batches}
    cfgs = [Settings(task=Settings(name="sequence_classification"), data=Settings(name=name)) for name in names]

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = LlamaModel.from_pretrained(tmp_path / "base")

    with stand_in():
        sys.modules["utils"].get_base_model = lambda cfg: Wrapper()
        found = train_merged_model(
            arguments(2, 2), cfgs, list(batches.values()), ["", ""], folders, None, "cpu", progress=False
        )
    base = LlamaModel.from_pretrained(tmp_path / "base")
    settings = {"steps": 2, "lr": 1e-3, "init": LAMBDA, "score_modules": ["v_proj"], "progress": False}
    padded = nsc_merge.merge(base, folders, batches, include_pad=True, **settings)
    assert found.result.coefficients == padded.coefficients
    assert padded.coefficients != nsc_merge.merge(base, folders, batches, **settings).coefficients


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kernel": False}, "args.kernel: expected True, .* found False; the codebase's own"),
        ({"ada": True}, "args.ada: expected False, .*adamerging"),
        ({"merge_type": "msu"}, "args.merge_type: expected 'weight', .* found 'msu'"),
        ({"coeff_type": "prob"}, "args.coeff_type: expected 'linear'"),
        ({"lambda_reg": 0.1}, "args.lambda_reg: expected 0, .* found 0.1"),
    ],
)
def test_other_merges_of_theirs_are_refused_by_name(small, changed, message):
    with stand_in(), pytest.raises(ValueError, match=message):
        train_merged_model(arguments(TASKS, 3, **changed), device="cpu", **small)


def test_wrong_tasks_and_a_missing_codebase_are_named(small, monkeypatch):
    unseen = [Settings(cfg, unseen=True) if not number else cfg for number, cfg in enumerate(small["cfgs"])]
    with stand_in(), pytest.raises(ValueError, match=r"cfgs: expected tasks .* found \['stanford_cars'\] unseen"):
        train_merged_model(arguments(TASKS, 3), device="cpu", **{**small, "cfgs": unseen})
    with stand_in(), pytest.raises(ValueError, match="lora_dicts: expected adapters of .* 2 loaders and 3 folders"):
        train_merged_model(arguments(TASKS, 3), device="cpu", **{**small, "val_loaders": small["val_loaders"][:2]})
    monkeypatch.setitem(sys.modules, "utils", ModuleType("utils"))
    with pytest.raises(ImportError, match=r"utils: expected the module of nsc_merging, with \['get_base_model'"):
        train_merged_model(arguments(TASKS, 3), device="cpu", **small)


class LinearTrainable(nn.Module):
    """What theirs computes, of a stand-in with its parts."""

    def __init__(self, d_in, d_out, ranks, scaling):
        super().__init__()
        self.base_layer = nn.Linear(d_in, d_out)
        down, diagonal = nn.Linear(d_in, sum(ranks), bias=False), nn.Identity()
        diagonal.logit = nn.Parameter(torch.linspace(0.2, 0.6, len(ranks)))
        diagonal.adapter_wise_rank = list(ranks)
        self.lora_A = nn.ModuleDict({"scaled": nn.Sequential(down, diagonal)})
        self.lora_B = nn.ModuleDict({"scaled": nn.Linear(sum(ranks), d_out, bias=False)})
        self.scaling, self.active_adapters = {"scaled": scaling}, ["scaled"]
        self.disable_adapters = self.merged = False
        for part in (self.base_layer, down, self.lora_B):
            part.requires_grad_(False)

    def forward(self, x):
        if self.disable_adapters:
            return self.base_layer(x)
        down, diagonal = self.lora_A["scaled"]
        weights = diagonal.logit.repeat_interleave(torch.tensor(diagonal.adapter_wise_rank))
        return self.base_layer(x) + self.lora_B["scaled"](down(x) * weights) * self.scaling["scaled"]


class Losses:
    def __init__(self):
        self.kept = {}

    def add_kernel_loss(self, key, adapter, value):
        self.kept[adapter, key] = value


class Merged(nn.Module):
    merge_type, coeff_type, scaled_name = "weight", "linear", "scaled"

    def __init__(self, ranks=(3, 5), scaling=1.5):
        super().__init__()
        torch.manual_seed(0)
        layers = [LinearTrainable(12, 12, ranks, scaling) for _ in range(3)]
        self.vit = nn.Module()
        self.vit.model = nn.ModuleDict({f"block{number}-v_proj": layer for number, layer in enumerate(layers)})
        self.lora_dicts = dict.fromkeys(["a", "b"][: len(ranks)], "")
        projectors = {name: dict.fromkeys(self.vit.model) for name in self.lora_dicts}
        self.projector_cluster = SimpleNamespace(kernel_projectors=projectors)
        self.loss_cluster = Losses()
        handles = []
        self.hook_manager = SimpleNamespace(handles=handles, clear=lambda: [handles.pop().remove() for _ in handles[:]])

    def activate_projectors(self, curr_adapter, block_candidates="block1,block2", layer_candidates="v_proj"):
        raise AssertionError("theirs, with hooks")

    def run(self, x):
        for layer in self.vit.model.values():
            x = layer(x).tanh()
        return x


def test_fused_layers_have_the_outputs_ratios_and_gradients_that_they_are_defined_by():
    model, x = Merged(), torch.randn(2, 7, 12)
    expected = model.run(x)
    with accelerate(model) as handle:
        assert handle.layers == 3
        torch.testing.assert_close(model.run(x), expected)
        model.activate_projectors("b")
        model.run(x)
        ratios = model.loss_cluster.kept
        assert [key for _, key in ratios] == ["block1-v_proj", "block2-v_proj"]
        (sum(ratios.values()) / 2).backward()
        model.hook_manager.clear()
        kept = dict(ratios)
        model.run(x)
        assert ratios == kept
    logits = [layer.lora_A["scaled"][1].logit for layer in model.vit.model.values()]
    found = [logit.grad for logit in logits]
    assert found[2] is None
    z, by_hand = x, []
    for number, layer in enumerate(model.vit.model.values()):
        rows = torch.linalg.qr(layer.lora_A["scaled"][0].weight[3:].t())[0]
        if number:
            quad = (z @ rows).square().sum(-1, keepdim=True)
            by_hand.append(null_space_ratio(quad, z.square().sum(-1)).mean())
        z = layer(z).tanh()
    torch.testing.assert_close(torch.stack(list(kept.values())), torch.stack(by_hand))
    gradients = torch.autograd.grad(sum(by_hand) / 2, logits[:2])
    for own, other in zip(found[:2], gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_disabled_layers_and_what_has_no_form_go_their_own_way():
    model, x = Merged(), torch.randn(4, 12)
    layer = model.vit.model["block0-v_proj"]
    handle = accelerate(model)
    layer.disable_adapters = True
    assert torch.equal(layer(x), layer.base_layer(x))
    with pytest.raises(ValueError, match="curr_adapter: expected one of .*'b'.* found 'c'"):
        model.activate_projectors("c")
    handle.remove()
    handle.remove()
    assert "forward" not in vars(layer)
    with pytest.raises(AssertionError, match="theirs"):
        model.activate_projectors("a")
    model.merge_type = "msu"
    with pytest.raises(ValueError, match="merged_model.merge_type: expected 'weight', found 'msu'"):
        accelerate(model)
    with pytest.raises(TypeError, match="expected SimpleMergeModel or KernelMergeModel, found Linear"):
        accelerate(nn.Linear(2, 2))
    wrong = Merged()
    wrong.vit.model["block0-v_proj"].lora_A["scaled"][1].adapter_wise_rank = [4, 5]
    with pytest.raises(ValueError, match=r"block0-v_proj: expected adapters of ranks \[4, 5\] .* found 8 rows"):
        accelerate(wrong)


class Counting(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_undoing_leaves_the_hook_that_somebody_else_put_around_a_layer():
    model, x, hook = Merged(), torch.randn(4, 12), Counting()
    layer = model.vit.model["block0-v_proj"]
    expected = model.run(x)
    handle = accelerate(model)
    add_hook_to_module(layer, hook)
    assert not torch.equal(model.run(x), expected)
    handle.remove()
    assert torch.equal(model.run(x), expected)
    assert hook.calls == 2
    remove_hook_from_module(layer)
    assert torch.equal(model.run(x), expected)
    others = [layer for name, layer in model.vit.model.items() if name != "block0-v_proj"]
    assert not any("forward" in vars(layer) for layer in others)
    assert "activate_projectors" not in vars(model)


def test_a_forward_that_somebody_else_put_there_before_is_refused_and_one_taken_off_does_not_stop_undoing():
    model, x, hook = Merged(), torch.randn(4, 12), Counting()
    layer = model.vit.model["block0-v_proj"]
    add_hook_to_module(layer, hook)
    with pytest.raises(ValueError, match="expected layers with the codebase's forward, found .* on block0-v_proj"):
        accelerate(model)
    model.run(x)
    assert hook.calls == 1
    remove_hook_from_module(layer)
    del layer.forward  # accelerate leaves the class's there
    expected = model.run(x)
    handle = accelerate(model)
    with pytest.raises(ValueError, match="by an earlier accelerate"):
        accelerate(model)
    del layer.forward
    handle.remove()
    assert torch.equal(model.run(x), expected)
    assert not any("forward" in vars(one) for one in model.vit.model.values())
    assert "activate_projectors" not in vars(model)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 2e-2)])
def test_a_model_converted_after_it_was_accelerated_is_computed_in_its_dtype(dtype, tolerance):
    model, x = Merged(), torch.randn(4, 12, dtype=dtype)
    handle = accelerate(model)
    model.to(dtype)
    found = model.run(x)
    handle.remove()
    assert found.dtype == dtype
    torch.testing.assert_close(found, model.run(x), rtol=tolerance, atol=tolerance)


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "models share one merged backbone: True" in capsys.readouterr().out
