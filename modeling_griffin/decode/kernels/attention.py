"""Triton kernel of one query's attention over a ring of keys and values, in splits that run side by side.

Names: p_ pointer, i_ index, m_ mask. The time is read from the device, as in `decode_kernels`. The last split to end
adds up what the others have left, in their order, so that results are the same every time.

Legend: B rows, H heads, K head dimension, W attention window, S splits of the window.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error

from .gemv import wait_for_the_kernel_before


@triton.jit
def rotated(p_x, p_cos, p_sin, offset, i_k, mask, ROTARY: tl.constexpr):
    """x with its first ROTARY dimensions rotated, in the dtype of x; offset: of each head's first dimension."""
    m_turn = i_k < ROTARY
    partner = tl.where(i_k < ROTARY // 2, i_k + ROTARY // 2, i_k - ROTARY // 2)
    x = tl.load(p_x + offset + i_k, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(p_x + offset + partner, mask=mask & m_turn, other=0.0).to(tl.float32)
    cos = tl.load(p_cos + i_k, mask=m_turn, other=1.0).to(tl.float32)
    sin = tl.load(p_sin + i_k, mask=m_turn, other=0.0).to(tl.float32)
    turned = x * cos + tl.where(i_k < ROTARY // 2, -other, other) * sin
    return turned.to(p_x.dtype.element_ty)


@triton.jit
def all_splits(
    p_sums, p_top, p_total, p_count, sums, top, total, i_query, i_k, m_query, m_k, K: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Leaves this split's sums; the last split of all returns sums and total of all, in their order, and True."""
    i_part = i_query * SPLITS + tl.program_id(1)
    m_sums = m_query[:, None] & m_k[None, :]
    tl.store(p_top + i_part, top, mask=m_query)
    tl.store(p_total + i_part, total, mask=m_query)
    tl.store(p_sums + i_part[:, None] * K + i_k[None, :], sums, mask=m_sums)
    tl.debug_barrier()  # all threads have stored before one of them says so
    is_last = tl.atomic_add(p_count, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        tl.store(p_count, 0)  # for the next launch
        i_part = i_query * SPLITS
        top = tl.full(top.shape, -1e30, tl.float32)
        for split in tl.static_range(SPLITS):
            top = tl.maximum(top, tl.load(p_top + i_part + split, mask=m_query, other=-1e30, cache_modifier=".cg"))
        total = tl.zeros(total.shape, tl.float32)
        sums = tl.zeros(sums.shape, tl.float32)
        for split in tl.static_range(SPLITS):
            its_top = tl.load(p_top + i_part + split, mask=m_query, other=-1e30, cache_modifier=".cg")
            its_total = tl.load(p_total + i_part + split, mask=m_query, other=1.0, cache_modifier=".cg")
            p_tile = p_sums + (i_part + split)[:, None] * K + i_k[None, :]
            share = tl.exp(its_top - top)
            total += share * its_total
            sums += share[:, None] * tl.load(p_tile, mask=m_sums, other=0.0, cache_modifier=".cg")
    return sums, total, is_last


@triton.jit
def attention_kernel(
    p_q, p_k, p_v, p_cos, p_sin, p_keys, p_values, p_time, p_padding, p_out, p_sums, p_top, p_total, p_count, scaling,
    W, PDL: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr, K: tl.constexpr, KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr, ROTARY: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One query against SPLIT slots of the ring of keys and values (B, H_kv, W, K), in which this step's are stored.

    q (B, H, K), k and v (B, H_kv, K) before the rotation. Slot s holds the last time that is s modulo W; a row sees it
    from its first token on, at time `padding`. out (B, H, K). A split leaves sums (B, H, S, K) of exp(score - top) *
    value, top and total (B, H, S); count (B * H_kv,) int32: of splits that have, 0 before and after.
    Program: (B * H_kv, S).
    """
    i_head, i_split = tl.program_id(0), tl.program_id(1)
    i_row = i_head // KEY_HEADS
    time = tl.load(p_time)
    slot = (time % W).to(tl.int32)
    kept = time - tl.load(p_padding + i_row)  # tokens of the row before this one
    i_g, i_k = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K)
    m_k = i_k < K
    m_q = (i_g < GROUP)[:, None] & m_k[None, :]
    p_cos += i_row * ROTARY
    p_sin += i_row * ROTARY
    i_query = i_head * GROUP + i_g
    p_keys += i_head.to(tl.int64) * W * K
    p_values += i_head.to(tl.int64) * W * K
    top = tl.full((BLOCK_G,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    sums = tl.zeros((BLOCK_G, BLOCK_K), tl.float32)
    q = tl.zeros((BLOCK_G, BLOCK_K), p_q.dtype.element_ty)
    new_k = tl.zeros((BLOCK_K,), p_k.dtype.element_ty)
    new_v = tl.zeros((BLOCK_K,), p_v.dtype.element_ty)
    for start in range(0, SPLIT, BLOCK_S):
        i_s = i_split * SPLIT + start + tl.arange(0, BLOCK_S)
        is_new = i_s == slot
        age = tl.where(i_s <= slot, slot - i_s, slot - i_s + W)
        seen = (i_s < W) & (age <= kept)
        m_old = (seen & (i_s != slot))[:, None] & m_k[None, :]
        tile = i_s[:, None] * K + i_k[None, :]
        k = tl.load(p_keys + tile, mask=m_old, other=0.0)
        v = tl.load(p_values + tile, mask=m_old, other=0.0)
        if start == 0:  # here, so that old keys and values are asked for before the wait
            wait_for_the_kernel_before(PDL)
            q = rotated(p_q, p_cos, p_sin, i_query[:, None] * K, i_k[None, :], m_q, ROTARY)
            new_k = rotated(p_k, p_cos, p_sin, i_head * K, i_k, m_k, ROTARY)
            new_v = tl.load(p_v + i_head * K + i_k, mask=m_k, other=0.0)
        k = tl.where(is_new[:, None], new_k[None, :], k)
        v = tl.where(is_new[:, None], new_v[None, :], v)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        scores = tl.where(seen[None, :], scores, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shares = tl.where(seen[None, :], tl.exp(scores - new_top[:, None]), 0.0)
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(shares, 1)
        sums = tl.dot(shares.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
        top = new_top
    m_new = m_k & (slot >= i_split * SPLIT) & (slot < (i_split + 1) * SPLIT)
    tl.store(p_keys + slot * K + i_k, new_k, mask=m_new)
    tl.store(p_values + slot * K + i_k, new_v, mask=m_new)
    is_last = True
    if SPLITS > 1:
        sums, total, is_last = all_splits(
            p_sums, p_top, p_total, p_count + i_head, sums, top, total, i_query, i_k, i_g < GROUP, m_k, K, SPLITS
        )
    if is_last:
        y = sums / total[:, None]
        tl.store(p_out + i_query[:, None] * K + i_k[None, :], y.to(p_out.dtype.element_ty), mask=m_q)
