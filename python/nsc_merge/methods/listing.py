"""The listing of ``nsc-merge methods``, kept as a file: to read it takes no method, and so no torch.

``python -m nsc_merge.methods.listing`` writes it anew, after a change to a method or to its options.
"""

from __future__ import annotations

import json
from pathlib import Path

from nsc_merge.methods.registry import describe_methods
from nsc_merge.utils.atomic_file import write_text

FILE = Path(__file__).with_name("listing.json")


def text() -> str:
    """What the file has to hold."""
    return json.dumps(describe_methods(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    write_text(FILE, text())
