"""Whether what a product of Hopper still reads is overwritten by the compiler's prefetch, as read from its TTGIR.

A ``warp_group_dot`` runs on after it was issued: a wait with ``pendings`` above zero leaves it running while the loop
issues the copies of a later step. An operand in shared memory that is prefetched P steps ahead therefore needs more
than P buffers; with P, the copy goes where the product still reads. Triton 3.6 to 3.9 allocate P where the loaded tile
has another reader beside the product; the result is wrong in ways that change from run to run.
"""

from __future__ import annotations

import re
from collections import Counter

ALLOCATED = re.compile(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")
VIEWED = re.compile(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)")
COPIED = re.compile(r"ttg\.async_copy_global_to_local %\w+, (%\w+)")
MULTIPLIED = re.compile(r"ttng\.warp_group_dot (%\w+), (%\w+),")
WAITED = re.compile(r"ttng\.warp_group_dot_wait .*pendings = (\d+)")


def overwritten(ttgir: str) -> list[str]:
    """The operands with too few buffers, by their names in the TTGIR; none if all is well."""
    buffers: dict[str, int] = {}
    of: dict[str, str] = {}  # the allocation behind a view
    ahead: Counter[str] = Counter()  # copies into an allocation before the loop
    found: list[str] = []
    loops: list[str] = []  # indentation of those that are open
    read: set[str] = set()
    copied: set[str] = set()
    pending = 0
    for line in ttgir.splitlines():
        if "scf.for" in line:
            loops.append(line[: len(line) - len(line.lstrip())])
            read, copied, pending = set(), set(), 0
        elif loops and line.startswith(loops[-1] + "}"):
            loops.pop()
            found += sorted(name for name in read & copied if pending and buffers[name] <= ahead[name])
            read, copied, ahead = set(), set(), Counter()
        if match := ALLOCATED.search(line):
            buffers[match[1]] = int(match[2])
            of[match[1]] = match[1]
        elif match := VIEWED.search(line):
            of[match[1]] = of.get(match[2], match[2])
        elif match := COPIED.search(line):
            name = of[match[1]]
            copied.add(name)
            ahead[name] += not loops
        elif match := MULTIPLIED.search(line):
            read |= {of[name] for name in match.groups() if of.get(name) in buffers}
        elif match := WAITED.search(line):
            pending = int(match[1])
    return found
