"""Triton GEMVs over weights of 4 bits (NF4 of QLoRA, Dettmers et al. 2023), read as bitsandbytes has packed them.

Names and PDL as in `gemv`. A byte holds two weights of a row, the first in its upper half, so that a tile of bytes
meets the even inputs and the odd ones. 64 weights share a scale; with NESTED the scales are bytes themselves.

Legend: D inputs of a product, N outputs, G groups of 64 weights in a tile.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error

from ...kernels.arithmetic import gelu
from .gemv import wait_for_the_kernel_before


HALF = tl.constexpr(32)  # bytes that share a scale
NESTED_BLOCK = tl.constexpr(256)  # scales that share theirs


@triton.jit
def _load_bytes(p_w, i_n, start: tl.constexpr, N, D: tl.constexpr, EVEN: tl.constexpr, G: tl.constexpr):
    """(BLOCK_N, G, 32) of the weights from input `start` on, read once and not kept."""
    i_g = start // (2 * HALF) + tl.arange(0, G)
    i_byte = i_g[:, None] * HALF + tl.arange(0, HALF)[None, :]
    p_tile = p_w + i_n[:, None, None].to(tl.int64) * (D // 2) + i_byte[None, :, :]
    if EVEN:
        if start + 2 * HALF * G <= D:
            return tl.load(p_tile, eviction_policy="evict_first")
    mask = (i_n < N)[:, None, None] & (i_byte * 2 < D)[None, :, :]
    return tl.load(p_tile, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _load_scales(
    p_s, p_nested_code, p_nested_scale, p_offset, i_n, i_g, N, D: tl.constexpr, NESTED: tl.constexpr
):  # fmt: skip
    """(BLOCK_N, G) float32 of groups i_g; 0 beyond the weights."""
    i_s = i_n[:, None].to(tl.int64) * (D // (2 * HALF)) + i_g[None, :]
    mask = (i_n < N)[:, None] & (i_g * 2 * HALF < D)[None, :]
    scale = tl.load(p_s + i_s, mask=mask, other=0)
    if NESTED:
        code = tl.load(p_nested_code + scale.to(tl.int32))
        shared = tl.load(p_nested_scale + i_s // NESTED_BLOCK, mask=mask, other=0.0)
        scale = tl.where(mask, code * shared + tl.load(p_offset), 0.0)
    return scale


@triton.jit
def _load_many(
    matrices, i_n, start: tl.constexpr, N, D: tl.constexpr, MATRICES: tl.constexpr, NESTED: tl.constexpr,
    EVEN: tl.constexpr, G: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """As `_load_weights` of `gemv`: of each tile its bytes and their scales."""
    tiles = ()
    for i_tile in tl.static_range(AHEAD):
        if start + i_tile * 2 * HALF * G < D:
            i_g = start // (2 * HALF) + i_tile * G + tl.arange(0, G)
            for matrix in tl.static_range(MATRICES):
                packed = _load_bytes(matrices[5 * matrix], i_n, start + i_tile * 2 * HALF * G, N, D, EVEN, G)
                scale = _load_scales(
                    matrices[5 * matrix + 1], matrices[5 * matrix + 2], matrices[5 * matrix + 3],
                    matrices[5 * matrix + 4], i_n, i_g, N, D, NESTED,
                )  # fmt: skip
                tiles = tiles + (packed, scale)
    return tiles


@triton.jit
def _load_inputs(p_x, start: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """Even and odd inputs from `start` on, (G, 32) each, float32."""
    i_d = start + 2 * (tl.arange(0, G)[:, None] * HALF + tl.arange(0, HALF)[None, :])
    even = tl.load(p_x + i_d, mask=i_d < D, other=0.0, eviction_policy="evict_last").to(tl.float32)
    odd = tl.load(p_x + i_d + 1, mask=i_d + 1 < D, other=0.0, eviction_policy="evict_last").to(tl.float32)
    return even, odd


@triton.jit
def _products(
    p_x, p_norm, p_code, matrices, i_n, eps, N, D: tl.constexpr, ROWS: tl.constexpr, MATRICES: tl.constexpr,
    NORM: tl.constexpr, NESTED: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr,
    G: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """As `_products` of `gemv`. matrices: weights, scales, and three of the scales' own, of each matrix."""
    TILE: tl.constexpr = 2 * HALF * G
    tiles = _load_many(matrices, i_n, 0, N, D, MATRICES, NESTED, EVEN, G, AHEAD)
    wait_for_the_kernel_before(PDL)
    sums = ()
    squares = ()
    for _ in tl.static_range(ROWS):
        squares = squares + (tl.zeros((G, HALF), tl.float32),)
        for _ in tl.static_range(MATRICES):
            sums = sums + (tl.zeros((BLOCK_N, G, HALF), tl.float32),)
    for start in tl.static_range(0, D, AHEAD * TILE):
        for i_tile in tl.static_range(AHEAD):
            if start + i_tile * TILE < D:
                norm_even = tl.zeros((G, HALF), tl.float32)
                norm_odd = tl.zeros((G, HALF), tl.float32)
                if NORM:
                    norm_even, norm_odd = _load_inputs(p_norm, start + i_tile * TILE, D, G)
                evens = ()
                odds = ()
                new_squares = ()
                for row in tl.static_range(ROWS):
                    even, odd = _load_inputs(p_x + row * D, start + i_tile * TILE, D, G)
                    if NORM:
                        new_squares = new_squares + (squares[row] + even * even + odd * odd,)
                        even = even * (1.0 + norm_even)
                        odd = odd * (1.0 + norm_odd)
                    else:
                        new_squares = new_squares + (squares[row],)
                    evens = evens + (even,)
                    odds = odds + (odd,)
                squares = new_squares
                ws = ()
                for matrix in tl.static_range(MATRICES):
                    packed = tiles[2 * (i_tile * MATRICES + matrix)].to(tl.int32)
                    scale = tiles[2 * (i_tile * MATRICES + matrix) + 1][:, :, None]
                    ws = ws + (tl.load(p_code + (packed >> 4)) * scale, tl.load(p_code + (packed & 15)) * scale)
                new_sums = ()
                for row in tl.static_range(ROWS):
                    for matrix in tl.static_range(MATRICES):
                        part = ws[2 * matrix] * evens[row][None, :, :] + ws[2 * matrix + 1] * odds[row][None, :, :]
                        new_sums = new_sums + (sums[row * MATRICES + matrix] + part,)
                sums = new_sums
        if start + AHEAD * TILE < D:
            tiles = _load_many(matrices, i_n, start + AHEAD * TILE, N, D, MATRICES, NESTED, EVEN, G, AHEAD)
    results = ()
    for row in tl.static_range(ROWS):
        scale = 1.0
        if NORM:
            scale = tl.rsqrt(tl.sum(tl.sum(squares[row], 1), 0) / D + eps)
        for matrix in tl.static_range(MATRICES):
            results = results + (tl.sum(tl.sum(sums[row * MATRICES + matrix], 2), 1) * scale,)
    return results


@triton.jit
def nf4_project_kernel(
    p_x, p_norm, p_code, p_w, p_s, p_nested_code, p_nested_scale, p_offset, p_b, p_residual, p_y, eps, N,
    D: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, G: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """y = norm(x) w^T + b (+ residual) for a matrix w (N, D); x (ROWS, D). Program: BLOCK_N outputs."""
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = i_n < N
    b = tl.zeros((BLOCK_N,), tl.float32)
    if BIAS:
        b = tl.load(p_b + i_n, mask=m_n, other=0.0).to(tl.float32)
    matrix = (p_w, p_s, p_nested_code, p_nested_scale, p_offset)
    ys = _products(p_x, p_norm, p_code, matrix, i_n, eps, N, D, ROWS, 1, NORM, NESTED, EVEN, PDL, BLOCK_N, G, AHEAD)
    for row in tl.static_range(ROWS):
        y = ys[row] + b
        if RESIDUAL:
            y += tl.load(p_residual + row * N + i_n, mask=m_n, other=0.0).to(tl.float32)
        tl.store(p_y + row * N + i_n, y.to(p_y.dtype.element_ty), mask=m_n)


@triton.jit
def nf4_gated_project_kernel(
    p_x, p_norm, p_code, p_w_gate, p_s_gate, p_nested_code_gate, p_nested_scale_gate, p_offset_gate, p_b_gate,
    p_w_up, p_s_up, p_nested_code_up, p_nested_scale_up, p_offset_up, p_b_up, p_y, eps, N, D: tl.constexpr,
    ROWS: tl.constexpr, NESTED: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr,
    G: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y = gelu(norm(x) w_gate^T + b_gate) * (norm(x) w_up^T + b_up); x (ROWS, D) -> y (ROWS, N)."""
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = i_n < N
    b_gate = tl.load(p_b_gate + i_n, mask=m_n, other=0.0).to(tl.float32)
    b_up = tl.load(p_b_up + i_n, mask=m_n, other=0.0).to(tl.float32)
    both = (
        p_w_gate, p_s_gate, p_nested_code_gate, p_nested_scale_gate, p_offset_gate,
        p_w_up, p_s_up, p_nested_code_up, p_nested_scale_up, p_offset_up,
    )  # fmt: skip
    ys = _products(p_x, p_norm, p_code, both, i_n, eps, N, D, ROWS, 2, True, NESTED, EVEN, PDL, BLOCK_N, G, AHEAD)
    for row in tl.static_range(ROWS):
        y = gelu(ys[2 * row] + b_gate) * (ys[2 * row + 1] + b_up)
        tl.store(p_y + row * N + i_n, y.to(p_y.dtype.element_ty), mask=m_n)


@triton.jit
def nf4_dequantise_kernel(
    p_code, p_w, p_s, p_nested_code, p_nested_scale, p_offset, p_y, N, D: tl.constexpr, NESTED: tl.constexpr,
    BLOCK_N: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """y (N, D): what the weights are. Program: BLOCK_N outputs, 64 * G inputs."""
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_g = tl.program_id(1) * G + tl.arange(0, G)
    i_byte = i_g[:, None] * HALF + tl.arange(0, HALF)[None, :]
    mask = (i_n < N)[:, None] & (i_g * 2 * HALF < D)[None, :]
    scale = _load_scales(p_s, p_nested_code, p_nested_scale, p_offset, i_n, i_g, N, D, NESTED)
    i_w = i_n[:, None, None].to(tl.int64) * (D // 2) + i_byte[None, :, :]
    packed = tl.load(p_w + i_w, mask=mask[:, :, None], other=0).to(tl.int32)
    even = tl.load(p_code + (packed >> 4)) * scale[:, :, None]
    odd = tl.load(p_code + (packed & 15)) * scale[:, :, None]
    tl.store(p_y + 2 * i_w, even.to(p_y.dtype.element_ty), mask=mask[:, :, None])
    tl.store(p_y + 2 * i_w + 1, odd.to(p_y.dtype.element_ty), mask=mask[:, :, None])
