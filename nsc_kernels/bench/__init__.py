"""Measures the operator on the machine at hand: ``python -m nsc_kernels.bench``."""
