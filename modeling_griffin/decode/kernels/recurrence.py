"""Triton kernels of one decoding step's recurrent branch: convolution, gates, recurrence and the branch's gate.

Names and PDL as in `gemv`. Two kernels: the gates as a GEMV for few rows, as a GEMM for many. In both a program
has BLOCK_C channels and asks for its gates' weights before anything else. It needs the convolution of its whole gate
block, so that a block's programs read the same past; none of them reads this step's slot, which they write.

Legend: B rows, C RG-LRU channels, P channels of a gate block. x, y (B, C): inputs of the branch and of its gate; past
(B, TAPS, C), a ring of the inputs; state (B, C) float32, h; out (B, C), h * gelu(y).
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error

from ...kernels.arithmetic import gelu
from ...rg_lru_scan_triton_math import decay, sigmoid, square_root
from .gemv import wait_for_the_kernel_before


@triton.jit
def _convolved_past(p_past, p_w, p_b, row, channel, m, m_c, time, C, TAPS: tl.constexpr):
    """What the past adds to the convolution's output, which lies at time % TAPS; row, channel: of each element.

    m, m_c: of elements and of channels that there are, m_c of one row, so that weights are not loaded for each.
    """
    y = tl.load(p_b + channel, mask=m_c, other=0.0).to(tl.float32)
    for back in tl.static_range(1, TAPS):
        slot = (time + (TAPS - back)) % TAPS
        x = tl.load(p_past + (row * TAPS + slot) * C + channel, mask=m, other=0.0).to(tl.float32)
        y += x * tl.load(p_w + channel * TAPS + (TAPS - 1 - back), mask=m_c, other=0.0).to(tl.float32)
    return y


@triton.jit
def _convolved(past, p_x, p_w, row, channel, m, m_c, C, TAPS: tl.constexpr):
    """The convolution's output, rounded as the layer rounds it; 0 where masked."""
    x = tl.load(p_x + row * C + channel, mask=m, other=0.0).to(tl.float32)
    y = past + x * tl.load(p_w + channel * TAPS + (TAPS - 1), mask=m_c, other=0.0).to(tl.float32)
    return tl.where(m, y, 0.0).to(p_x.dtype.element_ty)


@triton.jit
def load_gates(p_w_r, p_w_i, start: tl.constexpr, i_j, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """(BLOCK_P, BLOCK_C) of both gates' weights of a block."""
    i_p = start + tl.arange(0, BLOCK_P)
    offset = i_p[:, None] * P + i_j[None, :]
    mask = (i_p < P)[:, None] & (i_j < P)[None, :]
    return tl.load(p_w_r + offset, mask=mask, other=0.0), tl.load(p_w_i + offset, mask=mask, other=0.0)


@triton.jit
def coefficients(r, i, log_decay, u, EXACT: tl.constexpr):
    """a and b of h_t = a h_{t-1} + b, from both gates before the sigmoid and the convolution's output.

    EXACT: as in the scan's kernels, for weights in float32.
    """
    a, y = decay(log_decay, sigmoid(r, EXACT), EXACT)
    return a, square_root(y, EXACT) * sigmoid(i, EXACT) * u.to(tl.float32)


@triton.jit
def _store_step(p_past, p_state, p_out, h, x, y, row, channel, m, time, C, TAPS: tl.constexpr):
    tl.store(p_state + row * C + channel, h, mask=m)
    tl.store(p_past + (row * TAPS + time % TAPS) * C + channel, x, mask=m)
    out = h * gelu(y.to(tl.float32))
    tl.store(p_out + row * C + channel, out.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def recurrent_row_kernel(
    p_x, p_y, p_past, p_state, p_out, p_conv_w, p_conv_b, p_w_r, p_b_r, p_w_i, p_b_i, p_log_decay, p_time,
    B, C, P: tl.constexpr, TAPS: tl.constexpr, PDL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row. Program: (channels of a gate block, row)."""
    i_tile = tl.program_id(0) % tl.cdiv(P, BLOCK_C)
    i_block = tl.program_id(0) // tl.cdiv(P, BLOCK_C)
    i_b = tl.program_id(1)
    i_j = i_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    i_c, m_c = i_block * P + i_j, i_j < P
    p_w_r += i_block * P * P
    p_w_i += i_block * P * P
    w_r, w_i = load_gates(p_w_r, p_w_i, 0, i_j, P, BLOCK_P)
    time = tl.load(p_time)
    i_p = tl.arange(0, BLOCK_P)
    past = _convolved_past(p_past, p_conv_w, p_conv_b, i_b, i_block * P + i_p, i_p < P, i_p < P, time, C, TAPS)
    r = tl.load(p_b_r + i_c, mask=m_c, other=0.0).to(tl.float32)
    i = tl.load(p_b_i + i_c, mask=m_c, other=0.0).to(tl.float32)
    log_decay = tl.load(p_log_decay + i_c, mask=m_c, other=0.0)
    h = tl.load(p_state + i_b * C + i_c, mask=m_c, other=0.0)
    own_u = tl.zeros((BLOCK_C,), tl.float32)
    wait_for_the_kernel_before(PDL)
    x = tl.load(p_x + i_b * C + i_c, mask=m_c, other=0.0)
    y = tl.load(p_y + i_b * C + i_c, mask=m_c, other=0.0)
    for start in tl.static_range(0, P, BLOCK_P):
        i_p = start + tl.arange(0, BLOCK_P)
        u = _convolved(past, p_x, p_conv_w, i_b, i_block * P + i_p, i_p < P, i_p < P, C, TAPS)
        u = u.to(tl.float32)[:, None]
        own_u += tl.sum(tl.where(i_p[:, None] == i_j[None, :], u, 0.0), 0)
        r += tl.sum(w_r.to(tl.float32) * u, 0)
        i += tl.sum(w_i.to(tl.float32) * u, 0)
        if start + BLOCK_P < P:
            w_r, w_i = load_gates(p_w_r, p_w_i, start + BLOCK_P, i_j, P, BLOCK_P)
            i_p += BLOCK_P
            past = _convolved_past(p_past, p_conv_w, p_conv_b, i_b, i_block * P + i_p, i_p < P, i_p < P, time, C, TAPS)
    a, b = coefficients(r, i, log_decay, own_u, p_x.dtype.element_ty == tl.float32)
    h = a * h + b
    _store_step(p_past, p_state, p_out, h, x, y, i_b, i_c, m_c, time, C, TAPS)


@triton.jit
def recurrent_kernel(
    p_x, p_y, p_past, p_state, p_out, p_conv_w, p_conv_b, p_w_r, p_b_r, p_w_i, p_b_i, p_log_decay, p_time,
    B, C, P: tl.constexpr, TAPS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_B rows. Program: (channels of a gate block, rows)."""
    i_tile = tl.program_id(0) % tl.cdiv(P, BLOCK_C)
    i_block = tl.program_id(0) // tl.cdiv(P, BLOCK_C)
    i_j = i_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    p_w_r += i_block * P * P
    p_w_i += i_block * P * P
    row = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    m_b = row < B
    time = tl.load(p_time)
    m_c = (i_j < P)[None, :]
    i_c = (i_block * P + i_j)[None, :]
    own = m_b & m_c
    tiles, pasts = (), ()
    for start in tl.static_range(0, P, BLOCK_P):
        tiles = tiles + load_gates(p_w_r, p_w_i, start, i_j, P, BLOCK_P)
        i_p = (start + tl.arange(0, BLOCK_P))[None, :]
        past = _convolved_past(
            p_past, p_conv_w, p_conv_b, row, i_block * P + i_p, m_b & (i_p < P), i_p < P, time, C, TAPS
        )
        pasts = pasts + (past,)
    own_past = _convolved_past(p_past, p_conv_w, p_conv_b, row, i_c, own, m_c, time, C, TAPS)
    h = tl.load(p_state + row * C + i_c, mask=own, other=0.0)
    r = tl.load(p_b_r + i_c, mask=m_c, other=0.0).to(tl.float32) + tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    i = tl.load(p_b_i + i_c, mask=m_c, other=0.0).to(tl.float32) + tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    log_decay = tl.load(p_log_decay + i_c, mask=m_c, other=0.0)
    wait_for_the_kernel_before(PDL)
    x = tl.load(p_x + row * C + i_c, mask=own, other=0.0)
    y = tl.load(p_y + row * C + i_c, mask=own, other=0.0)
    us = ()
    for start in tl.static_range(0, P, BLOCK_P):
        i_p = (start + tl.arange(0, BLOCK_P))[None, :]
        past = pasts[start // BLOCK_P]
        us = us + (_convolved(past, p_x, p_conv_w, row, i_block * P + i_p, m_b & (i_p < P), i_p < P, C, TAPS),)
    for i_tile in tl.static_range(len(us)):
        r = tl.dot(us[i_tile], tiles[i_tile * 2], r, input_precision="ieee")
        i = tl.dot(us[i_tile], tiles[i_tile * 2 + 1], i, input_precision="ieee")
    u = _convolved(own_past, p_x, p_conv_w, row, i_c, own, m_c, C, TAPS)
    a, b = coefficients(r, i, log_decay, u, p_x.dtype.element_ty == tl.float32)
    h = a * h + b
    _store_step(p_past, p_state, p_out, h, x, y, row, i_c, own, time, C, TAPS)
