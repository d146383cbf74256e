"""What a first recipe is written from, part by part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers as tf
import zoo
from torch import nn

from nsc_merge.methods import METHODS
from nsc_merge.recipes.first.findings import (
    Base,
    _base_named_by,
    _heads,
    _measured,
    _options,
    _other_bases,
    _partly,
    _samples,
    find,
)
from nsc_merge.recipes.first.tasks import find_tasks
from nsc_merge.recipes.yaml_keys import RecipeError

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


def task(name: str = "a", base: str | None = None, revision: Any = None, whole: tuple[str, ...] = ()) -> Any:
    outline = SimpleNamespace(base_model=base)
    return SimpleNamespace(name=name, outline=outline, config={"revision": revision}, whole=list(whole))


def base_of(model: nn.Module, source: str = "owner/base") -> Base:
    return Base(source, False, None, model, None, None)


def bert() -> Any:
    return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=64, **SIZES))


def test_heads_are_what_lies_behind_the_trunk() -> None:
    whole = ("classifier", "bert.embeddings.LayerNorm", "bert.pooler.dense", "bert.encoder.layer.1.output.dense")
    assert _heads(task(whole=whole), bert()) == ["classifier"]
    # By names within the trunk, too, as adapters of the trunk alone have them.
    assert _heads(task(whole=("embeddings.LayerNorm", "classifier")), bert()) == ["classifier"]
    # A language model's head is that of all.
    llama = zoo.build("llama")
    assert _heads(task(whole=("lm_head", "model.norm")), llama) == []
    vision = zoo.build("vit")
    paths = [path for path, _ in vision.named_modules()]
    assert "classifier" in paths
    inside = next(path for path in paths if path.endswith(("layernorm", "layer_norm")))
    assert _heads(task(whole=(inside, "classifier")), vision) == ["classifier"]


@pytest.mark.parametrize(
    ("tasks", "found"),
    [
        ([("owner/base", None)], ("owner/base", None)),
        ([("owner/base", "v1"), ("owner/base", "v1")], ("owner/base", "v1")),
        ([("here", "v1")], ("here", None)),
        ([("owner/base", "v1"), ("owner/base", None)], "a: owner/base at v1; b: owner/base"),
        ([("owner/base", None), ("owner/other", None)], "a: owner/base; b: owner/other"),
        ([(None, None), (None, None)], "a: none; b: none"),
        ([("gone/for/good", None)], "the adapters were trained on gone/for/good, which is not here"),
    ],
)
def test_the_base_that_adapters_name(tasks, found, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    given = [task(name, *told) for name, told in zip("ab", tasks, strict=False)]
    if isinstance(found, tuple):
        assert _base_named_by(given) == found
        return
    with pytest.raises(RecipeError) as raised:
        _base_named_by(given)
    assert found in str(raised.value)


def test_adapters_of_another_base_are_told(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Module()
    model.config = SimpleNamespace(_name_or_path="org/known-as")
    base = base_of(model, str(tmp_path / "base"))
    same = ("base", "./base", str(tmp_path / "base"), "elsewhere/base", "owner/base", "org/known-as", None, "")
    assert _other_bases([task(str(n), named) for n, named in enumerate(same)], base) == []
    (one, other) = _other_bases([task("a", "x/y"), task("b", "x/z"), task("c", "x/y"), task("d", "base")], base)
    assert one.startswith(f"a, c: trained on x/y, by the adapter's own word, and not on {tmp_path / 'base'};")
    assert other.startswith("b: trained on x/z,")


def test_adapters_that_leave_modules_out_are_told() -> None:
    linears = dict.fromkeys(("q", "k", "v"))
    adapters: Any = {"a": SimpleNamespace(factors=linears), "b": SimpleNamespace(factors={"q": 0})}
    assert _partly(adapters, linears) == ["b: touches 1 of the 3 modules; its coefficient is 0 in the others"]


@pytest.mark.parametrize(
    ("raw", "options", "batch_size", "samples"),
    [
        ([True], {"steps": 10}, 32, 320),
        ([True], {"steps": 500}, 32, 1024),
        ([False, True], {}, 32, 1024),
        ([False], {"steps": 10}, 32, 0),
        ([], {"steps": 10}, 32, 0),
    ],
)
def test_as_many_samples_as_the_steps_use(raw, options, batch_size, samples) -> None:
    data: Mapping[str, Any] = {str(n): SimpleNamespace(raw=one) for n, one in enumerate(raw)}
    assert _samples(data, options, batch_size) == samples


@pytest.mark.parametrize(("count", "scale"), [(1, 1.0), (2, 0.4), (5, 0.4), (8, 1 / 8)])
def test_the_scale_of_so_many_tasks(count, scale) -> None:
    tasks = [task(str(number)) for number in range(count)]
    assert _options(METHODS["task_arithmetic"], None, tasks) == {"scale": scale}
    assert set(_options(METHODS["nsc"], "llm", tasks)) == {"steps", "lr"}
    assert _options(METHODS["ties"], None, tasks) == {}


def test_nothing_is_measured_where_nobody_knows_where() -> None:
    options: dict[str, Any] = {}
    assert _measured(base_of(nn.Module()), ["q"], METHODS["nsc"], options) == []
    assert options == {}


def test_the_family_is_that_of_the_blocks_with_adapters(tmp_path) -> None:
    model = zoo.build("llama")
    model.save_pretrained(tmp_path / "base")
    zoo.write_adapter(model, tmp_path / "a", 1, r=2, target_modules=["down_proj"])
    found = find([str(tmp_path / "a")], str(tmp_path / "base"))
    assert found.base.family is not None
    assert found.base.parameters == sum(one.numel() for one in model.parameters())
    assert found.base.size == 4 * found.base.parameters
    assert found.base.dtype == "float32"
    # None of the family's linears carries an adapter: those that do are named.
    options: dict[str, Any] = {}
    assert _measured(found.base, ["model.layers.2.mlp.down_proj"], METHODS["nsc"], options)
    assert options == {"score_modules": ["down_proj"]}


def test_a_base_by_a_revision_in_an_adapters_configuration(tmp_path) -> None:
    """A folder has none, whatever PEFT wrote down."""
    model = zoo.build("llama")
    model.save_pretrained(tmp_path / "base")
    folder = zoo.write_adapter(model, tmp_path / "a", 1, r=2, target_modules=["q_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": str(tmp_path / "base"), "revision": "main"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (one,) = find_tasks([str(folder)])
    assert one.config["revision"] == "main"
    found = find([str(folder)]).base
    assert (found.source, found.local, found.revision) == (str(tmp_path / "base"), True, None)
