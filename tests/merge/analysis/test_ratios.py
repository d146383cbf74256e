"""Null-space ratios of adapters in a model, and how their row spaces overlap."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as tf
from analysis_cases import projected, seen
from safetensors.torch import save_file
from zoo import DECODER, KINDS, build, write_adapter

import nsc_merge
from nsc_merge.adapters import Adapter, Factor, load_adapter
from nsc_merge.analysis import check_bound, per_sample_ratios
from nsc_merge.analysis.adapter_overlap import null_space_ratios, overlaps
from nsc_merge.commands.main import main


@pytest.mark.parametrize("kind", ["coefficients", "factors", "base"])
def test_ratios_are_those_of_the_merged_model_by_an_explicit_projector(llama, kind):
    model, adapters, batches = llama
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if kind == "base":
        found, merged = per_sample_ratios(model, adapters, batches), model
    else:
        method = "task_arithmetic" if kind == "coefficients" else "ties"
        result = nsc_merge.merge(model, adapters, method=method, scale=0.6)
        found, merged = per_sample_ratios(model, result, batches), result.apply(copy.deepcopy(model))
    assert (found.values.shape, found.tasks) == ((6, 6, 2), ["a", "b"])
    for task, folder in adapters.items():
        factors = load_adapter(folder, task).factors
        means = []
        for path in found.paths:
            values = found.values[:, found.paths.index(path), found.tasks.index(task)]
            if path not in factors:
                assert values.isnan().all()
                continue
            expected = []
            for batch, z in zip(batches, seen(merged, path, batches), strict=True):
                ratio, mask = projected(factors[path], z), batch["attention_mask"]
                expected += [row[kept].mean() for row, kept in zip(ratio, mask.bool(), strict=True)]
            torch.testing.assert_close(values.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
            means.append(values)
        torch.testing.assert_close(found.of(task), torch.stack(means).mean(0))
        assert set(found.by_module(task)) == set(factors)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tied", ["embed_tokens", "lm_head"])
def test_a_merge_of_one_of_two_tied_weights_is_measured_in_its_own_model(tied, tmp_path):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**DECODER, "num_hidden_layers": 1}, tie_word_embeddings=True)).eval()
    settings = {"r": 2, "target_modules": ["q_proj", tied], "task_type": "CAUSAL_LM"}
    adapters = {"a": write_adapter(model, tmp_path / "a", 1, **settings)}
    result, batches = nsc_merge.merge(model, adapters, method="task_arithmetic"), [KINDS["llama"].inputs(3)]
    found, checks = per_sample_ratios(model, result, batches), check_bound(model, result, batches)
    merged = result.apply(copy.deepcopy(result.model))
    path, mask = "model.layers.0.self_attn.q_proj", batches[0]["attention_mask"]
    ratio = projected(load_adapter(adapters["a"], "a").factors[path], seen(merged, path, batches)[0])
    expected = (ratio * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(found.values[:, found.paths.index(path), 0].double(), expected, rtol=1e-5, atol=1e-5)
    assert {one["path"]: one["violations"] for one in checks}[path] == 0
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


SMALL = {"vocab_size": 64, "pad_token_id": 0}
WIDE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, **SMALL}


def of_rows_elsewhere(kind):
    """A model in which linears do not see one sample after another, what is adapted, and three samples of it."""
    if kind == "windows":
        sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "window_size": 2}
        config = tf.SwinConfig(**sizes, depths=[1, 1], num_heads=[2, 2])
        return tf.SwinForImageClassification(config), ["q_proj", "fc1"], {"pixel_values": torch.randn(3, 3, 16, 16)}
    mask = torch.ones(3, 3, dtype=torch.long)
    mask[0, 2] = 0
    inputs = {"input_ids": torch.randint(1, 64, (3, 3)), "attention_mask": mask}
    if kind == "positions first":
        config = tf.XLNetConfig(d_model=32, n_layer=1, n_head=4, d_inner=48, **SMALL)
        return tf.XLNetForSequenceClassification(config), ["layer_1"], inputs
    own = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
    return tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**WIDE, **own)), ["query_proj", "dense"], inputs


@pytest.mark.parametrize("kind", ["windows", "positions first", "positions of all"])
def test_ratios_are_of_samples_wherever_their_rows_lie(kind, tmp_path):
    torch.manual_seed(0)
    model, targets, inputs = of_rows_elsewhere(kind)
    model.eval()
    write_adapter(model, tmp_path / "a", 1, r=4, target_modules=targets)
    adapter = load_adapter(tmp_path / "a", "a")
    found = per_sample_ratios(model, {"a": tmp_path / "a"}, [inputs])
    assert len(found.values) == 3
    for row in range(3):
        # Alone and without padding, its rows are all that there are.
        kept = inputs["attention_mask"][row].bool() if "attention_mask" in inputs else ...
        alone = {name: value[row : row + 1, kept] for name, value in inputs.items()}
        for number, path in enumerate(found.paths):
            z = seen(model, path, [alone])[0]
            expected = projected(adapter.factors[path], z).mean()
            torch.testing.assert_close(found.values[row, number, 0].double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_that_are_of_no_sample_are_refused(tmp_path):
    torch.manual_seed(0)
    model = build("llava")
    inputs = KINDS["llava"].inputs(1)
    write_adapter(model, tmp_path / "a", 1, r=4, target_modules=r".*vision.*q_proj")
    twice = {**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}
    twice["input_ids"] = torch.cat([twice["input_ids"], twice["input_ids"]], 1)
    twice["attention_mask"] = torch.ones_like(twice["input_ids"])
    with pytest.raises(ValueError, match=r"modules: expected some .* found \S*q_proj, which sees"):
        per_sample_ratios(model, {"a": tmp_path / "a"}, [twice])


def test_images_beside_another_number_of_texts_are_samples(tmp_path):
    """As CLIP has a text for each class; of images and texts together there are no samples then."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    told = {**sizes, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    seen_by = {**sizes, "image_size": 16, "patch_size": 8}
    model = tf.CLIPModel(tf.CLIPConfig(text_config=told, vision_config=seen_by, projection_dim=16)).eval()
    write_adapter(model, tmp_path / "a", 1, r=4, target_modules=r"(text|vision)_model.*q_proj")
    inputs = {"input_ids": torch.randint(3, 60, (3, 5)), "pixel_values": torch.randn(2, 3, 16, 16)}
    (path,) = (name for name, _ in model.named_modules() if name.startswith("vision") and name.endswith("q_proj"))
    found = per_sample_ratios(model, {"a": tmp_path / "a"}, [inputs], modules=[path])
    z = seen(model, path, [inputs])[0]
    expected = projected(load_adapter(tmp_path / "a", "a").factors[path], z).mean(1)
    torch.testing.assert_close(found.values[:, 0, 0].double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"modules: expected some that see the same samples, found .* of [23] and .*"):
        per_sample_ratios(model, {"a": tmp_path / "a"}, [inputs])


def test_a_random_adapter_is_compared_over_the_modules_that_are_reached(tmp_path):
    model = build("llava")
    write_adapter(model, tmp_path / "a", 1, r=4, target_modules=["q_proj", "linear_1"], rank_pattern={"linear_1": 9})
    adapter = load_adapter(tmp_path / "a", "a")
    text = {"input_ids": torch.tensor([[1, 7, 8]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    found = null_space_ratios(model, {"a": adapter}, [text])["a"]
    widths = {factor.A.shape[1] for path, factor in adapter.factors.items() if "language_model" in path}
    assert found["random"] == pytest.approx((1 - 4 / widths.pop()) ** 0.5)


def test_modules_and_blocks_are_chosen(llama, tmp_path):
    model, adapters, batches = llama
    some = per_sample_ratios(model, adapters, batches, modules=["v_proj"])
    assert [path.rpartition(".")[2] for path in some.paths] == ["v_proj"] * 3
    last = per_sample_ratios(model, {"a": adapters["a"]}, batches, blocks="last_quarter")
    assert last.paths == ["model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.v_proj"]
    one = per_sample_ratios(model, {"a": adapters["a"]}, batches, modules=["v_proj"], blocks=[1])
    assert one.paths == ["model.layers.1.self_attn.v_proj"]
    every = per_sample_ratios(model, {"a": adapters["a"]}, batches)
    torch.testing.assert_close(every.of("a", ["model.layers.1.self_attn.v_proj"]), one.of("a"))
    with pytest.raises(
        ValueError, match=r"modules: expected paths or some of \['q_proj', 'v_proj'\], found 'o_proj'"
    ):
        per_sample_ratios(model, adapters, batches, modules=["o_proj"])
    with pytest.raises(ValueError, match=r"modules: expected paths or some of \['q_proj', 'v_proj'\], found none"):
        per_sample_ratios(model, adapters, batches, modules=[])
    embeddings = write_adapter(model, tmp_path / "rows", 3, r=2, target_modules=["embed_tokens"])
    for analysis in (per_sample_ratios, check_bound):
        with pytest.raises(ValueError, match="adapters: expected low-rank updates of linears, found none"):
            analysis(model, {"rows": embeddings}, batches)
    with pytest.raises(ValueError, match="score_blocks: expected block numbers from 0 to 2"):
        per_sample_ratios(model, adapters, batches, blocks=[7])
    with pytest.raises(ValueError, match="batches: expected at least one batch"):
        per_sample_ratios(model, adapters, [])
    with pytest.raises(ValueError, match="gives every task its own update"):
        per_sample_ratios(model, nsc_merge.merge(model, adapters, method="finetuned"), batches)


def test_modules_trained_in_full_count_once_and_are_not_measured(tmp_path):
    model = build("llava")
    settings = {
        "r": 2,
        "target_modules": KINDS["llava"].targets,
        "modules_to_save": ["multi_modal_projector"],
    }
    folder = write_adapter(model, tmp_path / "a", 1, **settings)
    batches = [KINDS["llava"].inputs(0)]
    for policy in ("lambda", "mean"):
        result = nsc_merge.merge(
            model, {"a": folder}, method="task_arithmetic", scale=1.0, shared_modules=policy
        )
        found = per_sample_ratios(model, result, batches)
        assert not any("projector" in path for path in found.paths)
        whole = result.apply(copy.deepcopy(model))
        path = found.paths[-1]
        ratio = projected(result.adapters["a"].factors[path], seen(whole, path, batches)[0])
        mask = batches[0]["attention_mask"].bool()
        expected = torch.stack([row[kept].mean() for row, kept in zip(ratio, mask, strict=True)])
        torch.testing.assert_close(found.values[:, -1, 0].double(), expected, rtol=1e-5, atol=1e-5)


def test_inspection_measures_the_same(tmp_path):
    model = build("vit")
    folder = write_adapter(model, tmp_path / "a", 1, r=4, target_modules=["q_proj", "o_proj"])
    adapters = {"a": load_adapter(folder, "a")}
    batches = [KINDS["vit"].inputs(0)]
    mean = per_sample_ratios(model, adapters, batches).of("a").mean().item()
    assert null_space_ratios(model, adapters, batches)["a"]["measured"] == pytest.approx(mean, rel=1e-5)


def test_inspected_ratios_are_means_over_tokens_however_these_are_batched(llama, tmp_path, capsys):
    model, folders, batches = llama
    adapters = {name: load_adapter(folder, name) for name, folder in folders.items()}
    mask = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    expected = []
    for path, factor in adapters["a"].factors.items():
        z = torch.cat(seen(model, path, batches))[mask].double()
        A = factor.A.double()
        inside = (z @ torch.linalg.pinv(A) @ A).square().sum(-1)
        expected.append((1 - inside / z.square().sum(-1)).clamp(min=0).sqrt().mean().item())
    together = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    for size in (1, 2, 4, 6):
        cut = [{name: value[start : start + size] for name, value in together.items()} for start in range(0, 6, size)]
        found = null_space_ratios(model, adapters, cut)["a"]["measured"]
        assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)

    # The files of nsc-merge eval hold labels, too.
    model.save_pretrained(tmp_path / "base")
    save_file({**together, "labels": torch.rand(6)}, tmp_path / "test.safetensors")
    named = ["--model", str(tmp_path / "base"), "--inputs", str(tmp_path / "test.safetensors"), "--batch-size", "4"]
    assert main(["inspect", str(folders["a"]), *named, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["null_space_ratio"]["a"]["measured"]
    assert shown == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_inputs_are_inspected_in_the_dtype_of_the_base(llama, tmp_path, capsys):
    model, folders, _ = llama
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path / "base")
    save_file({"inputs_embeds": torch.randn(3, 5, 32)}, tmp_path / "inputs.safetensors")
    named = ["--model", str(tmp_path / "base"), "--inputs", str(tmp_path / "inputs.safetensors")]
    assert main(["inspect", str(folders["a"]), *named, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["null_space_ratio"]["a"]
    assert found["measured"] == pytest.approx(found["random"], abs=0.1)


@pytest.mark.parametrize("kind", ["rows of 0", "rows twice"])
def test_overlaps_of_row_spaces_are_of_directions_that_are_there(kind):
    generator = torch.Generator().manual_seed(0)
    A, other = torch.randn(2, 4, 32, generator=generator)
    A[2:] = 0 if kind == "rows of 0" else A[:2]
    one, two = ({"q": Factor(rows, torch.randn(8, 4, generator=generator), 1.0)} for rows in (A, other))
    pair = {name: Adapter(name, factors) for name, factors in (("one", one), ("two", two))}
    rows = [torch.linalg.svd(value.double(), full_matrices=False).Vh for value in (A, other)]
    # Of two directions the mean squared cosine of the angles to the other's four.
    expected = (rows[0][:2] @ rows[1].t()).square().sum().item() / 2
    assert overlaps(pair)[0]["inputs"] == pytest.approx(expected)
    nothing = {"q": Factor(torch.zeros(4, 32), two["q"].B, 1.0)}
    assert overlaps({"none": Adapter("none", nothing), "two": pair["two"]})[0]["inputs"] is None


def test_inputs_that_the_model_refuses_are_told_with_their_shapes(tmp_path, capsys):
    model = build("vit")
    model.save_pretrained(tmp_path / "base")
    write_adapter(model, tmp_path / "steps" / "checkpoint-1", 1, r=2, target_modules=["q_proj"])
    inputs = tmp_path / "x.safetensors"
    save_file({"pixel_values": torch.ones(2, 3, 12, 12)}, inputs)
    of_model = ["--model", str(tmp_path / "base"), "--inputs", str(inputs)]
    adapter = str(tmp_path / "steps" / "checkpoint-1")
    for command in (
        ["inspect", adapter],
        ["analyse", "bound", adapter],
        ["analyse", "tracking", str(tmp_path / "steps")],
    ):
        assert main([*command, *of_model]) == 1
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith(
            "nsc-merge: error: inputs: in a forward of pixel_values [2, 3, 12, 12]: Input image size (12*12)"
        )
