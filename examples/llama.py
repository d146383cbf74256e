"""Merge LoRA adapters of a LLaMA-like decoder (Llama, Mistral, Qwen) without labels.

    python examples/llama.py meta-llama/Meta-Llama-3-8B mnli=USER/llama-mnli rte=./rte --data mnli=m.jsonl rte=r.txt

or, with a small model made on the spot:

    python examples/small_inputs.py text small
    python examples/llama.py small/base french=small/adapters/french opposite=small/adapters/opposite \\
        --data french=small/chats/french.jsonl opposite=small/chats/opposite.jsonl
"""

from __future__ import annotations

from command_line import run
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    run(__doc__, AutoModelForCausalLM, batch_size=2, steps=500, out="merged-llama")
