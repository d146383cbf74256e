"""A campaign whose third trial kills its process once, and whose fourth is wrong."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator

from bench.fuzz.trial import Trial


def trials(seed: int) -> Iterator[Trial]:
    for number in itertools.count():
        if number == 2 and seed == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        yield Trial(f"{seed} {number}", "wrong" if number == 3 else "right", "found 1, expected 2")
