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
def shrink(
    x, w_in, t, begin, end, T, R, D, stride_x,
    BT: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``x[t, begin:end] @ w_in[:, begin:end]^T`` in N chunks, and with NORM the sums of x^2, all float32."""
    accs = ()
    for _ in tl.static_range(N):
        accs = accs + (tl.zeros((BT, C), tl.float32),)
    # Summed over columns once, at the end: a reduction across threads in every step would cost more than the squares.
    squares = tl.zeros((BT, BK), tl.float32)
    x_rows = x + t.to(tl.int64)[:, None] * stride_x
    j = tl.arange(0, C)
    w_rows = w_in + j.to(tl.int64)[None, :] * D
    for k0 in range(begin, end, BK):
        k = k0 + tl.arange(0, BK)
        x_tile = tl.load(x_rows + k[None, :], mask=(t < T)[:, None] & (k < D)[None, :], other=0.0)
        added = ()
        for i in tl.static_range(N):
            inside = (k < D)[:, None] & (i * C + j < R)[None, :]
            w_tile = tl.load(w_rows + (i * C * tl.cast(D, tl.int64) + k)[:, None], mask=inside, other=0.0)
            added = added + (tl.dot(x_tile, w_tile, accs[i], input_precision=PRECISION),)
        accs = added
        if NORM:
            x_wide = x_tile.to(tl.float32)
            squares += x_wide * x_wide
    return accs, tl.sum(squares, 1)


@triton.jit
def middle(
    acc, i, t, u, lam, quad, owner, T, R, K,
    ROWS: tl.constexpr, C: tl.constexpr, G: tl.constexpr, UNIFORM: tl.constexpr,
    BACKWARD: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """The diagonal on chunk i: ``c`` in float32, and u * u or u * v summed over each group of columns.

    Computed as ``[ROWS, C / G, G]``: what an adapter has per token is loaded once per group and not once per column.
    """
    GROUPS: tl.constexpr = C // G
    g = i * GROUPS + tl.arange(0, GROUPS)
    used = g * G < R
    if UNIFORM:
        k = g
    else:
        k = tl.load(owner + g, mask=used, other=0)
    j = i * C + tl.arange(0, C)
    columns = t.to(tl.int64)[:, None] * R + j[None, :]
    inside = (t < T)[:, None] & (j < R)[None, :]
    adapters = t.to(tl.int64)[:, None] * K + k[None, :]
    in_group = (t < T)[:, None] & used[None, :]
    grouped = tl.reshape(acc, (ROWS, GROUPS, G))
    if PER_ROW:
        c = grouped * tl.load(lam + adapters, mask=in_group, other=0.0)[:, :, None]
    else:
        c = grouped * tl.load(lam + k, mask=used, other=0.0)[None, :, None]
    if BACKWARD:
        saved = tl.load(u + columns, mask=inside, other=0.0).to(tl.float32)
        saved = tl.reshape(saved, (ROWS, GROUPS, G))
        product = saved * grouped
        if quad is not None:
            c += saved * (2.0 * tl.load(quad + adapters, mask=in_group, other=0.0))[:, :, None]
    else:
        product = grouped * grouped
        if u is not None:
            tl.store(u + columns, acc.to(u.dtype.element_ty), mask=inside)
    return tl.reshape(c, (ROWS, C)), tl.sum(product, 2)


@triton.jit
def store_per_adapter(
    out, sums, t, owner, T, R, K,
    N: tl.constexpr, C: tl.constexpr, G: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """``out[t, k]`` = the sum over adapter k's groups; ``sums`` holds ``[len(t), C / G]`` for each chunk."""
    GROUPS: tl.constexpr = C // G
    g = tl.arange(0, GROUPS)
    rows = out + t.to(tl.int64) * K
    if UNIFORM:
        for i in tl.static_range(N):
            k = i * GROUPS + g
            tl.store(rows[:, None] + k[None, :], sums[i], mask=(t < T)[:, None] & (k < K)[None, :])
    else:
        for k in range(K):
            value = tl.zeros_like(tl.sum(sums[0], 1))
            for i in tl.static_range(N):
                owners = tl.load(owner + i * GROUPS + g, mask=(i * GROUPS + g) * G < R, other=-1)
                value += tl.sum(tl.where((owners == k)[None, :], sums[i], 0.0), 1)
            tl.store(rows + k, value, mask=t < T)


@triton.jit
def store_sums(
    sums, squares, t, unit, quad, sqnorm, dlam, owner, parts, T, R, K,
    N: tl.constexpr, C: tl.constexpr, G: tl.constexpr, UNIFORM: tl.constexpr,
    BACKWARD: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """What the middle leaves per token (statistics, dlam per row) or per unit (parts of dlam)."""
    if BACKWARD:
        if dlam is not None:
            if PER_ROW:
                store_per_adapter(dlam, sums, t, owner, T, R, K, N, C, G, UNIFORM)
            else:
                for i in tl.static_range(N):
                    at = (unit * N + i) * (C // G) + tl.arange(0, C // G)
                    tl.store(parts + at, tl.sum(sums[i], 0))
    elif quad is not None:
        store_per_adapter(quad, sums, t, owner, T, R, K, N, C, G, UNIFORM)
        tl.store(sqnorm + t, squares, mask=t < T)


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
def load_tile(source, t, n0, T, end, stride, BT: tl.constexpr, BN: tl.constexpr):
    """``source[t, n0 : n0 + BN]``, zero outside of ``[T, end]`` and where there is no source."""
    if source is None:
        tile = tl.zeros((BT, BN), tl.float32)
    else:
        n = n0 + tl.arange(0, BN)
        inside = (t < T)[:, None] & (n < end)[None, :]
        tile = tl.load(source + t.to(tl.int64)[:, None] * stride + n[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def expand(
    cs, w_out, base, out, z, dsqnorm, t, begin, end, T, R, D, stride_base, stride_out, stride_z,
    BT: tl.constexpr, BN: tl.constexpr, N: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out[t, begin:end] = base + c @ w_out [+ 2 dsqnorm z]``, rounded once."""
    rows = t.to(tl.int64)[:, None]
    j = tl.arange(0, C)
    w_rows = w_out + j.to(tl.int64)[:, None] * D
    scale = tl.zeros((BT,), tl.float32)
    if z is not None:
        scale = 2.0 * tl.load(dsqnorm + t, mask=t < T, other=0.0)
    base_tile = load_tile(base, t, begin, T, end, stride_base, BT, BN)
    z_tile = load_tile(z, t, begin, T, end, stride_z, BT, BN)
    for n0 in range(begin, end, BN):
        n = n0 + tl.arange(0, BN)
        acc = base_tile.to(tl.float32)
        if z is not None:
            acc += scale[:, None] * z_tile.to(tl.float32)
        # One step ahead by hand: the compiler prefetches what a product reads from shared memory, and this it does not.
        base_tile = load_tile(base, t, n0 + BN, T, end, stride_base, BT, BN)
        z_tile = load_tile(z, t, n0 + BN, T, end, stride_z, BT, BN)
        for i in tl.static_range(N):
            in_chunk = (i * C + j < R)[:, None] & (n < D)[None, :]
            w_tile = tl.load(w_rows + (i * C * tl.cast(D, tl.int64) + n)[None, :], mask=in_chunk, other=0.0)
            acc = tl.dot(cs[i], w_tile, acc, input_precision=PRECISION)
        inside = (t < T)[:, None] & (n < D)[None, :]
        tl.store(out + rows * stride_out + n[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def shrink_unit(
    unit, x, w_in, work, norms, arrived, T, R, D, stride_x,
    BT: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr,
    SLICES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One slice of the shrink of one tile, left as a partial in ``work [SLICES, T, R]``."""
    tile = unit // SLICES
    s = unit % SLICES
    t = tile * BT + tl.arange(0, BT)
    width = tl.cdiv(tl.cdiv(D, BK), SLICES) * BK
    begin = s * width
    end = tl.minimum(begin + width, D)
    accs, squares = shrink(x, w_in, t, begin, end, T, R, D, stride_x, BT, BK, N, C, NORM, PRECISION)
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
    SLICES: tl.constexpr, EXPAND: tl.constexpr,
):  # fmt: skip
    """The middle of ROWS tokens, once every slice of their tile has arrived."""
    tile = index // MIDS
    t = index * ROWS + tl.arange(0, ROWS)
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
            acc, i, t, u, lam, quad, owner, T, R, K, ROWS, C, G, UNIFORM, BACKWARD, PER_ROW
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
    OUT_SLICES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One slice of the output columns of one tile, once its middle is done."""
    tile = index // OUT_SLICES
    s = index % OUT_SLICES
    t = tile * BT + tl.arange(0, BT)
    wait(ready + tile, MIDS)
    cs = ()
    for i in tl.static_range(N):
        j = i * C + tl.arange(0, C)
        inside = (t < T)[:, None] & (j < R)[None, :]
        cs = cs + (tl.load(c + t.to(tl.int64)[:, None] * R + j[None, :], mask=inside, other=0.0),)
    width = tl.cdiv(tl.cdiv(D, BN), OUT_SLICES) * BN
    begin = s * width
    end = tl.minimum(begin + width, D)
    expand(
        cs, w_out, base, out, z, dsqnorm, t, begin, end, T, R, D, stride_base, stride_out, stride_z,
        BT, BN, N, C, PRECISION,
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
        accs, squares = shrink(x, w_in, t, 0, D_IN, T, R, D_IN, stride_x, BT, BK, N, C, NORM, PRECISION)
        cs = ()
        sums = ()
        for i in tl.static_range(N):
            c_chunk, per_group = middle(
                accs[i], i, t, u, lam, quad, owner, T, R, K, BT, C, G, UNIFORM, BACKWARD, PER_ROW
            )
            cs = cs + (c_chunk.to(w_out.dtype.element_ty),)
            sums = sums + (per_group,)
        store_sums(
            sums, squares, t, tile, quad, sqnorm, dlam, owner, parts, T, R, K, N, C, G, UNIFORM, BACKWARD, PER_ROW
        )  # fmt: skip
        if EXPAND:
            expand(
                cs, w_out, base, out, z, sqnorm, t, 0, D_OUT, T, R, D_OUT, stride_base, stride_out, stride_z,
                BT, BN, N, C, PRECISION,
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
                unit, x, w_in, work, norms, arrived, T, R, D_IN, stride_x, BT, BK, N, C, NORM, SLICES, PRECISION
            )  # fmt: skip
        elif unit < first_expand:
            index = unit - first_mid
            mid_unit(
                index, lam, u, quad, sqnorm, dlam, owner, work, norms, parts, c, arrived, ready, T, R, K,
                MIDS, ROWS, N, C, G, UNIFORM, BACKWARD, PER_ROW, NORM, SLICES, EXPAND,
            )  # fmt: skip
            if SUM_DLAM:
                finish_dlam(dlam, parts, tiles * MIDS, owner, arrivals, R, K, N, C, G, UNIFORM)
        elif EXPAND:
            expand_unit(
                unit - first_expand, w_out, base, out, z, sqnorm, c, ready, left, T, R, D_OUT,
                stride_base, stride_out, stride_z, MIDS, BT, BN, N, C, OUT_SLICES, PRECISION,
            )  # fmt: skip
