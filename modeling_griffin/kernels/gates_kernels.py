"""The two Triton kernels of `gates`: both gates' products of one block, and the way back to their input.

A program has ROWS rows of one gate block, whose WIDTH channels need not be a power of two: its columns are FIRST, a
power of two, and REST, the power of two that covers what remains, or 0. The sum runs over DEPTH channels at a time, in
float32; where powers of two reach past the block, loads give zeros and nothing is stored.

Legend: p_ pointer, m_ mask, M all rows, N gate blocks, n the block, k channels summed over, j channels of the result.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error

from .arithmetic import dot


SIZES = ["M", "N"]  # compile once, whatever these are


@triton.jit
def _load(p, i, j, stride_i, stride_j, size_i, size_j):
    """The matrix at rows i and columns j, with zeros outside of its sizes."""
    mask = (i < size_i)[:, None] & (j < size_j)[None, :]
    return tl.load(p + i[:, None] * stride_i + j[None, :] * stride_j, mask=mask, other=0.0)


@triton.jit
def _store(p, total, i, j, stride_i, size_i, size_j):
    mask = (i < size_i)[:, None] & (j < size_j)[None, :]
    tl.store(p + i[:, None] * stride_i + j[None, :], total.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _load_row(p, j, size):
    return tl.load(p + j, mask=j < size, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    p_x,  # (M, N * WIDTH)
    p_weight_r,  # (N, WIDTH, WIDTH), the input axis first
    p_bias_r,  # (N, WIDTH)
    p_weight_i,
    p_bias_i,
    p_r,  # (M, N * WIDTH)
    p_i,
    M,
    N,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x W + b of one gate. The other gate's program is the next one, and finds x in the cache."""
    program = tl.program_id(0)
    n, tile = program // 2 % N, program // 2 // N
    is_r = program % 2 == 0
    p_weight = tl.where(is_r, p_weight_r, p_weight_i) + n * (WIDTH * WIDTH)
    p_bias = tl.where(is_r, p_bias_r, p_bias_i) + n * WIDTH
    corner = tile.to(tl.int64) * (ROWS * WIDTH) * N + n * WIDTH
    p_x, p_y = p_x + corner, tl.where(is_r, p_r, p_i) + corner
    row, rows = tl.arange(0, ROWS), M - tile * ROWS

    j = tl.arange(0, FIRST)
    first = tl.zeros((ROWS, FIRST), tl.float32)
    if REST:
        j_rest = FIRST + tl.arange(0, REST)
        rest = tl.zeros((ROWS, REST), tl.float32)
    for start in range(0, WIDTH, DEPTH):
        k = start + tl.arange(0, DEPTH)
        x = _load(p_x, row, k, N * WIDTH, 1, rows, WIDTH)
        first = dot(x, _load(p_weight, k, j, WIDTH, 1, WIDTH, WIDTH), first)
        if REST:
            rest = dot(x, _load(p_weight, k, j_rest, WIDTH, 1, WIDTH, WIDTH), rest)
    _store(p_y, first + _load_row(p_bias, j, WIDTH), row, j, N * WIDTH, rows, WIDTH)
    if REST:
        _store(p_y, rest + _load_row(p_bias, j_rest, WIDTH), row, j_rest, N * WIDTH, rows, WIDTH)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    p_d_r,  # (M, N * WIDTH)
    p_d_i,
    p_d_same,  # what d_x begins with, or None
    p_weight_r,
    p_weight_i,
    p_d_x,  # (M, N * WIDTH)
    p_d_bias,  # (tiles, 2, N * WIDTH) float32: the sums over each tile's rows
    M,
    N,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """d_x of both gates and of all else that reads x as one sum, and the biases' gradients of these rows."""
    program = tl.program_id(0)
    n, tile = program % N, program // N
    p_weight_r, p_weight_i = p_weight_r + n * (WIDTH * WIDTH), p_weight_i + n * (WIDTH * WIDTH)
    corner = tile.to(tl.int64) * (ROWS * WIDTH) * N + n * WIDTH
    p_d_r, p_d_i, p_d_x = p_d_r + corner, p_d_i + corner, p_d_x + corner
    if p_d_same is not None:
        p_d_same += corner
    p_d_bias_r = p_d_bias + tile.to(tl.int64) * (2 * WIDTH) * N + n * WIDTH
    p_d_bias_i = p_d_bias_r + N * WIDTH
    row, rows = tl.arange(0, ROWS), M - tile * ROWS

    j = tl.arange(0, FIRST)
    first = tl.zeros((ROWS, FIRST), tl.float32)
    if REST:
        j_rest = FIRST + tl.arange(0, REST)
        rest = tl.zeros((ROWS, REST), tl.float32)
    for start in range(0, WIDTH, DEPTH):
        k = start + tl.arange(0, DEPTH)
        d_r = _load(p_d_r, row, k, N * WIDTH, 1, rows, WIDTH)
        d_i = _load(p_d_i, row, k, N * WIDTH, 1, rows, WIDTH)
        first = dot(d_r, _load(p_weight_r, k, j, 1, WIDTH, WIDTH, WIDTH), first)
        first = dot(d_i, _load(p_weight_i, k, j, 1, WIDTH, WIDTH, WIDTH), first)
        if REST:
            rest = dot(d_r, _load(p_weight_r, k, j_rest, 1, WIDTH, WIDTH, WIDTH), rest)
            rest = dot(d_i, _load(p_weight_i, k, j_rest, 1, WIDTH, WIDTH, WIDTH), rest)
        tl.store(p_d_bias_r + k, tl.sum(d_r.to(tl.float32), 0), mask=k < WIDTH)
        tl.store(p_d_bias_i + k, tl.sum(d_i.to(tl.float32), 0), mask=k < WIDTH)
    if p_d_same is not None:
        first += _load(p_d_same, row, j, N * WIDTH, 1, rows, WIDTH).to(tl.float32)
        if REST:
            rest += _load(p_d_same, row, j_rest, N * WIDTH, 1, rows, WIDTH).to(tl.float32)
    _store(p_d_x, first, row, j, N * WIDTH, rows, WIDTH)
    if REST:
        _store(p_d_x, rest, row, j_rest, N * WIDTH, rows, WIDTH)
