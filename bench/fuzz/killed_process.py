"""A child of a prepared process, without the seconds that an interpreter with torch takes to start, and its death."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

# What Python tells its audit hooks before a folder, or a name in one, changes.
CHANGES = ("open", "os.mkdir", "os.rmdir", "os.rename", "os.link", "os.remove", "os.chmod", "ctypes.dlsym")
LIMIT = 60.0


class Child:
    """A process that does one job and says how it ended.

    Args:
        job: what to do.
        answer: file for how it ended; not within what the job writes.
        gate: a pipe at whose end it waits before it begins, if any.
        dies_at: SIGKILL before this change of the filesystem, counted from 0; None to live.
    """

    def __init__(
        self,
        job: Callable[[], object],
        answer: Path,
        *,
        gate: tuple[int, int] | None = None,
        dies_at: int | None = None,
    ) -> None:
        self._answer, self._started = answer, time.perf_counter()
        answer.unlink(missing_ok=True)
        self.pid = os.fork()
        if self.pid:
            return
        text, changes = "torn", 0
        try:
            if gate:
                os.close(gate[1])
                os.read(gate[0], 1)

            def count(event: str, _: object) -> None:
                nonlocal changes
                if event in CHANGES:
                    if changes == dies_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    changes += 1

            sys.addaudithook(count)
            job()
            text = f"done\n{changes}"
        except (OSError, ValueError) as error:
            text = f"refused\n{error}"
        except BaseException as error:
            text = f"raised\n{type(error).__name__}: {error}"
        finally:
            # Whole or not at all: it may be killed here, too.
            torn = answer.with_suffix(".torn")
            torn.write_text(text, encoding="utf-8")
            os.replace(torn, answer)
            os._exit(0)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> tuple[str, str]:
        """``"done"`` (with the number of changes), ``"refused"`` (with the error), ``"killed"``, or what is wrong."""
        while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            if time.perf_counter() - self._started > LIMIT:
                self.kill()
                os.waitpid(self.pid, 0)
                return "hung", f"{LIMIT} s"
            time.sleep(0.0005)
        self.seconds = time.perf_counter() - self._started
        if not self._answer.exists():
            return "killed", ""
        how, _, what = self._answer.read_text(encoding="utf-8").partition("\n")
        return how, what
