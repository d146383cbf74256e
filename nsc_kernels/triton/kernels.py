"""The kernel: shrink -> mid -> expand in one launch, for both directions and both schedules.

    forward :  x = z,  w_in = A,  w_out = Bt        backward:  x = dy, w_in = Bt, w_out = A

Both weights are stored ``[R, d]``, so the two directions are one kernel and differ in the middle only (constexpr
BACKWARD). See :mod:`nsc_kernels.reference` for the mathematics and the rounding points.

Schedules (constexpr SLICES):

* ``SLICES == 0``, tiles: one program per tile of BT tokens does all three steps; the middle stays in registers.
* ``SLICES >= 1``, sliced: the steps become units of work, so that few tiles still fill the machine and so that no
  program holds more than one step in registers. Units are numbered in this order:

      shrink units  tiles * SLICES       sum over one slice of d, to a float32 partial (in L2 where T is small)
      mid units     tiles * BT / ROWS    add the partials of ROWS tokens in slice order, middle, store ``c``
      expand units  tiles * OUT_SLICES   one slice of the output columns

  A program draws its unit from an atomic ticket, so the units of running programs are always the lowest not yet
  finished, and a unit waits on lower units only. Whatever number of programs is resident, the lowest unfinished unit
  does not wait, hence no deadlock; and running the programs one after another (the interpreter) works too.

Counters are zero between launches: each is put back by the last unit that can look at it. No launch has to clear
them, and a captured graph can be replayed. Layout: ``[ticket, dlam arrivals, arrived[tiles], ready[tiles],
left[tiles]]``, int32.

The rank axis is N chunks of C columns, C a power of two: R = 320 is 5 x 64 and not 512, and the middle needs registers
for one chunk at a time. A chunk is C / G groups of columns, each group with one owner (see columns.py).

Every sum runs in an order fixed by the shape and the configuration, so results are bitwise repeatable.
"""

# mypy: disable-error-code="assignment"
# Triton's language grows tuples in unrolled loops, which Python's types cannot say.

from __future__ import annotations

import triton.language as tl

import triton

from .steps import expand, first_rows, load_diagonal, load_step, middle, shrink, store_per_adapter, store_sums


@triton.jit
def signal(counter, sem: tl.constexpr):
    """Count one arrival after every store of this program; returns the arrivals before it.

    The barrier puts all threads' stores before the one thread that does the release. Whoever puts a counter back on
    the strength of what is returned must also acquire: else its store may overtake the others' last looks at it.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem=sem)


@triton.jit
def wait(counter, arrivals):
    """Return when ``arrivals`` have been counted; what was stored before them is then visible."""
    while tl.atomic_add(counter, 0, sem="acquire") < arrivals:
        pass


@triton.jit
def finish_dlam(
    dlam, parts, units, owner, arrivals, R, K,
    N: tl.constexpr, C: tl.constexpr, G: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """The last of ``units`` to arrive adds the parts ``[units, N, C / G]`` in the order of the units."""
    STEP: tl.constexpr = 16
    GROUPS: tl.constexpr = C // G
    if signal(arrivals, "acq_rel") == units - 1:
        tl.store(arrivals, 0)
        i = tl.arange(0, STEP)
        g = tl.arange(0, GROUPS)
        totals = ()
        for n in tl.static_range(N):
            total = tl.zeros((STEP, GROUPS), tl.float32)
            for i0 in range(0, units, STEP):
                rows = parts + ((i0 + i) * N + n) * GROUPS
                total += tl.load(rows[:, None] + g[None, :], mask=(i0 + i < units)[:, None], other=0.0)
            totals = totals + (tl.reshape(tl.sum(total, 0), (1, GROUPS)),)
        one = tl.arange(0, 1)
        store_per_adapter(dlam, totals, one, owner, 1, R, K, N, C, G, UNIFORM)


@triton.jit
def slice_of(s, D, BLOCK: tl.constexpr, SLICES: tl.constexpr):
    """Where slice s of D columns begins and ends."""
    width = tl.cdiv(tl.cdiv(D, BLOCK), SLICES) * BLOCK
    begin = s * width
    return begin, tl.minimum(begin + width, D)


@triton.jit
def shrink_unit(
    unit, x, w_in, work, norms, arrived, T, R, D, stride_x,
    BT: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr,
    SLICES: tl.constexpr, PRECISION: tl.constexpr, WARPGROUPS: tl.constexpr,
):  # fmt: skip
    """One slice of the shrink of one tile, left as a partial in ``work [SLICES, T, R]``."""
    tile = unit // SLICES
    s = unit % SLICES
    t = tile * BT + tl.arange(0, BT)
    begin, end = slice_of(s, D, BK, SLICES)
    accs, squares = shrink(x, w_in, t, begin, end, T, R, D, stride_x, BT, BK, N, C, NORM, PRECISION, WARPGROUPS)
    rows = t.to(tl.int64) + tl.cast(s, tl.int64) * T
    for i in tl.static_range(N):
        j = i * C + tl.arange(0, C)
        inside = (t < T)[:, None] & (j < R)[None, :]
        tl.store(work + rows[:, None] * R + j[None, :], accs[i], mask=inside)
    if NORM:
        tl.store(norms + rows, squares, mask=t < T)
    signal(arrived + tile, "release")


@triton.jit
def mid_unit(
    index, lam, u, quad, sqnorm, dlam, owner, work, norms, parts, c, arrived, ready, T, R, K,
    MIDS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    UNIFORM: tl.constexpr, BACKWARD: tl.constexpr, PER_ROW: tl.constexpr, NORM: tl.constexpr,
    SLICES: tl.constexpr, EXPAND: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The middle of ROWS tokens, once every slice of their tile has arrived."""
    tile = index // MIDS
    t = index * ROWS + tl.arange(0, ROWS)
    ahead = ()
    if EARLY:  # inputs of the launch only: what another program writes is not there yet
        for i in tl.static_range(N):
            found = load_diagonal(i, t, u, lam, quad, owner, T, R, K, ROWS, C, G, UNIFORM, BACKWARD, PER_ROW)
            ahead = ahead + (found,)
    wait(arrived + tile, SLICES)
    rows = t.to(tl.int64)
    sums = ()
    for i in tl.static_range(N):
        j = i * C + tl.arange(0, C)
        inside = (t < T)[:, None] & (j < R)[None, :]
        acc = tl.zeros((ROWS, C), tl.float32)
        # Unrolled, so that the loads of all slices are in flight together: each is a round trip to L2.
        for s in tl.static_range(SLICES):
            partial = work + (rows + s * tl.cast(T, tl.int64))[:, None] * R + j[None, :]
            acc += tl.load(partial, mask=inside, other=0.0)
        c_chunk, per_group = middle(
            acc, ahead[i] if EARLY else None, i, t, u, lam, quad, owner, T, R, K,
            ROWS, C, G, UNIFORM, BACKWARD, PER_ROW,
        )  # fmt: skip
        sums = sums + (per_group,)
        if EXPAND:
            tl.store(c + rows[:, None] * R + j[None, :], c_chunk.to(c.dtype.element_ty), mask=inside)
    squares = tl.zeros((ROWS,), tl.float32)
    if NORM:
        for s in tl.static_range(SLICES):
            squares += tl.load(norms + rows + s * tl.cast(T, tl.int64), mask=t < T, other=0.0)
    store_sums(
        sums, squares, t, index, quad, sqnorm, dlam, owner, parts, T, R, K, N, C, G, UNIFORM, BACKWARD, PER_ROW
    )  # fmt: skip
    # Whoever is last here knows that all mid units of the tile have seen its slices arrive.
    if signal(ready + tile, "acq_rel") == MIDS - 1:
        tl.store(arrived + tile, 0)
        if not EXPAND:
            tl.store(ready + tile, 0)


@triton.jit
def expand_unit(
    index, w_out, base, out, z, dsqnorm, c, ready, left, T, R, D, stride_base, stride_out, stride_z,
    MIDS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    OUT_SLICES: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One slice of the output columns of one tile, once its middle is done."""
    tile = index // OUT_SLICES
    s = index % OUT_SLICES
    t = tile * BT + tl.arange(0, BT)
    first = None
    if EARLY:
        begin, end = slice_of(s, D, BN, OUT_SLICES)
        w_rows = first_rows(w_out, D, C)
        first = load_step(w_rows, base, z, t, begin, T, R, end, D, stride_base, stride_z, BT, BN, N, C, True)
    wait(ready + tile, MIDS)
    cs = ()
    for i in tl.static_range(N):
        j = i * C + tl.arange(0, C)
        inside = (t < T)[:, None] & (j < R)[None, :]
        cs = cs + (tl.load(c + t.to(tl.int64)[:, None] * R + j[None, :], mask=inside, other=0.0),)
    begin, end = slice_of(s, D, BN, OUT_SLICES)
    expand(
        cs, first, w_out, base, out, z, dsqnorm, t, begin, end, T, R, D, stride_base, stride_out, stride_z,
        BT, BN, N, C, PRECISION, STAGES,
    )  # fmt: skip
    if signal(left + tile, "acq_rel") == OUT_SLICES - 1:
        tl.store(ready + tile, 0)
        tl.store(left + tile, 0)


@triton.jit(do_not_specialize=["T", "K", "parts_at"])
def merged_lora_kernel(
    x, w_in, w_out, lam, base, out, u, quad, sqnorm, z, dlam, owner, work, c, counters,
    T, R, K, D_IN, D_OUT, stride_x, stride_base, stride_out, stride_z, parts_at,
    BACKWARD: tl.constexpr, PER_ROW: tl.constexpr, UNIFORM: tl.constexpr,
    N: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    SLICES: tl.constexpr, OUT_SLICES: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
    EXPAND_STAGES: tl.constexpr, EARLY: tl.constexpr, WARPGROUPS: tl.constexpr,
):  # fmt: skip
    """One direction of the operator on ``x [T, D_IN]``; what is None is not read, not computed and not written.

    Args:
        w_in, w_out: ``[R, D_IN]`` and ``[R, D_OUT]``.
        lam: float32, ``[K]``, or ``[T, K]`` with PER_ROW.
        base, out: ``[T, D_OUT]``; without ``out`` there is no expand.
        u: ``[T, R]``: stored by the forward, read by the backward.
        quad, sqnorm: ``[T, K]`` and ``[T]``: the statistics in the forward, their gradients in the backward.
        z: ``[T, D_OUT]``, backward with ``sqnorm``.
        dlam: shaped like ``lam``, backward.
        owner: adapter of each group of G columns; not read with UNIFORM, where group k is adapter k.
        work: float32: the shrink partials ``[SLICES, T, R]`` and ``[SLICES, T]``, then from ``parts_at`` the parts of
            dlam ``[units, N, C / G]``.
        c: ``[T, R]`` in the compute dtype, sliced only.
        EXPAND_STAGES, EARLY: when the loads of the expand are issued, and whether units load what they can before they
            wait; neither changes what is added in which order. See :class:`nsc_kernels.triton.configs.Config`.
        WARPGROUPS: products are those of a Hopper warpgroup.
    """
    NORM: tl.constexpr = (not BACKWARD) and (sqnorm is not None)
    SUM_DLAM: tl.constexpr = BACKWARD and (dlam is not None) and (not PER_ROW)
    EXPAND: tl.constexpr = out is not None
    tiles = tl.cdiv(T, BT)
    parts = work
    arrivals = counters
    if SUM_DLAM:
        parts = work + parts_at
        arrivals = counters + 1
    if SLICES == 0:
        tile = tl.program_id(0)
        t = tile * BT + tl.arange(0, BT)
        accs, squares = shrink(
            x, w_in, t, 0, D_IN, T, R, D_IN, stride_x, BT, BK, N, C, NORM, PRECISION, WARPGROUPS
        )  # fmt: skip
        cs = ()
        sums = ()
        for i in tl.static_range(N):
            c_chunk, per_group = middle(
                accs[i], None, i, t, u, lam, quad, owner, T, R, K, BT, C, G, UNIFORM, BACKWARD, PER_ROW
            )
            cs = cs + (c_chunk.to(w_out.dtype.element_ty),)
            sums = sums + (per_group,)
        store_sums(
            sums, squares, t, tile, quad, sqnorm, dlam, owner, parts, T, R, K, N, C, G, UNIFORM, BACKWARD, PER_ROW
        )  # fmt: skip
        if EXPAND:
            expand(
                cs, None, w_out, base, out, z, sqnorm, t, 0, D_OUT, T, R, D_OUT, stride_base, stride_out, stride_z,
                BT, BN, N, C, PRECISION, EXPAND_STAGES,
            )  # fmt: skip
        if SUM_DLAM:
            finish_dlam(dlam, parts, tiles, owner, arrivals, R, K, N, C, G, UNIFORM)
    else:
        MIDS: tl.constexpr = BT // ROWS
        norms = work + tl.cast(T, tl.int64) * R * SLICES
        arrived = counters + 2
        ready = arrived + tiles
        left = ready + tiles
        first_mid = tiles * SLICES
        first_expand = first_mid + tiles * MIDS
        units = first_expand
        if EXPAND:
            units += tiles * OUT_SLICES
        unit = tl.atomic_add(counters, 1, sem="relaxed")
        if unit == units - 1:
            tl.store(counters, 0)
        if unit < first_mid:
            shrink_unit(
                unit, x, w_in, work, norms, arrived, T, R, D_IN, stride_x, BT, BK, N, C, NORM, SLICES, PRECISION,
                WARPGROUPS,
            )  # fmt: skip
        elif unit < first_expand:
            index = unit - first_mid
            mid_unit(
                index, lam, u, quad, sqnorm, dlam, owner, work, norms, parts, c, arrived, ready, T, R, K,
                MIDS, ROWS, N, C, G, UNIFORM, BACKWARD, PER_ROW, NORM, SLICES, EXPAND, EARLY,
            )  # fmt: skip
            if SUM_DLAM:
                finish_dlam(dlam, parts, tiles * MIDS, owner, arrivals, R, K, N, C, G, UNIFORM)
        elif EXPAND:
            expand_unit(
                unit - first_expand, w_out, base, out, z, sqnorm, c, ready, left, T, R, D_OUT,
                stride_base, stride_out, stride_z, MIDS, BT, BN, N, C, OUT_SLICES, PRECISION, EXPAND_STAGES, EARLY,
            )  # fmt: skip
