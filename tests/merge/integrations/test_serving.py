"""Exports against the rules of vLLM, SGLang, LoRAX and llama.cpp, and against what their loading code makes of them."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import zoo
from safetensors.torch import load_file

import nsc_merge
from nsc_merge.integrations.serving import SERVERS, check, main, write_uniform

ROOT = Path(__file__).parents[3]
QV = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 6}
ALL = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "lora_alpha": 6}
LANGUAGE = {"target_modules": r".*language_model.*\.(q_proj|v_proj)", "lora_alpha": 6}


class Case(NamedTuple):
    """Two adapters of a model, merged and saved, or ("raw") the first one as it is; effects by server."""

    kind: str
    adapters: tuple[dict, ...]
    effects: dict[str, set[str]]
    rank: int | None = None


TAKEN = {"vllm": set(), "sglang": set(), "lorax": set(), "llama.cpp": set()}
CASES = {
    "one rank of 8": Case("llama", ({"r": 4, **QV}, {"r": 4, **QV}), TAKEN),
    "one rank of 7": Case("llama", ({"r": 3, **QV}, {"r": 4, **QV}), {**TAKEN, "lorax": {"wrong"}}),
    "all linears, truncated to 8": Case("llama", ({"r": 8, **ALL}, {"r": 4, **ALL}), TAKEN, rank=8),
    "all linears, truncated to 5": Case("qwen2", ({"r": 8, **ALL}, {"r": 4, **ALL}), {**TAKEN, "lorax": {"wrong"}}, 5),
    "rsLoRA, merged": Case("mistral", ({"r": 8, "use_rslora": True, **ALL}, {"r": 8, **ALL}), TAKEN),
    "rsLoRA, unmerged": Case(
        "llama",
        ({"r": 8, "use_rslora": True, **QV},),
        {**TAKEN, "sglang": {"wrong"}, "lorax": {"unsure"}, "llama.cpp": {"wrong"}},
    ),
    "patterns, unmerged": Case(
        "llama",
        ({"r": 8, "alpha_pattern": {"v_proj": 24}, **QV},),
        {**TAKEN, "sglang": {"wrong"}, "lorax": {"wrong"}, "llama.cpp": {"wrong"}},
    ),
    "different ranks in a stack": Case(
        "llama",
        ({"r": 16, **QV}, {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj"], "rank_pattern": {"k_proj": 4}}),
        {**TAKEN, "sglang": {"refused"}, "lorax": {"wrong"}, "llama.cpp": {"wrong"}},
    ),
    "different ranks in a layer": Case(
        "llama",
        ({"r": 8, **QV}, {"r": 8, "target_modules": ["q_proj", "v_proj", "o_proj"], "lora_alpha": 6}),
        {**TAKEN, "sglang": {"refused"}, "lorax": {"wrong"}, "llama.cpp": {"wrong"}},
    ),
    "different ranks in layers": Case(
        "qwen2",
        ({"r": 16, **QV}, {"r": 16, "layers_to_transform": [0, 1], **QV}),
        {**TAKEN, "sglang": {"refused"}, "lorax": {"refused"}, "llama.cpp": {"wrong"}},
    ),
    "no LoRA in a layer": Case(
        "llama",
        ({"r": 4, "layers_to_transform": [0, 2], **QV}, {"r": 4, "layers_to_transform": [0, 2], **QV}),
        {**TAKEN, "lorax": {"left out"}},
    ),
    "query and key alone": Case(
        "llama",
        ({"r": 8, "target_modules": ["q_proj", "k_proj"]},),
        {**TAKEN, "sglang": {"refused"}},
    ),
    "value alone": Case(
        "mistral", ({"r": 8, "target_modules": ["v_proj"]},), {**TAKEN, "sglang": {"refused"}}
    ),
    "gate alone": Case("llama", ({"r": 8, "target_modules": ["gate_proj"]},), TAKEN),
    "up alone": Case(
        "llama", ({"r": 8, "target_modules": ["up_proj"]},), {**TAKEN, "sglang": {"refused"}}
    ),
    "expression, unmerged": Case(
        "llama", ({"r": 8, "target_modules": r".*\.(q_proj|v_proj)"},), {**TAKEN, "sglang": {"refused"}}
    ),
    "DoRA": Case(
        "llama",
        ({"r": 8, "use_dora": True, **QV},),
        {"vllm": {"refused"}, "sglang": {"refused"}, "lorax": {"wrong"}, "llama.cpp": {"refused"}},
    ),
    "biases": Case(
        "llama",
        ({"r": 8, "lora_bias": True, **QV},),
        {"vllm": {"refused"}, "sglang": {"left out"}, "lorax": {"left out"}, "llama.cpp": {"refused"}},
    ),
    "head in full": Case(
        "llama",
        ({"r": 8, "modules_to_save": ["lm_head"], **QV},),
        {"vllm": {"refused"}, "sglang": {"left out"}, "lorax": {"left out"}, "llama.cpp": {"refused"}},
    ),
    "images": Case(
        "llava",
        ({"r": 4, **LANGUAGE}, {"r": 4, **LANGUAGE}),
        {**TAKEN, "lorax": {"refused"}, "llama.cpp": {"unsure"}},
    ),
    "images, connector too": Case(
        "llava",
        ({"r": 8, "target_modules": r".*language_model.*\.(q_proj|v_proj)|.*linear_1"},) * 2,
        {"vllm": {"left out"}, "sglang": {"left out"}, "lorax": {"refused"}, "llama.cpp": {"unsure"}},
    ),
    "images, towers too": Case(
        "llava",
        ({"r": 8, "target_modules": ["q_proj", "v_proj"]},) * 2,
        {"vllm": {"left out"}, "sglang": {"refused"}, "lorax": {"refused"}, "llama.cpp": {"unsure"}},
    ),
}
# What zeros cannot cure: what is there beside updates of linears, and linears that are not served.
BESIDE_LINEARS = ("DoRA", "biases", "head in full")
MORE = (*BESIDE_LINEARS, "images", "images, connector too", "images, towers too")
PADDED = {
    server: [name for name, case in CASES.items() if case.effects[server] and name not in MORE] for server in SERVERS
}


class Made(NamedTuple):
    folder: Path
    config: dict
    deltas: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name of a case -> its adapter, its base's configuration, and its updates by our reading."""
    done: dict[str, Made] = {}

    def once(name: str) -> Made:
        if name in done:
            return done[name]
        case, folder = CASES[name], tmp_path_factory.mktemp("case")
        model = zoo.build(case.kind)
        sources = {
            f"t{seed}": zoo.write_adapter(model, folder / f"t{seed}", seed, **settings)
            for seed, settings in enumerate(case.adapters)
        }
        config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        if len(sources) == 1:
            held = nsc_merge.load_adapter(sources["t0"], "t0").factors
            deltas = {path: factor.B.double() @ factor.A.double() * factor.scaling for path, factor in held.items()}
            done[name] = Made(sources["t0"], config, deltas)
            return done[name]
        result = nsc_merge.merge(model, sources, method="task_arithmetic", scale=0.7)
        out = result.save(folder / "out", "lora", rank=case.rank)
        held = nsc_merge.load_adapter(out, "out").factors
        deltas = {path: factor.B.double() @ factor.A.double() * factor.scaling for path, factor in held.items()}
        if case.rank is None:
            for path in result.paths:
                torch.testing.assert_close(deltas[path], result.delta(path), rtol=1e-5, atol=1e-6)
        done[name] = Made(out, config, deltas)
        return done[name]

    return once


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("name", CASES)
def test_the_rules_say_what_a_server_makes_of_an_export(name, server, made):
    found = check(made(name).folder, server, base=made(name).config)
    assert {problem.effect for problem in found.problems} == CASES[name].effects[server]
    assert bool(found.flags) == ("refused" not in CASES[name].effects[server])


# The server's own code, which is run where it is: 20 seconds and more to import.
def installed(server: str) -> bool:
    if server == "llama.cpp":
        return True
    if server == "lorax":
        return "LORAX_REPO" in os.environ and importlib.util.find_spec("loguru") is not None
    return importlib.util.find_spec(server) is not None


def by_llama_cpp(folder: Path) -> dict[str, torch.Tensor] | str:
    """By the formulas of its converter and of ``llama_adapter_lora_weight::get_scale``: it is no Python package."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in tensors:
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            return f"Unexpected name {name!r}: Not a lora_A or lora_B tensor"
    found = {}
    for name, A in tensors.items():
        if name.endswith(".lora_A.weight"):
            B = tensors[name.replace(".lora_A.", ".lora_B.")].double()
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[path] = alpha / B.shape[1] * (B @ A.double())
    return found


@pytest.fixture(scope="module")
def served(made, tmp_path_factory):
    """Server -> case, or its form for that server -> the updates that it holds, or its error."""
    done: dict[str, dict[str, dict[str, torch.Tensor] | str]] = {}
    broken: dict[str, str] = {}

    def once(server: str) -> dict[str, dict[str, torch.Tensor] | str]:
        if server in broken:
            pytest.fail(broken[server])
        if server in done:
            return done[server]
        if not installed(server):
            pytest.skip(f"needs {'LORAX_REPO, a checkout, and loguru' if server == 'lorax' else server}")
        folder, jobs = tmp_path_factory.mktemp(server), {}
        for number, name in enumerate(CASES):
            one = made(name)
            if server == "lorax" and one.config["model_type"] == "llava":
                continue
            config = folder / f"{number}.json"
            config.write_text(json.dumps(one.config))
            jobs[name] = {"folder": str(one.folder), "config": str(config), "out": str(folder / f"{number}")}
            if name in PADDED[server]:
                write_uniform(one.folder, folder / f"{number}p", server, base=one.config)
                padded = {"folder": str(folder / f"{number}p"), "out": str(folder / f"{number}q")}
                jobs[f"{name}, padded"] = {**jobs[name], **padded}
        if server == "llama.cpp":
            done[server] = {name: by_llama_cpp(Path(job["folder"])) for name, job in jobs.items()}
            return done[server]
        (folder / "jobs").write_text(json.dumps(list(jobs.values())))
        # LoRAX's kernels, which nobody calls here, cannot be made for Triton's interpreter.
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        run = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "merge" / "served_by.py"), server, str(folder / "jobs")],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        if run.returncode:
            broken[server] = run.stderr[-3000:]
            pytest.fail(broken[server])
        done[server] = {
            name: load_file(job["out"]) if Path(job["out"]).exists() else Path(job["out"] + ".txt").read_text()
            for name, job in jobs.items()
        }
        return done[server]

    return once


def differs(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest number; linears that one of them has not count as zeros there."""
    largest = max(delta.abs().max().item() for delta in expected.values())
    gaps = [
        (found.get(path, torch.zeros(())) - expected.get(path, torch.zeros(()))).abs().max().item()
        for path in {*found, *expected}
    ]
    return max(gaps) / largest


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("name", CASES)
def test_a_server_does_what_its_rules_say(name, server, made, served):
    held, effects = served(server).get(name), CASES[name].effects[server]
    if held is None:
        pytest.skip("LoRAX serves no adapters for models with images as transformers names them")
    if "refused" in effects:
        assert isinstance(held, str), "it was loaded"
        return
    assert isinstance(held, dict), held
    gap = differs(held, made(name).deltas)
    if name in BESIDE_LINEARS:
        # B A of the linears is loaded as it is, and nothing else.
        assert gap < 1e-6
    elif effects == {"unsure"}:
        # LoRAX reads use_rslora with the PEFT of this environment; whether llama.cpp finds such names is not tried.
        assert gap < 1e-6
    elif effects:
        assert gap > 0.05
    else:
        assert gap < 1e-6


@pytest.mark.parametrize(("server", "name"), [(server, name) for server in SERVERS for name in PADDED[server]])
def test_the_form_that_is_written_for_a_server_is_served_as_it_is(server, name, made, served):
    held = served(server)[f"{name}, padded"]
    assert isinstance(held, dict), held
    assert differs(held, made(name).deltas) < 1e-6


@pytest.mark.parametrize("server", SERVERS)
def test_the_form_that_is_written_for_a_server_breaks_none_of_its_rules_and_has_the_same_updates(
    server, made, tmp_path
):
    """Where no server is installed, too: LoRA of zeros stands where it wants some, in the sizes of the base."""
    filled = 0
    for number, name in enumerate(PADDED[server]):
        one, out = made(name), tmp_path / str(number)
        assert not write_uniform(one.folder, out, server, base=one.config).problems, name
        model, written = zoo.build(CASES[name].kind), nsc_merge.load_adapter(out, "out").factors
        assert one.deltas.keys() <= written.keys()
        assert len({factor.rank for factor in written.values()}) == 1
        for path, factor in written.items():
            delta = factor.B.double() @ factor.A.double()
            assert (factor.scaling, delta.shape) == (1.0, model.get_submodule(path).weight.shape)
            torch.testing.assert_close(delta, one.deltas.get(path, 0 * delta), rtol=1e-6, atol=1e-7)
        filled += len(written) - len(one.deltas)
    assert (filled > 0) is (server in ("sglang", "lorax"))


def effects(folder: Path, server: str, **settings) -> list[tuple[str, str]]:
    return [(problem.effect, problem.what) for problem in check(folder, server, **settings).problems]


def write(folder: Path, kind: str = "llama", **settings) -> tuple[Path, dict]:
    """An adapter as PEFT writes it, and its base's configuration."""
    model = zoo.build(kind)
    return zoo.write_adapter(model, folder, 0, **{"r": 8, **QV, **settings}), {
        **model.config.to_dict(),
        "architectures": [type(model).__name__],
    }


BESIDE = {
    "head in full": (
        {"modules_to_save": ["lm_head"]},
        ("refused", "the adapter has modules_to_save (lm_head)"),
        ("left out", "lm_head.weight, trained in full (modules_to_save)"),
        ("left out", "lm_head.weight, trained in full (modules_to_save)"),
        ("refused", "lm_head.weight, trained in full (modules_to_save)"),
    ),
    "biases": (
        {"lora_bias": True},
        ("refused", "the adapter has biases (lora_bias)"),
        ("left out", "biases (lora_bias)"),
        ("left out", "biases (lora_bias)"),
        ("refused", "biases (lora_bias)"),
    ),
    "base changed": (
        {"init_lora_weights": "pissa"},
        ("refused", "init_lora_weights='pissa'"),
        ("wrong", "init_lora_weights='pissa' is not read"),
        ("wrong", "init_lora_weights='pissa' is not read"),
        ("wrong", "init_lora_weights='pissa' is not read"),
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_is_more_than_lora_on_linears_is_named(case, tmp_path):
    settings, *expected = BESIDE[case]
    folder, config = write(tmp_path / "one", **settings)
    assert [effects(folder, server, base=config) for server in SERVERS] == [[one] for one in expected]
    if case != "base changed":
        for server, taken in (("lorax", "linears"), ("vllm", "linears and embeddings")):
            with pytest.raises(ValueError, match=f"expected LoRA on {taken} alone: save as a model"):
                write_uniform(folder, tmp_path / "out", server, base=config)
        assert not (tmp_path / "out").exists()


def test_embeddings_and_heads_are_held_against_the_model(tmp_path):
    settings = {"target_modules": ["q_proj", "v_proj", "embed_tokens", "lm_head"]}
    folder, llama = write(tmp_path / "one", **settings)
    assert not check(folder, "vllm", base=llama).problems
    assert "--lora-target-modules embed_tokens lm_head q_proj v_proj" in check(folder, "sglang", base=llama).flags
    # LoRAX has LoRA for the head alone.
    assert effects(folder, "lorax", base=llama) == [
        ("left out", "model.embed_tokens, not among the linears that it knows")
    ]
    assert not check(folder, "llama.cpp", base={**llama, "tie_word_embeddings": False}).problems
    ends = "LoRA on model.embed_tokens, by which the server ends where the head is the same weight"
    assert effects(folder, "llama.cpp", base={**llama, "tie_word_embeddings": True}) == [("refused", ends)]
    passed = "LoRA on lm_head, which the heads of some models pass over"
    assert effects(folder, "llama.cpp") == [("unsure", ends), ("unsure", passed)]
    deepseek = {"model_type": "deepseek_v3", "tie_word_embeddings": False}
    assert effects(folder, "llama.cpp", base=deepseek) == [("left out", passed)]
    folder, mistral = write(tmp_path / "two", "mistral", **settings)
    assert effects(folder, "vllm", base=mistral) == [
        ("refused", "the adapter has LoRA on lm_head, which vLLM does not load for mistral models")
    ]


# What vLLM itself makes of tiny models of these types: bench/results/serving/vllm.jsonl.
@pytest.mark.parametrize(
    ("kind", "refused", "effect"),
    [
        ("qwen3", [], None),
        ("qwen2", ["embed_tokens", "lm_head"], "refused"),
        ("gemma3_text", ["embed_tokens", "lm_head"], "refused"),
        ("olmo2", ["lm_head"], "refused"),
        ("gpt2", ["embed_tokens", "lm_head", "q_proj"], "refused"),
        ("of_tomorrow", ["embed_tokens", "lm_head"], "unsure"),
    ],
)
def test_what_vllm_has_lora_on_hangs_on_the_type_of_the_model(kind, refused, effect, tmp_path):
    for end in ("q_proj", "embed_tokens", "lm_head"):
        folder, config = write(tmp_path / end, target_modules=[end])
        found = check(folder, "vllm", base={**config, "model_type": kind}).problems
        assert [problem.effect for problem in found] == ([effect] if end in refused else []), end


# Of these families the base alone is answered otherwise than by transformers.
@pytest.mark.parametrize(("server", "otherwise"), [("vllm", "GPTNeoX"), ("llama.cpp", "Qwen3Moe")])
def test_whole_servers_did_what_the_rules_said(server, otherwise):
    lines = (ROOT / "bench" / "results" / "serving" / f"{server}.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines[1:]) if row["case"] != "base"]
    assert {row["family"] for row in rows} >= {"Llama", "Qwen2", "Qwen3", "Olmo2", "Granite"}
    for row in rows:
        if "refused" in row["rule"]:
            assert row["said"], row
        else:
            assert row["rule"] in ([], ["wrong"]), row
            assert row["served"] is (None if row["family"] == otherwise else not row["rule"]), row


def test_a_whole_server_left_out_of_a_llava_what_the_rules_said():
    lines = (ROOT / "bench" / "results" / "serving" / "vllm-images.jsonl").read_text().splitlines()
    rows = {row["case"]: row for row in map(json.loads, lines[1:])}
    outside = {"connector too", "vision tower too"}
    assert rows.keys() > outside | {"language model", "model"}
    for case, row in rows.items():
        if "--enable" in case:
            assert "EngineDeadError" in row["said"]
        elif case != "base":
            assert row["served"] is (case not in outside)
            assert row.get("rule", []) == (["left out"] if case in outside else [])


def test_engines_that_read_the_base_computed_the_merged_model():
    lines = (ROOT / "bench" / "results" / "serving" / "models.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines[1:]) if "said" not in row]
    read = {engine: {row["family"] for row in rows if row["engine"] == engine} for engine in ("ctranslate2", "mlx_lm")}
    assert read["ctranslate2"] == {"Llama", "Qwen3"}
    assert read["mlx_lm"] == {
        "Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma2", "Olmo2", "Granite", "Mixtral"
    }  # fmt: skip
    for row in rows:
        assert row["differs"] <= 2 * row["base"] < 1e-4 < 1 < row["moved"], row


def test_gpt2_generates_text(tmp_path):
    folder, config = write(tmp_path / "one")
    base = {**config, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    assert not check(folder, "llama.cpp", base=base).problems


def test_embeddings_of_another_rank_are_scaled_otherwise_or_refused_and_written_with_one_rank(tmp_path):
    ranks = {"r": 8, "rank_pattern": {"embed_tokens": 4}, "alpha_pattern": {"embed_tokens": 4}, "lora_alpha": 8}
    folder, config = write(tmp_path / "one", target_modules=["q_proj", "v_proj", "embed_tokens"], **ranks)
    assert not check(folder, "vllm", base=config).problems
    assert effects(folder, "sglang", base=config) == [
        ("refused", "model.embed_tokens of another rank than r=8")
    ]
    assert effects(folder, "llama.cpp", base=config) == [
        ("wrong", "model.embed_tokens is scaled by 2, and by PEFT by 1")
    ]
    for server in ("sglang", "llama.cpp"):
        assert not write_uniform(folder, tmp_path / server, server, base=config).problems
        before, after = (nsc_merge.load_adapter(place, "one").factors for place in (folder, tmp_path / server))
        assert before.keys() == after.keys()
        for path, one in after.items():
            assert (one.rank, one.scaling) == (8, 1.0)
            wanted = before[path].scaling * before[path].B @ before[path].A
            torch.testing.assert_close(one.B @ one.A, wanted, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="has LoRA on embeddings; expected LoRA on linears alone"):
        write_uniform(folder, tmp_path / "lorax", "lorax", base=config)


def test_llama_cpp_passes_over_norms_and_is_told_how_it_is_converted(tmp_path):
    folder, config = write(tmp_path / "with a norm", modules_to_save=["norm"])
    found = check(folder, "llama.cpp", base=config)
    assert [(problem.effect, problem.what) for problem in found.problems] == [
        ("left out", "7 modules, such as model.layers.0.input_layernorm.weight, trained in full (modules_to_save)")
    ]
    made = f"convert_lora_to_gguf.py '{folder}' --base BASE --outfile adapter.gguf"
    assert found.flags == f"--lora adapter.gguf, made by {made}"
    beyond = [("refused", "2 modules, such as model.layers.2.self_attn.q_proj: the base has 2 layers")]
    folder, config = write(tmp_path / "one")
    assert effects(folder, "llama.cpp", base={**config, "num_hidden_layers": 2}) == beyond


@pytest.mark.parametrize("rank", [None, 8, 4])
def test_the_servers_largest_rank_counts(rank, tmp_path):
    folder, config = write(tmp_path / "one")
    refused = [("refused", "rank 8 is more than 4")] if rank == 4 else []
    assert effects(folder, "vllm", base=config, max_rank=rank) == refused
    assert effects(folder, "sglang", base=config, max_rank=rank) == refused


def test_more_than_vllm_takes_at_all(tmp_path):
    folder, config = write(tmp_path / "one", r=513)
    found = check(folder, "vllm", base=config)
    assert [problem.cure for problem in found.problems] == ["save with a rank of at most 512, or save as a model"]
    assert found.flags == ""
    assert check(folder, "sglang", base=config).flags.startswith("--enable-lora --max-lora-rank 513 ")


def test_layers_that_the_base_has_not_and_towers_are_named(tmp_path):
    folder, config = write(tmp_path / "one")
    assert effects(folder, "vllm", base={**config, "num_hidden_layers": 2}) == [
        ("left out", "2 modules, such as model.layers.2.self_attn.q_proj: the base has 2 layers")
    ]
    assert [effect for effect, _ in effects(folder, "sglang", base={**config, "num_hidden_layers": 2})] == ["refused"]
    folder, config = write(tmp_path / "two", "llava", target_modules=["q_proj", "v_proj"])
    named = "6 modules, such as model.vision_tower.encoder.layers.0.self_attn"
    alike = {**config, "text_config": {**config["text_config"], "num_key_value_heads": 4}}
    for server, base, effect in (
        ("vllm", config, "left out"), ("sglang", config, "refused"), ("sglang", alike, "wrong"),
    ):  # fmt: skip
        ((found, what),) = effects(folder, server, base=base)
        assert found == effect
        assert what.startswith(named)


def test_a_model_without_text_is_served_by_none(tmp_path):
    folder, config = write(tmp_path / "one", "vit", target_modules=["q_proj"])
    for server in SERVERS:
        assert [effect for effect, _ in effects(folder, server, base=config)] == ["refused"]


def test_more_gpus_make_lorax_pad_more(tmp_path):
    folder, config = write(tmp_path / "one")
    assert not check(folder, "lorax", base=config).problems
    assert effects(folder, "lorax", base=config, shards=2) == [
        ("wrong", "self_attn.v_proj is scaled by 0.375 when it is loaded, and by PEFT by 0.75")
    ]
    assert not write_uniform(folder, tmp_path / "out", "lorax", base=config, shards=2).problems


def test_the_base_is_found_where_the_adapter_says(tmp_path):
    folder, config = write(tmp_path / "one", target_modules=["v_proj"])
    # Of a query that no layer has LoRA on, only the base tells the size.
    with pytest.raises(ValueError, match=r"base: the size of model\.layers\.0\.self_attn\.q_proj is not known"):
        write_uniform(folder, tmp_path / "out", "sglang")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    said = json.loads((folder / "adapter_config.json").read_text())
    said["base_model_name_or_path"] = str(tmp_path / "base")
    (folder / "adapter_config.json").write_text(json.dumps(said))
    assert not write_uniform(folder, tmp_path / "out", "sglang").problems
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"].shape == (32, 8)


def test_no_form_is_written_into_the_folder_of_a_model(tmp_path):
    folder, config = write(tmp_path / "one", r=4)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"out: .*base holds a model \(config\.json\); expected a folder without one"):
        write_uniform(folder, tmp_path / "base", "lorax", base=tmp_path / "base")
    assert [file.name for file in (tmp_path / "base").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"server": "tgi"}, r"server: expected one of \['vllm', 'sglang', 'lorax', 'llama.cpp'\], found 'tgi'"),
        ({"max_rank": 0}, "max_rank: expected a whole number of at least 1, found 0"),
        ({"shards": True}, "shards: expected a whole number of at least 1, found True"),
    ],
)
def test_bad_arguments_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check(tmp_path, **settings)


def test_missing_and_contradictory_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        check(tmp_path)
    folder, _ = write(tmp_path / "one")
    with pytest.raises(FileNotFoundError, match=r"base: expected the folder of a model, with config\.json"):
        check(folder, base=tmp_path)
    with pytest.raises(ValueError, match="out: expected another folder"):
        write_uniform(folder, folder, "vllm")
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, "r": 4}))
    with pytest.raises(ValueError, match="expected rank 4, by its configuration"):
        check(folder)


def test_the_command_line_prints_and_exits_by_what_it_finds(tmp_path, capsys):
    folder, config = write(tmp_path / "one", r=4)
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = ["--base", str(tmp_path)]
    assert main([str(folder), "--server", "vllm", "--server", "sglang", *base]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "vllm: --enable-lora --max-lora-rank 8",
        "sglang: --enable-lora --max-lora-rank 4 --lora-target-modules q_proj v_proj",
    ]
    assert main([str(folder), "--json", *base]) == 1
    found = {one["server"]: one["problems"] for one in json.loads(capsys.readouterr().out)}
    assert [len(found[server]) for server in SERVERS] == [0, 0, 1, 0]
    assert found["lorax"][0]["effect"] == "wrong"
    assert main([str(folder), "--server", "lorax", "--write", str(tmp_path / "out"), *base]) == 0
    assert main([str(tmp_path / "out"), *base]) == 0
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "error: adapters['nowhere']: " in capsys.readouterr().err
    for line in (["--help"], [str(folder), "--write", "x"]):
        with pytest.raises(SystemExit):
            main(line)
    assert "--server" in capsys.readouterr().out


def test_the_example_runs(tmp_path, capsys, monkeypatch):
    folder, _ = write(tmp_path / "one", r=4)
    monkeypatch.setattr(sys, "argv", ["serving.py", str(folder), str(tmp_path / "served")])
    runpy.run_path(str(ROOT / "examples" / "integrations" / "serving.py"), run_name="__main__")
    assert "lorax: wrong" in capsys.readouterr().out
    assert not check(tmp_path / "served" / "lorax", "lorax").problems
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == ["lorax"]


def test_the_example_says_of_every_server_what_no_zeros_cure(tmp_path, capsys, monkeypatch):
    folder, _ = write(tmp_path / "one", r=4, use_dora=True)
    monkeypatch.setattr(sys, "argv", ["serving.py", str(folder), str(tmp_path / "served")])
    runpy.run_path(str(ROOT / "examples" / "integrations" / "serving.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert all(f"{server}: {folder} has DoRA; expected LoRA on linears" in said for server in SERVERS)
    assert not (tmp_path / "served").exists()
