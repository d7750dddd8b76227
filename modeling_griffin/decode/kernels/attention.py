"""Triton kernel of one query's attention over a ring of keys and values, in splits that run side by side.

Names: p_ pointer, i_ index, m_ mask. The time is read from the device, as in `gemv`. The last split to end
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
def attended(q, k, v, seen, scaling, top, total, sums):
    """The largest score, the total and the sums of a tile of queries, with these keys and values added."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    scores = tl.where(seen, scores, -1e30)
    new_top = tl.maximum(top, tl.max(scores, 1))
    shares = tl.where(seen, tl.exp(scores - new_top[:, None]), 0.0)
    shrink = tl.exp(top - new_top)
    total = total * shrink + tl.sum(shares, 1)
    sums = tl.dot(shares.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
    return new_top, total, sums


@triton.jit
def _load_parts(
    p_sums, p_top, p_total, i_part, start, i_k, m_query, m_sums, K: tl.constexpr, SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """top, total and sums of splits start to start + AHEAD: all are asked for before one is used."""
    parts = ()
    for ahead in tl.static_range(AHEAD):
        split, i = start + ahead, i_part + start + ahead
        is_there = m_query & (split < SPLITS)
        m = m_sums & (split < SPLITS)
        top = tl.load(p_top + i, mask=is_there, other=-1e30, cache_modifier=".cg")
        total = tl.load(p_total + i, mask=is_there, other=0.0, cache_modifier=".cg")
        sums = tl.load(p_sums + i[:, None] * K + i_k[None, :], mask=m, other=0.0, cache_modifier=".cg")
        parts = parts + (top, total, sums)
    return parts


@triton.jit
def all_splits(
    p_sums, p_top, p_total, p_count, sums, top, total, i_query, i_k, m_query, m_k, K: tl.constexpr,
    SPLITS: tl.constexpr, AHEAD: tl.constexpr,
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
        total = tl.zeros(total.shape, tl.float32)
        sums = tl.zeros(sums.shape, tl.float32)
        # A loop: unrolled over all splits, it took minutes to compile and more registers than there are.
        for start in range(0, SPLITS, AHEAD):
            parts = _load_parts(p_sums, p_top, p_total, i_part, start, i_k, m_query, m_sums, K, SPLITS, AHEAD)
            for ahead in tl.static_range(AHEAD):
                new_top = tl.maximum(top, parts[3 * ahead])
                shrink, share = tl.exp(top - new_top), tl.exp(parts[3 * ahead] - new_top)
                total = total * shrink + parts[3 * ahead + 1] * share
                sums = sums * shrink[:, None] + parts[3 * ahead + 2] * share[:, None]
                top = new_top
    return sums, total, is_last


@triton.jit
def _load_old(p_keys, p_values, i_s, slot, kept, W, i_k, m_k, K: tl.constexpr):
    """Keys and values of earlier tokens in these slots, (BLOCK_S, BLOCK_K), zeros elsewhere; and which are seen."""
    age = tl.where(i_s <= slot, slot - i_s, slot - i_s + W)
    seen = (i_s < W) & (i_s != slot) & (age <= kept)
    tile, mask = i_s[:, None] * K + i_k[None, :], seen[:, None] & m_k[None, :]
    return tl.load(p_keys + tile, mask=mask, other=0.0), tl.load(p_values + tile, mask=mask, other=0.0), seen[None, :]


@triton.jit
def _attended_one(q, k, v, is_here, scaling, top, total, sums):
    """As `attended` for a single key and value (BLOCK_K,), if they are of this split."""
    score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scaling
    new_top = tl.maximum(top, tl.where(is_here, score, -1e30))
    share, shrink = tl.where(is_here, tl.exp(score - new_top), 0.0), tl.exp(top - new_top)
    rounded = share.to(v.dtype).to(tl.float32)
    return new_top, total * shrink + share, sums * shrink[:, None] + rounded[:, None] * v.to(tl.float32)[None, :]


@triton.jit
def attention_kernel(
    p_q, p_k, p_v, p_cos, p_sin, p_keys, p_values, p_time, p_padding, p_out, p_sums, p_top, p_total, p_count, scaling,
    W, PDL: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr, K: tl.constexpr, KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr, ROTARY: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr,
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
    i_first = i_split * SPLIT + tl.arange(0, BLOCK_S)
    # The first block is asked for before the wait, which stands outside of the loop: inside, it would not be pipelined.
    k, v, seen = _load_old(p_keys, p_values, i_first, slot, kept, W, i_k, m_k, K)
    wait_for_the_kernel_before(PDL)
    q = rotated(p_q, p_cos, p_sin, i_query[:, None] * K, i_k[None, :], m_q, ROTARY)
    new_k = rotated(p_k, p_cos, p_sin, i_head * K, i_k, m_k, ROTARY)
    new_v = tl.load(p_v + i_head * K + i_k, mask=m_k, other=0.0)
    top, total, sums = attended(q, k, v, seen, scaling, top, total, sums)
    for start in tl.range(BLOCK_S, SPLIT, BLOCK_S, num_stages=STAGES):
        k, v, seen = _load_old(p_keys, p_values, i_first + start, slot, kept, W, i_k, m_k, K)
        top, total, sums = attended(q, k, v, seen, scaling, top, total, sums)
    is_here = (slot >= i_split * SPLIT) & (slot < (i_split + 1) * SPLIT)
    top, total, sums = _attended_one(q, new_k, new_v, is_here, scaling, top, total, sums)
    m_new = m_k & is_here
    tl.store(p_keys + slot * K + i_k, new_k, mask=m_new)
    tl.store(p_values + slot * K + i_k, new_v, mask=m_new)
    is_last = True
    if SPLITS > 1:
        sums, total, is_last = all_splits(
            p_sums, p_top, p_total, p_count + i_head, sums, top, total, i_query, i_k, i_g < GROUP, m_k, K, SPLITS,
            AHEAD,
        )  # fmt: skip
    if is_last:
        y = sums / total[:, None]
        tl.store(p_out + i_query[:, None] * K + i_k[None, :], y.to(p_out.dtype.element_ty), mask=m_q)
