"""Updates of weights that are not in memory, or no plain numbers: right against a dense sum on a plain copy, or refused
before anything changes.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from loop_cases import adapters_for, image_batches, llama, llava, text_batches, trajectory, values
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

import nsc_merge
from nsc_merge.evaluation.scoring import applied
from nsc_merge.models.bases.stored_weights import sharing, state_of
from nsc_merge.models.fitting import fit
from nsc_merge.models.merged.measured_linear import MeasuredLoRALinear

DISK = ("model.layers.1", "model.layers.2", "lm_head")


def dispatched(model, folder):
    parts = [f"model.{name}" for name in ("embed_tokens", "norm", "rotary_emb", *(f"layers.{n}" for n in range(4)))]
    places = {part: "disk" if part in DISK else "cpu" for part in (*parts, "lm_head")}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder)


OFFLOADED = {
    "cpu": lambda model, folder: cpu_offload(model, torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, folder, torch.device("cpu")),
    "device_map": dispatched,
}


@pytest.fixture(params=OFFLOADED)
def offloaded(request, tmp_path):
    return OFFLOADED[request.param](llama(), tmp_path / "weights")


@pytest.fixture
def update():
    model = llama()
    return nsc_merge.merge(model, adapters_for(model), method="task_arithmetic", scale=0.5)


@pytest.fixture
def expected(update):
    """Parameters of a plain model with the dense sum added."""
    parameters = {name: value.detach().clone() for name, value in update.model.named_parameters()}
    for path in update.paths:
        parameters[f"{path}.weight"] = (parameters[f"{path}.weight"].double() + update.delta(path)).float()
    return parameters


def logits(model, parameters=None):
    inputs = text_batches(1)["a"][0]
    with torch.no_grad():
        return torch.func.functional_call(model, parameters or {}, (), inputs).logits


def test_apply_reaches_offloaded_weights(update, expected, offloaded):
    assert torch.equal(logits(update.apply(offloaded)), logits(llama(), expected))


def test_applied_gives_offloaded_weights_back(update, expected, offloaded):
    with applied(offloaded, update):
        assert torch.equal(logits(offloaded), logits(llama(), expected))
    assert torch.equal(logits(offloaded), logits(llama()))
    before = dict(update.model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in state_of(offloaded).items())


def test_files_of_offloaded_weights_stay_as_they_are(update, tmp_path):
    model = disk_offload(llama(), tmp_path, torch.device("cpu"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    update.apply(model)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_is_saved_with_its_offloaded_weights(expected, offloaded, tmp_path):
    result = nsc_merge.merge(offloaded, adapters_for(llama()), method="task_arithmetic", scale=0.5)
    saved = LlamaForCausalLM.from_pretrained(result.save(tmp_path / "out", "model"))
    assert {name: value.shape for name, value in saved.named_parameters()} == {k: v.shape for k, v in expected.items()}
    assert all(torch.equal(value, expected[name]) for name, value in saved.named_parameters())


def test_the_cache_of_a_tower_gives_an_offloaded_tower_its_forward_back():
    plain, model = llava(), llava()
    model = cpu_offload(model, torch.device("cpu"))
    tower = model.model.vision_tower
    tower.forward = own = tower.forward
    adapters, batches = adapters_for(plain), image_batches()
    found, wanted = (trajectory(one, adapters, batches, recipe="vlm", steps=2) for one in (model, plain))
    torch.testing.assert_close(values(found), values(wanted), rtol=0, atol=1e-5)
    assert vars(tower)["forward"] is own


@pytest.mark.parametrize("settings", [{}, {"checkpointing": True, "fold": True}])
def test_nsc_of_an_offloaded_base_is_that_of_a_plain_one(offloaded, settings):
    plain = llama()
    adapters, batches = adapters_for(plain), text_batches()
    forwards = {module: vars(module).get("forward") for module in offloaded.modules()}
    found = trajectory(offloaded, adapters, batches, batch_tasks=None, **settings)
    wanted = trajectory(plain, adapters, batches, batch_tasks=None, fold=False)
    torch.testing.assert_close(values(found), values(wanted), rtol=0, atol=1e-5)
    assert (values(found) - 0.4).abs().max() > 1e-3
    assert all(parameter.requires_grad for parameter in offloaded.parameters())
    assert {module: vars(module).get("forward") for module in offloaded.modules()} == forwards


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_methods_of_data_take_an_offloaded_base(offloaded, method):
    plain = llama()
    adapters, batches = adapters_for(plain), text_batches(1)
    found, wanted = (nsc_merge.merge(model, adapters, batches, method, batches=1) for model in (offloaded, plain))
    for path in wanted.paths:
        torch.testing.assert_close(found.delta(path), wanted.delta(path), rtol=1e-6, atol=1e-9)


def test_whole_linears_of_an_offloaded_base_become_updates(tmp_path):
    plain = llama()
    adapter = adapters_for(plain)["a"]
    path = "model.layers.1.mlp.up_proj"
    trained = plain.get_submodule(path).weight.detach() + 0.25
    adapter = nsc_merge.Adapter("a", adapter.factors, trained={f"{path}.weight": trained})
    model = disk_offload(llama(), tmp_path, torch.device("cpu"))
    found, wanted = (fit({"a": adapter}, one)["a"].factors[path].dense for one in (model, plain))
    assert torch.equal(found, wanted)
    torch.testing.assert_close(found, torch.full_like(found, 0.25))
    result = nsc_merge.merge(model, {"a": adapter}, method="task_arithmetic", scale=1.0)
    saved = load_file(result.save(tmp_path / "out", "lora") / "adapter_model.safetensors")
    torch.testing.assert_close(saved[f"base_model.model.{path}.weight"], trained)


def test_ties_are_seen_where_parameters_are_offloaded():
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    tied = ["model.embed_tokens.weight", "lm_head.weight"]
    assert sharing(model)["lm_head.weight"] == tied
    assert sharing(cpu_offload(model, torch.device("cpu")))["lm_head.weight"] == tied
    apart = llama()
    apart.lm_head.weight = nn.Parameter(apart.model.embed_tokens.weight.detach())
    assert sharing(apart)["lm_head.weight"] == tied
    twice = llama()
    twice.model.layers[1].mlp = twice.model.layers[0].mlp
    path = "mlp.up_proj.weight"
    assert sharing(twice)[f"model.layers.0.{path}"] == [f"model.layers.{number}.{path}" for number in (0, 1)]


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_an_adapter_is_merged_for_a_base_without_weights(method, tmp_path):
    saved = [
        load_file(nsc_merge.merge(model, adapters_for(llama()), method=method, scale=0.5).save(folder, "lora", rank=4)
        / "adapter_model.safetensors")
        for model, folder in ((llama(), tmp_path / "plain"), (llama().to("meta"), tmp_path / "meta"))
    ]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())


class Codes(torch.Tensor):
    """What a library for quantisation puts in a weight's place."""


class QuantisedLinear(nn.Linear):
    """int8 codes with a scale per row, and a forward of its own, as bitsandbytes has it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        weight = linear.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        codes = (weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes.as_subclass(Codes), requires_grad=False)

    def forward(self, z):
        return nn.functional.linear(z, self.weight.as_subclass(torch.Tensor).float() * self.scale)


def replaced(model, make):
    """The model with ``make`` of every adapted linear in its place."""
    for path in adapters_for(model)["a"].factors:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))
    return model


def fp8(linear):
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return linear


def shard(linear):
    linear.weight = nn.Parameter(linear.weight.detach().flatten()[:7])
    return linear


REFUSED = {
    "codes": (QuantisedLinear, r"expected a plain parameter in float64.*Codes in int8; use format 'lora' and load it"),
    "fp8": (fp8, r"found a parameter in float8_e4m3fn; use format 'lora'.*or load the base in bfloat16"),
    "shard": (shard, r"expected shape \[32, 32\], found \[7\]: a shard"),
    "meta": (lambda linear: linear.to("meta"), "found the meta device; load the model's weights first"),
    "parametrized": (torch.nn.utils.parametrizations.weight_norm, "found one that is computed from others"),
    "sparse": (
        lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.detach().to_sparse())) or linear,
        "expected a plain parameter",
    ),
}


def plain_numbers(value):
    value = value.detach()
    return value.to_dense() if value.is_sparse else value.as_subclass(torch.Tensor).double()


@pytest.mark.parametrize("kind", REFUSED)
def test_apply_refuses_what_is_no_plain_weight_and_touches_nothing(update, kind, tmp_path):
    make, words = REFUSED[kind]
    model = llama()
    last = model.model.layers[3].self_attn
    last.v_proj = make(last.v_proj)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"^model\.layers\.3\.self_attn\.v_proj\.weight: .*{words}"):
        update.apply(model)
    if kind != "codes":
        with pytest.raises(ValueError, match=words), applied(model, update):
            pass
    result = nsc_merge.merge(model, adapters_for(llama()), method="task_arithmetic")
    with pytest.raises(ValueError, match=words):
        result.save(tmp_path / "out", "model")
    assert not (tmp_path / "out").exists()
    for name, value in model.named_parameters():
        assert value.device.type == "meta" or torch.equal(*map(plain_numbers, (value, before[name])))


@pytest.mark.parametrize("kind", ["shard", "meta", "fp8"])
def test_attach_refuses_a_base_that_cannot_run(kind):
    words = {"shard": "found a shard", "meta": r"v_proj\.weight on the meta device", "fp8": "float8_e4m3fn"}[kind]
    model = llama()
    last = model.model.layers[3].self_attn
    last.v_proj = REFUSED[kind][0](last.v_proj)
    with pytest.raises(ValueError, match=words), nsc_merge.attach(model, adapters_for(llama()), 0.4):
        pass
    assert not any(isinstance(module, MeasuredLoRALinear) for module in model.modules())


def test_a_quantised_base_keeps_its_own_forward(update):
    model = replaced(llama(), QuantisedLinear)
    with nsc_merge.attach(model, adapters_for(llama()), 0.5):
        found = logits(model)
    with applied(model, update):
        # As an evaluation measures a merge on it: added to what the linears give.
        beside = logits(model)
    for path in update.paths:
        delta = update.delta(path).float()
        model.get_submodule(path).register_forward_hook(
            lambda _, given, y, delta=delta: y + nn.functional.linear(given[0], delta)
        )
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(beside, logits(model), rtol=1e-5, atol=1e-5)


def test_nsc_on_a_quantised_base_is_that_on_its_values():
    quantised = replaced(llama(), QuantisedLinear)
    plain = llama()
    for path in adapters_for(plain)["a"].factors:
        eye = torch.eye(32)
        plain.get_submodule(path).weight.data.copy_(quantised.get_submodule(path)(eye).t())
    adapters, batches = adapters_for(plain), text_batches()
    found, wanted = (trajectory(model, adapters, batches, fold=False) for model in (quantised, plain))
    torch.testing.assert_close(values(found), values(wanted), rtol=0, atol=1e-5)
    assert (values(found) - 0.4).abs().max() > 1e-3


def test_offloaded_checkpoint_files_are_read_through_accelerate(update, expected, tmp_path):
    """An index of safetensors files, as transformers gives it for a device map with disk."""
    from accelerate.utils import OffloadedWeightsLoader

    model = llama()
    save_file({name: value.detach() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    index = {
        name: {"safetensors_file": str(tmp_path / "model.safetensors"), "weight_name": name, "dtype": "float32"}
        for name in model.state_dict()
    }
    cpu_offload(model, torch.device("cpu"), state_dict=OffloadedWeightsLoader(index=index))
    assert torch.equal(logits(update.apply(model)), logits(llama(), expected))
