"""Calculates what a step of NSC takes for models that no machine here can hold: the table of docs/large_models.md.

``python -m bench.merging.large_models`` prints it, and ``--write`` puts it into the page. Nothing in it is measured:
bytes and operations are those of :mod:`nsc_merge.recipes.forecast.estimate`, seconds what the published peak rates
make of them.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsc_merge.recipes.forecast.estimate import (
    LINEARS,
    STORED,
    Work,
    as_run,
    block,
    bytes_per_step,
    memory,
    operations,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "large_models.md"
BEGIN, END = "<!-- calculated: begin -->", "<!-- calculated: end -->"

# Of an H100 SXM, as published: bytes of memory, dense bfloat16 operations a second, and bytes a second from its own
# memory, from the other GPUs of its node over NVLink (one way), over InfiniBand NDR (one card of 400 Gb/s for each GPU)
# and from the host over PCIe 5 x16 (a usual rate rather than the peak of 64).
BYTES, RATE, OWN, NODE, NODES, HOST = 80e9, 990e12, 3.35e12, 450e9, 50e9, 55e9
GPUS = 8  # of a node
VOCABULARY = 128256
# Shared by all three: heads of 128 numbers, eight of which have keys and values.
KEYS = 1024
# Width, width of the feed-forward network, blocks.
SHAPES = {"8 B": (4096, 14336, 32), "70 B": (8192, 28672, 80), "405 B": (16384, 53248, 126)}
# Tasks, rank of an adapter on every linear of a block, and the batch of each task.
TASKS, RANK, ROWS, LENGTH = 6, 16, 8, 512


@dataclass(frozen=True)
class Way:
    """One way of holding the base.

    Attributes:
        name: for the table.
        ranks: GPUs among which it is divided.
        offloaded: whether its blocks lie in the host's memory.
        checkpointing: option of the method.
        stored: bytes of a weight.
    """

    name: str
    ranks: int = 1
    offloaded: bool = False
    checkpointing: bool = True
    stored: float = 2.0

    @property
    def how(self) -> dict[str, Any]:
        return {"ranks": self.ranks, "offloaded": self.offloaded}


WAYS = (
    Way("one GPU", checkpointing=False),
    Way("one GPU, `checkpointing`"),
    Way("one GPU, `bitsandbytes-4bit`, `checkpointing`", stored=STORED["bitsandbytes-4bit"]),
    Way("one GPU, `device_map`", offloaded=True),
    Way("one node, 8 ranks, `checkpointing`", ranks=8),
    Way("4 nodes, 32 ranks, `checkpointing`", ranks=32),
)


def work_of(shape: tuple[int, int, int], way: Way) -> Work:
    """A step on a model of LLaMA-3's shape with adapters on every linear, in bfloat16, with the defaults of its family:
    the inputs of ``v_proj`` are measured in the last quarter of blocks.
    """
    width, inner, blocks = shape
    shapes = {
        **dict.fromkeys(("q", "o"), (width, width)),
        **dict.fromkeys(("k", "v"), (width, KEYS)),
        **dict.fromkeys(("gate", "up"), (width, inner)),
        "down": (inner, width),
    }
    made = [
        block(
            shapes,
            dict.fromkeys(LINEARS, TASKS * RANK),
            element=2,
            weights=sum(map(math.prod, shapes.values())) * way.stored,
            wide_norms=True,
            measured=("v",) if number >= blocks - math.ceil(blocks / 4) else (),
            until="v" if number == blocks - 1 else None,
            first=number == 0,
            checkpointing=way.checkpointing,
        )
        for number in range(blocks)
    ]
    embedding = 2 * VOCABULARY * width
    return Work(tuple(made), 2 * embedding, embedding, 2, ((ROWS, LENGTH),) * TASKS)


def row(model: str, way: Way) -> list[str]:
    """One line of the table."""
    apart = work_of(SHAPES[model], way)
    joined = as_run(apart, True, 0, **way.how)
    # What moves weights moves them in every pass.
    together = (way.ranks > 1 or way.offloaded) and memory(joined, **way.how).total <= BYTES
    loaded = memory(apart, **way.how)
    free = BYTES - loaded.weights - loaded.adapters
    work = joined if together else as_run(apart, None, free, **way.how)
    held, moved = memory(work, **way.how), bytes_per_step(work, **way.how)
    name = f"{way.name}, one pass" if work == joined else way.name
    if held.total > BYTES:
        return [model, name, f"{held.total / 1e9:.1f}", "no", "", "", "", ""]
    done = operations(work.recomputed() if way.offloaded else work.divided(way.ranks))
    passed = sum(one.weights * 2 for one in work.blocks) * len(work.passes)
    seconds = {
        "arithmetic": done / RATE,
        "memory": passed / OWN,
        "NVLink" if way.ranks <= GPUS else "InfiniBand": moved.received / (NODE if way.ranks <= GPUS else NODES),
        "PCIe": moved.loaded / HOST,
    }
    binds = max(seconds, key=lambda name: seconds[name])
    across = moved.received + moved.loaded
    return [
        model,
        name,
        f"{held.total / 1e9:.1f}",
        "yes",
        f"{done / 1e12:.0f}",
        f"{across / 1e9:.0f}" if across else "",
        f"{seconds[binds]:.0f}" if seconds[binds] >= 10 else f"{seconds[binds]:.2g}",
        binds,
    ]


def table() -> str:
    """The table in Markdown."""
    head = ["base", "way", "GB a GPU", "fits in 80 GB", "TFLOP a GPU", "GB moved", "seconds, at least", "what binds"]
    rows = [row(model, way) for model in SHAPES for way in WAYS]
    lines = [head, ["---"] * 2 + ["--:"] + ["---"] + ["--:"] * 3 + ["---"], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def page_with(text: str, table: str) -> str:
    """The page with the table in its place."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put it into {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), table()), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
