"""Classifiers within a trunk, or a model without one, that say which they are, as timm's models do."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

import nsc_merge
from nsc_merge.calibration.raw.preprocessors import Base, image_processor_of
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.models.fitting import fit
from nsc_merge.models.traits import classifiers
from nsc_merge.recipes.first import findings
from nsc_merge.results.beside.preprocessing import preprocessing_notes

CLASSES = {"a": 5, "b": 3}
LORA = {"target_modules": ["fc"], "modules_to_save": ["head"]}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.fc(x))


class Trunk(nn.Module):
    """As timm has it: the head is within."""

    def __init__(self, classes):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, classes)

    def get_classifier(self):
        return self.head

    def features(self, x):
        return self.norm(self.blocks(x)).mean(1)

    def forward(self, x):
        return self.head(self.features(x))


class Config(PreTrainedConfig):
    model_type = "with_a_head_within"


class Wrapper(PreTrainedModel):
    """As transformers has timm's models."""

    config_class = Config
    base_model_prefix = "inner"
    main_input_name = "x"
    _no_split_modules = ()

    def __init__(self, config):
        super().__init__(config)
        self.inner = Trunk(config.num_labels)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, x):
        return ImageClassifierOutput(logits=self.inner(x))


def made(kind, classes):
    """The same trunk with heads of its own."""
    torch.manual_seed(0)
    model = Trunk(classes) if kind is Trunk else Wrapper(Config(num_labels=classes))
    torch.manual_seed(0)
    trunk = model if kind is Trunk else model.inner
    for module in (trunk.blocks[0].fc, trunk.blocks[1].fc, trunk.norm):
        module.reset_parameters()
    return model.eval()


def written(kind, place):
    """Adapters with heads of unequal sizes, by PEFT, and what each task's own model gives."""
    folders, own = {}, {}
    for seed, (task, classes) in enumerate(CLASSES.items()):
        adapted = get_peft_model(made(kind, classes), LoraConfig(r=2, **LORA))
        torch.manual_seed(seed)
        with torch.no_grad():
            for value in adapted.parameters():
                if value.requires_grad:
                    value.normal_(std=0.4)
        adapted.save_pretrained(place / task)
        folders[task], own[task] = place / task, adapted.eval()
    return folders, own


def photos():
    return torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", [Trunk, Wrapper])
def test_a_classifier_that_the_model_points_out_stays_its_task_s(kind, tmp_path):
    folders, _ = written(kind, tmp_path)
    model = made(kind, 5)
    result = nsc_merge.merge(model, folders, method="task_arithmetic", scale=0.4)
    head = "head" if kind is Trunk else "inner.head"
    for task, adapter in result.adapters.items():
        assert set(adapter.trained) == {f"{head}.weight", f"{head}.bias"}
        assert f"{head}: trained in full, the task's own head: kept in heads/, not merged" in adapter.notes
        saved = load_file(result.save(tmp_path / "out", "lora") / "heads" / f"{task}.safetensors")
        assert saved[f"{head}.weight"].shape == (CLASSES[task], 8)
    assert all(path.endswith(".fc") for path in result.paths)


@pytest.mark.parametrize("base", CLASSES.values())
def test_a_head_within_the_trunk_is_put_into_both_formats(base, tmp_path):
    folders, own = written(Wrapper, tmp_path)
    model, x = made(Wrapper, base), photos()
    before = copy.deepcopy(model.state_dict())
    result = nsc_merge.merge(model, folders, method="task_arithmetic", scale={"a": 0.0, "b": 1.0})
    loaded = Wrapper.from_pretrained(result.save(tmp_path / "model", "model", head="b")).eval()
    torch.testing.assert_close(loaded(x).logits, own["b"](x).logits, **TOLERANCE)
    assert loaded.config.num_labels == 3
    other = Wrapper.from_pretrained(result.save(tmp_path / "other", "model", head="a"))
    assert torch.equal(other.inner.head.weight, result.adapters["a"].trained["inner.head.weight"])
    folder = result.save(tmp_path / "lora", "lora", head="b")
    assert len(load_file(folder / "adapter_model.safetensors")) == 2 * 2 + 2
    peft = PeftModel.from_pretrained(made(Wrapper, 3), folder).eval()
    torch.testing.assert_close(peft(x).logits, own["b"](x).logits, **TOLERANCE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [Trunk, Wrapper])
@pytest.mark.parametrize("method", ["distill", "adamerging"])
def test_a_task_is_judged_by_its_own_classifier(kind, method, tmp_path):
    folders, _ = written(kind, tmp_path)
    model, data = made(kind, 5), {task: [{"x": photos()}] for task in CLASSES}
    adapters = fit({task: nsc_merge.load_adapter(folder, task) for task, folder in folders.items()}, model)

    def logits(task):
        weight, bias = adapters[task].trained.values()
        weight, bias = (bias, weight) if weight.dim() == 1 else (weight, bias)
        return lambda model, batch: getattr(model, "inner", model).features(batch["x"]) @ weight.T + bias

    outputs = {task: logits(task) for task in CLASSES}
    found = nsc_merge.merge(model, folders, data, method, steps=2, progress=False)
    wanted = nsc_merge.merge(model, folders, data, method, steps=2, progress=False, outputs=outputs)
    for path in found.paths:
        torch.testing.assert_close(found.delta(path), wanted.delta(path), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [Trunk, Wrapper])
def test_what_is_matched_is_in_front_of_the_classifier(kind, tmp_path):
    folders, _ = written(kind, tmp_path)
    data = {task: [{"x": photos()}] for task in CLASSES}
    found = nsc_merge.merge(made(kind, 5), folders, data, "match", steps=1, progress=False)
    # Another head is in the way of none of them.
    other = nsc_merge.merge(made(kind, 3), folders, data, "match", steps=1, progress=False)
    assert found.objective["before"] == pytest.approx(other.objective["before"], rel=1e-6)


def test_a_model_without_blocks_is_matched_where_it_points_out_its_classifier():
    """As timm's convolutional ones."""

    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def get_classifier(self):
            return self.fc

        def forward(self, x):
            return self.fc(self.stem(x).mean((2, 3)))

    torch.manual_seed(0)
    factor = nsc_merge.Factor(torch.randn(2, 27), torch.randn(8, 2), 1.0)
    adapters = {task: nsc_merge.Adapter(task, {"stem": factor}) for task in CLASSES}
    data = {task: [{"x": torch.randn(2, 3, 6, 6)}] for task in CLASSES}
    model = Convolutions()
    found = nsc_merge.merge(model, adapters, data, "match", steps=2, progress=False)
    changed = copy.deepcopy(model)
    nn.init.zeros_(changed.fc.weight)
    assert found.coefficients == nsc_merge.merge(changed, adapters, data, "match", steps=2, progress=False).coefficients
    with pytest.raises(ValueError, match="say where its blocks are by family"):
        nsc_merge.merge(model, adapters, data, steps=2, progress=False)


def test_heads_of_unequal_sizes_are_refused_with_the_way_out(tmp_path, monkeypatch):
    folders, _ = written(Trunk, tmp_path)
    monkeypatch.delattr(Trunk, "get_classifier")
    model = made(Trunk, 5)
    with pytest.raises(ValueError, match=r"expected shape \[5\], found \[3\].*get_classifier = lambda: model.head"):
        nsc_merge.merge(model, folders, method="task_arithmetic", scale=0.4)
    model.get_classifier = lambda: model.head
    nsc_merge.merge(model, folders, method="task_arithmetic", scale=0.4)


def test_logits_are_those_of_the_classifier_where_no_head_was_brought(tmp_path, monkeypatch):
    model, data = made(Trunk, 5), {task: [{"x": photos()}] for task in CLASSES}
    adapters = {
        task: nsc_merge.Adapter(task, {"blocks.0.fc": nsc_merge.Factor(torch.randn(2, 8), torch.randn(8, 2), 1.0)})
        for task in CLASSES
    }
    outputs = dict.fromkeys(CLASSES, lambda model, batch: model(**batch))
    found = nsc_merge.merge(model, adapters, data, "distill", steps=2, progress=False)
    wanted = nsc_merge.merge(model, adapters, data, "distill", steps=2, progress=False, outputs=outputs)
    assert found.coefficients == wanted.coefficients
    # A tensor of another model may be anything.
    monkeypatch.delattr(Trunk, "get_classifier")
    with pytest.raises(ValueError, match="outputs: Trunk has no logits; expected a function of model and batch"):
        nsc_merge.merge(model, adapters, data, "distill", steps=2, progress=False)


def test_names_of_classes_are_those_of_the_head_in_timm_s_configuration_too(tmp_path):
    folders, _ = written(Wrapper, tmp_path)
    model = made(Wrapper, 5)
    model.config.label_names = [f"LABEL_{number}" for number in range(5)]
    result = nsc_merge.merge(model, folders, method="task_arithmetic", scale=0.4)
    loaded = Wrapper.from_pretrained(result.save(tmp_path / "out", head="b", labels={"b": ["x", "y", "z"]}))
    assert loaded.config.label_names == list(loaded.config.id2label.values()) == ["x", "y", "z"]
    assert len(model.config.label_names) == 5


def test_the_processor_of_a_model_of_timm_is_in_its_configuration(tmp_path, monkeypatch):
    folders, _ = written(Wrapper, tmp_path)
    result = nsc_merge.merge(made(Wrapper, 5), folders, method="task_arithmetic", scale=0.4)
    asked = []
    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", lambda name, **_: asked.append(name))
    base = Base(str(tmp_path), None, result.model.config, frozenset({"pixel_values"}))
    with pytest.raises(FileNotFoundError, match="holds no processor"):
        image_processor_of(base, DataSettings(), "data")
    assert "processor" in preprocessing_notes(result)[0]
    monkeypatch.setattr(Config, "model_type", "timm_wrapper")
    image_processor_of(base, DataSettings(), "data")
    assert (asked, preprocessing_notes(result)) == ([str(tmp_path)], [])


def test_a_first_recipe_says_whose_the_classifier_is():
    trained = ["inner.norm", "inner.head"]
    assert findings._heads(SimpleNamespace(whole=trained), made(Wrapper, 5)) == ["inner.head"]
    assert findings._heads(SimpleNamespace(whole=["norm", "head"]), made(Trunk, 5)) == ["head"]


@pytest.mark.parametrize("meant", [lambda kind: kind, nn.Linear(8, 2), "head"])
def test_what_means_something_else_by_the_name_is_no_classifier(meant):
    model = nn.Sequential(Trunk(3), nn.Module())
    model[1].get_classifier = meant
    assert classifiers(model) == [model[0].head]
