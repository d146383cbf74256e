"""Shows the GPU kernels correct on the machine at hand: ``python -m nsc_kernels.verify``.

The automatic choice takes a GPU backend where it has been shown correct at the source in use (verified_hardware.py): on
the architectures that the release names, and where this command has shown it. ``cases`` is what is tried, ``criterion``
what a result may be off by, ``repeats`` the ways of calling that must give the same bits, ``check`` and ``launches``
are the trials, ``verdict`` what their rows come to.
"""
