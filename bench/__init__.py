"""Benchmarks that need a checkout: hardware, merging, quality. The operator's own are in nsc_kernels.bench."""
