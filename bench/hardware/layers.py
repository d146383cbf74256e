"""The layers that the GPU stages measure: the three model families first, so that a run that is cut short has them."""

from __future__ import annotations

from nsc_kernels.bench.shapes import Shape

FAMILIES = [
    Shape("ViT-B", 6304, 768, 768, 20, 16),
    Shape("LLaMA-3-8B q, o", 256, 4096, 4096, 6, 16),
    Shape("LLaMA-3-8B v, k", 256, 4096, 1024, 6, 16),
    Shape("LLaVA-7B q, k, v, o", 640, 4096, 4096, 6, 16),
    Shape("LLaMA-3-8B q, o", 1536, 4096, 4096, 6, 16),
    Shape("LLaMA-3-8B v, k", 1536, 4096, 1024, 6, 16),
    Shape("LLaVA-7B q, k, v, o", 3840, 4096, 4096, 6, 16),
]
LARGE = [
    Shape("large T", 16384, 4096, 4096, 8, 16),
    Shape("large T", 16384, 4096, 4096, 1, 16),
    Shape("large T", 8192, 8192, 8192, 8, 16),
]
MLP = [
    Shape(f"LLaMA-3-8B {name}", T, *widths, 6, 16)
    for T in (256, 1536)
    for name, widths in (("gate, up", (4096, 14336)), ("down", (14336, 4096)))
]
SHAPES = [*FAMILIES, *LARGE, *MLP]
DRY_RUN = Shape("dry run", 5, 24, 40, 2, 4)
