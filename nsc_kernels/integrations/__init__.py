"""Swap-ins for other libraries, one module each; importing one imports that library."""
