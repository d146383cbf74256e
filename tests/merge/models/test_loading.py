"""Loading a base: its files hashed as they were read, its weights its own, nothing of it run."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from types import SimpleNamespace

import pytest
import served_cases
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from zoo import build

from nsc_merge.models.bases import loading
from nsc_merge.models.bases.architecture import architecture_of, outline_of, quantised_as
from nsc_merge.models.bases.loading import files_of, load_model
from nsc_merge.models.bases.placement import Placement
from nsc_merge.utils.provenance import whole

FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    build("vit").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def load(folder, **options):
    return load_model(str(folder), local=True, placement=Placement(device="cpu"), **options)


def test_weights_are_told_by_header_and_size_and_hashed_whole_when_asked(folder):
    raw = (folder / FILE).read_bytes()
    header = raw[: 8 + int.from_bytes(raw[:8], "little")]
    sha256 = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in (FILE, "config.json")}
    quick = {"header_sha256": hashlib.sha256(header).hexdigest(), "size": len(raw)}
    assert files_of(load(folder)) == {"config.json": sha256["config.json"], FILE: quick}
    assert files_of(load(folder, digest=whole)) == sha256
    assert files_of(build("vit")) == {}


@pytest.mark.parametrize("change", ["overwritten", "cut"])
def test_a_base_outlives_its_files(folder, change):
    model = load(folder)
    expected = {name: value.clone() for name, value in type(model).from_pretrained(folder).state_dict().items()}
    size = (folder / FILE).stat().st_size
    if change == "cut":
        os.truncate(folder / FILE, 100)
    else:
        with (folder / FILE).open("r+b") as file:
            file.seek(size // 2)
            file.write(bytes(size - size // 2))
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_files_that_change_while_they_are_read_are_refused(folder, monkeypatch):
    """Other weights take the place of the file between transformers' reading and the hashing."""

    def replaced(*arguments):
        values = {name: value + 1 for name, value in load_file(folder / FILE).items()}
        save_file(values, folder / "other", metadata={"format": "pt"})
        os.replace(folder / "other", folder / FILE)
        return before(*arguments)

    before = loading.digests
    monkeypatch.setattr(loading, "digests", replaced)
    with pytest.raises(ValueError, match="model: files in .*base changed while they were read"):
        load(folder)


def test_code_that_comes_with_a_base_is_never_run(folder, monkeypatch, capsys):
    def ask(*_):
        raise AssertionError("transformers asked")

    monkeypatch.setattr("builtins.input", ask)
    for name in ("configuration_own", "modeling_own"):
        (folder / f"{name}.py").write_text("import pathlib; pathlib.Path(__file__).with_name('run').touch()\n")
    own = {"AutoConfig": "configuration_own.Config", "AutoModel": "modeling_own.Model"}
    # transformers has a ViT of its own, which is taken.
    edit(folder / "config.json", auto_map=own)
    assert type(load(folder)).__name__ == "ViTForImageClassification"
    edit(folder / "config.json", model_type="own")
    with pytest.raises(ValueError, match=r"model: .*base needs code of its own \(auto_map .*nsc_merge\.merge") as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert not list(folder.rglob("run"))


def test_models_and_pipelines_of_diffusers_are_refused_with_the_way_to_merge_them(folder):
    fields = {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.42.1"}
    (folder / "config.json").write_text(json.dumps(fields))
    way = r"diffusers.*; load it there, and merge in Python: nsc_merge\.merge\(pipe\.transformer, adapters\)"
    with pytest.raises(ValueError, match=f"^model: .*base holds a model of {way}"):
        load(folder)
    (folder / "config.json").unlink()
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"^model: .*base holds a pipeline of {way}"):
        load(folder)


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 10**9}, {"text_config": {"num_layers": 10**12}}])
def test_layers_that_no_file_holds_are_not_made(folder, fields):
    edit(folder / "config.json", **fields)
    with pytest.raises(ValueError, match=r"^model: the config.json of .*base says 10+ layers, whose files hold \d"):
        load(folder)


@pytest.mark.parametrize("fields", [{"num_labels": 10**12}, {"text_config": {"num_labels": 10_000_001}}])
def test_labels_beyond_count_are_given_no_names(folder, fields):
    edit(folder / "config.json", **fields)
    with pytest.raises(ValueError, match=r"^model: the config.json of .*base says num_labels: 10+1?; expected at"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": 10**13}, r" \(hidden_size: 10000000000000\): Storage size"),
        ({"image_size": 10**20}, r" \(image_size: 100000000000000000000\): "),
        ({"num_attention_heads": 10**6}, ": 0.0 cannot be raised to a negative power"),
        ({"hidden_act": "none-such"}, ": .*none-such"),
    ],
)
def test_a_configuration_that_no_model_can_be_made_of_is_named(folder, fields, named):
    edit(folder / "config.json", **fields)
    message = f"^model: no ViTForImageClassification can be made of the config.json of .*/base{named}"
    for numbers in (True, False):
        with pytest.raises(ValueError, match=message):
            load_model(str(folder), local=True, placement=Placement(device="cpu", numbers=numbers))
    with pytest.raises(ValueError, match=message):
        outline_of(architecture_of(str(folder), local=True))


@pytest.mark.parametrize(
    ("fields", "why"),
    [({"num_return_sequences": 3}, "num_return_sequences"), ({"max_new_tokens": "many"}, "not supported between")],
)
def test_a_generation_configuration_that_is_none_is_named_before_weights_are_read(tmp_path, fields, why):
    base = served_cases.write_base("llama", tmp_path / "base")
    edit(base / "generation_config.json", **fields)
    with pytest.raises(ValueError, match=rf"^model: the generation_config.json of .*base is none .*{why}"):
        architecture_of(str(base), local=True)
    (base / "generation_config.json").unlink()
    architecture_of(str(base), local=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "owner/kernel"},
        {"_attn_implementation": {"": "sdpa", "text_config": "owner/kernel@main"}},
        {"text_config": {"inner": {"experts_implementation": "owner/kernel:layer"}}},
    ],
)
def test_a_kernel_that_a_configuration_names_is_not_fetched(folder, fields):
    edit(folder / "config.json", **fields)
    with pytest.raises(ValueError, match=r"^model: the config.json of .*base asks for a kernel from the hub \('own"):
        load(folder)
    edit(folder / "config.json", **dict.fromkeys(fields, "eager"))
    load(folder)


@pytest.mark.parametrize("given", [{"quant_method": "modelopt", "quant_algo": "FP8"}, {"group_size": 64, "bits": 4}, 8])
def test_files_quantised_in_a_way_that_transformers_does_not_know_are_refused(folder, given):
    edit(folder / "config.json", quantization_config=given)
    with pytest.raises(ValueError, match="quant_method .*, which transformers does not know .* take the key out"):
        load(folder)


def test_what_the_configuration_of_the_text_says_of_quantised_files_counts_too(tmp_path):
    """As transformers has it, which looks there for what it does not find at the top."""
    build("llava").save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    edit(tmp_path / "config.json", text_config={**text, "quantization_config": {"quant_method": "modelopt"}})
    with pytest.raises(ValueError, match="quant_method 'modelopt', which transformers does not know"):
        load(tmp_path)
    edit(tmp_path / "config.json", text_config={**text, "quantization_config": {"quant_method": "fp8"}})
    placement = Placement(device="cpu", quantization="torchao-int8")
    with pytest.raises(ValueError, match=r"expected none for a base whose files are quantised \(fp8\)"):
        load_model(str(tmp_path), local=True, placement=placement)


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({"quantization_config": {"quant_method": "awq"}, "text_config": {"quantization_config": {}}}, "awq"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"quantization_config": None, "text_config": {"quantization_config": {"bits": 4}}}, "unnamed"),
        ({"text_config": {}}, None),
        ([], None),
    ],
)
def test_how_files_are_quantised_as_fields_and_as_a_configuration_have_it(fields, method):
    assert quantised_as(fields) == method
    if fields:
        places = {name: SimpleNamespace(**value) if name == "text_config" else value for name, value in fields.items()}
        assert quantised_as(SimpleNamespace(**places)) == method


def test_quantised_weights_are_not_read_as_plain_numbers(folder):
    numbers = load_file(folder / FILE)
    name = next(name for name in numbers if name.endswith(("query.weight", "q_proj.weight")))
    scale = numbers[name].abs().max() / 448
    codes = {name: (numbers[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    save_file({**numbers, **codes}, folder / FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds \S*weight_scale, of a quantised weight"):
        load(folder)


@pytest.mark.parametrize("named", ["Trainer", "pipeline", "torch", "NoSuchModel"])
def test_what_is_no_model_of_transformers_is_refused(folder, named):
    edit(folder / "config.json", architectures=[named])
    with pytest.raises(ValueError, match=f"model: transformers has no model {named!r}, which .*base asks for") as error:
        load(folder)
    assert "one of another package is loaded with it, and merged in Python: nsc_merge.merge(" in str(error.value)


def test_a_folder_of_several_models_names_one_of_them(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "several" / "query_0_Transformer")
    (tmp_path / "several" / "1_Pooling").mkdir()
    (tmp_path / "several" / "1_Pooling" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds no config.json; folders .* such as .*query_0_Transformer: exp"):
        load(tmp_path / "several")


def test_a_configuration_of_other_types_is_refused_in_one_line(folder):
    edit(folder / "config.json", hidden_size="many")
    with pytest.raises(ValueError, match=r"model: the config\.json of .* is none: .*hidden_size") as found:
        load(folder)
    assert "\n" not in str(found.value)


def test_what_lies_beside_the_weights_is_checked_before_anything_is_loaded(folder):
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.rstrip().removesuffix("}") + ', "hidden_size": 64}')
    with pytest.raises(ValueError, match=r"model: .*config\.json is not valid JSON: the key 'hidden_size'"):
        load(folder)
    config.write_text(text)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match=r"index\.json: expected files in the same folder, found '\.\./elsewhere"):
        load(folder)
    index.unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        load(folder)


def recorded_makings(monkeypatch):
    """Where transformers was to make models, one after another."""
    made = []
    own = tf.PreTrainedModel.from_pretrained.__func__

    def recorded(kind, *arguments, **settings):
        made.append(settings.get("device_map"))
        return own(kind, *arguments, **settings)

    monkeypatch.setattr(tf.PreTrainedModel, "from_pretrained", classmethod(recorded))
    return made


def sharded(folder):
    build("vit").save_pretrained(folder, max_shard_size="40KB")
    (folder / FILE).unlink()
    index = folder / f"{FILE}.index.json"
    return index, json.loads(index.read_text())


@pytest.mark.parametrize("numbers", [True, False])
def test_what_is_wrong_with_files_of_weights_is_said(folder, numbers, monkeypatch):
    def refused(error, message):
        with pytest.raises(error, match=message) as found:
            load_model(str(folder), local=True, placement=Placement(device="cpu", numbers=numbers))
        assert "\n" not in str(found.value)

    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", hidden_size=2 * config["hidden_size"])
    made = recorded_makings(monkeypatch)
    refused(ValueError, r"model: .* tensors of another shape .*classifier\.weight: expected \[2, 64\], found \[2, 32\]")
    # What fits into no memory is no different: nothing of that size is made.
    edit(folder / "config.json", hidden_size=config["hidden_size"], image_size=10**7)
    refused(ValueError, r"model: .* 1 tensors of another shape .*expected \[1, 6250000000001, 32\], found \[1, 5, 32\]")
    # Nor is anything made before: of sizes that fit, random numbers take minutes.
    assert set(made) == {"meta"}
    edit(folder / "config.json", image_size=config["image_size"])
    index, fields = sharded(folder)
    index.write_text(json.dumps({"weight_map": fields["weight_map"]}))
    refused(ValueError, r'model: .*index\.json lacks "metadata", .*add "metadata": \{\}')
    edit(index, metadata={})
    load(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(FileNotFoundError, r"model: .*base lacks 1 of 3 files that .* names: model-00002-of-00003\.safetensors")
    index.unlink()
    refused(FileNotFoundError, r"model: .*base holds no weights: expected model\.safetensors")
    torch.save(build("vit").state_dict(), folder / "pytorch_model.bin")
    refused(FileNotFoundError, r"model: .*base holds its weights in pytorch_model\.bin, which is pickled")
    # The line that it gives does what it says, whatever the folder is called.
    odd = folder.rename(folder.with_name("it's $(touch \"x\")"))
    with pytest.raises(FileNotFoundError) as error:
        load(odd)
    words = shlex.split(str(error.value).split("If you trust it: ")[1])
    assert words[:2] == ["python", "-c"]
    assert f"m = {json.dumps(str(odd))}; t.ViTForImageClassification.from_pretrained(m, " in words[2]
    odd.rename(folder)
    (folder / FILE).write_bytes(b"short")
    refused(ValueError, r"^model: .*model\.safetensors")


def test_a_base_that_would_give_tuples_is_run_by_names(folder):
    edit(folder / "config.json", return_dict=False)
    model = load(folder)
    assert model(pixel_values=torch.zeros(1, 3, 8, 8)).logits.shape == (1, 2)
