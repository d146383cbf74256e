"""A state that is damaged, or of something else, is refused in one line, whatever is wrong with it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from loop_cases import adapters_for, llama, text_batches, trajectory
from safetensors import safe_open
from safetensors.torch import save_file

SETTINGS = {"steps": 3, "state_every": 1}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Tensors and metadata of a good state."""
    file = tmp_path_factory.mktemp("state") / "state"
    trajectory(llama(), adapters_for(llama()), text_batches(), **SETTINGS, state_to=file)
    with safe_open(file, framework="pt") as content:
        return {name: content.get_tensor(name) for name in content.keys()}, content.metadata()  # noqa: SIM118


def refused(file, message, model=None, **options):
    model = llama() if model is None else model
    with pytest.raises(ValueError, match=message) as caught:
        trajectory(model, adapters_for(model), text_batches(), **{**SETTINGS, **options}, resume_from=file)
    line = str(caught.value)
    assert line.startswith("resume_from: ")
    assert "\n" not in line
    return line


def of(text, **changes):
    """The document of a state with fields changed; those changed to None are gone."""
    document = {**json.loads(text), **changes}
    return json.dumps({name: value for name, value in document.items() if value is not None})


def entries(text, **changes):
    """The same of the last entry of the history."""
    history = json.loads(text)["history"]
    last = {name: value for name, value in {**history[-1], **changes}.items() if value is not None}
    return of(text, history=[*history[:-1], last])


DOCUMENTS = {
    "no JSON": (lambda text: text[:-20], "metadata is not valid JSON: "),
    "deep JSON": (lambda text: "[" * 100000, "metadata is not valid JSON: values are nested deeper"),
    "no object": (lambda text: "[1]", "metadata: expected .*, found 'no such JSON'"),
    "no step": (lambda text: of(text, step=None), r"metadata: expected \[.*'step'\], found \['batch_tasks', "),
    "one more": (lambda text: of(text, more=1), r"metadata: expected .*, found .*'more'"),
    "step as text": (lambda text: of(text, step="3"), "step: expected int, found '3'"),
    "step as bool": (lambda text: of(text, step=True), "step: expected int, found True"),
    "step ahead": (lambda text: of(text, step=7), "history: expected one entry for each of 7 steps, found 3"),
    "step below 0": (lambda text: of(text, step=-1), "history: expected one entry for each of -1 steps"),
    "batch_tasks": (lambda text: of(text, batch_tasks="no"), "batch_tasks: expected bool, found 'no'"),
    "problem": (lambda text: of(text, problem=[1]), "problem: expected dict, found"),
    "history": (lambda text: of(text, history={}), "history: expected list, found"),
    "short history": (lambda text: of(text, history=[]), "history: expected one entry for each of 3 steps, found 0"),
    "no entries": (lambda text: of(text, history=[1, 2, 3]), "history: expected .* of step 0, found 1"),
    "another step": (lambda text: entries(text, step=5), "history: expected .* of step 2"),
    "no seconds": (lambda text: entries(text, seconds=None), "history: expected .*'seconds'.* of step 2"),
    "no ratios": (lambda text: entries(text, omega=None), "history: expected .*'omega'.* of step 2"),
    "NaN": (lambda text: entries(text, objective=math.nan), "history: expected finite numbers of step 2"),
    "text": (lambda text: entries(text, seconds="1"), "history: expected finite numbers of step 2"),
    "huge": (lambda text: entries(text, seconds=10**400), "metadata is not valid JSON: expected numbers of at most 40"),
    "infinite": (lambda text: entries(text, omega={"a": 1, "b": 1, "c": math.inf}), "expected finite numbers of step"),
    "another task": (lambda text: entries(text, omega={"a": 1, "x": 1}), "history: expected omega of every task"),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_damaged_metadata_are_refused(parts, tmp_path, kind):
    tensors, metadata = parts
    change, message = DOCUMENTS[kind]
    save_file(tensors, tmp_path / "state", {**metadata, "document": change(metadata["document"])})
    assert refused(tmp_path / "state", message).endswith("; remove the file to start anew")


def test_missing_metadata_are_refused(parts, tmp_path):
    tensors, metadata = parts
    save_file(tensors, tmp_path / "state", {name: value for name, value in metadata.items() if name != "document"})
    refused(tmp_path / "state", "metadata is not valid JSON: .*; remove the file")


def changed(name, change):
    return lambda tensors: {**tensors, name: change(tensors[name])}


TENSORS = {
    "missing": (
        lambda tensors: {name: value for name, value in tensors.items() if name != "start"},
        r"expected tensors \['dead', .*, found \['dead', 'lam'",
    ),
    "no moments": (
        lambda tensors: {name: value for name, value in tensors.items() if "optimizer" not in name},
        "expected tensors",
    ),
    "one more": (lambda tensors: {**tensors, "x": torch.zeros(1)}, "expected tensors"),
    "NaN": (changed("lam", lambda value: value.index_fill(0, torch.tensor(0), math.nan)), "lam: expected finite"),
    "infinite": (changed("optimizer.exp_avg_sq", lambda value: value + math.inf), "exp_avg_sq: expected finite"),
    "other shape": (
        changed("lam", lambda value: value[:-1]),
        r"lam: expected torch.float32 \[8, 3\], found torch.float32 \[7, 3\]",
    ),
    "transposed": (changed("start", lambda value: value.T.contiguous()), r"start: .*, found torch.float32 \[3, 8\]"),
    "other dtype": (changed("start", lambda value: value.half()), r"start: .*, found torch.float16"),
    "whole numbers": (changed("lam", lambda value: value.long()), "lam: expected"),
    "dead as numbers": (changed("dead", lambda value: value.float()), "dead: expected torch.bool"),
    "other count": (changed("optimizer.step", lambda value: value + 1), "optimizer.step: expected 3, the steps done"),
    "rng": (changed("rng", lambda value: value[:-1].clone()), "rng: expected the state of a generator"),
    "rng as numbers": (changed("rng", lambda value: value.float()), "rng: expected the state of a generator"),
    "no rng": (changed("rng", lambda value: value * 0), "rng: expected the state of a generator"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_damaged_tensors_are_refused(parts, tmp_path, kind):
    tensors, metadata = parts
    change, message = TENSORS[kind]
    save_file(change(tensors), tmp_path / "state", metadata)
    assert refused(tmp_path / "state", message).endswith("; remove the file to start anew")


def test_a_state_of_a_gpu_is_continued_without_one(parts, tmp_path):
    tensors, metadata = parts
    save_file({**tensors, "rng_cuda": torch.zeros(16, dtype=torch.uint8)}, tmp_path / "state", metadata)
    found = trajectory(llama(), adapters_for(llama()), text_batches(), **SETTINGS, resume_from=tmp_path / "state")
    assert len(found.history) == 3


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_truncated_files_are_refused(parts, tmp_path, share):
    tensors, metadata = parts
    save_file(tensors, tmp_path / "state", metadata)
    content = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(content[: int(share * len(content))])
    refused(tmp_path / "state", "is not valid safetensors: .*; remove the file to start anew")


def test_a_state_of_another_dtype_is_refused(parts, tmp_path):
    tensors, metadata = parts
    save_file(tensors, tmp_path / "state", metadata)
    refused(tmp_path / "state", "is of coefficients in torch.float32, .* in torch.float64", llama().double())
