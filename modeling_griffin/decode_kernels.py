"""Triton kernels of one decoding step: every token's work for few rows, at the speed at which weights are read.

Names: p_ pointer, i_ index, m_ mask. Sums are float32; what is stored has the dtype of its tensor. A tensor's time is
read from the device, so that a recorded CUDA graph can be replayed: the same launch serves every step.

Legend: B rows, D inputs of a product, N outputs, C RG-LRU channels, P channels of a gate block.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(z)) = x sigmoid(2 z)."""
    z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * z))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _load_weight(p_w, i_n, i_d, N, D, EVEN: tl.constexpr):
    """(BLOCK_N, BLOCK_D), read once and not kept: it would push what the next kernel needs out of the cache."""
    p_tile = p_w + i_n[:, None].to(tl.int64) * D + i_d[None, :]
    if EVEN:
        return tl.load(p_tile, eviction_policy="evict_first").to(tl.float32)
    mask = (i_n < N)[:, None] & (i_d < D)[None, :]
    return tl.load(p_tile, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _load_row(p_x, i_d, D, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(p_x + i_d, eviction_policy="evict_last").to(tl.float32)
    return tl.load(p_x + i_d, mask=i_d < D, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def _scale_of(squares, D, eps):
    """1 / rms, from the squares that a program has summed by position."""
    return tl.rsqrt(tl.sum(squares, 0) / D + eps)


@triton.jit
def _project_rows(
    p_x, p_norm, p_w, p_b, p_residual, p_y, i_tile, eps, N, D: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = ()
    squares = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
        squares = squares + (tl.zeros((BLOCK_D,), tl.float32),)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES, loop_unroll_factor=UNROLL):
        i_d = start + tl.arange(0, BLOCK_D)
        w = _load_weight(p_w, i_n, i_d, N, D, EVEN)
        if NORM:
            scale = 1.0 + _load_row(p_norm, i_d, D, EVEN)
        new_sums = ()
        new_squares = ()
        for row in tl.static_range(ROWS):
            x = _load_row(p_x + row * D, i_d, D, EVEN)
            if NORM:
                new_squares = new_squares + (squares[row] + x * x,)
                x = x * scale
            else:
                new_squares = new_squares + (squares[row],)
            new_sums = new_sums + (sums[row] + w * x[None, :],)
        sums = new_sums
        squares = new_squares
    m_n = i_n < N
    for row in tl.static_range(ROWS):
        y = tl.sum(sums[row], 1)
        if NORM:
            y = y * _scale_of(squares[row], D, eps)
        if BIAS:
            y += tl.load(p_b + i_n, mask=m_n, other=0.0).to(tl.float32)
        if RESIDUAL:
            y += tl.load(p_residual + row * N + i_n, mask=m_n, other=0.0).to(tl.float32)
        tl.store(p_y + row * N + i_n, y.to(p_y.dtype.element_ty), mask=m_n)


@triton.jit
def project_kernel(
    p_x, p_norm, p_w0, p_b0, p_y0, p_w1, p_b1, p_y1, p_w2, p_b2, p_y2, p_residual, eps, N0, N1, N2,
    D: tl.constexpr, ROWS: tl.constexpr, MATRICES: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = norm(x) w^T + b (+ residual) for one to three matrices w (N, D); x (ROWS, D). One program: BLOCK_N outputs.

    The norm costs no pass of its own: its scale is one number a row, found while x is read for the product.
    """
    i_tile = tl.program_id(0)
    end0 = tl.cdiv(N0, BLOCK_N)
    end1 = end0 + tl.cdiv(N1, BLOCK_N)
    if i_tile < end0:
        _project_rows(
            p_x, p_norm, p_w0, p_b0, p_residual, p_y0, i_tile, eps, N0, D,
            ROWS, NORM, BIAS, RESIDUAL, EVEN, BLOCK_N, BLOCK_D, UNROLL, STAGES,
        )  # fmt: skip
    elif MATRICES > 1:
        if i_tile < end1:
            _project_rows(
                p_x, p_norm, p_w1, p_b1, p_residual, p_y1, i_tile - end0, eps, N1, D,
                ROWS, NORM, BIAS, RESIDUAL, EVEN, BLOCK_N, BLOCK_D, UNROLL, STAGES,
            )  # fmt: skip
        elif MATRICES > 2:
            _project_rows(
                p_x, p_norm, p_w2, p_b2, p_residual, p_y2, i_tile - end1, eps, N2, D,
                ROWS, NORM, BIAS, RESIDUAL, EVEN, BLOCK_N, BLOCK_D, UNROLL, STAGES,
            )  # fmt: skip


@triton.jit
def gated_project_kernel(
    p_x, p_norm, p_w_gate, p_b_gate, p_w_up, p_b_up, p_y, eps, N, D: tl.constexpr,
    ROWS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = gelu(norm(x) w_gate^T + b_gate) * (norm(x) w_up^T + b_up); x (ROWS, D) -> y (ROWS, N)."""
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gates = ()
    ups = ()
    squares = ()
    for _ in tl.static_range(ROWS):
        gates = gates + (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
        ups = ups + (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
        squares = squares + (tl.zeros((BLOCK_D,), tl.float32),)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES, loop_unroll_factor=UNROLL):
        i_d = start + tl.arange(0, BLOCK_D)
        w_gate = _load_weight(p_w_gate, i_n, i_d, N, D, EVEN)
        w_up = _load_weight(p_w_up, i_n, i_d, N, D, EVEN)
        scale = 1.0 + _load_row(p_norm, i_d, D, EVEN)
        new_gates = ()
        new_ups = ()
        new_squares = ()
        for row in tl.static_range(ROWS):
            x = _load_row(p_x + row * D, i_d, D, EVEN)
            new_squares = new_squares + (squares[row] + x * x,)
            x = x * scale
            new_gates = new_gates + (gates[row] + w_gate * x[None, :],)
            new_ups = new_ups + (ups[row] + w_up * x[None, :],)
        gates = new_gates
        ups = new_ups
        squares = new_squares
    m_n = i_n < N
    for row in tl.static_range(ROWS):
        scale = _scale_of(squares[row], D, eps)
        gate = tl.sum(gates[row], 1) * scale + tl.load(p_b_gate + i_n, mask=m_n, other=0.0).to(tl.float32)
        up = tl.sum(ups[row], 1) * scale + tl.load(p_b_up + i_n, mask=m_n, other=0.0).to(tl.float32)
        tl.store(p_y + row * N + i_n, (gelu_tanh(gate) * up).to(p_y.dtype.element_ty), mask=m_n)


@triton.jit
def add_norm_kernel(p_residual, p_delta, p_norm, p_y, eps, D, ADD: tl.constexpr, BLOCK_D: tl.constexpr):
    """residual += delta; y = residual / rms * (1 + norm). One program: one row of D."""
    i_d = tl.arange(0, BLOCK_D)
    m_d = i_d < D
    offset = tl.program_id(0) * D + i_d
    x = tl.load(p_residual + offset, mask=m_d, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(p_delta + offset, mask=m_d, other=0.0).to(tl.float32)
        x = x.to(p_residual.dtype.element_ty)
        tl.store(p_residual + offset, x, mask=m_d)
        x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    y = x * scale * (1.0 + tl.load(p_norm + i_d, mask=m_d, other=0.0).to(tl.float32))
    tl.store(p_y + offset, y.to(p_y.dtype.element_ty), mask=m_d)


@triton.jit
def gate_kernel(p_gate, p_up, p_y, SIZE, BLOCK: tl.constexpr):
    """y = gelu(gate) * up."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < SIZE
    gate = tl.load(p_gate + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(p_up + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_y + i, (gelu_tanh(gate) * up).to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def _convolved(p_x, p_past, p_w, p_b, i_b, i_c, m, time, C, TAPS: tl.constexpr):
    """The convolution's output (BLOCK_B, channels), rounded as the layer rounds it; past inputs lie at time % TAPS."""
    y = tl.load(p_b + i_c[None, :], mask=m, other=0.0).to(tl.float32)
    for back in tl.static_range(TAPS):
        if back == 0:
            x = tl.load(p_x + i_b[:, None] * C + i_c[None, :], mask=m, other=0.0)
        else:
            slot = (time + (TAPS - back)) % TAPS
            x = tl.load(p_past + (i_b[:, None] * TAPS + slot) * C + i_c[None, :], mask=m, other=0.0)
        w = tl.load(p_w + i_c[None, :] * TAPS + (TAPS - 1 - back), mask=m, other=0.0)
        y += x.to(tl.float32) * w.to(tl.float32)
    return y.to(p_x.dtype.element_ty)


@triton.jit
def _one_minus_exp(z):
    """1 - exp(z) for z <= 0; near 0 from the series, the difference has no digits there."""
    p = 1.0 + z * (1.0 / 9)
    p = 1.0 + z * (1.0 / 8) * p
    p = 1.0 + z * (1.0 / 7) * p
    p = 1.0 + z * (1.0 / 6) * p
    p = 1.0 + z * (1.0 / 5) * p
    p = 1.0 + z * (1.0 / 4) * p
    p = 1.0 + z * (1.0 / 3) * p
    p = 1.0 + z * (1.0 / 2) * p
    return tl.where(z > -0.5, -z * p, 1.0 - tl.exp(z))


@triton.jit
def recurrent_kernel(
    p_x, p_y, p_past, p_state, p_out, p_conv_w, p_conv_b, p_w_r, p_b_r, p_w_i, p_b_i, p_log_decay, p_time,
    B, C, P: tl.constexpr, TAPS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Convolution, both gates, recurrence, and the branch's gate: out = h * gelu(y). One program: BLOCK_C channels.

    x, y (B, C); past (B, TAPS, C), a ring of the inputs; state (B, C) float32. Each program needs the convolution of
    its whole gate block, so that a block's programs read the same past; none of them reads this step's slot.
    """
    tiles = tl.cdiv(P, BLOCK_C)
    i_block = tl.program_id(0) // tiles
    i_j = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = i_b < B
    time = tl.load(p_time)
    p_w_r += i_block * P * P
    p_w_i += i_block * P * P
    r = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    i = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK_P):
        i_p = start + tl.arange(0, BLOCK_P)
        m_p = i_p < P
        mask = m_b[:, None] & m_p[None, :]
        u = _convolved(p_x, p_past, p_conv_w, p_conv_b, i_b, i_block * P + i_p, mask, time, C, TAPS)
        u = tl.where(mask, u, 0.0).to(p_x.dtype.element_ty)
        m_w = m_p[:, None] & (i_j < P)[None, :]
        offset = i_p[:, None] * P + i_j[None, :]
        r = tl.dot(u, tl.load(p_w_r + offset, mask=m_w, other=0.0), r, input_precision="ieee")
        i = tl.dot(u, tl.load(p_w_i + offset, mask=m_w, other=0.0), i, input_precision="ieee")
    i_c = i_block * P + i_j
    m_c = i_j < P
    mask = m_b[:, None] & m_c[None, :]
    u = _convolved(p_x, p_past, p_conv_w, p_conv_b, i_b, i_c, mask, time, C, TAPS)
    r = _sigmoid(r + tl.load(p_b_r + i_c, mask=m_c, other=0.0).to(tl.float32)[None, :])
    i = _sigmoid(i + tl.load(p_b_i + i_c, mask=m_c, other=0.0).to(tl.float32)[None, :])
    log_a = tl.load(p_log_decay + i_c, mask=m_c, other=0.0)[None, :] * r
    here = i_b[:, None] * C + i_c[None, :]
    h = tl.exp(log_a) * tl.load(p_state + here, mask=mask, other=0.0)
    h += tl.sqrt(_one_minus_exp(2.0 * log_a)) * i * u.to(tl.float32)
    tl.store(p_state + here, h, mask=mask)
    x = tl.load(p_x + here, mask=mask, other=0.0)
    tl.store(p_past + (i_b[:, None] * TAPS + time % TAPS) * C + i_c[None, :], x, mask=mask)
    y = tl.load(p_y + here, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_out + here, (h * gelu_tanh(y)).to(p_out.dtype.element_ty), mask=mask)
