"""The problems that are tried: a case each, in a grid over what tells the kernels' ways apart."""

from __future__ import annotations

import itertools
from typing import NamedTuple

UNEQUAL = (3, 0, 16, 5, 1, 31)
R16 = {K: (16,) * K for K in (1, 6, 8, 20, 32)}


class Case(NamedTuple):
    T: int
    d_in: int
    d_out: int
    ranks: tuple[int, ...]
    dtype: str
    per_row: bool = False
    given: str = "all"  # what the gradients are of: "all", "y", "statistics"
    base: bool = True
    precision: str = "highest"

    @property
    def memory(self) -> int:
        """Bytes that its check takes, in round numbers: inputs, results, and float64 of all of them."""
        return self.T * (50 * (self.d_in + self.d_out) + 100 * sum(self.ranks))

    def __str__(self) -> str:
        K, r = len(self.ranks), self.ranks[0]
        ranks = f"{K}x{r}" if self.ranks == (r,) * K else ",".join(map(str, self.ranks))
        words = [f"T={self.T} {self.d_in}->{self.d_out} r={ranks} {self.dtype}"]
        words += ["per_row"] if self.per_row else []
        words += [f"given={self.given}"] if self.given != "all" else []
        words += [] if self.base else ["no_base"]
        words += [self.precision] if self.precision != "highest" else []
        return " ".join(words)


# The first to be run: a row each of the tile and of the sliced schedule, and what divides nothing.
SMALLEST = Case(130, 776, 840, R16[6], "bfloat16")
FIRST = [SMALLEST, Case(63, 768, 768, R16[6], "bfloat16"), Case(1000, 760, 1128, UNEQUAL, "float16")]
TRIED = [Case(5, 24, 40, (4, 4), "bfloat16"), Case(19, 40, 24, UNEQUAL, "float32", per_row=True)]


def cases(dry_run: bool) -> list[Case]:
    """The grid: both schedules, every tile, the shapes of the benchmark, and what divides nothing."""
    if dry_run:
        return TRIED
    layers = [(768, 768, R16[20]), (4096, 4096, R16[6]), (4096, 1024, R16[6])]
    layers += [(4096, 4096, R16[32]), (4096, 4096, R16[1])]
    grid = [
        Case(T, d_in, d_out, ranks, "bfloat16")
        for (d_in, d_out, ranks), T in itertools.product(layers, (1, 63, 256, 1536, 6304, 16384))
    ]
    grid += [
        Case(T, 760, 1128, ranks, dtype, per_row=per_row)
        for T, ranks, dtype, per_row in itertools.product(
            (1, 1000, 20001), (UNEQUAL, R16[8]), ("bfloat16", "float16", "float32"), (False, True)
        )
    ]
    grid += [Case(T, 768, 1001, R16[8], "float32", precision="high") for T in (63, 2049, 20001)]
    grid += [Case(T, 768, 760, R16[32], "float32") for T in (63, 2049)]
    grid += [
        Case(T, 768, 768, ranks, "bfloat16", given=given, base=base)
        for T, ranks, given, base in itertools.product(
            (300, 9000), (R16[6], (2,) * 64), ("y", "statistics"), (False, True)
        )
    ]
    edges = [
        Case(300, 1, 1, (1,), "bfloat16"),
        Case(300, 768, 768, (0, 0), "bfloat16"),
        Case(0, 64, 64, (4,), "float32"),
    ]
    return list(dict.fromkeys([*FIRST, *grid, *edges]))
