"""Tasks whose answers are generated: as long as the longest label of any batch."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import save_file
from zoo import KINDS, build, write_adapter

from nsc_merge.evaluation import heads
from nsc_merge.evaluation.eval_recipe_reader import load_eval_recipe
from nsc_merge.evaluation.scoring import predict, score
from nsc_merge.evaluation.suite import RecipeSuite


@pytest.mark.parametrize(("test", "validation"), [((2, 4), None), ((2, 4), (3, 6)), ((5, 2), (3,))])
def test_answers_are_as_long_as_the_longest_label(tmp_path, monkeypatch, test, validation):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    write_adapter(model, tmp_path / "caption", 1, r=2, target_modules=["q_proj"])
    prompts = {name: value.flip(1) for name, value in KINDS["llama"].inputs(0).items()}
    written = heads.GeneratingHead(6)(model, prompts)
    task = {"adapter": "caption", "generate": True, "metric": "exact_match"}
    for key, lengths in (("test", test), ("validation", validation)):
        if lengths is not None:
            task[key] = key
            (tmp_path / key).mkdir()
            for number, length in enumerate(lengths):
                labels = written[:, :length].contiguous()
                save_file({**prompts, "labels": labels}, tmp_path / key / f"{number}.safetensors")
    recipe = {"model": "base", "tasks": {"caption": task}, "methods": ["task_arithmetic"], "output": {"dir": "out"}}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    suite = RecipeSuite(load_eval_recipe(tmp_path / "eval.yaml").at(0))
    for split in ("test",) if validation is None else ("test", "val"):
        predicted = predict(suite, suite.model, split)
        outputs, _ = predicted["caption"]
        assert outputs.shape[1] == max(*test, *(validation or ()))
        assert torch.equal(outputs[: len(written)], written[:, : outputs.shape[1]])
        assert score(suite, predicted).metrics["caption"] == 1
