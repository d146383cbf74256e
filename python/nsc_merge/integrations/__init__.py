"""Merging from inside other codebases, one module or folder each; importing one imports that library where it needs
something of it.
"""
