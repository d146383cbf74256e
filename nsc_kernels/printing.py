"""Commands whose output is read by a program that may stop reading, as ``head`` and a pager do."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def exit_status(command: Callable[[], int]) -> int:
    """Runs ``command`` and returns its exit status, or 141, as of SIGPIPE, if whoever read its output has left.

    What is printed is written out before this returns, so that a reader that left shows up here and not when
    Python ends.
    """
    try:
        status = command()
        if sys.stdout is not None:  # it may have been closed before Python began
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        # What is still in the buffer would be written, and fail, at Python's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
