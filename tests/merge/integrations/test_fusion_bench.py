"""Our algorithm, pools and layer-wise model inside FusionBench, against FusionBench's own results."""

from __future__ import annotations

import functools
import re
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("fusion_bench")

import hydra
from fusion_bench.method.adamerging.flan_t5_layer_wise_adamerging import FlanT5LayerWiseAdaMergingAlgorithm
from fusion_bench.method.base_algorithm import BaseAlgorithm
from fusion_bench.method.dare import DareTaskArithmetic, DareTiesMerging
from fusion_bench.method.emr_merging.utils import emr_merge
from fusion_bench.method.knots.knots_utils import subspace_alignment
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from fusion_bench.modelpool import BaseModelPool, Seq2SeqLMPool
from fusion_bench.models.wrappers import layer_wise_fusion
from fusion_bench.utils import instantiate
from fusion_bench.utils.hydra_utils import get_default_config_path
from omegaconf import OmegaConf

import nsc_merge
from fusion_bench_cases import TASKS, clip, peft_models, saved, t5, whole
from nsc_merge.integrations import fusion_bench as ours
from nsc_merge.integrations.fusion_bench import (
    CLIPVisionLoRAPool,
    LayerWiseMergedModel,
    LoRAPool,
    NSCMerging,
    OnFactors,
    Seq2SeqLoRAPool,
    on_factors,
)

QV = ["q_proj", "v_proj"]
EXAMPLE = Path(__file__).parents[3] / "examples" / "integrations" / "fusion_bench.yaml"
ties = functools.partial(TiesMergingAlgorithm, scaling_factor=0.3, remove_keys=[])


def whole_pool(base, models, **settings):
    return BaseModelPool({"_pretrained_": deepcopy(base), **whole(models)}, **settings)


def updates(model, base):
    parts = [model.get_parameter(name) - value for name, value in base.named_parameters()]
    return torch.cat([part.detach().double().flatten() for part in parts])


def agree(found, expected, base, most=1e-6):
    a, b = updates(found, base), updates(expected, base)
    assert b.norm() > 0.1
    assert (a - b).norm() <= most * b.norm()


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    base = clip()
    models = peft_models(base, QV)
    return base, models, saved(models, tmp_path_factory.mktemp("adapters"))


def shares(base):
    """Entries of the adapted weights, and of everything."""
    weights = [value for name, value in base.named_parameters() if name.split(".")[-2] in QV and value.dim() > 1]
    return sum(value.numel() for value in weights), sum(value.numel() for value in base.state_dict().values())


def kept(base, percent):
    """The density on adapted entries that FusionBench's share of all entries amounts to, where all tasks adapt the same
    modules; the half keeps rounding from taking one off.
    """
    adapted, every = shares(base)
    return min(1.0, (int(every * percent / 100) + 0.5) / adapted)


@pytest.mark.parametrize(
    ("theirs", "method", "options"),
    [
        (lambda: TaskArithmeticAlgorithm(scaling_factor=0.3), "task_arithmetic", {"scale": 0.3}),
        (SimpleAverageAlgorithm, "task_arithmetic", {"scale": 1 / 3}),
        (lambda: ties(threshold=20, merge_func="sum"), "ties", {"density": 20}),
        (lambda: ties(threshold=5, merge_func="sum"), "ties", {"density": 5}),
        (lambda: ties(threshold=5, merge_func="mean"), "ties", {"density": 5, "aggregate": "mean"}),
        (
            lambda: DareTiesMerging(0.0, False, True, 0.3, 5, [], "sum"),
            "dare_ties",
            {"preset": "fusion_bench", "drop": 0.0, "density": 5, "scale": 0.3},
        ),
        (lambda: DareTaskArithmetic(0.3, 0.0, False), "dare", {"drop": 0.0, "scale": 0.3}),
    ],
    ids=["task_arithmetic", "average", "ties", "ties_trimmed", "ties_mean", "dare_ties_no_drop", "dare_no_drop"],
)
def test_results_are_fusion_benchs_on_the_same_adapters(suite, theirs, method, options):
    base, models, folders = suite
    if "density" in options:
        options = {"preset": "adamerging", **options, "density": kept(base, options["density"])}
    if options.get("density", 1) < 1:
        models, folders = ({task: held[task] for task in TASKS[:2]} for held in (models, folders))
    expected = theirs().run(whole_pool(base, models))
    for pool in (
        LoRAPool({"_pretrained_": deepcopy(base), **folders}),
        whole_pool(base, models),
        BaseModelPool({"_pretrained_": deepcopy(base), **deepcopy(models)}),
    ):
        agree(NSCMerging(method, options).run(pool), expected, base)


def test_dropping_draws_as_often_and_scales_the_same(suite):
    base, models, folders = suite
    one = {"_pretrained_": deepcopy(base), "first": folders["first"]}
    torch.manual_seed(0)
    expected = DareTaskArithmetic(1.0, 0.6, False).run(whole_pool(base, {"first": models["first"]}))
    found = NSCMerging("dare", {"drop": 0.6, "scale": 1.0}).run(LoRAPool(one))
    delta = updates(whole({"first": models["first"]})["first"], base)
    for model in (found, expected):
        got = updates(model, base)
        left = got.abs() > 1e-9
        torch.testing.assert_close(got[left], delta[left] / 0.4, rtol=1e-3, atol=1e-6)
        assert float(left[delta.abs() > 1e-8].double().mean()) == pytest.approx(0.4, abs=0.03)


def test_knots_on_their_subspaces(suite):
    base, models, folders = suite
    found = NSCMerging(
        "knots_ties", {"preset": "adamerging", "trim_scope": "tensor", "density": 0.5, "scale": 1.0, "atol": 1e-4}
    ).run(LoRAPool({"_pretrained_": deepcopy(base), **folders}))
    dense = whole(models)
    for name, value in base.named_parameters():
        path = name.removesuffix(".weight")
        held = [dense[task].get_parameter(name) - value for task in TASKS]
        held = [one.detach() for one in held if one.abs().max() > 1e-6]
        if value.dim() != 2 or not held or path.split(".")[-1] not in QV:
            continue
        U, S, Vhs = subspace_alignment(held)
        aligned = torch.stack([(S[:, None] * one).flatten() for one in Vhs])
        merged = U @ ties_merging(aligned, 50, "sum").view(len(S), -1)
        torch.testing.assert_close(found.get_parameter(name) - value, merged, rtol=1e-3, atol=1e-5)


def test_methods_with_an_update_per_task_give_a_model_for_each(suite):
    base, models, folders = suite
    found = NSCMerging("emr").run(LoRAPool({"_pretrained_": deepcopy(base), **folders}))
    assert list(found) == TASKS
    dense = whole(models)
    vectors = [
        {name: dense[task].get_parameter(name) - value for name, value in base.named_parameters()} for task in TASKS
    ]
    unified, masks, rescalers = emr_merge(vectors)
    for k, task in enumerate(TASKS):
        expected = deepcopy(base)
        with torch.no_grad():
            for name, value in expected.named_parameters():
                value.add_(unified[name] * masks[name][k] * rescalers[k])
        agree(found[task], expected, base, most=1e-5)


def test_nsc_takes_unlabelled_data_of_the_pool(suite, tmp_path):
    base, models, folders = suite
    data = {task: {"_target_": "fusion_bench_cases.images", "seed": k} for k, task in enumerate(TASKS)}
    pool = LoRAPool({"_pretrained_": deepcopy(base), **folders}, test_datasets=OmegaConf.create(data))
    steps = {"steps": 2, "progress": False, "lr": 0.05, "score_modules": ["q_proj"]}
    algorithm = NSCMerging(options=steps, samples=6, batch_size=3, adapter_save_path=str(tmp_path / "merged"))
    merged = algorithm.run(pool)
    coefficients = algorithm.result.coefficients
    assert len({value for row in coefficients.values() for value in row.values()}) > 4
    written = nsc_merge.load_adapter(tmp_path / "merged", "merged")
    alone = nsc_merge.merge(deepcopy(base), {"m": written}, method="task_arithmetic", scale=1.0)
    agree(alone.apply(deepcopy(base)), merged, base, most=1e-5)
    # The same steps on whole models, whose factors are found first.
    again = NSCMerging(options=steps, samples=6, batch_size=3).run(
        whole_pool(base, models, test_datasets=OmegaConf.create(data))
    )
    agree(again, merged, base, most=1e-3)
    with pytest.raises(ValueError, match=r"dataset: expected a dataset of 'first' among the pool's val_datasets"):
        NSCMerging(options=steps).run(LoRAPool({"_pretrained_": deepcopy(base), **folders}))


def test_an_adapter_of_full_rank_is_truncated_or_refused_before_anything_is_merged(suite, tmp_path, monkeypatch):
    base, _, folders = suite

    def pool():
        return LoRAPool({"_pretrained_": deepcopy(base), **folders})

    algorithm = NSCMerging("ties", adapter_save_path=str(tmp_path / "merged"), adapter_rank=5)
    algorithm.run(pool())
    assert {factor.rank for factor in nsc_merge.load_adapter(tmp_path / "merged", "merged").factors.values()} == {5}
    monkeypatch.setattr(ours.nsc_merge, "merge", None)
    for settings, words in (
        ({"adapter_save_path": str(tmp_path / "other")}, "adapter_save_path: .*'ties' is of full rank.*adapter_rank"),
        ({"adapter_save_path": str(tmp_path / "other"), "adapter_rank": 0}, "adapter_rank: expected a whole number"),
        ({"adapter_rank": 4}, "adapter_rank: expected it with adapter_save_path, found 4"),
        ({"samples": -1}, "samples: expected a whole number of at least 1, found -1"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, found 0"),
    ):
        with pytest.raises(ValueError, match=words):
            NSCMerging("ties", **settings).run(pool())
    assert not (tmp_path / "other").exists()


def test_pools_of_theirs_whose_configuration_names_adapters(suite):
    base, _, folders = suite
    loader = "fusion_bench.modelpool.seq2seq_lm.modelpool.load_lora_model"
    configs = {
        task: {"_target_": loader, "base_model_path": "unused", "peft_model_path": folder}
        for task, folder in folders.items()
    }
    pool = BaseModelPool(configs)
    pool._models = {**pool._models, "_pretrained_": deepcopy(base)}
    expected = NSCMerging("task_arithmetic").run(LoRAPool({"_pretrained_": deepcopy(base), **folders}))
    agree(NSCMerging("task_arithmetic").run(pool), expected, base)


def test_their_algorithms_take_our_pools(suite):
    base, models, folders = suite
    expected = TaskArithmeticAlgorithm(scaling_factor=0.3).run(whole_pool(base, models))
    found = TaskArithmeticAlgorithm(scaling_factor=0.3).run(LoRAPool({"_pretrained_": deepcopy(base), **folders}))
    agree(found, expected, base)


def test_models_of_full_rank(suite):
    base, models, _ = suite
    changed = whole(models)
    with torch.no_grad():
        for number, model in enumerate(changed.values()):
            generator = torch.Generator().manual_seed(number)
            for value in model.parameters():
                value.add_(0.02 * torch.randn(value.shape, generator=generator))
    held = BaseModelPool({"_pretrained_": deepcopy(base), **deepcopy(changed)})
    expected = ties(threshold=20, merge_func="sum").run(held)
    every = BaseModelPool({"_pretrained_": deepcopy(base), **deepcopy(changed)})
    # Their state dictionary has nothing but parameters, so that both count the same entries.
    found = NSCMerging("ties", {"preset": "adamerging"}).run(every)
    agree(found, expected, base, most=1e-5)
    for method, message in (
        ("knots_ties", "method: 'knots_ties' merges matrices, and first also changes 'embeddings.class_embedding'"),
        ("nsc", "first: changes embeddings.class_embedding, which is no weight or bias of a layer"),
    ):
        with pytest.raises(ValueError, match=message):
            NSCMerging(method).run(BaseModelPool({"_pretrained_": deepcopy(base), **changed}))


def test_the_example_configuration(suite, tmp_path):
    base, models, folders = suite
    base.save_pretrained(tmp_path / "base")
    # Beside the model and the adapters, with the command that the file says.
    (tmp_path / "adapters").mkdir()
    shutil.copy(EXAMPLE, tmp_path)
    command = re.search(r"fusion_bench --config-dir .*", EXAMPLE.read_text()).group()
    (base_model, _), (adapters, _) = (word.split("=") for word in command.split() if "=" in word)
    overrides = [f"{base_model}={tmp_path / 'base'}", f"{adapters}={Path(folders['first']).parent}"]
    theirs = f"hydra.searchpath=[file://{get_default_config_path()}]"
    with hydra.initialize_config_dir(str(tmp_path), version_base=None):
        composed = hydra.compose("fusion_bench", [*overrides, theirs])
    config = OmegaConf.create({part: composed[part] for part in ("modelpool", "method", base_model, adapters)})
    OmegaConf.resolve(config)
    pool = instantiate(config.modelpool, _recursive_=False)
    assert isinstance(pool, CLIPVisionLoRAPool)
    algorithm = instantiate(config.method, _recursive_=False)
    assert isinstance(algorithm, BaseAlgorithm)
    merged = algorithm.run(pool)
    two = {task: models[task] for task in TASKS[:2]}
    agree(merged, NSCMerging("ties", {"preset": "adamerging"}).run(whole_pool(base, two)), base)
    assert algorithm.config.options.preset == "adamerging"


def test_their_layer_wise_adamerging_runs_on_factors(tmp_path):
    base = t5()
    models = peft_models(base, ["q", "v"])
    folders = saved(models, tmp_path)
    base.save_pretrained(tmp_path / "base")
    data = OmegaConf.create({t: {"_target_": "fusion_bench_cases.texts", "seed": k} for k, t in enumerate(TASKS)})
    config = {
        "_target_": f"{FlanT5LayerWiseAdaMergingAlgorithm.__module__}.FlanT5LayerWiseAdaMergingAlgorithm",
        # Not Adam, to which a gradient that is nothing but rounding counts as much as any other.
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.3},
        "dataloader_kwargs": {"batch_size": 4, "num_workers": 0},
        "init_values": 0.3,
        "max_steps": 3,
        "tie_weights": False,
        "merging_weights_save_path": str(tmp_path / "weights.pt"),
    }
    theirs = Seq2SeqLMPool({"_pretrained_": deepcopy(base), **whole(models)}, tokenizer=None, test_datasets=data)
    # Models at hand take no keywords of loading.
    theirs.load_model = functools.partial(BaseModelPool.load_model, theirs)
    torch.manual_seed(0)
    expected = instantiate(OmegaConf.create(config), _recursive_=False).run(theirs)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    pretrained = {
        "_target_": "transformers.AutoModelForSeq2SeqLM.from_pretrained",
        "pretrained_model_name_or_path": str(tmp_path / "base"),
    }
    pool = Seq2SeqLoRAPool(
        OmegaConf.create({"_pretrained_": pretrained, **folders}), tokenizer=None, merged=False, test_datasets=data
    )
    torch.manual_seed(0)
    found = OnFactors(OmegaConf.create(config)).run(pool)
    own = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert own.shape == weights.shape
    assert (weights - 0.3).abs().max() > 0.02
    torch.testing.assert_close(own, weights, rtol=0, atol=1e-3)
    agree(found, expected, base, most=1e-3)


def test_the_swap_lasts_as_long_as_its_block(suite):
    base, models, _ = suite
    theirs = layer_wise_fusion.LayerWiseMergedModel
    module = __import__(FlanT5LayerWiseAdaMergingAlgorithm.__module__, fromlist=["_"])
    with on_factors():
        assert layer_wise_fusion.LayerWiseMergedModel is module.LayerWiseMergedModel is LayerWiseMergedModel
    assert layer_wise_fusion.LayerWiseMergedModel is module.LayerWiseMergedModel is theirs
    assert theirs is ours.TheirLayerWiseMergedModel
    count = sum(value.requires_grad for value in base.parameters())
    inner = LayerWiseMergedModel(torch.full((3, count), 0.3), deepcopy(base), list(models.values()))
    holder = torch.nn.Sequential(inner)
    layer_wise_fusion.fix_other_parts(holder)
    assert [name for name, value in holder.named_parameters() if value.requires_grad] == ["0.merge_weight"]
    layer_wise_fusion.merge_weights(holder)
    merged = layer_wise_fusion.merge_and_unload(holder)[0]
    assert type(merged) is type(base)
    expected = TaskArithmeticAlgorithm(scaling_factor=0.3).run(whole_pool(base, models))
    agree(merged, expected, base)
