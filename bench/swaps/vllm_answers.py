"""What vLLM answers on a CPU, in float32: a step for each token, with the likeliest of those that could stand there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENS, TOP = 12, 20


@dataclass(frozen=True)
class Step:
    """A token that a server generated: what stood before it, and the logarithms of probabilities of some tokens."""

    before: list[int]
    likely: dict[int, float]


def by_vllm(base: Path, adapters: Mapping[str, Path | None], prompts: list[list[int]]) -> Iterator[tuple[str, Any]]:
    """Case -> steps, or the error in words."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    try:
        engine = vllm_engine(base, skip_tokenizer_init=True)
    except Exception as error:
        yield from ((case, f"{type(error).__name__}: {error}") for case in adapters)
        return
    wanted = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=TOP, detokenize=False, ignore_eos=True)
    for number, (case, lora) in enumerate(adapters.items(), 1):
        request = LoRARequest(case, number, str(lora)) if lora else None
        try:
            if request:
                engine.llm_engine.add_lora(request)
            given: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
            answers = engine.generate(given, wanted, use_tqdm=False, lora_request=request)
        except Exception as error:
            yield case, f"{type(error).__name__}: {error}"
            continue
        yield case, [step for answer in answers for step in steps_of(answer)]


def vllm_engine(base: Path, **more: Any) -> Any:
    from vllm import LLM

    return LLM(
        str(base), dtype="float32", enable_lora=True, max_lora_rank=32, max_loras=1, enforce_eager=True,
        max_model_len=64, gpu_memory_utilization=0.2, enable_prefix_caching=False, **more,
    )  # fmt: skip


def steps_of(answer: Any) -> list[Step]:
    """Of what vLLM answers to a prompt."""
    prompt, tokens = [*answer.prompt_token_ids], [*answer.outputs[0].token_ids]
    return [
        Step([*prompt, *tokens[:place]], {token: one.logprob for token, one in likely.items()})
        for place, likely in enumerate(answer.outputs[0].logprobs or [])
    ]
