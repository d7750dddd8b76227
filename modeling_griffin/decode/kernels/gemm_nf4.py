"""Triton GEMMs over weights of 4 bits (NF4), for many rows: as `gemm`, but a tile of weights becomes numbers first.

What meets the rows is what bitsandbytes dequantises to: code times scale in float32, rounded to the rows' dtype.
A byte holds an even input and the odd one behind it: a tile of bytes is two products, for which x is split, or one,
for which they are joined. Of 64 rows gate and up are faster by two, the others by one.

Names and PDL as in `gemv`. Legend: M rows, D inputs of a product, N outputs, G groups of 64 inputs in a tile.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error

from ...kernels.arithmetic import gelu
from .gemm import _add_up, _load_bias, _prefetch_tile, _scaled
from .gemv import PTX


GROUP = tl.constexpr(64)  # weights that share a scale
NESTED_BLOCK = tl.constexpr(256)  # scales that share theirs
# Thread l of each 16 keeps number l of the code, and a shuffle fetches the one that the last four bits ask for.
OWN = tl.constexpr(
    "{.reg .b32 a; .reg .b64 p; mov.u32 a, %laneid; and.b32 a, a, 15; mul.wide.u32 p, a, 4; add.u64 p, p, $1;"
    "ld.global.f32 $0, [p];}"
)
LOOK_UP = tl.constexpr("shfl.sync.idx.b32 $0, $2, $1, 0x101f, 0xffffffff;")


@triton.jit
def _own_of_code(p_code):
    """Each thread's number of the code; in the interpreter none."""
    if PTX:
        return tl.inline_asm_elementwise(OWN, "=f,l", [p_code.to(tl.int64)], dtype=tl.float32, is_pure=False, pack=1)
    else:
        return 0.0


@triton.jit
def _look_up(p_code, own, index):
    """The code at the last four bits of index."""
    if PTX:
        return tl.inline_asm_elementwise(LOOK_UP, "=f,r,f", [index, own], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.load(p_code + (index & 15))


@triton.jit
def _load_stored(p_s, i_n, i, N, D: tl.constexpr, G: tl.constexpr):
    """Scales (BLOCK_N, G) of tile i as they are stored. p_s (BLOCK_N, 1): where each output's begin."""
    i_g = i * G + tl.arange(0, G)
    return tl.load(p_s + i_g[None, :], mask=(i_n < N)[:, None] & (i_g < D // GROUP)[None, :], other=0)


@triton.jit
def _finish(stored, p_nested_code, p_nested_scale, p_offset, i_n, i, N, D: tl.constexpr, NESTED: tl.constexpr):
    """float32 of stored scales (BLOCK_N, G) of tile i. Pointers (BLOCK_N,)."""
    if NESTED:
        G: tl.constexpr = stored.shape[1]
        i_g = i * G + tl.arange(0, G)
        mask = (i_n < N)[:, None] & (i_g < D // GROUP)[None, :]
        i_s = i_n[:, None].to(tl.int64) * (D // GROUP) + i_g[None, :]
        shared = tl.load(p_nested_scale[:, None] + i_s // NESTED_BLOCK, mask=mask, other=0.0)
        return tl.load(p_nested_code[:, None] + stored.to(tl.int32)) * shared + tl.load(p_offset)[:, None]
    else:
        return stored


@triton.jit
def _load_bytes(p_w, i_n, i, wanted, N, D: tl.constexpr, EVEN: tl.constexpr, HALF: tl.constexpr):
    i_byte = i * HALF + tl.arange(0, HALF)
    p_tile = p_w + i_n[:, None].to(tl.int64) * (D // 2) + i_byte[None, :]
    mask = wanted
    if not EVEN:
        mask = wanted & (i_n < N)[:, None] & (i_byte < D // 2)[None, :]
    return tl.load(p_tile, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _all_sums(
    p_x, p_norm, p_code, p_w, p_s, p_nested_code, p_nested_scale, p_offset, p_part, p_squares, p_count, i_n, M, N,
    D: tl.constexpr, NORM: tl.constexpr, NESTED: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    IN_TWO: tl.constexpr,
):  # fmt: skip
    """As `_all_sums` of `gemm`. p_w (BLOCK_N, 1) of each output's matrix, and p_s to p_offset (BLOCK_N,). IN_TWO:
    whether a tile is two products.

    Scales are loaded one turn ahead, and with NESTED two, and one what they mean: asynchronous copies take no bytes.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    HALF: tl.constexpr = BLOCK_D // 2
    G: tl.constexpr = BLOCK_D // GROUP
    TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    TURNS: tl.constexpr = (TILES + SPLITS - 1) // SPLITS
    i_split = tl.program_id(1)
    first, end = i_split * TILES // SPLITS, (i_split + 1) * TILES // SPLITS
    i_m = tl.arange(0, BLOCK_M)
    p_scales = (p_s + i_n.to(tl.int64) * (D // GROUP))[:, None]
    if PDL:
        for i_tile in tl.static_range(STAGES):
            _prefetch_tile(p_w, i_n, first + i_tile, end, N, D // 2, HALF)
    own = _own_of_code(p_code)
    stored = _load_stored(p_scales, i_n, first, N, D, G)
    scale = _finish(stored, p_nested_code, p_nested_scale, p_offset, i_n, first, N, D, NESTED)
    if NESTED:
        stored = _load_stored(p_scales, i_n, first + 1, N, D, G)
    if PDL:
        tl.extra.cuda.gdc_wait()
    SWAP: tl.constexpr = BLOCK_M >= 64 and not NORM  # the rows as left operand: as numbers, weights are there for both
    squares = tl.zeros((BLOCK_M, BLOCK_D // 8), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_N) if SWAP else (BLOCK_N, BLOCK_M), tl.float32)
    for turn in tl.range(0, TURNS, num_stages=STAGES):
        i = first + turn
        wanted = i < end
        i_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
        packed = _load_bytes(p_w, i_n, i, wanted, N, D, EVEN, HALF).to(tl.int32)
        m_x = (i_m < M)[:, None] & wanted
        if not EVEN:
            m_x = m_x & (i_d < D)[None, :]
        x = tl.load(p_x + i_m[:, None] * D + i_d[None, :], mask=m_x, other=0.0)
        if NORM:
            norm = tl.load(p_norm + i_d, mask=i_d < D, other=0.0)
            x32 = x.to(tl.float32)
            squares += tl.sum(tl.reshape(x32 * x32, (BLOCK_M, BLOCK_D // 8, 8)), 2)
            x = (x32 * (1.0 + norm.to(tl.float32))[None, :]).to(x.dtype)
        each = tl.reshape(tl.broadcast_to(scale[:, :, None], (BLOCK_N, G, GROUP // 2)), (BLOCK_N, HALF))
        even = (_look_up(p_code, own, packed >> 4) * each).to(x.dtype)
        odd = (_look_up(p_code, own, packed) * each).to(x.dtype)
        if IN_TWO:
            x_even, x_odd = tl.split(tl.reshape(x, (BLOCK_M, HALF, 2)))
            sums = tl.dot(even, tl.trans(x_even), sums, input_precision="ieee")
            sums = tl.dot(odd, tl.trans(x_odd), sums, input_precision="ieee")
        else:
            w = tl.reshape(tl.join(even, odd), (BLOCK_N, BLOCK_D))
            if SWAP:
                sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
            else:
                sums = tl.dot(w, tl.trans(x), sums, input_precision="ieee")
        if NESTED:
            scale = _finish(stored, p_nested_code, p_nested_scale, p_offset, i_n, i + 1, N, D, NESTED)
            stored = _load_stored(p_scales, i_n, i + 2, N, D, G)
        else:
            scale = _load_stored(p_scales, i_n, i + 1, N, D, G)
    squares = tl.sum(squares, 1)
    if SWAP:
        sums = tl.trans(sums)
    is_last = True
    if SPLITS > 1:
        i_tile = tl.program_id(0)
        p_part += i_tile * (SPLITS * BLOCK_N * BLOCK_M)
        p_squares += i_tile * (SPLITS * BLOCK_M)
        sums, squares, is_last = _add_up(p_part, p_squares, p_count + i_tile, sums, squares, SPLITS)
    return sums, squares, is_last


@triton.jit
def nf4_matmul_kernel(
    p_x, p_norm, p_code, p_w0, p_s0, p_c0, p_n0, p_o0, p_b0, p_y0, p_w1, p_s1, p_c1, p_n1, p_o1, p_b1, p_y1,
    p_w2, p_s2, p_c2, p_n2, p_o2, p_b2, p_y2, p_residual, p_part, p_squares, p_count, eps, M, N0, N1, N2,
    D: tl.constexpr, MATRICES: tl.constexpr, NORM: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = norm(x) w^T + b (+ residual) for one to three matrices w (N, D); x (M, D). Program: (outputs, split).

    Of each matrix: weights, their scales, and what these mean, as in `nf4_matvec_kernel`.
    """
    i_tile = tl.program_id(0)
    p_w, p_s, p_c, p_n, p_o, p_b, p_y, N = p_w0, p_s0, p_c0, p_n0, p_o0, p_b0, p_y0, N0
    if MATRICES > 1:
        end0 = tl.cdiv(N0, BLOCK_N)
        end1 = end0 + tl.cdiv(N1, BLOCK_N)
        if i_tile >= end1:
            p_w, p_s, p_c, p_n, p_o, p_b, p_y, N, i_tile = p_w2, p_s2, p_c2, p_n2, p_o2, p_b2, p_y2, N2, i_tile - end1
        elif i_tile >= end0:
            p_w, p_s, p_c, p_n, p_o, p_b, p_y, N, i_tile = p_w1, p_s1, p_c1, p_n1, p_o1, p_b1, p_y1, N1, i_tile - end0
    i_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = _load_bias(p_b, i_n, N, BIAS)
    none = tl.zeros((BLOCK_N,), tl.int32)
    sums, squares, is_last = _all_sums(
        p_x, p_norm, p_code, p_w, p_s + none, p_c + none, p_n + none, p_o + none, p_part, p_squares, p_count, i_n, M, N,
        D, NORM, NESTED, EVEN, PDL, BLOCK_M, BLOCK_N, BLOCK_D, SPLITS, STAGES, False,
    )  # fmt: skip
    if is_last:
        y = _scaled(sums, squares, eps, 1.0, bias, D, NORM, False)
        i_m = tl.arange(0, BLOCK_M)[:, None]
        i_y = i_m * N + i_n[None, :]
        mask = (i_m < M) & (i_n < N)[None, :]
        if RESIDUAL:
            y += tl.load(p_residual + i_y, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_y + i_y, y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def _of_both(p_first, p_second, is_second, BYTES: tl.constexpr):
    """A pointer for each output. Both begin at multiples of BYTES: so much is still read at a time."""
    STEP: tl.constexpr = 8 * BYTES // p_first.dtype.element_ty.primitive_bitwidth
    return p_first + is_second * ((p_second.to(tl.int64) - p_first.to(tl.int64)) // BYTES) * STEP


@triton.jit
def nf4_gated_matmul_kernel(
    p_x, p_norm, p_code, p_w_gate, p_s_gate, p_c_gate, p_n_gate, p_o_gate, p_b_gate,
    p_w_up, p_s_up, p_c_up, p_n_up, p_o_up, p_b_up, p_y, p_part, p_squares, p_count, eps, M, N, D: tl.constexpr,
    NESTED: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `gated_matmul_kernel`."""
    i_row = tl.arange(0, 2 * BLOCK_N)
    is_up = tl.where(i_row < BLOCK_N, 0, 1)
    SCALE: tl.constexpr = p_s_gate.dtype.element_ty.primitive_bitwidth // 8
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_gate, b_up = _load_bias(p_b_gate, i_n, N, True), _load_bias(p_b_up, i_n, N, True)
    sums, squares, is_last = _all_sums(
        p_x, p_norm, p_code, _of_both(p_w_gate, p_w_up, is_up[:, None], 16),
        _of_both(p_s_gate, p_s_up, is_up, SCALE), _of_both(p_c_gate, p_c_up, is_up, 4),
        _of_both(p_n_gate, p_n_up, is_up, 4), _of_both(p_o_gate, p_o_up, is_up, 4),
        p_part, p_squares, p_count, tl.program_id(0) * BLOCK_N + i_row % BLOCK_N, M, N,
        D, True, NESTED, EVEN, PDL, BLOCK_M, 2 * BLOCK_N, BLOCK_D, SPLITS, STAGES, True,
    )  # fmt: skip
    if is_last:
        sums_gate, sums_up = tl.split(tl.permute(tl.reshape(sums, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
        gate = _scaled(sums_gate, squares, eps, 1.0, b_gate, D, True, False)
        y = gelu(gate) * _scaled(sums_up, squares, eps, 1.0, b_up, D, True, False)
        i_m = tl.arange(0, BLOCK_M)[:, None]
        tl.store(p_y + i_m * N + i_n[None, :], y.to(p_y.dtype.element_ty), mask=(i_m < M) & (i_n < N)[None, :])
