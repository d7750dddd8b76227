"""A forward kernel of the scan that is tried, not used: programs stay, and load the next tile before they look back.

As `forward_kernel` of `rg_lru_scan_triton_kernels`, for bfloat16 without states, resets or ragged ends. A word of 32
bits holds two channels, also where it is carried around the loop: carried as 16-bit values, each took a register. The
two channels of a word are tensors of their own, "even" and "odd", so that nothing has to be exchanged between threads.

Tickets may be taken early: of all tiles that are not complete the first is always one that its program works at, since
a program has its tiles in order, and so waiting ends.

Legend: as there; P pairs of channels, C = 2 P.
"""

import triton
import triton.language as tl

from modeling_griffin.rg_lru_scan_triton_kernels import COMPLETE, PUBLISHED, _and, _publish, compose
from modeling_griffin.rg_lru_scan_triton_math import LOG2_E, PTX, decay, reciprocal, sigmoid, square_root


@triton.jit
def _both(word):
    """int32 of two bfloat16 -> two float32."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _packed(even, odd):
    if PTX:
        asm: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        return tl.inline_asm_elementwise(asm, "=r,r,r", [even, odd], dtype=tl.int32, is_pure=True, pack=1)
    else:
        low, high = (even.to(tl.bfloat16).to(tl.int16, bitcast=True), odd.to(tl.bfloat16).to(tl.int16, bitcast=True))
        return (high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)


@triton.jit
def _gates(r, i, ONE_RECIPROCAL: tl.constexpr):
    """Both sigmoids. ONE_RECIPROCAL: 1 / ((1 + e_r) (1 + e_i)) serves both; bounded exponents keep it finite."""
    if ONE_RECIPROCAL:
        one_r = 1.0 + tl.exp2(tl.minimum(r * -LOG2_E, 60.0))
        one_i = 1.0 + tl.exp2(tl.minimum(i * -LOG2_E, 60.0))
        inverse = reciprocal(one_r * one_i, False)
        return inverse * one_i, inverse * one_r
    else:
        return sigmoid(r, False), sigmoid(i, False)


@triton.jit
def _map(r, i, x, log_decay, ONE_RECIPROCAL: tl.constexpr):
    r, i = _gates(r, i, ONE_RECIPROCAL)
    a, y = decay(log_decay, r, False)
    return a, square_root(y, False) * i * x


@triton.jit
def _compose_pairs(a_1, b_1, c_1, d_1, e_1, f_1, g_1, h_1, a_2, b_2, c_2, d_2, e_2, f_2, g_2, h_2):
    """Maps of both channels: of two neighbouring runs of segments, and of both without the last segment."""
    return (
        a_1 * a_2, tl.fma(a_2, b_1, b_2), a_1 * c_2, tl.fma(c_2, b_1, d_2),
        e_1 * e_2, tl.fma(e_2, f_1, f_2), e_1 * g_2, tl.fma(g_2, f_1, h_2),
    )  # fmt: skip


@triton.jit
def _vote(high, i_word, WORDS: tl.constexpr):
    every: tl.constexpr = PUBLISHED | ((1 << WORDS) - 1)
    return tl.where(high == 0, 0, tl.where(high == 1, every, every & ~(1 << i_word)))


@triton.jit
def _state(words, i_s, SEGMENTS: tl.constexpr):
    a = ((words >> 32).to(tl.int32) - 1).to(tl.float32, bitcast=True)
    a, b = tl.associative_scan((a, words.to(tl.int32).to(tl.float32, bitcast=True)), 0, compose)
    return tl.sum(tl.where(i_s == SEGMENTS - 1, b, 0.0), 0)


@triton.jit
def _look_back(p_words, i_chain, n_chains, n_before, SEGMENTS: tl.constexpr, PAIRS: tl.constexpr):
    """States of the even and the odd channels, (PAIRS,) each; see the kernel that this one follows."""
    i_s = tl.arange(0, SEGMENTS)[:, None]
    i_tile = n_before - SEGMENTS + i_s
    offset = (i_tile.to(tl.int64) * n_chains + i_chain) * (2 * PAIRS) + tl.arange(0, PAIRS)[None, :]
    even, odd = tl.full([PAIRS], 0.0, tl.float32), tl.full([PAIRS], 0.0, tl.float32)
    waiting = n_before > 0
    while waiting:
        words_even = tl.load(p_words + offset, mask=i_tile >= 0, other=COMPLETE, volatile=True)
        words_odd = tl.load(p_words + offset + PAIRS, mask=i_tile >= 0, other=COMPLETE, volatile=True)
        vote = _vote((words_even >> 32).to(tl.int32), i_s, SEGMENTS) & _vote(
            (words_odd >> 32).to(tl.int32), i_s, SEGMENTS
        )
        waiting = tl.reduce(tl.reduce(vote, 1, _and), 0, _and) <= PUBLISHED
        if not waiting:
            even, odd = _state(words_even, i_s, SEGMENTS), _state(words_odd, i_s, SEGMENTS)
    return even, odd


@triton.jit
def _where(tile, T, P, n_chains, n_blocks, SEGMENTS: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Which tile of its chain, which chain, where it starts and where each thread's first row is in it."""
    i_t, i_chain = tile // n_chains, tile % n_chains
    i_b = (i_chain // n_blocks).to(tl.int64)
    p = (i_chain % n_blocks) * PAIRS + tl.arange(0, PAIRS)[None, :]
    first = (i_b * T + i_t * (SEGMENTS * ROWS)) * P
    return i_t, i_chain, i_b, p, first + tl.arange(0, SEGMENTS)[:, None] * (ROWS * P) + p


@triton.jit
def _load_tile(p_x, p_r, p_i, offset, P, there, ROWS: tl.constexpr):
    rows = ()
    for i in tl.static_range(ROWS):
        rows = rows + (tl.load(p_r + offset + i * P, mask=there, other=0),)
        rows = rows + (tl.load(p_i + offset + i * P, mask=there, other=0),)
        rows = rows + (tl.load(p_x + offset + i * P, mask=there, other=0),)
    return rows


@triton.jit(do_not_specialize=["B", "T"])
def persistent_forward_kernel(
    p_x, p_r, p_i, p_log_decay, p_hidden, p_last_state, p_words, B, T, P,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, ONE_RECIPROCAL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x, r, i, hidden (B, T, P) int32: two channels each; log_decay (C,), last_state (B, C); T in whole tiles."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    n_blocks, n_steps = P // PAIRS, T // (SEGMENTS * ROWS)
    n_chains = B * n_blocks
    n_tiles = n_chains * n_steps
    p_ticket = (p_words + n_tiles.to(tl.int64) * (2 * PAIRS)).to(tl.pointer_type(tl.int32))
    i_s = tl.arange(0, SEGMENTS)[:, None]
    m_end = (i_s == SEGMENTS - 1) & (tl.arange(0, PAIRS)[None, :] >= 0)
    tile = tl.atomic_add(p_ticket, 1, sem="relaxed")
    _, _, _, _, offset = _where(tile, T, P, n_chains, n_blocks, SEGMENTS, ROWS, PAIRS)
    rows = _load_tile(p_x, p_r, p_i, offset, P, tile < n_tiles, ROWS)
    while tile < n_tiles:
        next_tile = tl.atomic_add(p_ticket, 1, sem="relaxed")
        i_t, i_chain, i_b, p, offset = _where(tile, T, P, n_chains, n_blocks, SEGMENTS, ROWS, PAIRS)
        decay_even = tl.load(p_log_decay + 2 * p + i_s * 0)
        decay_odd = tl.load(p_log_decay + 2 * p + 1 + i_s * 0)
        maps = ()
        a, b = tl.full([SEGMENTS, PAIRS], 1.0, tl.float32), tl.full([SEGMENTS, PAIRS], 0.0, tl.float32)
        e, f = a, b
        for i in tl.static_range(ROWS):
            r_even, r_odd = _both(rows[3 * i])
            i_even, i_odd = _both(rows[3 * i + 1])
            x_even, x_odd = _both(rows[3 * i + 2])
            a_even, b_even = _map(r_even, i_even, x_even, decay_even, ONE_RECIPROCAL)
            a_odd, b_odd = _map(r_odd, i_odd, x_odd, decay_odd, ONE_RECIPROCAL)
            a, b, e, f = a * a_even, tl.fma(a_even, b, b_even), e * a_odd, tl.fma(a_odd, f, b_odd)
            maps = maps + (a_even, b_even, a_odd, b_odd)
        # The next tile's loads fly while this one waits for its carry.
        _, _, _, _, next_offset = _where(next_tile, T, P, n_chains, n_blocks, SEGMENTS, ROWS, PAIRS)
        rows = _load_tile(p_x, p_r, p_i, next_offset, P, next_tile < n_tiles, ROWS)
        one, zero = tl.full([SEGMENTS, PAIRS], 1.0, tl.float32), tl.full([SEGMENTS, PAIRS], 0.0, tl.float32)
        a, b, c, d, e, f, g, h = tl.associative_scan((a, b, one, zero, e, f, one, zero), 0, _compose_pairs)
        p_word = p_words + tile.to(tl.int64) * (2 * PAIRS) + tl.arange(0, PAIRS)[None, :] + i_s * 0
        if i_t > 0:
            _publish(p_word, a, b, m_end)
            _publish(p_word + PAIRS, e, f, m_end)
        even, odd = _look_back(p_words, i_chain, n_chains, i_t, SEGMENTS, PAIRS)
        even, odd = even[None, :], odd[None, :]
        state_even, state_odd = tl.fma(a, even, b), tl.fma(e, odd, f)
        _publish(p_word, tl.zeros_like(a), state_even, m_end)
        _publish(p_word + PAIRS, tl.zeros_like(a), state_odd, m_end)
        h_even, h_odd = tl.fma(c, even, d), tl.fma(g, odd, h)
        for i in tl.static_range(ROWS):
            h_even = tl.fma(maps[4 * i], h_even, maps[4 * i + 1])
            h_odd = tl.fma(maps[4 * i + 2], h_odd, maps[4 * i + 3])
            tl.store(p_hidden + offset + i * P, _packed(h_even, h_odd))
        if i_t == n_steps - 1:
            tl.store(p_last_state + i_b * (2 * P) + 2 * p + i_s * 0, state_even, mask=m_end)
            tl.store(p_last_state + i_b * (2 * P) + 2 * p + 1 + i_s * 0, state_odd, mask=m_end)
        tile = next_tile
