"""The backends, one file each; :mod:`nsc_kernels.dispatch` loads them by name."""
