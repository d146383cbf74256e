"""Methods that look at outputs, where each task's adapter brought a head of its own (``modules_to_save``)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from own_cases import QUIET
from transformers import ViTConfig, ViTForImageClassification, ViTModel

import nsc_merge
from nsc_merge.methods import METHODS, Problem
from nsc_merge.models.fitting import fit
from nsc_merge.models.forward_contexts import shared_forward

CLASSES = {"size": 2, "colour": 4}
METHODS_OF_OUTPUTS = {"distill": {"steps": 3}, "adamerging": {"steps": 3}, "fisher": {}}


def vit(classes, kind=ViTForImageClassification):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48}
    return kind(ViTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, num_labels=classes)).eval()


def adapters_for(model, tmp_path):
    """Trained beside heads of 2 and of 4 classes, fitted to ``model``."""
    targets = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
    folders = {
        task: zoo.write_adapter(vit(count), tmp_path / task, count, **targets) for task, count in CLASSES.items()
    }
    return fit({task: nsc_merge.load_adapter(folder, task) for task, folder in folders.items()}, model)


def head_of(adapter):
    weight, bias = adapter.trained["classifier.weight"], adapter.trained["classifier.bias"]
    return lambda model, batch: F.linear(model.vit(**batch).last_hidden_state[:, 0], weight, bias)


def result_of(problem, method, **options):
    result = METHODS[method].run(problem, {**({} if method == "fisher" else QUIET), **options})
    return torch.cat([result.delta(path).flatten() for path in result.paths])


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("method", METHODS_OF_OUTPUTS)
def test_a_task_is_judged_by_the_head_that_its_adapter_brought(tmp_path, method, classes):
    """Also by the one of several whose batches are the very same objects; the base's own is of other classes."""
    model = vit(classes)
    adapters = adapters_for(model, tmp_path)
    photos = [{"pixel_values": torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))}]
    problem = Problem(model, adapters, dict.fromkeys(CLASSES, photos))
    own = {name: value.clone() for name, value in model.named_parameters()}

    found = result_of(problem, method, **METHODS_OF_OUTPUTS[method])
    heads = {task: head_of(adapter) for task, adapter in adapters.items()}
    expected = result_of(problem, method, outputs=heads, **METHODS_OF_OUTPUTS[method])

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(value, own[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("method", METHODS_OF_OUTPUTS)
def test_a_head_without_a_place_in_the_model_is_refused(tmp_path, method):
    model = vit(2, ViTModel)
    photos = [{"pixel_values": torch.randn(2, 3, 16, 16)}]
    problem = Problem(model, adapters_for(model, tmp_path), dict.fromkeys(CLASSES, photos))
    with pytest.raises(ValueError, match=r"outputs: the adapter of 'size' brought a head \(classifier\..*no place"):
        METHODS[method].run(problem, {})


def test_a_shared_forward_runs_anew_for_another_head():
    model = vit(2)
    photos = {"pixel_values": torch.randn(2, 3, 16, 16)}
    other = {"classifier.weight": torch.randn(4, 32), "classifier.bias": torch.randn(4)}
    with shared_forward(model), torch.no_grad():
        first = model(**photos).logits
        swapped = torch.func.functional_call(model, other, (), photos).logits
        assert model(**photos).logits is first
    assert swapped.shape == (2, 4)
