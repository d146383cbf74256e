"""Random trials of what must never be wrong without a word; see ``python -m bench.fuzz --help``."""
