"""Triton GEMMs of one decoding step, for many rows: paced by reading weights once.

Names and PDL as in `gemv`. A program has BLOCK_N outputs of a matrix and all rows; where outputs are too few
for all multiprocessors, SPLITS programs share them, each with some of the inputs, and the last one to end adds up what
the others have left, in their order, so that results are the same every time.

Weights are the left operand, outputs times inputs, and rows the right one: few rows then fill the matrix units.

Legend: M rows, D inputs of a product, N outputs.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error

from ...kernels.arithmetic import gelu
from .gemv import PTX, load_scale


# Four weights in float8 e4m3, in one register, as bfloat16 in two, exactly: their bits are a bfloat16's but for the
# exponent's bias, which 2^120 makes up for. GPUs convert from float16 a quarter as fast as they multiply. What is no
# number becomes 480: the scale of its row is no number then either.
FLOAT8_TO_BFLOAT16 = tl.constexpr(
    "{.reg .b32 a, b, m, z; mov.b32 m, 0x7B807B80; mov.b32 z, 0x80008000;"
    + "".join(
        f"prmt.b32 a, $2, 0, {two}; shr.b32 b, a, 4; and.b32 b, b, 0x07F007F0; and.b32 a, a, z; or.b32 a, a, b;"
        f"fma.rn.bf16x2 ${i}, a, m, z;"
        for i, two in enumerate(("0x1404", "0x3424"))
    )
    + "}"
)


@triton.jit
def _in_dtype(w, dtype: tl.constexpr):
    """Exact: of 8 bits, or as it is."""
    if PTX and w.dtype == tl.float8e4nv and dtype == tl.bfloat16:
        bits = w.to(tl.int8, bitcast=True)
        return tl.inline_asm_elementwise(
            FLOAT8_TO_BFLOAT16, "=&r,=&r,r", [bits], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        return w.to(dtype)


@triton.jit
def _load_tile(p_w, i_n, i_d, wanted, N, D: tl.constexpr, EVEN: tl.constexpr):
    """(BLOCK_N, BLOCK_D) of a matrix (N, D), or zeros. EVEN: all of i_n are outputs and all of i_d inputs."""
    p_tile = p_w + i_n[:, None].to(tl.int64) * D + i_d[None, :]
    if EVEN:
        return tl.load(p_tile, mask=wanted, other=0.0, eviction_policy="evict_first")
    return tl.load(
        p_tile, mask=wanted & (i_n < N)[:, None] & (i_d < D)[None, :], other=0.0, eviction_policy="evict_first"
    )


@triton.jit
def _prefetch_tile(p_w, i_n, i, end, N, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Asks for a tile, 128 bytes at a time, into the cache of all programs; nothing waits for it."""
    STEP: tl.constexpr = 1024 // p_w.dtype.element_ty.primitive_bitwidth
    i_d = i * BLOCK_D + tl.arange(0, (BLOCK_D + STEP - 1) // STEP) * STEP
    p_tile = p_w + i_n[:, None].to(tl.int64) * D + i_d[None, :]
    is_there = (i < end) & (i_n < N)[:, None] & (i_d < D)[None, :]
    p_tile = tl.where(is_there, p_tile, p_w + i_n[:, None] * 0).to(tl.uint64)
    prefetch: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"  # Triton wants a result
    tl.inline_asm_elementwise(prefetch, "=r,l", [p_tile], dtype=tl.uint32, is_pure=False, pack=1)


@triton.jit
def _sums(
    p_x, p_norm, p_w, p_residual, i_n, M, N, D: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """w (x (1 + norm))^T (BLOCK_N, BLOCK_M) and sums of x's squares (BLOCK_M,), for a split's inputs.

    Behind these the residual stream (BLOCK_M, BLOCK_N), asked for as soon as it may be read, or 0.

    p_w: of the matrix, or (BLOCK_N, 1) of each output's. i_n: the row of each output in it.

    The loop loads weights and x STAGES - 1 tiles ahead, and begins when the kernel that computes x has ended. Weights
    of the first STAGES tiles are asked for before that, into the cache.
    """
    TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    TURNS: tl.constexpr = (TILES + SPLITS - 1) // SPLITS
    i_split = tl.program_id(1)
    first, end = i_split * TILES // SPLITS, (i_split + 1) * TILES // SPLITS
    i_m = tl.arange(0, BLOCK_M)
    if PDL:
        for i_tile in tl.static_range(STAGES):
            _prefetch_tile(p_w, i_n, first + i_tile, end, N, D, BLOCK_D)
        tl.extra.cuda.gdc_wait()
    residual = 0.0
    if RESIDUAL:
        mask = (i_m < M)[:, None] & (i_n < N)[None, :]
        residual = tl.load(p_residual + i_m[:, None] * N + i_n[None, :], mask=mask, other=0.0)
    squares = tl.zeros((BLOCK_M, BLOCK_D // 8), tl.float32)  # eight of a thread at once, those of threads at the end
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for turn in tl.range(0, TURNS, num_stages=STAGES):
        wanted = first + turn < end
        i_d = (first + turn) * BLOCK_D + tl.arange(0, BLOCK_D)
        w = _load_tile(p_w, i_n, i_d, wanted, N, D, EVEN)
        m_x = (i_m < M)[:, None] & wanted
        if not EVEN:
            m_x = m_x & (i_d < D)[None, :]
        x = tl.load(p_x + i_m[:, None] * D + i_d[None, :], mask=m_x, other=0.0)
        if NORM:
            norm = tl.load(p_norm + i_d, mask=i_d < D, other=0.0)
            x32 = x.to(tl.float32)
            squares += tl.sum(tl.reshape(x32 * x32, (BLOCK_M, BLOCK_D // 8, 8)), 2)
            x = (x32 * (1.0 + norm.to(tl.float32))[None, :]).to(x.dtype)
        sums = tl.dot(_in_dtype(w, x.dtype), tl.trans(x), sums, input_precision="ieee")
    return sums, tl.sum(squares, 1), residual


@triton.jit
def _add_up(p_part, p_squares, p_count, sums, squares, SPLITS: tl.constexpr):
    """Leaves this split's sums; the last split of all returns those of all, in their order, and True."""
    BLOCK_N: tl.constexpr = sums.shape[0]
    BLOCK_M: tl.constexpr = sums.shape[1]
    SIZE: tl.constexpr = BLOCK_N * BLOCK_M
    i_split = tl.program_id(1)
    i = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    i_m = tl.arange(0, BLOCK_M)
    tl.store(p_part + i_split * SIZE + i, sums)
    tl.store(p_squares + i_split * BLOCK_M + i_m, squares)
    tl.debug_barrier()  # all threads have stored before one of them says so
    is_last = tl.atomic_add(p_count, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        tl.store(p_count, 0)  # for the next launch
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for split in tl.static_range(SPLITS):
            sums += tl.load(p_part + split * SIZE + i, cache_modifier=".cg")
            squares += tl.load(p_squares + split * BLOCK_M + i_m, cache_modifier=".cg")
    return sums, squares, is_last


@triton.jit
def _all_sums(
    p_x, p_norm, p_w, p_residual, p_part, p_squares, p_count, i_n, M, N, D: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `_sums` over all inputs; last, whether this program is the one that has them."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # it waits in turn for the end of this one and so of those before
    sums, squares, residual = _sums(
        p_x, p_norm, p_w, p_residual, i_n, M, N, D, NORM, RESIDUAL, EVEN, PDL, BLOCK_M, BLOCK_N, BLOCK_D, SPLITS, STAGES
    )
    is_last = True
    if SPLITS > 1:
        i_tile = tl.program_id(0)
        p_part += i_tile * (SPLITS * BLOCK_N * BLOCK_M)
        p_squares += i_tile * (SPLITS * BLOCK_M)
        sums, squares, is_last = _add_up(p_part, p_squares, p_count + i_tile, sums, squares, SPLITS)
    return sums, squares, residual, is_last


@triton.jit
def _load_bias(p_b, i_n, N, BIAS: tl.constexpr):
    """Asked for before the wait: from memory, behind the sums, it would hold up all kernels behind."""
    bias = 0.0
    if BIAS:
        bias = tl.load(p_b + i_n, mask=i_n < N, other=0.0).to(tl.float32)[:, None]
    return bias


@triton.jit
def _scaled(sums, squares, eps, scale, bias, D: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr):
    """(BLOCK_M, BLOCK_N), what the product's definition says."""
    y = sums
    if SCALED:
        y = y * scale[:, None]
    if NORM:
        y = y * tl.rsqrt(squares / D + eps)[None, :]
    return tl.trans(y + bias)


@triton.jit
def matmul_kernel(
    p_x, p_norm, p_w0, p_s0, p_b0, p_y0, p_w1, p_s1, p_b1, p_y1, p_w2, p_s2, p_b2, p_y2, p_residual, p_part, p_squares,
    p_count, eps, unit, M, N0, N1, N2, D: tl.constexpr, MATRICES: tl.constexpr, NORM: tl.constexpr,
    SCALED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = norm(x) w^T + b (+ residual) for one to three matrices w (N, D); x (M, D). Program: (outputs, split).

    SCALED as in `project_kernel`.
    """
    i_tile = tl.program_id(0)
    p_w, p_s, p_b, p_y, N = p_w0, p_s0, p_b0, p_y0, N0
    if MATRICES > 1:
        end0 = tl.cdiv(N0, BLOCK_N)
        end1 = end0 + tl.cdiv(N1, BLOCK_N)
        if i_tile >= end1:
            p_w, p_s, p_b, p_y, N, i_tile = p_w2, p_s2, p_b2, p_y2, N2, i_tile - end1
        elif i_tile >= end0:
            p_w, p_s, p_b, p_y, N, i_tile = p_w1, p_s1, p_b1, p_y1, N1, i_tile - end0
    i_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    scale, bias = load_scale(p_s, i_n, unit, N, SCALED), _load_bias(p_b, i_n, N, BIAS)
    sums, squares, residual, is_last = _all_sums(
        p_x, p_norm, p_w, p_residual, p_part, p_squares, p_count, i_n, M, N, D,
        NORM, RESIDUAL, EVEN, PDL, BLOCK_M, BLOCK_N, BLOCK_D, SPLITS, STAGES,
    )  # fmt: skip
    if is_last:
        y = _scaled(sums, squares, eps, scale, bias, D, NORM, SCALED)
        i_m = tl.arange(0, BLOCK_M)[:, None]
        i_y = i_m * N + i_n[None, :]
        mask = (i_m < M) & (i_n < N)[None, :]
        if RESIDUAL:
            y += residual.to(tl.float32)
        tl.store(p_y + i_y, y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def gated_matmul_kernel(
    p_x, p_norm, p_w_gate, p_s_gate, p_b_gate, p_w_up, p_s_up, p_b_up, p_y, p_part, p_squares, p_count, eps, unit, M, N,
    D: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = gelu(norm(x) w_gate^T + b_gate) * (norm(x) w_up^T + b_up); (M, D) -> (M, N). Program: (outputs, split).

    A tile has BLOCK_N rows of the gate's matrix and as many of the other: one product of twice the height.
    """
    i_row = tl.arange(0, 2 * BLOCK_N)
    # From one matrix to the other in steps of 16 bytes, so that rows are still read 16 bytes at a time.
    STEP: tl.constexpr = 128 // p_w_gate.dtype.element_ty.primitive_bitwidth
    apart = ((p_w_up.to(tl.int64) - p_w_gate.to(tl.int64)) // 16) * STEP
    p_w = p_w_gate + tl.where(i_row < BLOCK_N, 0, 1)[:, None] * apart
    i_both = tl.program_id(0) * BLOCK_N + i_row % BLOCK_N
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    s_gate, b_gate = load_scale(p_s_gate, i_n, unit, N, SCALED), _load_bias(p_b_gate, i_n, N, True)
    s_up, b_up = load_scale(p_s_up, i_n, unit, N, SCALED), _load_bias(p_b_up, i_n, N, True)
    sums, squares, _, is_last = _all_sums(
        p_x, p_norm, p_w, p_x, p_part, p_squares, p_count, i_both, M, N, D,
        True, False, EVEN, PDL, BLOCK_M, 2 * BLOCK_N, BLOCK_D, SPLITS, STAGES,
    )  # fmt: skip
    if is_last:
        sums_gate, sums_up = tl.split(tl.permute(tl.reshape(sums, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
        gate = _scaled(sums_gate, squares, eps, s_gate, b_gate, D, True, SCALED)
        y = gelu(gate) * _scaled(sums_up, squares, eps, s_up, b_up, D, True, SCALED)
        i_m = tl.arange(0, BLOCK_M)[:, None]
        tl.store(p_y + i_m * N + i_n[None, :], y.to(p_y.dtype.element_ty), mask=(i_m < M) & (i_n < N)[None, :])
