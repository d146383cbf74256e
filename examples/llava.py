"""Merge LoRA adapters of LLaVA's language model without labels; the frozen vision tower runs once per image.

    python examples/llava.py llava-hf/llava-1.5-7b-hf vqa=USER/vqa caption=./caption --data vqa=v.jsonl caption=c.jsonl

or, with a small model made on the spot:

    python examples/small_inputs.py vlm small
    python examples/llava.py small/base size=small/adapters/size colour=small/adapters/colour \\
        --data size=small/pairs.jsonl colour=small/pairs.jsonl

Every line of DATA names an image and a prompt.
"""

from __future__ import annotations

from command_line import run
from transformers import LlavaForConditionalGeneration

if __name__ == "__main__":
    run(__doc__, LlavaForConditionalGeneration, batch_size=2, steps=500, out="merged-llava")
