"""The suite on a real pre-trained LLaMA, SmolLM2-135M-Instruct: six tasks on data that package registries carry."""

from .smollm2_suite import PERMUTED, load

__all__ = ["PERMUTED", "load"]
