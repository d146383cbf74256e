"""Fused kernels for merged LoRA adapters and their null-space statistics.

One operator, ``y = base + sum_k lam_k s_k B_k A_k z`` together with
``quad_k = z^T A_k^T (A_k A_k^T)^-1 A_k z`` and ``sqnorm = ||z||^2``, forward and backward, on every backend
with the same skeleton: shrink -> mid -> expand.
"""

from ._version import __version__
from .bank import AdapterBank
from .dispatch import available_backends, use_backend
from .functional import merged_lora, merged_lora_nsc
from .module import MergedLoRALinear
from .ratio import null_space_ratio

__all__ = [
    "AdapterBank",
    "MergedLoRALinear",
    "__version__",
    "available_backends",
    "merged_lora",
    "merged_lora_nsc",
    "null_space_ratio",
    "use_backend",
]
