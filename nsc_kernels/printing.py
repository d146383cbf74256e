"""Commands whose output is read by a program that may stop reading, as ``head`` and a pager do, or fills a disk."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable


def exit_status(command: Callable[[], int]) -> int:
    """Runs ``command`` and returns its exit status; or 141, as of SIGPIPE, if whoever read its output has left.

    With a line on standard error: 130, as of SIGINT, after Ctrl-C, and 1 if the disk that the output goes to is full.
    What is printed is written out before this returns, so that either shows up here and not when Python ends.
    """
    if sys.stderr is None:
        # Closed before Python began: what is said there is for nobody, and would be printed among the output.
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As on standard error: × and → by their numbers where a locale has no form of them. JSON here has neither.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            status = command()
        except SystemExit as ended:  # argparse prints its help, and leaves
            if ended.code:
                raise
            status = 0
        if sys.stdout is not None:  # it may have been closed before Python began
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        status = 141
    except OSError as error:
        # Files that the command writes name themselves.
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        status = 1
    # What is still in the buffer would be written, and fail, at Python's end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status
