"""The three steps, each on the tokens of one program: shrink -> middle -> expand. Who runs them when: kernels.py."""

# mypy: disable-error-code="assignment"
# Triton's language grows tuples in unrolled loops, which Python's types cannot say.

from __future__ import annotations

import triton.language as tl

import triton


@triton.jit
def shrink(
    x, w_in, t, begin, end, T, R, D, stride_x,
    BT: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr,
    PRECISION: tl.constexpr, WARPGROUPS: tl.constexpr,
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
        left = x_tile
        if NORM and WARPGROUPS:
            # Read by the products and by the squares, x is prefetched into one buffer too few: Hopper's products run on
            # while the next step is issued, and their x was overwritten (seen with Triton 3.6; 3.9 compiles the same).
            # After an operation the products take x from registers. What it masks is zero already.
            left = tl.where((k < D)[None, :], x_tile, 0.0)
        added = ()
        for i in tl.static_range(N):
            inside = (k < D)[:, None] & (i * C + j < R)[None, :]
            w_tile = tl.load(w_rows + (i * C * tl.cast(D, tl.int64) + k)[:, None], mask=inside, other=0.0)
            added = added + (tl.dot(left, w_tile, accs[i], input_precision=PRECISION),)
        accs = added
        if NORM:
            x_wide = x_tile.to(tl.float32)
            squares += x_wide * x_wide
    return accs, tl.sum(squares, 1)


@triton.jit
def diagonal_at(
    i, t, owner, T, R, K, C: tl.constexpr, G: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Where the middle of chunk i reads: ``[K]`` per group, ``[T, R]`` per column, ``[T, K]`` per group; with masks."""
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
    return k, used, columns, inside, adapters, in_group


@triton.jit
def load_lam(lam, at, PER_ROW: tl.constexpr):
    if PER_ROW:
        found = tl.load(lam + at[4], mask=at[5], other=0.0)[:, :, None]
    else:
        found = tl.load(lam + at[0], mask=at[1], other=0.0)[None, :, None]
    return found


@triton.jit
def load_saved(u, at, ROWS: tl.constexpr, C: tl.constexpr, G: tl.constexpr):
    saved = tl.load(u + at[2], mask=at[3], other=0.0).to(tl.float32)
    return tl.reshape(saved, (ROWS, C // G, G))


@triton.jit
def load_gradient(quad, at):
    return (2.0 * tl.load(quad + at[4], mask=at[5], other=0.0))[:, :, None]


@triton.jit
def load_diagonal(
    i, t, u, lam, quad, owner, T, R, K,
    ROWS: tl.constexpr, C: tl.constexpr, G: tl.constexpr, UNIFORM: tl.constexpr,
    BACKWARD: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """What the middle of chunk i reads, ahead of it: lam, and in the backward u and the gradient of quad.

    No program of the launch writes them.
    """
    at = diagonal_at(i, t, owner, T, R, K, C, G, UNIFORM)
    found = (load_lam(lam, at, PER_ROW),)
    if BACKWARD:
        found = found + (load_saved(u, at, ROWS, C, G),)
        if quad is not None:
            found = found + (load_gradient(quad, at),)
    return found


@triton.jit
def middle(
    acc, ahead, i, t, u, lam, quad, owner, T, R, K,
    ROWS: tl.constexpr, C: tl.constexpr, G: tl.constexpr, UNIFORM: tl.constexpr,
    BACKWARD: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """The diagonal on chunk i: ``c`` in float32, and u * u or u * v summed over each group of columns.

    Computed as ``[ROWS, C / G, G]``: what an adapter has per token is loaded once per group and not once per column.
    ``ahead`` is what :func:`load_diagonal` gave, None to load it here.
    """
    at = diagonal_at(i, t, owner, T, R, K, C, G, UNIFORM)
    grouped = tl.reshape(acc, (ROWS, C // G, G))
    c = grouped * (load_lam(lam, at, PER_ROW) if ahead is None else ahead[0])
    if BACKWARD:
        saved = load_saved(u, at, ROWS, C, G) if ahead is None else ahead[1]
        product = saved * grouped
        if quad is not None:
            c += saved * (load_gradient(quad, at) if ahead is None else ahead[2])
    else:
        product = grouped * grouped
        if u is not None:
            tl.store(u + at[2], acc.to(u.dtype.element_ty), mask=at[3])
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
def first_rows(w_out, D, C: tl.constexpr):
    """Where the first C rows of the weights begin, as a column."""
    return w_out + tl.arange(0, C).to(tl.int64)[:, None] * D


@triton.jit
def load_weights(w_rows, i, n0, R, end, D, BN: tl.constexpr, C: tl.constexpr):
    """Rows ``i C`` to ``(i + 1) C`` and columns ``n0`` to ``n0 + BN`` of the weights, zero outside of ``[R, end]``."""
    j = tl.arange(0, C)
    n = n0 + tl.arange(0, BN)
    inside = (i * C + j < R)[:, None] & (n < end)[None, :]
    return tl.load(w_rows + (i * C * tl.cast(D, tl.int64) + n)[None, :], mask=inside, other=0.0)


@triton.jit
def load_step(
    w_rows, base, z, t, n0, T, R, end, D, stride_base, stride_z,
    BT: tl.constexpr, BN: tl.constexpr, N: tl.constexpr, C: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """What a step of the expand reads beside c: base, z and, with WEIGHTS, the N chunks of the weights.

    No other program writes them, so they may be loaded before c is there: where ``out`` is ``base``, an element has
    the one program that reads it first.
    """
    tiles = (load_tile(base, t, n0, T, end, stride_base, BT, BN), load_tile(z, t, n0, T, end, stride_z, BT, BN))
    if WEIGHTS:
        for i in tl.static_range(N):
            tiles = tiles + (load_weights(w_rows, i, n0, R, end, D, BN, C),)
    return tiles


@triton.jit
def expand(
    cs, first, w_out, base, out, z, dsqnorm, t, begin, end, T, R, D, stride_base, stride_out, stride_z,
    BT: tl.constexpr, BN: tl.constexpr, N: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``out[t, begin:end] = base + c @ w_out [+ 2 dsqnorm z]``, rounded once.

    Loads are issued ahead of their step in one of three ways. By default the compiler prefetches the weights, which a
    product reads from shared memory, and the rest is loaded one step ahead by hand. With STAGES the compiler prefetches
    everything, so many steps deep. With ``first``, what :func:`load_step` gave for ``begin``, everything is loaded one
    step ahead by hand.
    """
    EARLY: tl.constexpr = first is not None
    rows = t.to(tl.int64)[:, None]
    w_rows = first_rows(w_out, D, C)
    scale = tl.zeros((BT,), tl.float32)
    if z is not None:
        scale = 2.0 * tl.load(dsqnorm + t, mask=t < T, other=0.0)
    tiles = first
    if STAGES is None and not EARLY:
        tiles = load_step(w_rows, base, z, t, begin, T, R, end, D, stride_base, stride_z, BT, BN, N, C, False)
    for n0 in tl.range(begin, end, BN, num_stages=STAGES):
        n = n0 + tl.arange(0, BN)
        if STAGES is not None:
            now = load_step(w_rows, base, z, t, n0, T, R, end, D, stride_base, stride_z, BT, BN, N, C, False)
        else:
            now = tiles
        if STAGES is None:
            tiles = load_step(w_rows, base, z, t, n0 + BN, T, R, end, D, stride_base, stride_z, BT, BN, N, C, EARLY)
        acc = tl.zeros((BT, BN), tl.float32)
        for i in tl.static_range(N):
            if EARLY:
                w_tile = now[2 + i]
            else:
                w_tile = load_weights(w_rows, i, n0, R, D, D, BN, C)
            acc = tl.dot(cs[i], w_tile, acc, input_precision=PRECISION)
        # Added last, or base would be what tensor cores cut off in every product. By fma: the compiler would move an
        # addition into the product.
        acc = tl.fma(acc, 1.0, now[0].to(tl.float32))
        if z is not None:
            acc = tl.fma(scale[:, None], now[1].to(tl.float32), acc)
        inside = (t < T)[:, None] & (n < D)[None, :]
        tl.store(out + rows * stride_out + n[None, :], acc.to(out.dtype.element_ty), mask=inside)
