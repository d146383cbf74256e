"""What a step of NSC takes, by formula: memory, arithmetic and bytes moved, for a model in one place or in several.

Pure functions of shapes, so that they answer for models and machines that are not at hand. What the graph of a step
keeps is what autograd saves of a block whose weights are frozen: the inputs of its norms, the operands of its
attention, and those of the nonlinear part of its feed-forward network. A frozen linear keeps nothing of its input, a
merged one only its projection on the adapters' rows, and a measured one the input as well.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

# The linears of a block, in the order in which they run. Without a gate, ``up`` is the first layer of the feed-forward
# network.
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
# The place in the block at which they take their input, counted in inputs.
_STAGES = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


@dataclass(frozen=True)
class Block:
    """One block of a transformer with its adapters: numbers per token, unless it is said otherwise.

    Attributes:
        weights: bytes of its parameters.
        bank: bytes of its adapters, packed.
        width: of the residual stream, all that is kept of a block that is recomputed.
        kept: numbers in the dtype of the weights that the graph keeps.
        wide: numbers in float32 that it keeps.
        working: numbers that its backward holds beside what is kept, at its largest.
        forward: multiplications of the frozen linears that run.
        backward: those of them that a gradient goes back through.
        again: multiplications of the frozen linears that recomputing it takes: all but those of the last, whose output
            nobody asks for.
        low_rank: multiplications of the adapters, in either direction.
        attention: numbers in the queries of all heads, 0 where attention does not run.
        recomputed: whether checkpointing keeps nothing but its input.
        ends: whether the forward ends in it.
        runs: whether the forward comes so far.
        learns: whether a gradient goes through it: the first block with an adapter and those behind it.
    """

    weights: float
    bank: float
    width: int
    kept: int
    wide: int
    working: int
    forward: int
    backward: int
    again: int
    low_rank: int
    attention: int
    recomputed: bool = False
    ends: bool = False
    runs: bool = True
    learns: bool = True


def block(
    shapes: Mapping[str, tuple[int, int]],
    rows: Mapping[str, int],
    *,
    element: float,
    weights: float | None = None,
    wide_norms: bool = False,
    measured: Collection[str] = (),
    until: str | None = None,
    first: bool = False,
    masked: int = 0,
    checkpointing: bool = False,
) -> Block:
    """What a block of these linears takes.

    Args:
        shapes: some of :data:`LINEARS` -> ``(d_in, d_out)``.
        rows: linear -> ranks of its adapters added up; none where it is absent.
        element: bytes of a number of the activations.
        weights: bytes of its parameters; those of its linears at ``element`` when None.
        wide_norms: whether norms compute, and so keep, in float32 (RMSNorm of transformers).
        measured: linears whose input is measured.
        until: the linear at whose input the forward ends, nothing of that input's linears being applied.
        first: whether nothing in front of the block depends on a coefficient.
        masked: tokens in a row if attention takes a mask, for which keys and values are repeated for all heads and the
            mask is kept in numbers; 0 without one.
        checkpointing: whether the block is recomputed.
    """
    ran = _before(until)
    width, attention, keys = shapes["q"][0], shapes["q"][1], shapes["k"][1]
    inner = shapes["down"][0] if "up" in ran else 0
    norms = (not first) + ("o" in ran)
    attends = "q" in ran
    held = (attention if masked else keys) * 2 + attention * 2 + masked
    kept = attends * held + inner * (3 if "gate" in shapes else 1)
    kept += sum(_input(shapes, stage) for stage in _STAGES if set(stage) & set(measured))
    # A linear at whose input the forward ends still projects on the rows of its adapters.
    touched = [name for name in LINEARS if rows.get(name) and (name in ran or name in measured)]
    kept += sum(rows[name] for name in touched)
    linears = {name: math.prod(shape) for name, shape in shapes.items() if name in ran}
    into_first = sum(linears.get(name, 0) for name in _STAGES[0]) if first else 0
    return Block(
        weights=sum(map(math.prod, shapes.values())) * element if weights is None else weights,
        bank=sum(count * sum(shapes[name]) for name, count in rows.items()) * element,
        width=width,
        kept=kept + (0 if wide_norms else norms * width),
        wide=norms * width if wide_norms else 0,
        working=max(2 * inner + 2 * width, 2 * (attention + keys) * attends),
        forward=sum(linears.values()),
        backward=sum(linears.values()) - into_first,
        again=sum(count for name, count in linears.items() if name != "down" or rows.get(name)),
        low_rank=sum(rows[name] * (shapes[name][0] + (shapes[name][1] if name in ran else 0)) for name in touched),
        attention=attention if attends else 0,
        recomputed=checkpointing,
        ends=until is not None,
    )


def _before(until: str | None) -> tuple[str, ...]:
    """The linears that are applied."""
    stage = next((number for number, names in enumerate(_STAGES) if until in names), len(_STAGES))
    return tuple(name for names in _STAGES[:stage] for name in names)


def _input(shapes: Mapping[str, tuple[int, int]], stage: Sequence[str]) -> int:
    return next(shapes[name][0] for name in stage if name in shapes)


# Quantised weights as they are stored, in bytes each, scales included: one in float32 for 64 weights of 4 bits; torchao
# keeps four bits in a byte, with scale and zero for 32 of them.
STORED = {"bitsandbytes-8bit": 1.0, "bitsandbytes-4bit": 0.5625, "torchao-int8": 1.0, "torchao-int4": 1.09, "fp8": 1.0}


@dataclass(frozen=True)
class Work:
    """A step.

    Attributes:
        blocks: of the model, in order.
        outside: bytes of parameters outside of blocks,
        front: and of those among them that a forward runs.
        element: bytes of a number of the activations.
        passes: of one step: rows, and tokens of a row.
        head: numbers per token of the logits, if the forward comes so far; 0 if it ends at what is measured.
        fold: bytes of merged weights that are kept beside the model's.
    """

    blocks: tuple[Block, ...]
    outside: float
    front: float
    element: float
    passes: tuple[tuple[int, int], ...]
    head: int = 0
    fold: float = 0

    @property
    def tokens(self) -> int:
        """Of the largest pass."""
        return max(rows * length for rows, length in self.passes)

    def divided(self, ranks: int) -> Work:
        """The share of one of some processes, among which the rows of every pass are divided."""
        return replace(self, passes=tuple((math.ceil(rows / ranks), length) for rows, length in self.passes))

    def recomputed(self) -> Work:
        """With every block computed again in the backward."""
        return replace(self, blocks=tuple(replace(one, recomputed=True) for one in self.blocks))


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, at most.

    Attributes:
        weights: of the model that are there at one time.
        adapters: packed, and what they were folded into.
        activations: that the graph of a pass keeps, or that are computed again for one block.
        working: beside them, while a gradient goes through a block.
    """

    weights: float
    adapters: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        return self.weights + self.adapters + self.activations + self.working


def memory(work: Work, *, ranks: int = 1, offloaded: bool = False) -> Memory:
    """Bytes on each device.

    Args:
        work: a step.
        ranks: processes that hold a shard of each weight (FSDP2), and gather two blocks at a time: the one that runs
            and the next. What else runs stays gathered.
        offloaded: whether the weights of all blocks lie elsewhere and come one block at a time; blocks are then all
            recomputed.
    """
    work = (work.recomputed() if offloaded else work).divided(ranks)
    blocks = work.blocks
    everything = sum(one.weights for one in blocks)
    largest = max(one.weights for one in blocks)
    if offloaded:
        weights = work.outside + largest
    elif ranks > 1:
        gathered = sum(sorted((one.weights for one in blocks), reverse=True)[:2])
        weights = (everything + work.outside) / ranks + gathered + work.front
    else:
        weights = everything + work.outside
    activations, working = _peak([one for one in blocks if one.runs and one.learns], work.element, work.head)
    # What is offloaded or sharded is never folded.
    adapters = sum(one.bank for one in blocks) + (0 if offloaded or ranks > 1 else work.fold)
    return Memory(weights, adapters, work.tokens * activations, work.tokens * working)


def as_run(work: Work, batch_tasks: bool | None, free: float, *, ranks: int = 1, offloaded: bool = False) -> Work:
    """The batches of all tasks in one pass, where they are run so.

    Args:
        work: a step that runs one batch after another.
        batch_tasks: option of the method.
        free: bytes, half of which the graph of one pass of all may take where the option does not say.
        ranks: as in :func:`memory`.
        offloaded: see there.
    """
    rows, lengths = zip(*work.passes, strict=True)
    joined = replace(work, passes=((sum(rows), max(lengths)),))
    if batch_tasks is None:
        fits = memory(joined, ranks=ranks, offloaded=offloaded).activations <= free / 2
        batch_tasks = fits and len(set(lengths)) == 1
    return joined if batch_tasks else work


def _peak(blocks: Sequence[Block], element: float, head: int) -> tuple[float, float]:
    """Bytes per token that the graph keeps, and bytes beside it, at the moment of the backward when both together are
    most: what the graph kept of later blocks is gone by then.
    """
    kept, moments = 0.0, []
    for one in blocks:
        whole = one.kept * element + one.wide * max(element, 4)
        kept += one.width * element if one.recomputed else whole
        moments.append((kept + (whole if one.recomputed else 0), one.working * element))
    return max([*moments, (kept, head * element)], key=sum)


def operations(work: Work) -> float:
    """Floating-point operations of a step, over all processes: a multiplication and an addition count two each."""
    total = 0.0
    for rows, length in work.passes:
        for one in work.blocks:
            if not one.runs:
                continue
            # Two products in the forward, five in the backward, which computes the weights of attention again.
            attention = 2 * length * one.attention
            forward = 2 * (one.forward + one.low_rank) + 2 * attention
            backward = 2 * (one.backward + one.low_rank) + 5 * attention if one.learns else 0
            again = forward - 2 * (one.forward - one.again) if one.learns and one.recomputed else 0
            total += rows * length * (forward + backward + again)
        total += rows * length * 2 * work.blocks[0].width * work.head
    return total


@dataclass(frozen=True)
class Moved:
    """Bytes that a step moves.

    Attributes:
        received: by each process from the others.
        loaded: from the host to the device, of weights that lie there.
    """

    received: float = 0
    loaded: float = 0


def bytes_per_step(work: Work, *, coefficients: int = 0, ranks: int = 1, offloaded: bool = False) -> Moved:
    """Bytes that a step moves.

    Every block is gathered in the forward and, if a gradient goes through it, again in the backward, in each pass: all
    but the one in which the forward ends, and what runs outside of blocks, which are there still. The gradient of the
    coefficients is added up once.

    Args:
        work: a step.
        coefficients: how many are learnt, in float32.
        ranks: processes that hold a shard of each weight.
        offloaded: whether the weights of blocks lie on the host.
    """
    blocks = [one for one in work.blocks if one.runs]
    loaded = sum(one.weights * (2 if one.learns else 1) for one in blocks)
    gathered = work.front + sum(one.weights * (2 if one.learns and not one.ends else 1) for one in blocks)
    others = (ranks - 1) / ranks
    received = others * (gathered * len(work.passes) + 2 * 4 * coefficients)
    return Moved(received, loaded * len(work.passes) if offloaded else 0)
