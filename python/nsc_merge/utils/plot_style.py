"""The style that all pictures share."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from nsc_merge.utils.atomic_file import replacing

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#7B3294")
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.bbox": "tight",
    "savefig.dpi": 130,
    # Names of tasks and methods are what they are, with a $ in them, too.
    "text.parse_math": False,
}


@contextmanager
def pyplot_in_style() -> Iterator[Any]:
    """``matplotlib.pyplot`` without a display, in the style of all pictures here.

    Raises:
        RuntimeError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("plots need matplotlib: pip install matplotlib") from None

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(_STYLE):
        yield pyplot


def write_picture(figure: Any, path: Path) -> None:
    """Write a figure of pyplot as a whole, and close it. Nothing lies there while it is drawn, which takes a second in
    which a process may be killed.
    """
    from matplotlib import pyplot

    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."))
    pyplot.close(figure)
    with replacing(path) as temporary:
        temporary.write_bytes(drawn.getvalue())


# The blocks by their usual names, in front of numbers within them: T5 has block.3.layer.0.
_BLOCK = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.(.+)$")
_NUMBERED = re.compile(r"(?:^|\.)(\d+)\.(.+)$")


def place(path: str) -> tuple[int, str]:
    """Block number and name within the block of a module; block -1 outside the blocks, which are the first that has a
    number where none has a usual name. Numbers at the end, such as of experts in one parameter, are no part of the
    name.
    """
    named = re.sub(r"(\.\d+)+$", "", path)
    match = _BLOCK.search(named) or _NUMBERED.search(named)
    return (int(match[1]), match[2].rsplit(".", 1)[-1]) if match else (-1, named.rsplit(".", 1)[-1])


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Of every value and those before it, ``window`` in all; shorter by ``window - 1`` than ``values``."""
    sums = [0.0, *accumulate(values)]
    return [(sums[end] - sums[end - window]) / window for end in range(window, len(sums))]
