"""The sweep over model types: rows of three of them, and what a summary makes of rows."""

from __future__ import annotations

import json

import pytest
import transformers as tf

from bench.sweeps import summary, transformers_models
from bench.sweeps.small_models import classes


@pytest.mark.parametrize(
    ("heads", "kind", "adapter"),
    [
        ("text", "qwen2", "linears"),
        ("text", "t5", "embeddings"),
        ("text", "phi3", "dora"),
        ("media", "blip", "linears"),
    ],
)
def test_a_small_model_of_a_type_computes_what_peft_does(heads, kind, adapter):
    found = transformers_models.row_of(kind, classes(heads)[kind], heads, adapter, methods=adapter == "linears")
    assert "error" not in found
    assert found["parameters"] < 1e6
    for way in summary.WAYS:
        assert 0 <= found[way] < summary.EQUAL
    assert found["files"] == "same"
    if adapter == "linears":
        assert [found[method] for method in summary.METHODS] == ["ran"] * 3
        assert found["measured"]


@pytest.fixture
def quiet():
    """What a sweep tells transformers of its messages is no matter of other tests."""
    level = tf.logging.get_verbosity()
    yield
    tf.logging.set_verbosity(level)
    tf.utils.logging.enable_progress_bar()


@pytest.mark.usefixtures("quiet")
def test_rows_are_written_as_they_are_made_and_once(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    for _ in range(2):
        transformers_models.main(["--types", "gpt2", "--no-methods", "--out", str(out)])
    environment, *rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert environment["adapter"] == "linears"
    assert [row["type"] for row in rows] == ["gpt2"]
    assert "gpt2" in capsys.readouterr().err
    for wrong in (["--types", "nosuch"], ["--adapter", "dora"]):
        with pytest.raises(SystemExit):
            transformers_models.main([*wrong, "--out", str(out)])
    assert "'nosuch' has none of the heads of text" in (said := capsys.readouterr().err)
    assert "has rows of adapter 'linears'; expected another file" in said
    summary.main([str(out)])
    assert capsys.readouterr().out.splitlines()[:3] == [
        "rows",
        "1 model types: 1 ran, 0 took no such adapter, 0 were not built",
        "  applied: 1 compute what PEFT does",
    ]


def test_a_summary_names_what_is_apart_and_what_is_refused():
    row = {"type": "one", "parameters": 1, "applied": 0.0, "model": 0.2, "lora": "ValueError: no", "files": "same"}
    rows = [row, {"type": "two", "error": "TypeError: no"}, {"type": "three", "parameters": 1, "error": "no"}]
    lines = summary.summary([{**one, "nsc": "ran"} if one is row else one for one in rows])
    assert lines == [
        "3 model types: 1 ran, 1 took no such adapter, 1 were not built",
        "  applied: 1 compute what PEFT does",
        "  model: 0 compute what PEFT does",
        "    one: 0.2",
        "  lora: 0 compute what PEFT does",
        "    one: ValueError: no",
        "  files: 1 the same bytes from files and from memory",
        "  nsc: 1 ran",
    ]
