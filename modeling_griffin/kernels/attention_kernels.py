"""The kernels of local attention: forward, gradients of the queries, of keys and values, and a sum of partial ones.

A program holds a block of queries (of keys) and walks over the keys (queries) that it sees (that see it), in tiles.
Tiles on the diagonal, on the edge of the window or of a run are walked first, with a mask; the others need none.

With S = scale Q K^T, P = exp(S - lse): dV = P^T dO, dP = dO V^T, dS = P * (dP - rowsum(dO * O)), dQ = scale dS K,
dK = scale dS^T Q. Everything is summed in float32. Scores are kept times log2(e), which `exp2` takes.

Legend: N tokens of all rows, H heads, H_KV key-value heads, K head dimension, DIM its power of two. Variables: p_
pointer, i_ index, m_ mask.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error

from .arithmetic import dot


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_first, p_order, p_out, p_lse, N, log2_scale,
    H: tl.constexpr, H_KV: tl.constexpr, K: tl.constexpr, DIM: tl.constexpr,
    ORDERED: tl.constexpr, PACK: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program has TOKENS queries of each of PACK heads, which share their keys, as the rows of one matrix."""
    start, head = _queries_of_program(p_order, H, ORDERED, PACK, TOKENS)
    i_token, i_row, m_row = _rows(start, head, N, H, K, DIM, PACK, TOKENS)
    q = tl.load(p_q + i_row, mask=m_row, other=0.0)
    first = tl.load(p_first + i_token, mask=i_token < N, other=0)
    base, masked, full = _tiles_of_queries(p_first, start, N, TOKENS, KEYS)
    offset = head // (H // H_KV) * K
    p_k, p_v = p_k + offset, p_v + offset
    out = tl.zeros([PACK * TOKENS, DIM], tl.float32)
    total = tl.zeros([PACK * TOKENS], tl.float32)
    # Not -inf: before a row has seen a key, what it subtracts from -inf must be a number.
    top = tl.full([PACK * TOKENS], -1e30, tl.float32)
    for MASKED in tl.static_range(1, -1, -1):
        for i in range(0, masked if MASKED else full):
            i_key = _tile_of_keys(i, base, full, TOKENS, KEYS, MASKED)
            k, v = _keys(p_k, i_key, N, H_KV, K, DIM, KEYS, MASKED), _keys(p_v, i_key, N, H_KV, K, DIM, KEYS, MASKED)
            out, total, top = _attend(q, k, v, out, total, top, i_key, first, i_token, log2_scale, KEYS, MASKED)
    tl.store(p_out + i_row, (out / total[:, None]).to(p_out.dtype.element_ty), mask=m_row)
    tl.store(p_lse + _i_statistic(head, i_token, N, PACK, TOKENS), top + tl.log2(total), mask=i_token < N)


@triton.jit
def _attend(
    q, k, v, out, total, top, i_key, first, i_token, log2_scale, KEYS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    s = dot(q, tl.trans(k))
    if MASKED:
        s = tl.where(_visible(i_key + tl.arange(0, KEYS)[None], first[:, None], i_token[:, None]), s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * log2_scale)
    p = tl.exp2(s * log2_scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    out = dot(p.to(v.dtype), v, out * shrink[:, None])
    return out, total * shrink + tl.sum(p, 1), new_top


@triton.jit
def query_gradient_kernel(
    p_q, p_k, p_v, p_out, p_d_out, p_lse, p_first, p_order, p_d_q, p_delta, N, log2_scale, scale,
    H: tl.constexpr, H_KV: tl.constexpr, K: tl.constexpr, DIM: tl.constexpr,
    ORDERED: tl.constexpr, PACK: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """As `forward_kernel`. Also writes delta = rowsum(dO * O) (H, N), for `key_gradients_kernel`."""
    start, head = _queries_of_program(p_order, H, ORDERED, PACK, TOKENS)
    i_token, i_row, m_row = _rows(start, head, N, H, K, DIM, PACK, TOKENS)
    d_out = tl.load(p_d_out + i_row, mask=m_row, other=0.0)
    delta = tl.sum(tl.load(p_out + i_row, mask=m_row, other=0.0).to(tl.float32) * d_out.to(tl.float32), 1)
    i_statistic = _i_statistic(head, i_token, N, PACK, TOKENS)
    tl.store(p_delta + i_statistic, delta, mask=i_token < N)
    lse = tl.load(p_lse + i_statistic, mask=i_token < N, other=0.0)
    q = tl.load(p_q + i_row, mask=m_row, other=0.0)
    first = tl.load(p_first + i_token, mask=i_token < N, other=0)
    base, masked, full = _tiles_of_queries(p_first, start, N, TOKENS, KEYS)
    offset = head // (H // H_KV) * K
    p_k, p_v = p_k + offset, p_v + offset
    d_q = tl.zeros([PACK * TOKENS, DIM], tl.float32)
    for MASKED in tl.static_range(1, -1, -1):
        for i in range(0, masked if MASKED else full):
            i_key = _tile_of_keys(i, base, full, TOKENS, KEYS, MASKED)
            k, v = _keys(p_k, i_key, N, H_KV, K, DIM, KEYS, MASKED), _keys(p_v, i_key, N, H_KV, K, DIM, KEYS, MASKED)
            d_q = _add_d_q(q, k, v, d_out, lse, delta, d_q, i_key, first, i_token, log2_scale, KEYS, MASKED)
    tl.store(p_d_q + i_row, (d_q * scale).to(p_d_q.dtype.element_ty), mask=m_row)


@triton.jit
def _add_d_q(
    q, k, v, d_out, lse, delta, d_q, i_key, first, i_token, log2_scale, KEYS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    p = tl.exp2(dot(q, tl.trans(k)) * log2_scale - lse[:, None])
    if MASKED:
        p = tl.where(_visible(i_key + tl.arange(0, KEYS)[None], first[:, None], i_token[:, None]), p, 0.0)
    d_p = dot(d_out, tl.trans(v))
    return dot((p * (d_p - delta[:, None])).to(k.dtype), k, d_q)


@triton.jit(do_not_specialize=["heads_at_once", "parts"])
def key_gradients_kernel(
    p_q, p_k, p_v, p_d_out, p_lse, p_delta, p_first, p_last, p_order, p_d_k, p_d_v, N, heads_at_once, parts,
    log2_scale, scale,
    H: tl.constexpr, H_KV: tl.constexpr, K: tl.constexpr, DIM: tl.constexpr,
    ORDERED: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """A program has KEYS keys, and adds up what `heads_at_once` query heads of their group say, in one loop.

    A group of more heads has several programs; d_k and d_v then are (parts, N, H_KV, K) in float32.
    """
    GROUP: tl.constexpr = H // H_KV
    program = tl.program_id(0)
    part, key_head = program % parts, program // parts % H_KV
    start = _block(p_order, program // (parts * H_KV), ORDERED, KEYS)
    head = key_head * GROUP + part * heads_at_once
    heads = tl.minimum(heads_at_once, GROUP - part * heads_at_once)
    tiles, diagonal, full = _tiles_of_keys(p_last, start, N, KEYS, QUERIES)
    k = _keys(p_k + key_head * K, start, N, H_KV, K, DIM, KEYS, True)
    v = _keys(p_v + key_head * K, start, N, H_KV, K, DIM, KEYS, True)
    d_k, d_v = tl.zeros([KEYS, DIM], tl.float32), tl.zeros([KEYS, DIM], tl.float32)
    for MASKED in tl.static_range(1, -1, -1):
        of_head = tiles - full if MASKED else full
        for i in range(0, heads * of_head):
            i_head, tile = head + i // tl.maximum(of_head, 1), i % tl.maximum(of_head, 1)
            i_query = start + _tile_of_queries(tile, diagonal, full, MASKED) * QUERIES
            q = _keys(p_q + i_head * K, i_query, N, H, K, DIM, QUERIES, MASKED)
            d_out = _keys(p_d_out + i_head * K, i_query, N, H, K, DIM, QUERIES, MASKED)
            i_token = i_query + tl.arange(0, QUERIES)
            i_inside = tl.minimum(i_token, N - 1) if MASKED else i_token
            i_statistic = i_head.to(tl.int64) * N + i_inside
            lse, delta = tl.load(p_lse + i_statistic), tl.load(p_delta + i_statistic)
            # The scores stand transposed, keys as rows, so that both sums take them as they come from the product.
            p = tl.exp2(dot(k, tl.trans(q)) * log2_scale - lse[None])
            if MASKED:
                visible = _visible(
                    start + tl.arange(0, KEYS)[:, None], tl.load(p_first + i_inside)[None], i_token[None]
                )
                p = tl.where(visible & (i_token < N)[None], p, 0.0)
            d_v = dot(p.to(d_out.dtype), d_out, d_v)
            d_p = dot(v, tl.trans(d_out))
            d_k = dot((p * (d_p - delta[None])).to(q.dtype), q, d_k)
    i_key, i_dim = start + tl.arange(0, KEYS)[:, None], tl.arange(0, DIM)[None]
    i_key_head = (part.to(tl.int64) * N + i_key) * H_KV + key_head
    m_key = (i_key < N) & (i_dim < K)
    tl.store(p_d_k + i_key_head * K + i_dim, (d_k * scale).to(p_d_k.dtype.element_ty), mask=m_key)
    tl.store(p_d_v + i_key_head * K + i_dim, d_v.to(p_d_v.dtype.element_ty), mask=m_key)


@triton.jit
def sum_of_parts_kernel(p_parts, p_sum, SIZE, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """(PARTS, SIZE) in float32 -> (SIZE,)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in tl.static_range(PARTS):
        total += tl.load(p_parts + i, mask=i < SIZE, other=0.0)
        p_parts += SIZE
    tl.store(p_sum + i, total.to(p_sum.dtype.element_ty), mask=i < SIZE)


@triton.jit
def _visible(i_key, first, i_query):
    return (i_key >= first) & (i_key <= i_query)


@triton.jit
def _block(p_order, rank, ORDERED: tl.constexpr, SIZE: tl.constexpr):
    """Where the block of SIZE tokens starts that is `rank`-th in p_order, which has blocks of ORDERED tokens."""
    SPLIT: tl.constexpr = ORDERED // SIZE
    return tl.load(p_order + rank // SPLIT) * ORDERED + rank % SPLIT * SIZE


@triton.jit
def _queries_of_program(p_order, H: tl.constexpr, ORDERED: tl.constexpr, PACK: tl.constexpr, TOKENS: tl.constexpr):
    program = tl.program_id(0)
    return _block(p_order, program // (H // PACK), ORDERED, TOKENS), program % (H // PACK) * PACK


@triton.jit
def _rows(
    start, head, N, H: tl.constexpr, K: tl.constexpr, DIM: tl.constexpr, PACK: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Of each row its token; of each element where it is in (N, H, K) and whether it is there."""
    i = tl.arange(0, PACK * TOKENS)
    i_token = start + i % TOKENS
    i_dim = tl.arange(0, DIM)[None]
    i_row = (i_token.to(tl.int64) * H + head + i // TOKENS)[:, None] * K + i_dim
    return i_token, i_row, (i_token < N)[:, None] & (i_dim < K)


@triton.jit
def _i_statistic(head, i_token, N, PACK: tl.constexpr, TOKENS: tl.constexpr):
    """Where each row is in (H, N)."""
    return (head + tl.arange(0, PACK * TOKENS) // TOKENS).to(tl.int64) * N + i_token


@triton.jit
def _keys(
    p, start, N, H: tl.constexpr, K: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """A tile (ROWS, DIM) of one head of (N, H, K), p of that head; rows outside of the N tokens are 0."""
    i, i_dim = tl.arange(0, ROWS)[:, None], tl.arange(0, DIM)[None]
    p = p + start.to(tl.int64) * (H * K) + (i * (H * K) + i_dim)
    if MASKED:
        return tl.load(p, mask=(start + i >= 0) & (start + i < N) & (i_dim < K), other=0.0)
    elif K < DIM:
        return tl.load(p, mask=i_dim < K, other=0.0)
    else:
        return tl.load(p)


@triton.jit
def _tiles_of_queries(p_first, start, N, TOKENS: tl.constexpr, KEYS: tl.constexpr):
    """Where tiles left of the diagonal end, how many tiles need a mask, and how many do not.

    From the right: those on the diagonal, from base on; full ones; those that only some of the queries see.
    """
    base = start - (KEYS - TOKENS if KEYS > TOKENS else 0)
    lowest = tl.load(p_first + start, mask=start < N, other=base)  # nothing is left of a block behind all tokens
    highest = tl.load(p_first + tl.minimum(start + TOKENS, N) - 1)
    left = (tl.maximum(base - lowest, 0) + KEYS - 1) // KEYS
    full = tl.minimum(tl.maximum(base - highest, 0) // KEYS, left)
    return base, (TOKENS // KEYS if TOKENS > KEYS else 1) + left - full, full


@triton.jit
def _tile_of_keys(i, base, full, TOKENS: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr):
    """Where the i-th tile of those with a mask, or without, starts."""
    if MASKED:
        DIAGONAL: tl.constexpr = TOKENS // KEYS if TOKENS > KEYS else 1
        return base + tl.where(i < DIAGONAL, i, DIAGONAL - 1 - full - i) * KEYS
    else:
        return base - (i + 1) * KEYS


@triton.jit
def _tiles_of_keys(p_last, start, N, KEYS: tl.constexpr, QUERIES: tl.constexpr):
    """How many tiles of queries see some of the keys, how many stand on the diagonal, and how many see all keys.

    Counted from `start` on; those that see all keys follow those on the diagonal.
    """
    end = tl.load(p_last + tl.minimum(start + KEYS, N) - 1) + 1
    end_of_all = tl.load(p_last + tl.minimum(start, N - 1)) + 1
    tiles = (tl.maximum(end - start, 0) + QUERIES - 1) // QUERIES
    diagonal = tl.minimum(KEYS // QUERIES if KEYS > QUERIES else 1, tiles)
    full = tl.maximum(tl.maximum(end_of_all - start, 0) // QUERIES - diagonal, 0)
    return tiles, diagonal, full


@triton.jit
def _tile_of_queries(i, diagonal, full, MASKED: tl.constexpr):
    if MASKED:
        return tl.where(i < diagonal, i, i + full)
    else:
        return diagonal + i
