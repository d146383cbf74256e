"""The attached model against a dense merge and against peft's own multi-adapter forward."""

from __future__ import annotations

import copy
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call

import nsc_merge
from nsc_merge import Adapter, Factor, attach, load_adapter
from nsc_merge.models import attachment
from nsc_merge.models.forward_contexts import evaluating


def loaded(folders):
    return {task: load_adapter(folder, task) for task, folder in folders.items()}


def dense_weights(model, adapters, lams):
    """The merged weights as differentiable functions of ``lams``: path -> [K]."""
    weights = {}
    for path, lam in lams.items():
        weight = model.get_submodule(path).weight.detach()
        for coefficient, adapter in zip(lam, adapters.values(), strict=True):
            if path in adapter.factors:
                weight = weight + coefficient * adapter.factors[path].delta().to(weight)
        weights[f"{path}.weight"] = weight
    return weights


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_forward_and_lambda_gradient_equal_the_dense_merge(
    model, folders, images, random_lambdas, dtype, tolerance
):
    model, images = model.to(dtype), images.to(dtype)
    adapters = loaded(folders)
    weighting = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(3), dtype=dtype)
    with attach(model, adapters, 0.4) as merged:
        random_lambdas(merged)
        out = model(pixel_values=images).last_hidden_state
        (out * weighting).sum().backward()
        lams = {path: module.lam.detach().clone().requires_grad_() for path, module in merged.items()}
        gradients = {path: module.lam.grad for path, module in merged.items()}
    expected = functional_call(model, dense_weights(model, adapters, lams), (images,)).last_hidden_state
    (expected * weighting).sum().backward()
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    largest = max(lam.grad.abs().max() for lam in lams.values())
    for path, lam in lams.items():
        torch.testing.assert_close(
            gradients[path], lam.grad, rtol=20 * tolerance, atol=tolerance * float(largest)
        )


def test_forward_equals_peft_with_scaled_adapters(model, folders, images, random_lambdas):
    adapters = loaded(folders)
    tasks = list(folders)
    oracle = PeftModel.from_pretrained(copy.deepcopy(model), folders[tasks[0]], adapter_name=tasks[0])
    for task in tasks[1:]:
        oracle.load_adapter(folders[task], adapter_name=task)
    oracle.base_model.set_adapter(tasks)
    oracle.eval()
    with attach(model, adapters, 0.4) as merged:
        random_lambdas(merged)
        out = model(pixel_values=images).last_hidden_state
        for path, module in merged.items():
            layer = oracle.base_model.model.get_submodule(path)
            for index, task in enumerate(tasks):
                if task in layer.scaling:
                    layer.scaling[task] *= module.lam[index].item()
    with torch.no_grad():
        expected = oracle(pixel_values=images).last_hidden_state
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_detach_restores_the_same_objects(model, folders, fails):
    model.embeddings.requires_grad_(False)
    objects = {name: id(module) for name, module in model.named_modules()}
    tensors = {name: (id(value), value.requires_grad) for name, value in model.named_parameters()}
    values = copy.deepcopy(model.state_dict())
    try:
        with attach(model, loaded(folders), 0.4) as merged:
            path, module = next(iter(merged.items()))
            assert model.get_submodule(path) is module
            assert id(module.linear) == objects[path]
            assert [name for name, value in model.named_parameters() if value.requires_grad] == [
                f"{name}.lam" for name in merged
            ]
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert {name: id(module) for name, module in model.named_modules()} == objects
    assert {name: (id(value), value.requires_grad) for name, value in model.named_parameters()} == tensors
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])


def test_wrong_path_shape_or_type_is_refused_and_leaves_the_model_alone(model, write_adapter):
    adapter = load_adapter(write_adapter("one", 1), "one")
    objects = {name: id(module) for name, module in model.named_modules()}
    path, factor = next(iter(adapter.factors.items()))

    def renamed(to, value=factor):
        return {"one": type(adapter)("one", {**adapter.factors, to: value})}

    with (
        pytest.raises(ValueError, match=r"adapters\['one'\].*'layers\.9\.attention\.q_proj'"),
        attach(model, renamed("layers.9.attention.q_proj"), 0.4),
    ):
        pass
    with (
        pytest.raises(TypeError, match=r"embedding, norm or convolution, found transformers\..*ViTLayer"),
        attach(model, renamed("layers.0"), 0.4),
    ):
        pass
    wrong = type(factor)(factor.A[:, :-1], factor.B, factor.scaling)
    with (
        pytest.raises(ValueError, match=r"of shape \[32, 32\] to fit the model, found \[32, 31\]"),
        attach(model, renamed(path, wrong), 0.4),
    ):
        pass
    assert {name: id(module) for name, module in model.named_modules()} == objects


def test_a_base_that_carries_adapters_is_refused_with_the_way_out(model, folders):
    adapters = loaded(folders)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with (
        pytest.raises(ValueError, match=r"not in PeftModel.*expected the base model, as its unload\(\) gives it"),
        attach(wrapped, adapters, 0.4),
    ):
        pass
    with (
        pytest.raises(TypeError, match=r"found peft\..*Linear; the PeftModel's unload\(\) takes the adapters off"),
        attach(wrapped.base_model.model, adapters, 0.4),
    ):
        pass
    with attach(wrapped.unload(), adapters, 0.4) as merged:
        assert merged


def test_a_model_in_another_wrapper_is_refused_with_the_way_out(model, folders):
    wrapped = nn.DataParallel(model)
    with pytest.raises(ValueError, match=r"expected its \.module"), attach(wrapped, loaded(folders), 0.4):
        pass


def test_weights_that_a_parent_brings_are_refused():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 3)))
    cpu_offload(model, torch.device("cpu"), preload_module_classes=["Sequential"])
    adapters = {"a": Adapter("a", {"0.0": Factor(torch.randn(2, 4), torch.randn(3, 2), 1.0)})}
    words = r"^0\.0: .* offload without preload_module_classes"
    with pytest.raises(ValueError, match=words), attach(model, adapters, 1.0):
        pass


@pytest.mark.parametrize("method", ["nsc", "match", "regmean", "task_arithmetic"])
def test_a_model_made_in_inference_mode_is_refused_before_anything_runs(model, folders, images, method):
    calibration = {task: [{"pixel_values": images}] for task in folders}
    with torch.inference_mode():
        made = copy.deepcopy(model)
    if method == "task_arithmetic":
        assert nsc_merge.merge(made, folders, method=method).paths
        return
    with pytest.raises(ValueError, match=r"model: \S+ was made inside torch.inference_mode\(\).*loaded outside"):
        nsc_merge.merge(made, folders, calibration, method)
    assert all(parameter.requires_grad for parameter in made.parameters())
    # Called inside, a merge of a model that was made outside learns as ever.
    with torch.inference_mode():
        assert nsc_merge.merge(model, folders, calibration, method).paths


def test_a_second_merge_of_a_model_is_refused_while_one_is_at_work(model, folders, images):
    """As of two requests to one server, whose threads share the base."""
    copied = copy.deepcopy(model)
    modules, refused = list(model.modules()), []

    class Batches:
        def __iter__(self):
            refused.extend(pool.map(merged, (model, copied)))
            yield {"pixel_values": images}

    def merged(base):
        try:
            return nsc_merge.merge(base, folders, method="task_arithmetic").delta("layers.0.attention.v_proj")
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        nsc_merge.merge(model, folders, dict.fromkeys(folders, Batches()), steps=1, progress=False)
    assert refused[0].startswith("model: another merge of this very model is at work")
    assert torch.equal(refused[1], merged(model))
    assert list(model.modules()) == modules


def test_ctrl_c_while_a_model_is_given_back_leaves_no_merged_linear_in_it(model, folders, monkeypatch):
    before = dict(model.named_modules())
    handler = signal.getsignal(signal.SIGINT)
    replace = attachment._replace

    def pressed(*arguments):
        signal.raise_signal(signal.SIGINT)
        replace(*arguments)

    with attach(model, loaded(folders), 0.3):
        assert dict(model.named_modules()) != before
        monkeypatch.setattr(attachment, "_replace", pressed)
    assert dict(model.named_modules()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_while_a_model_is_put_into_evaluation_mode_leaves_its_modes(model, monkeypatch):
    modes = [bool(number % 2) for number, _ in enumerate(model.modules())]
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    evaluate = model.eval

    def pressed():
        evaluate()
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "eval", pressed)
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        pass
    assert [module.training for module in model.modules()] == modes
