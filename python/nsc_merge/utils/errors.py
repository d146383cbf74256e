"""Errors that decide the exit status of a command."""

from __future__ import annotations


class UsageError(ValueError):
    """The command line, not the data, is at fault."""

    exit_status = 2
