"""Triton kernels of attention for N tokens of one row, which see a ring of keys and values and each other.

Names and splits as in `attention`. The ring is read and not written: N slots of it still hold what the
first tokens see. New keys and values lie in buffers of their own, and those of accepted tokens are copied afterwards.

Legend: N tokens, H heads, K head dimension, W attention window, S splits of the window.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error

from .attention import all_splits, attended, rotated
from .gemv import wait_for_the_kernel_before


@triton.jit
def _ages(i_s, slot, W):
    """Of the ring's slots, how old what they hold is at the first of the new tokens."""
    return tl.where(i_s < slot, slot - i_s, slot - i_s + W)


@triton.jit
def _load_ring(p_keys, p_values, i_s, age, kept, W, i_k, m_k, K: tl.constexpr):
    """Keys and values of earlier tokens, (BLOCK_S, BLOCK_K), zeros elsewhere; and which slots there are."""
    is_there = (i_s < W) & (age <= kept)
    tile, mask = i_s[:, None] * K + i_k[None, :], is_there[:, None] & m_k[None, :]
    return tl.load(p_keys + tile, mask=mask, other=0.0), tl.load(p_values + tile, mask=mask, other=0.0), is_there


@triton.jit
def draft_attention_kernel(
    p_q, p_k, p_v, p_cos, p_sin, p_keys, p_values, p_new_keys, p_new_values, p_time, p_padding, p_out,
    p_sums, p_top, p_total, p_count, scaling, N, W, PDL: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr,
    K: tl.constexpr, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of a key head, of any tokens, against SPLIT slots of the ring; the last split: the new keys too.

    q (N, H, K), k and v (N, H_kv, K) before the rotation; cos, sin (N, R). keys, values (H_kv, W, K): slot s holds the
    last time before these tokens that is s modulo W; the row begins at time `padding`. new_keys, new_values
    (H_kv, N, K): of these tokens. out (N, H, K). A split leaves sums (N, H, S, K), top and total (N, H, S); count:
    of splits of the same queries. Program: (tiles of queries of all key heads, S).
    """
    tiles = tl.cdiv(N * GROUP, BLOCK_M)
    i_head, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    is_last_split = tl.program_id(1) == SPLITS - 1
    time = tl.load(p_time)
    slot = (time % W).to(tl.int32)
    kept = time - tl.load(p_padding)  # tokens of the row before these
    i_m, i_k, i_n = i_tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    m_m, m_k, m_n = i_m < N * GROUP, i_k < K, i_n < N
    i_token = tl.minimum(i_m // GROUP, N - 1)
    i_query = i_token * (KEY_HEADS * GROUP) + i_head * GROUP + i_m % GROUP
    m_q = m_m[:, None] & m_k[None, :]
    p_keys += i_head.to(tl.int64) * W * K
    p_values += i_head.to(tl.int64) * W * K
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    i_first = tl.program_id(1) * SPLIT + tl.arange(0, BLOCK_S)
    # The first block is asked for before the wait, which stands outside of the loop: inside, it would not be pipelined.
    age = _ages(i_first, slot, W)
    k, v, is_there = _load_ring(p_keys, p_values, i_first, age, kept, W, i_k, m_k, K)
    wait_for_the_kernel_before(PDL)
    turn = i_token[:, None] * ROTARY
    q = rotated(p_q, p_cos + turn, p_sin + turn, i_query[:, None] * K, i_k[None, :], m_q, ROTARY)
    seen = is_there[None, :] & (age[None, :] + i_token[:, None] < W)
    top, total, sums = attended(q, k, v, seen, scaling, top, total, sums)
    for start in tl.range(BLOCK_S, SPLIT, BLOCK_S, num_stages=STAGES):
        age = _ages(i_first + start, slot, W)
        k, v, is_there = _load_ring(p_keys, p_values, i_first + start, age, kept, W, i_k, m_k, K)
        seen = is_there[None, :] & (age[None, :] + i_token[:, None] < W)
        top, total, sums = attended(q, k, v, seen, scaling, top, total, sums)
    if is_last_split:
        new_turn = tl.minimum(i_n, N - 1)[:, None] * ROTARY
        row = (i_n * KEY_HEADS + i_head)[:, None] * K
        m_new = m_n[:, None] & m_k[None, :]
        new_k = rotated(p_k, p_cos + new_turn, p_sin + new_turn, row, i_k[None, :], m_new, ROTARY)
        new_v = tl.load(p_v + row + i_k[None, :], mask=m_new, other=0.0)
        if i_tile == 0:
            i_new = (i_head * N + i_n)[:, None] * K + i_k[None, :]
            tl.store(p_new_keys + i_new, new_k, mask=m_new)
            tl.store(p_new_values + i_new, new_v, mask=m_new)
        is_past = m_n[None, :] & (i_n[None, :] <= i_token[:, None])
        top, total, sums = attended(q, new_k, new_v, is_past, scaling, top, total, sums)
    is_last = True
    if SPLITS > 1:
        sums, total, is_last = all_splits(
            p_sums, p_top, p_total, p_count + tl.program_id(0), sums, top, total, i_query, i_k, m_m, m_k, K, SPLITS,
            AHEAD,
        )  # fmt: skip
    if is_last:
        y = sums / total[:, None]
        tl.store(p_out + i_query[:, None] * K + i_k[None, :], y.to(p_out.dtype.element_ty), mask=m_q)


@triton.jit
def keep_attention_kernel(
    p_keys, p_values, p_new_keys, p_new_values, p_report, p_time, N, W, K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A new key and value into their slot, where the token is accepted; the time is already behind all that are.

    Program: (token, key head of a layer).
    """
    i_n, i_head, i_k = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_K)
    wait_for_the_kernel_before(PDL)
    accepted = tl.load(p_report)
    m_k = (i_k < K) & (i_n < accepted)
    slot = (tl.load(p_time) - accepted + i_n) % W
    source, target = (i_head * N + i_n) * K + i_k, (i_head * W + slot) * K + i_k
    tl.store(p_keys + target, tl.load(p_new_keys + source, mask=m_k, other=0.0), mask=m_k)
    tl.store(p_values + target, tl.load(p_new_values + source, mask=m_k, other=0.0), mask=m_k)
