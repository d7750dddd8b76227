"""The two Triton kernels of `rg_lru_scan_triton`: one pass over memory each way. Math and shapes as in `rg_lru_scan`.

A tile is SEGMENTS * ROWS steps of time of CHANNELS channels of one batch row; the tiles of the same channels along time
are a chain. A tile is an affine map of the state, h -> a h + b, and so is any run of tiles. Each program
 1. takes a ticket, which is its tile: the tiles before it have started, so waiting for them always ends;
 2. loads the whole tile into registers. Rows are a tuple, not a tensor axis, so every load is in flight before the
    first use, and stepping over time is one multiply-add without any exchange between threads;
 3. folds each segment to a map, scans the maps over the segments, and publishes the map of the whole tile;
 4. looks back along its chain for the carry: the state that leaves the nearest complete map, through those after it;
 5. publishes its own complete map, replays its rows from the carry, and stores them.
The backward kernel does the same with time reversed. Single-pass look-back: Merrill and Garland 2016, applied to maps.

A published map is one 64-bit word per channel: b in the low half, a in the high half as its bits + 1. A word is never
torn, so it needs no flag and no fence; 0 means not published; a = 0 means complete: what came before does not matter.

Names: p_ pointer, i_ index, m_ mask, s segment, c channel; tiles are (SEGMENTS, CHANNELS) tensors, one for each row.
SEGMENTS * CHANNELS is 64 a warp, two or one a thread: every array, of 16, 32 or 64 bits, then has the same layout, and
no value is held by two threads. The look-back needs that: two threads that poll one word may see different values.

VARLEN: one row holds sequences end to end, and states have a row each. `lay_out_kernel` says which tokens are a first
one, a reset, a last one, and which tiles have none: these run the plain code, and touch no state.

PDL: the kernel may start while the one that clears the words ends, and waits for that before it touches anything.
"""  # SPDX-License-Identifier: Apache-2.0

try:
    import triton
    import triton.language as tl

    from .rg_lru_scan_triton_math import AMD, PTX, decay, load, reciprocal, sigmoid, square_root, store, to_float32
except ImportError as error:
    raise ImportError("Triton is not installed") from error


COMPLETE = tl.constexpr(1 << 32)  # the published map h -> 0
UNCHANGED = tl.constexpr((0x3F800000 + 1) << 32)  # the published map h -> h
SIZES = ["B", "T"]  # compile once, whatever these are
SINGLE, SEVERAL = tl.constexpr(1), tl.constexpr(2)  # kinds of a tile that has marks, see `lay_out_kernel`
PUBLISHED = tl.constexpr(1 << 30)  # in a vote of the look-back: all words are there


@triton.jit
def compose(a_1, b_1, a_2, b_2):
    """The map h -> a_2 (a_1 h + b_1) + b_2."""
    return a_1 * a_2, tl.fma(a_2, b_1, b_2)


@triton.jit
def _compose_twice(a_1, b_1, a_before_1, b_before_1, a_2, b_2, a_before_2, b_before_2):
    """Of two neighbouring runs of segments: the map of both, and the map of both without the last segment."""
    return a_1 * a_2, tl.fma(a_2, b_1, b_2), a_1 * a_before_2, tl.fma(a_before_2, b_1, b_before_2)


@triton.jit
def _scan_segments(a, b, SEGMENTS: tl.constexpr):
    """Maps of the segments -> maps from the tile's start to each segment's end, and to each segment's start."""
    one, zero = tl.full(a.shape, 1.0, tl.float32), tl.full(a.shape, 0.0, tl.float32)
    if SEGMENTS == 1:
        return a, b, one, zero
    else:
        return tl.associative_scan((a, b, one, zero), 0, _compose_twice)


@triton.jit
def _pack(a, b):
    high = (a.to(tl.int32, bitcast=True) & 0x7FFFFFFF) + 1  # a >= 0: dropping the sign keeps any NaN from becoming 0
    return (high.to(tl.int64) << 32) | (b.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _address(p_words):
    """Of no known tensor: in one of less than 2 GB, AMD's compiler leaves out what `.wt` and `.cv` ask for."""
    if AMD:  # no instruction, but the compiler cannot look through it
        p_words = tl.inline_asm_elementwise("", "=s,0", [p_words.to(tl.int64)], dtype=tl.int64, is_pure=True, pack=1)
    return p_words.to(tl.pointer_type(tl.int64))


@triton.jit
def _publish(p_word, a, b, mask):
    """The word is read soon, and written again: it should not give way to the tiles that pass through the cache."""
    tl.store(p_word, _pack(a, b), mask, cache_modifier=".wt" if AMD else "", eviction_policy="evict_last")


@triton.jit
def _poll(p_words, mask, other):
    """Past every cache that other programs do not write to; for AMD the compiler drops `volatile`."""
    return tl.load(p_words, mask, other, cache_modifier=".cv" if AMD else "", volatile=not AMD)


@triton.jit
def _and(a, b):
    return a & b


@triton.jit
def _is_waiting(high, i_word, is_word, WORDS: tl.constexpr):
    """Until all words are published and one of them is complete in every channel: one vote, so one barrier a poll.

    Each thread votes for every word but its own, and for that too if it is complete; what all agree on counts.
    """
    every: tl.constexpr = PUBLISHED | ((1 << WORDS) - 1)
    vote = tl.where(high == 1, every, every & ~(1 << i_word))
    vote = tl.where(is_word, tl.where(high == 0, 0, vote), every)
    return tl.reduce(tl.reduce(vote, 1, _and), 0, _and) <= PUBLISHED


@triton.jit
def _look_back(p_words, i_chain, n_chains, n_before, SEGMENTS: tl.constexpr, CHANNELS: tl.constexpr):
    """The state that leaves the n_before earlier tiles of a chain, (CHANNELS,), from the words of the last few.

    Waits until one of these is complete, and applies the maps after it one by one. Whichever is complete by then, these
    are the same operations in the same order, so the result does not depend on timing. The scan goes from warp to warp
    in order, but pairs up the rows within a warp: where CHANNELS < 64, one row of a warp is a word, the others are the
    map h -> h, which changes no bit.
    """
    GROUP: tl.constexpr = 64 // CHANNELS if CHANNELS < 64 else 1  # rows of a warp
    WORDS: tl.constexpr = SEGMENTS // GROUP
    i_s = tl.arange(0, SEGMENTS)[:, None]
    is_word = i_s % GROUP == 0
    i_word = i_s // GROUP
    i_tile = n_before - WORDS + i_word
    offset = (i_tile.to(tl.int64) * n_chains + i_chain) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    other = tl.where(is_word, COMPLETE, UNCHANGED)
    state = tl.full([CHANNELS], 0.0, tl.float32)
    waiting = n_before > 0
    while waiting:
        words = _poll(_address(p_words) + offset, is_word & (i_tile >= 0), other)
        high = (words >> 32).to(tl.int32)
        waiting = _is_waiting(high, i_word, is_word, WORDS)
        if not waiting:
            a = (high - 1).to(tl.float32, bitcast=True)
            b = words.to(tl.int32).to(tl.float32, bitcast=True)
            if SEGMENTS > 1:
                a, b = tl.associative_scan((a, b), 0, compose)
            state = tl.sum(tl.where(i_s == SEGMENTS - 1, b, 0.0), 0)
    return state


@triton.jit
def _take_tile(p_words, n_tiles, CHANNELS: tl.constexpr, CHAINED: tl.constexpr):
    if CHAINED:  # the ticket counter lies behind the words
        p_ticket = (p_words + n_tiles.to(tl.int64) * CHANNELS).to(tl.pointer_type(tl.int32))
        return tl.atomic_add(p_ticket, 1, sem="relaxed")
    else:
        return tl.program_id(0)


@triton.jit
def _load_marks(
    p_marks, p_reset, n_steps, i_t, i_s, t, T, VARLEN: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """(kind, marks, ends, n, n_end) as in `lay_out_kernel`: of each segment, bits 31 - i and 15 - i of marks say that
    row i is a reset and a first one, bits 31 - i and i of ends that it is a first one and no reset, and a last one."""
    if VARLEN:
        p_segment, count = p_marks + n_steps + i_t * SEGMENTS + i_s, n_steps * SEGMENTS
        words, n, n_end = tl.load(p_segment), tl.load(p_segment + count), tl.load(p_segment + 2 * count)
        return tl.load(p_marks + i_t), words.to(tl.int32), (words >> 32).to(tl.int32), n, n_end
    else:
        marks = t * 0
        if p_reset is not None:  # row by row: a sum over rows would lie in other threads, and each of its bits be moved
            for i in tl.static_range(ROWS):
                marks |= tl.load(p_reset + t + i, mask=t + i < T, other=0).to(tl.int32) << (31 - i)
        return 0 if p_reset is None else SEVERAL, marks, marks, marks, marks


@triton.jit
def _has(marks, bit: tl.constexpr):
    return (marks & ((1 << bit) if bit < 31 else -(1 << 31))) != 0


@triton.jit
def _state_of(p_states, n, marks, C, c, IS_THERE: tl.constexpr):
    """One state of each segment that has a mark, asked for long before it is used; else 0."""
    if IS_THERE:
        return tl.load(p_states + (n * C + c), mask=tl.where(c < C, marks, 0) != 0, other=0.0)
    else:
        return tl.zeros(c.shape, tl.float32)


@triton.jit
def _forward_maps(
    rs, gs, xs, log_decay, marks, entering,
    MARKED: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of each row its map, and of each segment that of all its rows, which forgets what came before its last start."""
    a_rows, b_rows = (), ()
    a_s, b_s = tl.full(log_decay.shape, 1.0, tl.float32), tl.full(log_decay.shape, 0.0, tl.float32)
    for i in tl.static_range(ROWS):
        reset = _has(marks, 31 - i) if MARKED else None
        a, y = decay(log_decay, sigmoid(to_float32(rs[i]), EXACT), EXACT, reset)
        b = (square_root(y, EXACT) * sigmoid(to_float32(gs[i]), EXACT)) * to_float32(xs[i])
        if not (MARKED and VARLEN):
            a_s, b_s = a_s * a, tl.fma(a, b_s, b)
        a_rows, b_rows = a_rows + (a,), b_rows + (b,)
    if MARKED and VARLEN:  # behind all rows: the state is on its way meanwhile
        for i in tl.static_range(ROWS):
            a_s, b_s = a_s * a_rows[i], tl.fma(a_rows[i], tl.where(_has(marks, 15 - i), entering, b_s), b_rows[i])
        a_s = tl.where((marks & 0xFFFF) != 0, 0.0, a_s)
    return a_rows, b_rows, a_s, b_s


@triton.jit
def _forward_rows(
    a_rows, b_rows, h, marks, ends, n, entering, p_initial_state, p_last_state, p_sequence, p_hidden, t, T, C, c,
    KIND: tl.constexpr, HAS_INITIAL: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Stores the states of all rows, given the one that enters the first, and those that leave sequences."""
    firsts, ends = marks & 0xFFFF, tl.where(c < C, ends, 0)  # masks of channels must not be broadcast from segments
    last_first, others = firsts & -firsts, ends & ((firsts - 1) << 16)
    if KIND == SEVERAL:
        n = tl.load(p_sequence + t, mask=t < T, other=0)
    for i in tl.static_range(ROWS):
        if KIND == SEVERAL:
            n = tl.load(p_sequence + t + i, mask=_has(firsts, 15 - i), other=n)
        if KIND > 0:
            h = tl.where(_has(last_first, 15 - i), entering, h)
        if KIND == SEVERAL and HAS_INITIAL:
            h = tl.load(p_initial_state + (n * C + c), mask=_has(others, 31 - i), other=h)
        h = tl.fma(a_rows[i], h, b_rows[i])
        store(p_hidden + i * C, h, (c < C) & (t + i < T), MASKED)
        if KIND > 0:
            tl.store(p_last_state + (n * C + c), h, mask=_has(ends, i))


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    p_x, p_recurrence_gate, p_input_gate, p_log_decay, p_initial_state, p_reset,
    p_hidden, p_last_state, p_words, p_marks, p_sequence,
    B, T, C,
    HAS_INITIAL: tl.constexpr, HAS_RESET: tl.constexpr, VARLEN: tl.constexpr, CHAINED: tl.constexpr,
    MASKED: tl.constexpr, EXACT: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    n_blocks, n_steps = tl.cdiv(C, CHANNELS), tl.cdiv(T, SEGMENTS * ROWS)
    n_chains = B * n_blocks
    tile = _take_tile(p_words, n_chains * n_steps, CHANNELS, CHAINED)
    i_t, i_chain = tile // n_chains, tile % n_chains
    i_b = (i_chain // n_blocks).to(tl.int64)
    i_s = tl.arange(0, SEGMENTS)[:, None]
    c = (i_chain % n_blocks) * CHANNELS + tl.arange(0, CHANNELS)[None, :] + i_s * 0
    t = i_t * (SEGMENTS * ROWS) + i_s * ROWS  # of each segment's first row
    first = (i_b * T + i_t * (SEGMENTS * ROWS)) * C  # where the tile starts; 64-bit, the rest fits 32
    offset = i_s * (ROWS * C) + c
    m_c = c < C
    p_row = p_reset + i_b * T if HAS_RESET else None
    # First of all, so that the state which they name is asked for together with the rows.
    kind, marks, ends, n, n_end = _load_marks(p_marks, p_row, n_steps, i_t, i_s, t, T, VARLEN, SEGMENTS, ROWS)
    # Every load comes before the first store: past one, the compiler may not move a load.
    rs, gs, xs = (), (), ()
    for i in tl.static_range(ROWS):
        m = m_c & (t + i < T)  # past the end: no input, nothing forgotten
        rs = rs + (load(p_recurrence_gate + first + i * C + offset, m, float("-inf"), MASKED),)
        gs = gs + (load(p_input_gate + first + i * C + offset, m, 0.0, MASKED),)
        xs = xs + (load(p_x + first + i * C + offset, m, 0.0, MASKED),)
    log_decay = load(p_log_decay + c, m_c, 0.0, MASKED)
    goes_on = (ends >> 16) & (marks & 0xFFFF) & -(marks & 0xFFFF)  # the last first one, if it does
    entering = _state_of(p_initial_state, n, goes_on, C, c, VARLEN and HAS_INITIAL)
    if (kind if VARLEN or HAS_RESET else 0) == 0:
        a_rows, b_rows, a_s, b_s = _forward_maps(rs, gs, xs, log_decay, marks, entering, False, VARLEN, EXACT, ROWS)
    else:
        a_rows, b_rows, a_s, b_s = _forward_maps(rs, gs, xs, log_decay, marks, entering, True, VARLEN, EXACT, ROWS)
    a_end, b_end, a_start, b_start = _scan_segments(a_s, b_s, SEGMENTS)

    m_end = i_s == SEGMENTS - 1
    carry = tl.full([SEGMENTS, CHANNELS], 0.0, tl.float32)
    if HAS_INITIAL and not VARLEN:
        if i_t == 0:
            carry = tl.load(p_initial_state + i_b * C + c, mask=m_c, other=0.0)
    if CHAINED:
        p_word = _address(p_words) + tile.to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)[None, :] + i_s * 0
        if i_t > 0:
            _publish(p_word, a_end, b_end, m_end)
        carry += _look_back(p_words, i_chain, n_chains, i_t, SEGMENTS, CHANNELS)[None, :]
    state = tl.fma(a_end, carry, b_end)
    if CHAINED:
        _publish(p_word, tl.zeros_like(state), state, m_end)

    rows = (a_rows, b_rows, tl.fma(a_start, carry, b_start), marks, ends, n_end, entering)
    places = (p_initial_state, p_last_state, p_sequence, p_hidden + first + offset, t, T, C, c)
    for KIND in tl.static_range(SEVERAL + 1):
        if (kind if VARLEN else 0) == KIND:
            _forward_rows(*rows, *places, KIND, HAS_INITIAL, MASKED, ROWS)
    if not VARLEN and (i_t + 1) * (SEGMENTS * ROWS) >= T:
        tl.store(p_last_state + i_b * C + c, state, mask=m_end & m_c)


@triton.jit
def _backward_fold(
    rs, ds, log_decay, marks, ends, d_last,
    KIND: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of each segment the map of its rows, from the last to the first, which forgets what is behind its first end."""
    a_s, b_s = tl.full(log_decay.shape, 1.0, tl.float32), tl.full(log_decay.shape, 0.0, tl.float32)
    for i in tl.static_range(ROWS - 1, -1, -1):
        reset = _has(marks, 31 - i) if KIND == SEVERAL else None
        a, _ = decay(log_decay, sigmoid(to_float32(rs[i]), EXACT), EXACT, reset)
        if KIND > 0 and VARLEN:
            b_s = tl.where(_has(ends, i), d_last, b_s)
        a_s, b_s = a_s * a, a * (b_s + to_float32(ds[i]))
    if KIND > 0 and VARLEN:
        a_s = tl.where((ends & 0xFFFF) != 0, 0.0, a_s)
    return a_s, b_s


@triton.jit
def _compute_again(x):
    """x, but the compiler does not know: what is computed from it is computed again, instead of held in registers."""
    if PTX and x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    else:
        return x


@triton.jit
def _backward_rows(
    rs, ds, gs, xs, hs, k, log_decay, marks, ends, n, entering, d_last,
    p_initial_state, p_d_last_state, p_d_initial_state, p_sequence,
    p_d_x, p_d_recurrence_gate, p_d_input_gate, first, offset, i_b, t, T, C: tl.constexpr, c,
    KIND: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_D_LAST: tl.constexpr, VARLEN: tl.constexpr,
    MASKED: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of each row, given the k that enters the last; returns the segments' d_log_decay."""
    d_log_decay = tl.full(log_decay.shape, 0.0, tl.float32)
    firsts, cuts = marks & 0xFFFF, marks | (marks >> 16)  # nothing comes over a cut: a first one or a reset
    last_first, others = firsts & -firsts, tl.where(c < C, ends & ((firsts - 1) << 16), 0)
    stored, other_ends = tl.where(c < C, firsts, 0), tl.where(c < C, ends & (ends - 1), 0)
    if KIND == SEVERAL and VARLEN:
        n = tl.load(p_sequence + t + (ROWS - 1), mask=t + (ROWS - 1) < T, other=0)
    for i in tl.static_range(ROWS - 1, -1, -1):
        reset = _has(marks, 31 - i) if KIND > 0 else None
        if KIND == SEVERAL and VARLEN:
            n = tl.load(p_sequence + t + i, mask=_has(ends, i), other=n)
        r, s = sigmoid(to_float32(_compute_again(rs[i])), EXACT), sigmoid(to_float32(gs[i]), EXACT)
        a, y = decay(log_decay, r, EXACT, reset)
        multiplier = square_root(y, EXACT)
        # Differs: 1 / sqrt(y) is bounded at 2 * 1000, as in `BoundedSqrt`; the paper has no bound.
        inverse = tl.minimum(reciprocal(multiplier, EXACT), 2000.0)
        x, h_before, dh = to_float32(xs[i]), to_float32(hs[i]), to_float32(ds[i])
        if KIND > 0:  # a is 0 at a reset, and so is d_log_a where h_before is finite
            before = entering
            if KIND == SEVERAL and VARLEN and HAS_INITIAL:
                before = tl.where(_has(last_first, 15 - i), entering, 0.0)
                before = tl.load(p_initial_state + (n * C + c), mask=_has(others, 31 - i), other=before)
            h_before = tl.where(_has(cuts, 15 - i) if VARLEN else reset, before, h_before)
        if HAS_INITIAL and not VARLEN and i == 0:
            h_before += tl.load(p_initial_state + i_b * C + c, mask=(c < C) & (t == 0), other=0.0)
        if KIND > 0 and VARLEN:  # what comes from behind a sequence's last row is another sequence's
            k = tl.where(_has(ends, i), d_last, k)
            if KIND == SEVERAL and HAS_D_LAST:
                k = tl.load(p_d_last_state + (n * C + c), mask=_has(other_ends, i), other=k)
        dh += k
        d_log_a = a * tl.fma(-a * inverse, s * x, h_before)  # times dh
        k = a * dh
        if KIND > 0 and VARLEN and HAS_INITIAL:
            tl.store(p_d_initial_state + (n * C + c), k, mask=_has(stored, 15 - i))
        d_x = dh * (multiplier * s)
        d_r = dh * d_log_a * r
        d_log_decay += d_r
        m = (c < C) & (t + i < T)
        store(p_d_x + first + i * C + offset, d_x, m, MASKED)
        store(p_d_input_gate + first + i * C + offset, d_x * x * (1.0 - s), m, MASKED)
        store(p_d_recurrence_gate + first + i * C + offset, d_r * log_decay * (1.0 - r), m, MASKED)
    return d_log_decay


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    p_x, p_recurrence_gate, p_input_gate, p_log_decay, p_initial_state, p_reset, p_hidden, p_d_hidden, p_d_last_state,
    p_d_x, p_d_recurrence_gate, p_d_input_gate, p_d_log_decay, p_d_initial_state, p_words, p_marks, p_sequence,
    B, T, C: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_RESET: tl.constexpr, VARLEN: tl.constexpr, CHAINED: tl.constexpr,
    HAS_D_LAST: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """dh_t = d_hidden_t + k_{t+1} with k_t = a_t dh_t: the maps are those of k, from a tile's end to its start.

    C is a constant here: rows become immediate offsets, which compiles and runs faster. The forward one gains nothing.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    n_blocks, n_steps = tl.cdiv(C, CHANNELS), tl.cdiv(T, SEGMENTS * ROWS)
    n_chains = B * n_blocks
    tile = _take_tile(p_words, n_chains * n_steps, CHANNELS, CHAINED)
    n_before, i_chain = tile // n_chains, tile % n_chains
    i_t = n_steps - 1 - n_before
    i_b = (i_chain // n_blocks).to(tl.int64)
    i_s = SEGMENTS - 1 - tl.arange(0, SEGMENTS)[:, None]  # counts from the tile's end
    i_c = tl.arange(0, CHANNELS)
    c = (i_chain % n_blocks) * CHANNELS + i_c[None, :] + i_s * 0
    t = i_t * (SEGMENTS * ROWS) + i_s * ROWS
    first = (i_b * T + i_t * (SEGMENTS * ROWS)) * C
    offset = i_s * (ROWS * C) + c
    m_c = c < C
    p_row = p_reset + i_b * T if HAS_RESET else None
    kind, marks, ends, n, n_end = _load_marks(p_marks, p_row, n_steps, i_t, i_s, t, T, VARLEN, SEGMENTS, ROWS)
    rs, ds, gs, xs, hs = (), (), (), (), ()
    for i in tl.static_range(ROWS):
        m = m_c & (t + i < T)
        rs = rs + (load(p_recurrence_gate + first + i * C + offset, m, float("-inf"), MASKED),)
        ds = ds + (load(p_d_hidden + first + i * C + offset, m, 0.0, MASKED),)
        gs = gs + (load(p_input_gate + first + i * C + offset, m, 0.0, MASKED),)
        xs = xs + (load(p_x + first + i * C + offset, m, 0.0, MASKED),)
        # the state before each row; the row before the sequence is the initial state, added below
        hs = hs + (load(p_hidden + first + (i - 1) * C + offset, m & (t + i > 0), 0.0, MASKED or i == 0),)
    log_decay = load(p_log_decay + c, m_c, 0.0, MASKED)
    log_decay = tl.where(log_decay == 0.0, -1e-37, log_decay)  # of 0, 1 - a^2 would be -0, and 1 / sqrt of that -inf
    goes_on = (ends >> 16) & (marks & 0xFFFF) & -(marks & 0xFFFF)
    entering = _state_of(p_initial_state, n, goes_on, C, c, VARLEN and HAS_INITIAL)
    d_last = _state_of(p_d_last_state, n_end, ends & 0xFFFF, C, c, VARLEN and HAS_D_LAST)
    folded = (log_decay, marks, ends, d_last)
    LEAST: tl.constexpr = SINGLE if VARLEN else 0  # one path for tiles without a mark and with single ones
    if (kind if VARLEN or HAS_RESET else 0) <= SINGLE:
        a_s, b_s = _backward_fold(rs, ds, *folded, LEAST, VARLEN, EXACT, ROWS)
    else:
        a_s, b_s = _backward_fold(rs, ds, *folded, SEVERAL, VARLEN, EXACT, ROWS)
    a_end, b_end, a_start, b_start = _scan_segments(a_s, b_s, SEGMENTS)

    m_end = i_s == 0
    carry = tl.full([SEGMENTS, CHANNELS], 0.0, tl.float32)
    if HAS_D_LAST and not VARLEN:
        if n_before == 0:
            carry = tl.load(p_d_last_state + i_b * C + c, mask=m_c, other=0.0)
    if CHAINED:
        p_word = _address(p_words) + tile.to(tl.int64) * CHANNELS + i_c[None, :] + i_s * 0
        if n_before > 0:
            _publish(p_word, a_end, b_end, m_end)
        carry += _look_back(p_words, i_chain, n_chains, n_before, SEGMENTS, CHANNELS)[None, :]
    state = tl.fma(a_end, carry, b_end)
    if CHAINED:
        _publish(p_word, tl.zeros_like(state), state, m_end)

    k = tl.fma(a_start, carry, b_start)
    outputs = (p_d_x, p_d_recurrence_gate, p_d_input_gate, first, offset, i_b, t, T, C, c)
    states = (marks, ends, n, entering, d_last, p_initial_state, p_d_last_state, p_d_initial_state, p_sequence)
    rows = (rs, ds, gs, xs, hs, k, log_decay)
    if (kind if VARLEN or HAS_RESET else 0) <= SINGLE:
        total = _backward_rows(*rows, *states, *outputs, LEAST, HAS_INITIAL, HAS_D_LAST, VARLEN, MASKED, EXACT, ROWS)
    else:
        total = _backward_rows(*rows, *states, *outputs, SEVERAL, HAS_INITIAL, HAS_D_LAST, VARLEN, MASKED, EXACT, ROWS)

    c_tile = (i_chain % n_blocks) * CHANNELS + i_c
    tl.store(p_d_log_decay + (i_b * n_steps + i_t) * C + c_tile, tl.sum(total, 0), mask=c_tile < C)
    if HAS_INITIAL and not VARLEN:
        if i_t == 0:
            tl.store(p_d_initial_state + i_b * C + c, state, mask=m_end & m_c)
