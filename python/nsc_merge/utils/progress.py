"""One progress display for every long loop: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from nsc_merge.utils.errors import printable


def on_terminal() -> bool:
    """Whether standard error is one; a host of Python may have put an object there that cannot tell, or none."""
    return hasattr(sys.stderr, "isatty") and sys.stderr.isatty()


class Progress:
    """Counts steps on standard error.

    A tqdm bar with rate and time left, or about ten plain lines over the whole run, so that a log file stays readable.

    Args:
        label: what is being done.
        total: number of steps.
        show: True draws the bar and False shows nothing; None draws it on a terminal and prints lines elsewhere.
    """

    def __init__(self, label: str, total: int, show: bool | None = None) -> None:
        self._label, self._total, self._done = label, total, 0
        # Where there is no standard error, as in a service, print and tqdm would take standard output.
        self._silent = show is False or sys.stderr is None
        self._every = max(1, total // 10)
        self._started = time.perf_counter()
        self._bar: Any = None
        if not self._silent and (show or on_terminal()):
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit="step", file=sys.stderr, dynamic_ncols=True)

    def update(self, count: int = 1, **values: object) -> None:
        """Count steps, all that were done by now, and show ``values`` beside them."""
        lines = self._done // self._every
        self._done += count
        known = {name: printable(str(value)) for name, value in values.items()}
        if self._bar is not None:
            self._bar.set_postfix(known, refresh=False)
            self._bar.update(count)
        elif not self._silent and (self._done // self._every > lines or self._done == self._total):
            seconds = time.perf_counter() - self._started
            shown = "".join(f"  {name} {value}" for name, value in known.items())
            left = seconds / self._done * (self._total - self._done)
            pace = f"{self._done / max(seconds, 1e-9):.3g} step/s, {seconds:.0f} s, {left:.0f} s left"
            print(f"{self._label}: {self._done}/{self._total}{shown}  ({pace})", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
