"""Triton kernels of a step over N tokens of one row: the recurrent branch, which drafts are right, what they leave.

Names and PDL as in `gemv`. What is read before the wait has been left by earlier steps, or is a weight.

Legend: N tokens, C RG-LRU channels, P channels of a gate block. past (TAPS, C), a ring of the convolution's inputs;
state (C,) float32, h: both as they are before the first of the tokens. new_x (N, C), new_h (N, C) float32: of each.
report (1 + N,) int64: how many tokens are accepted, and the argmax of the logits of each.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error

from ...kernels.arithmetic import gelu
from ...rg_lru_scan_triton_kernels import compose
from .gemv import wait_for_the_kernel_before
from .recurrence import coefficients, load_gates


@triton.jit
def _load_before(p_x, p_past, token, back: tl.constexpr, channel, mask, time, C, TAPS: tl.constexpr):
    """The input `back` tokens before each token, in float32: of these tokens, or from the ring."""
    source = token - back
    x = tl.load(p_x + source * C + channel, mask=mask & (source >= 0), other=0.0).to(tl.float32)
    slot = (time + (TAPS + source)) % TAPS
    past = tl.load(p_past + slot * C + channel, mask=mask & (source < 0), other=0.0).to(tl.float32)
    return x + past


@triton.jit
def _convolved(p_x, p_past, p_w, p_b, token, channel, m, m_c, time, C, TAPS: tl.constexpr):
    """The convolution's output at each token, rounded as the layer rounds it; 0 where masked. m_c: of one row."""
    y = tl.load(p_b + channel, mask=m_c, other=0.0).to(tl.float32)
    for back in tl.static_range(1, TAPS):
        w = tl.load(p_w + channel * TAPS + (TAPS - 1 - back), mask=m_c, other=0.0).to(tl.float32)
        y += _load_before(p_x, p_past, token, back, channel, m, time, C, TAPS) * w
    x = tl.load(p_x + token * C + channel, mask=m, other=0.0).to(tl.float32)
    y += x * tl.load(p_w + channel * TAPS + (TAPS - 1), mask=m_c, other=0.0).to(tl.float32)
    return tl.where(m, y, 0.0).to(p_x.dtype.element_ty)


@triton.jit
def draft_recurrent_kernel(
    p_x, p_y, p_past, p_state, p_new_x, p_new_h, p_out, p_conv_w, p_conv_b, p_w_r, p_b_r, p_w_i, p_b_i, p_log_decay,
    p_time, N, C, P: tl.constexpr, TAPS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x, y (N, C) -> out (N, C) = h gelu(y): gates as GEMMs, then a scan over the tokens.

    Program: BLOCK_C channels of a gate block, all tokens.
    """
    i_tile = tl.program_id(0) % tl.cdiv(P, BLOCK_C)
    i_block = tl.program_id(0) // tl.cdiv(P, BLOCK_C)
    i_j = i_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    i_c, m_c = (i_block * P + i_j)[None, :], (i_j < P)[None, :]
    p_w_r += i_block * P * P
    p_w_i += i_block * P * P
    tiles = ()
    for start in tl.static_range(0, P, BLOCK_P):
        tiles = tiles + load_gates(p_w_r, p_w_i, start, i_j, P, BLOCK_P)
    time = tl.load(p_time)
    h = tl.load(p_state + i_c, mask=m_c, other=0.0)
    r = tl.load(p_b_r + i_c, mask=m_c, other=0.0).to(tl.float32) + tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    i = tl.load(p_b_i + i_c, mask=m_c, other=0.0).to(tl.float32) + tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    log_decay = tl.load(p_log_decay + i_c, mask=m_c, other=0.0)
    token = tl.arange(0, BLOCK_N)[:, None]
    m_n = token < N
    own = m_n & m_c
    wait_for_the_kernel_before(PDL)
    for start in tl.static_range(0, P, BLOCK_P):
        i_p = (start + tl.arange(0, BLOCK_P))[None, :]
        m_p = i_p < P
        u = _convolved(p_x, p_past, p_conv_w, p_conv_b, token, i_block * P + i_p, m_n & m_p, m_p, time, C, TAPS)
        r = tl.dot(u, tiles[start // BLOCK_P * 2], r, input_precision="ieee")
        i = tl.dot(u, tiles[start // BLOCK_P * 2 + 1], i, input_precision="ieee")
    u = _convolved(p_x, p_past, p_conv_w, p_conv_b, token, i_c, own, m_c, time, C, TAPS)
    a, b = coefficients(r, i, log_decay, u, p_x.dtype.element_ty == tl.float32)
    a, b = tl.associative_scan((a, b), 0, compose)
    h = a * h + b
    x = tl.load(p_x + token * C + i_c, mask=own, other=0.0)
    y = tl.load(p_y + token * C + i_c, mask=own, other=0.0).to(tl.float32)
    tl.store(p_new_x + token * C + i_c, x, mask=own)
    tl.store(p_new_h + token * C + i_c, h, mask=own)
    tl.store(p_out + token * C + i_c, (h * gelu(y)).to(p_out.dtype.element_ty), mask=own)


@triton.jit
def accept_kernel(p_tokens, p_report, p_token, p_time, N, PDL: tl.constexpr, BLOCK_N: tl.constexpr):
    """A token (N,) is accepted where it is the argmax of the one in front of it; the first is. One program.

    report[0]: how many are before the first rejected; time goes on by as many. token (1,): argmax of the last of them.
    """
    i_n = tl.arange(0, BLOCK_N)
    wait_for_the_kernel_before(PDL)
    argmax = tl.load(p_report + 1 + i_n, mask=i_n < N, other=0)
    following = tl.load(p_tokens + 1 + i_n, mask=i_n + 1 < N, other=-1)
    last = tl.min(tl.where(argmax == following, BLOCK_N, i_n), 0)
    tl.store(p_token, tl.load(p_report + 1 + last))
    tl.store(p_report, (last + 1).to(tl.int64))
    tl.store(p_time, tl.load(p_time) + last + 1)


@triton.jit
def keep_recurrent_kernel(
    p_past, p_state, p_new_x, p_new_h, p_report, p_time, N, C,
    TAPS: tl.constexpr, PDL: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What the accepted tokens leave in past and state; the time is already behind them.

    All tensors have a layer in front. Program: (BLOCK_C channels, layer).
    """
    i_c, i_layer = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(1).to(tl.int64)
    m_c = i_c < C
    p_past += i_layer * TAPS * C
    p_state += i_layer * C
    p_new_x += i_layer * N * C
    p_new_h += i_layer * N * C
    wait_for_the_kernel_before(PDL)
    last, newest = tl.load(p_report) - 1, tl.load(p_time) - 1
    tl.store(p_state + i_c, tl.load(p_new_h + last * C + i_c, mask=m_c, other=0.0), mask=m_c)
    for slot in tl.static_range(TAPS):
        token = last - (newest + (TAPS - slot)) % TAPS  # the newest that has its place there
        m_new = m_c & (token >= 0)
        tl.store(p_past + slot * C + i_c, tl.load(p_new_x + token * C + i_c, mask=m_new, other=0.0), mask=m_new)
