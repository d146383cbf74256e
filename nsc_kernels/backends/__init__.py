"""Backends and the registry that chooses among them."""

from .registry import available_backends, use_backend

__all__ = ["available_backends", "use_backend"]
