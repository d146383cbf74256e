"""The contenders that are shipped; importing this registers them.

On the adapters alone (the frozen layer's output ``base`` is given, y = base + adapters(z)):

    fused            this package, on the backend that it chooses; ``fused_cpu`` and so on: on that one
    concat           the adapters concatenated along the rank: two products, the backward derived by hand
    compiled         the same, written plainly, under torch.compile; ``autotuned`` in mode max-autotune-no-cudagraphs
    two_launches     shrink and expand as two Triton kernels (two_launches.py)
    loop, peft       one adapter after another through autograd; ``peft`` without the statistics, as PEFT does it

``_inplace`` may overwrite base, and in the backward adds to a gradient that is there and overwrites it: what the layer
as a whole does. ``_autograd`` is called as users call it, through autograd; the others without. On the whole layer,
y = z W^T + adapters(z), where every contender may overwrite what it made itself:

    linear           the frozen layer alone: the floor, and what weights with the adapters folded in once for all cost
    product_copied   [z, c] @ [W, B]^T: the update is a part of the layer's own product, and y0 is never written. The
                     idea is LoRAFusion's (arXiv 2510.00206). z is copied beside c.
    product_ready    the same where the layer before already wrote z there. Both hold W three times.
    merged           W + sum_k lam_k B_k A_k made anew in each call, as a merge by functional_call does; no statistics

and, where they are installed, the LoRA kernels of other packages (other_packages.py).
"""

import importlib.util

from . import compiled, eager, fused, layer, other_packages, variants  # noqa: F401

if importlib.util.find_spec("triton") is not None:
    from . import two_launches  # noqa: F401
