"""Writes folders in processes that end, as if killed, before a given change to the filesystem.

A process of its own, which has imported next to nothing: to fork one that has imported torch takes far longer than all
that is tried in it. It reads a line of JSON per folder, and answers whether the writer was killed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from nsc_merge.utils import atomic_folder

KILLED = 9
CALLS = [
    *("os.rename", "os.replace", "os.link", "os.unlink", "os.rmdir", "os.mkdir", "os.chmod", "os.open"),
    "atomic_folder._exchange",
]
NEW = {"config.json": "new", "model-1.safetensors": "new", "tasks/a/x": "new", "tasks/b/x": "new"}


def obsolete(path, written):
    return path.name.startswith("model-")


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def replace(out):
    with atomic_folder.replacing_folder(out, obsolete) as staging:
        write(staging, NEW)


def killed_at(step, out, inside, exchange):
    """Replace ``out`` in a process that ends before its ``step``-th change; whether it got that far."""
    child = os.fork()
    if child == 0:
        count = 0
        if inside:
            os.chdir(out)
        if not exchange:
            atomic_folder._exchange = lambda *_: False

        def counting(original):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count > step:
                    os._exit(KILLED)
                return original(*args, **kwargs)

            return call

        for name in CALLS:
            module, function = name.split(".")
            holder = {"os": os, "atomic_folder": atomic_folder}[module]
            setattr(holder, function, counting(getattr(holder, function)))
        try:
            replace(Path(out))
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(killed_at(**json.loads(line))), flush=True)
