"""Merge LoRA adapters of a vision transformer (ViT, CLIP vision, DINOv2) without labels.

    python examples/vit.py google/vit-base-patch16-224 cars=USER/vit-cars pets=./pets --data cars=photos pets=photos

or, with a small model made on the spot:

    python examples/small_inputs.py vision small
    python examples/vit.py small/base size=small/adapters/size colour=small/adapters/colour \\
        --data size=small/photos colour=small/photos

Every DATA is a folder of images, or a table that names some.
"""

from __future__ import annotations

from command_line import run
from transformers import AutoModelForImageClassification

if __name__ == "__main__":
    run(__doc__, AutoModelForImageClassification, batch_size=32, steps=100, out="merged-vit")
