"""Triton GEMVs of one decoding step and what stands around them, at the speed at which weights are read.

Names: p_ pointer, i_ index, m_ mask. Sums are float32; what is stored has the dtype of its tensor. A tensor's time is
read from the device, so that a recorded CUDA graph can be replayed: the same launch serves every step.

PDL: a kernel may start while the one before it ends (programmatic dependent launch, compute capability 9).

Legend: B rows, D inputs of a product, N outputs, R rotated dimensions, V vocabulary.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error

from ...kernels.arithmetic import gelu


PTX = tl.constexpr(not triton.knobs.runtime.interpret)  # in Triton's interpreter there is no assembly
# Four whole numbers of 8 bits as the last bits of 2^23 + 128 + w, from which the rest is taken: exact. GPUs convert
# four times as slowly as they add.
TO_FLOAT32 = tl.constexpr(
    "{.reg .b32 a; xor.b32 a, $4, 0x80808080;"
    + "".join(f"prmt.b32 ${i}, a, 0x4B000000, 0x744{i}; add.f32 ${i}, ${i}, 0fCB000080;" for i in range(4))
    + "}"
)


@triton.jit
def wait_for_the_kernel_before(PDL: tl.constexpr):
    """Before this line a kernel reads only weights and what earlier steps have left, and writes nothing.

    The next kernel may start as soon as all programs of this one have come here, and then waits in turn for its end:
    its weights are on their way all through this kernel, even while this one still waits itself.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _load_weight(p_w, i_n, start: tl.constexpr, N, D: tl.constexpr, EVEN: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_N, BLOCK_D), read once and not kept: it would push what the next kernel needs out of the cache."""
    i_d = start + tl.arange(0, BLOCK_D)
    p_tile = p_w + i_n[:, None].to(tl.int64) * D + i_d[None, :]
    if EVEN:
        if start + BLOCK_D <= D:
            return tl.load(p_tile, eviction_policy="evict_first")
    return tl.load(p_tile, mask=(i_n < N)[:, None] & (i_d < D)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_weights(
    p_ws, i_n, start: tl.constexpr, N, D: tl.constexpr, MATRICES: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """AHEAD tiles of each matrix from input `start` on, as they are stored: nothing waits for them yet."""
    tiles = ()
    for i_tile in tl.static_range(AHEAD):
        if start + i_tile * BLOCK_D < D:
            for matrix in tl.static_range(MATRICES):
                tiles = tiles + (_load_weight(p_ws[matrix], i_n, start + i_tile * BLOCK_D, N, D, EVEN, BLOCK_D),)
    return tiles


@triton.jit
def _load_norms(
    p_norm, start: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr
):
    """The norm's weights in front of as many tiles."""
    norms = ()
    for i_tile in tl.static_range(AHEAD):
        if NORM and start + i_tile * BLOCK_D < D:
            i_d = start + i_tile * BLOCK_D + tl.arange(0, BLOCK_D)
            norms = norms + (tl.load(p_norm + i_d, mask=i_d < D, other=0.0, eviction_policy="evict_last"),)
    return norms


@triton.jit
def load_scale(p_s, i_n, unit, N, SCALED: tl.constexpr):
    """Of each output's weights, which are whole numbers or float8; 1 for those that are what they mean."""
    scale = 1.0
    if SCALED:
        scale = tl.load(p_s + i_n, mask=i_n < N, other=0.0).to(tl.float32) * unit
    return scale


@triton.jit
def _as_float32(w):
    if PTX and w.dtype == tl.int8:
        return tl.inline_asm_elementwise(
            TO_FLOAT32, "=&f,=&f,=&f,=&f,r", [w], dtype=tl.float32, is_pure=True, pack=4
        )  # fmt: skip
    else:
        return w.to(tl.float32)


@triton.jit
def _load_row(p_x, i_d, D: tl.constexpr):
    return tl.load(p_x + i_d, mask=i_d < D, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def _products(
    p_x, p_norm, p_ws, p_residual, i_n, eps, N, D: tl.constexpr, ROWS: tl.constexpr, MATRICES: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """norm(x) w^T for outputs i_n of each matrix: a tuple of ROWS * MATRICES tensors (BLOCK_N,), float32.

    EVEN: all of i_n are outputs. RESIDUAL: of each row those of the residual stream follow, as they are stored.

    Weights are asked for before anything else is done, even before the kernel that computes x has ended: how many are
    on their way at a time is what decides the speed. The norm costs no pass of its own, its scale is one number a row.
    What comes from memory late would hold up all kernels behind: so the norm is asked for with the weights, and the
    residual stream as soon as it may be read.
    """
    tiles = _load_weights(p_ws, i_n, 0, N, D, MATRICES, EVEN, BLOCK_D, AHEAD)
    norms = _load_norms(p_norm, 0, D, NORM, BLOCK_D, AHEAD)
    wait_for_the_kernel_before(PDL)
    residuals = ()
    if RESIDUAL:
        for row in tl.static_range(ROWS):
            residuals = residuals + (tl.load(p_residual + row * N + i_n, mask=i_n < N, other=0.0),)
    sums = ()
    squares = ()
    for _ in tl.static_range(ROWS):
        squares = squares + (tl.zeros((BLOCK_D,), tl.float32),)
        for _ in tl.static_range(MATRICES):
            sums = sums + (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
    for start in tl.static_range(0, D, AHEAD * BLOCK_D):
        for i_tile in tl.static_range(AHEAD):
            if start + i_tile * BLOCK_D < D:
                i_d = start + i_tile * BLOCK_D + tl.arange(0, BLOCK_D)
                scale = tl.zeros((BLOCK_D,), tl.float32)
                if NORM:
                    scale = 1.0 + norms[i_tile].to(tl.float32)
                new_sums = ()
                new_squares = ()
                for row in tl.static_range(ROWS):
                    x = _load_row(p_x + row * D, i_d, D)
                    if NORM:
                        new_squares = new_squares + (squares[row] + x * x,)
                        x = x * scale
                    else:
                        new_squares = new_squares + (squares[row],)
                    for matrix in tl.static_range(MATRICES):
                        w = _as_float32(tiles[i_tile * MATRICES + matrix])
                        new_sums = new_sums + (sums[row * MATRICES + matrix] + w * x[None, :],)
                sums = new_sums
                squares = new_squares
        if start + AHEAD * BLOCK_D < D:
            tiles = _load_weights(p_ws, i_n, start + AHEAD * BLOCK_D, N, D, MATRICES, EVEN, BLOCK_D, AHEAD)
            norms = _load_norms(p_norm, start + AHEAD * BLOCK_D, D, NORM, BLOCK_D, AHEAD)
    results = ()
    for row in tl.static_range(ROWS):
        scale = 1.0
        if NORM:
            scale = tl.rsqrt(tl.sum(squares[row], 0) / D + eps)
        for matrix in tl.static_range(MATRICES):
            results = results + (tl.sum(sums[row * MATRICES + matrix], 1) * scale,)
    return results + residuals


@triton.jit
def _project_rows(
    p_x, p_norm, p_w, p_s, p_b, p_residual, p_y, i_tile, eps, unit, N, D: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    i_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = i_n < N
    s = load_scale(p_s, i_n, unit, N, SCALED)
    b = tl.zeros((BLOCK_N,), tl.float32)
    if BIAS:
        b = tl.load(p_b + i_n, mask=m_n, other=0.0).to(tl.float32)
    ys = _products(
        p_x, p_norm, (p_w,), p_residual, i_n, eps, N, D, ROWS, 1, NORM, RESIDUAL, EVEN, PDL, BLOCK_N, BLOCK_D, AHEAD
    )
    for row in tl.static_range(ROWS):
        y = ys[row] * s + b
        if RESIDUAL:
            y += ys[ROWS + row].to(tl.float32)
        tl.store(p_y + row * N + i_n, y.to(p_y.dtype.element_ty), mask=m_n)


@triton.jit
def project_kernel(
    p_x, p_norm, p_w0, p_s0, p_b0, p_y0, p_w1, p_s1, p_b1, p_y1, p_w2, p_s2, p_b2, p_y2, p_residual, eps, unit,
    N0, N1, N2, D: tl.constexpr, ROWS: tl.constexpr, MATRICES: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y = norm(x) w^T + b (+ residual) for one to three matrices w (N, D); x (ROWS, D). Program: BLOCK_N outputs.

    SCALED: w is what is stored times s (N,) times unit.
    """
    i_tile = tl.program_id(0)
    end0 = tl.cdiv(N0, BLOCK_N)
    end1 = end0 + tl.cdiv(N1, BLOCK_N)
    if i_tile < end0:
        _project_rows(
            p_x, p_norm, p_w0, p_s0, p_b0, p_residual, p_y0, i_tile, eps, unit, N0, D,
            ROWS, NORM, SCALED, BIAS, RESIDUAL, EVEN, PDL, BLOCK_N, BLOCK_D, AHEAD,
        )  # fmt: skip
    elif MATRICES > 1:
        if i_tile < end1:
            _project_rows(
                p_x, p_norm, p_w1, p_s1, p_b1, p_residual, p_y1, i_tile - end0, eps, unit, N1, D,
                ROWS, NORM, SCALED, BIAS, RESIDUAL, EVEN, PDL, BLOCK_N, BLOCK_D, AHEAD,
            )  # fmt: skip
        elif MATRICES > 2:
            _project_rows(
                p_x, p_norm, p_w2, p_s2, p_b2, p_residual, p_y2, i_tile - end1, eps, unit, N2, D,
                ROWS, NORM, SCALED, BIAS, RESIDUAL, EVEN, PDL, BLOCK_N, BLOCK_D, AHEAD,
            )  # fmt: skip


@triton.jit
def gated_project_kernel(
    p_x, p_norm, p_w_gate, p_s_gate, p_b_gate, p_w_up, p_s_up, p_b_up, p_y, eps, unit, N, D: tl.constexpr,
    ROWS: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y = gelu(norm(x) w_gate^T + b_gate) * (norm(x) w_up^T + b_up); x (ROWS, D) -> y (ROWS, N)."""
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = i_n < N
    s_gate = load_scale(p_s_gate, i_n, unit, N, SCALED)
    s_up = load_scale(p_s_up, i_n, unit, N, SCALED)
    b_gate = tl.load(p_b_gate + i_n, mask=m_n, other=0.0).to(tl.float32)
    b_up = tl.load(p_b_up + i_n, mask=m_n, other=0.0).to(tl.float32)
    both = (p_w_gate, p_w_up)
    ys = _products(
        p_x, p_norm, both, p_x, i_n, eps, N, D, ROWS, 2, True, False, EVEN, PDL, BLOCK_N, BLOCK_D, AHEAD
    )  # fmt: skip
    for row in tl.static_range(ROWS):
        y = gelu(ys[2 * row] * s_gate + b_gate) * (ys[2 * row + 1] * s_up + b_up)
        tl.store(p_y + row * N + i_n, y.to(p_y.dtype.element_ty), mask=m_n)


@triton.jit
def add_norm_kernel(
    p_residual, p_delta, p_norm, p_y, eps, D, ADD: tl.constexpr, PDL: tl.constexpr, BLOCK_D: tl.constexpr
):
    """residual += delta; y = residual / rms * (1 + norm). One program: one row of D."""
    i_d = tl.arange(0, BLOCK_D)
    m_d = i_d < D
    offset = tl.program_id(0) * D + i_d
    norm = tl.load(p_norm + i_d, mask=m_d, other=0.0).to(tl.float32)
    wait_for_the_kernel_before(PDL)
    x = tl.load(p_residual + offset, mask=m_d, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(p_delta + offset, mask=m_d, other=0.0).to(tl.float32)
        x = x.to(p_residual.dtype.element_ty)
        tl.store(p_residual + offset, x, mask=m_d)
        x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    y = x * scale * (1.0 + norm)
    tl.store(p_y + offset, y.to(p_y.dtype.element_ty), mask=m_d)


@triton.jit
def gate_kernel(p_gate, p_up, p_y, SIZE, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """y = gelu(gate) * up."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < SIZE
    wait_for_the_kernel_before(PDL)
    gate = tl.load(p_gate + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(p_up + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_y + i, (gelu(gate) * up).to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def begin_kernel(
    p_token, p_table, p_time, p_padding, p_frequencies, p_x, p_cos, p_sin, scale, D, R,
    SCALE: tl.constexpr, ROTARY: tl.constexpr, PDL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """x (B, D): the token's embedding; cos, sin (B, R): of its position's angles. One program: one row.

    It starts when all before it has ended, so that the next kernel may start at once.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_b = tl.program_id(0)
    i_d, i_r = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    x = tl.load(p_table + tl.load(p_token + i_b) * D + i_d, mask=i_d < D)
    if SCALE:
        x = (x.to(tl.float32) * scale).to(p_x.dtype.element_ty)
    tl.store(p_x + i_b * D + i_d, x, mask=i_d < D)
    if ROTARY:
        position = (tl.load(p_time) - tl.load(p_padding + i_b)).to(tl.float32)
        angles = position * tl.load(p_frequencies + i_r, mask=i_r < R, other=0.0)
        tl.store(p_cos + i_b * R + i_r, tl.cos(angles).to(p_cos.dtype.element_ty), mask=i_r < R)
        tl.store(p_sin + i_b * R + i_r, tl.sin(angles).to(p_sin.dtype.element_ty), mask=i_r < R)


@triton.jit
def _in_order(x):
    """float32 -> int32 in the order of argmax: zeros of both signs are equal, and what is no number is above all."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, -0x80000000 - bits, bits))


@triton.jit
def end_kernel(
    p_logits, p_token, p_time, p_going_on, p_ends, p_pad,
    V: tl.constexpr, ENDS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """token (B,): argmax of logits (B, V), the first of several; time (1,) += 1. One program: one row.

    With ENDS > 0 rows end: token is pad (1,) for those that do not go on, and going_on (B,) turns false with a token
    that is one of ends (ENDS,).

    No kernel in front reads the time any more once the last of them has ended. A block is asked for before the one in
    front of it is looked at; each thread keeps the best of its places, and only these are compared between threads.
    """
    i_b, i = tl.program_id(0), tl.arange(0, BLOCK)
    p_row = p_logits + i_b.to(tl.int64) * V
    if ENDS > 0:
        going_on = tl.load(p_going_on + i_b).to(tl.int1)
        ends, pad = tl.load(p_ends + tl.arange(0, ENDS)), tl.load(p_pad)
    wait_for_the_kernel_before(PDL)
    best = tl.full((BLOCK,), -0x80000000, tl.int32)  # below all that there is
    i_best = tl.zeros((BLOCK,), tl.int32)
    x = tl.load(p_row + i, mask=i < V, other=float("-inf"))
    for start in range(0, V, BLOCK):
        i_next = start + BLOCK + i
        next_x = tl.load(p_row + i_next, mask=i_next < V, other=float("-inf"))
        order = _in_order(x.to(tl.float32))
        i_best = tl.where(order > best, start + i, i_best)
        best = tl.maximum(best, order)
        x = next_x
    first = tl.min(tl.where(best == tl.max(best, 0), i_best, V), 0)  # places beyond the row come behind those in it
    token = first.to(tl.int64)
    if ENDS > 0:
        token = tl.where(going_on, token, pad)
        is_end = tl.max((ends == token).to(tl.int32), 0) > 0
        tl.store(p_going_on + i_b, going_on & (is_end == 0))
    tl.store(p_token + i_b, token)
    if i_b == 0:
        tl.store(p_time, tl.load(p_time) + 1)
