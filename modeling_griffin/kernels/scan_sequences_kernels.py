"""Kernels of the scan for sequences end to end: one lays them out for the scan's own kernels, one walks over tokens.

Names and PDL as in `rg_lru_scan_triton_kernels`.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error

from ..rg_lru_scan_triton_kernels import SEVERAL
from ..rg_lru_scan_triton_math import decay, load, sigmoid, square_root, store, to_float32


@triton.jit
def sequence_of(p_cu_seqlens, t, N, halvings):
    """How many of the N sequences end at or before t: the one that holds it, or N behind the last."""
    low, high = t * 0, t * 0 + N
    for _ in range(halvings):
        middle = (low + high) >> 1
        is_open = low < high
        is_later = tl.load(p_cu_seqlens + 1 + middle, mask=is_open, other=0) <= t
        low = tl.where(is_open & is_later, middle + 1, low)
        high = tl.where(is_open & (is_later == 0), middle, high)
    return low


@triton.jit
def _sequence_of_neighbours(p_cu_seqlens, t, first, COUNT: tl.constexpr, N, SAMPLES: tl.constexpr):
    """`sequence_of` for COUNT tokens from `first` on: one look at samples of all ends leaves few sequences."""
    step = tl.cdiv(N, SAMPLES)
    i = (tl.arange(0, SAMPLES) + 1) * step
    end = tl.load(p_cu_seqlens + i, mask=i <= N, other=0x7FFFFFFF)
    counts = tl.sum((end <= first).to(tl.int32) + ((end < first + COUNT).to(tl.int32) << 16), 0)
    least, most = (counts & 0xFFFF) * step, tl.minimum((counts >> 16) * step + step - 1, N)
    low, high = t * 0 + least, t * 0 + most
    between = most - least
    while between > 0:
        middle = (low + high) >> 1
        is_open = low < high
        is_later = tl.load(p_cu_seqlens + 1 + middle, mask=is_open, other=0) <= t
        low = tl.where(is_open & is_later, middle + 1, low)
        high = tl.where(is_open & (is_later == 0), middle, high)
        between >>= 1
    return low


@triton.jit(do_not_specialize=["N_WORDS", "T", "N"])
def lay_out_kernel(
    p_cu_seqlens, p_starts, p_reset, p_entering,
    p_words, p_marks, p_sequence, p_leaving,
    N_WORDS, T, N, C,
    HAS_STARTS: tl.constexpr, HAS_RESET: tl.constexpr, HAS_ENTERING: tl.constexpr, CHAINED: tl.constexpr,
    PDL: tl.constexpr, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, TILES: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """What the scan needs to know of sequences, and its words cleared as by `clear_kernel`.

    p_sequence (T,): the sequence of each token. p_marks: words of 64 bits.
    First the kind of each tile: 0 where no token is a first one, a last one or a reset; SINGLE where a segment of ROWS
    tokens has at most one first and one last one, and no reset but a first one; else SEVERAL.
    Then of each segment: bit 15 - i says that token i is a sequence's first one, bit 31 - i a reset, bit 32 + i a last
    one, bit 63 - i a first one and no reset. Then of each segment the sequence of its last first one, and then of each
    that of its first last one.
    What leaves an empty sequence, (N, C), is what enters.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if CHAINED:
        i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(p_words + i, tl.full([BLOCK], 0, tl.int64), mask=i < N_WORDS)

    i_s, i_r = tl.arange(0, SEGMENTS)[:, None], tl.arange(0, ROWS)[None, :]
    t = program * (SEGMENTS * ROWS) + i_s * ROWS + i_r
    m = t < T
    n = _sequence_of_neighbours(p_cu_seqlens, t, program * (SEGMENTS * ROWS), SEGMENTS * ROWS, N, SAMPLES)
    tl.store(p_sequence + t, n, mask=m)
    is_first = m & (tl.load(p_cu_seqlens + n) == t)
    is_last = m & (n < N) & (tl.load(p_cu_seqlens + n + 1, mask=n < N, other=-1) == t + 1)
    is_reset = is_first
    if HAS_STARTS:
        is_reset = is_reset & ((n == N) | (tl.load(p_starts + n, mask=m & (n < N), other=0) != 0))
    if HAS_RESET:
        is_reset = is_reset | (tl.load(p_reset + t, mask=m, other=0) != 0)
    is_first = is_first & (n < N)
    goes_on = is_first & (is_reset == 0)
    marks = (is_first.to(tl.int64) << (15 - i_r)) | (is_reset.to(tl.int64) << (31 - i_r))
    marks |= (is_last.to(tl.int64) << (32 + i_r)) | (goes_on.to(tl.int64) << (63 - i_r))
    marks = tl.sum(marks, 1)
    firsts, resets, lasts = marks & 0xFFFF, (marks >> 16) & 0xFFFF, (marks >> 32) & 0xFFFF
    several = ((firsts & (firsts - 1)) | (lasts & (lasts - 1)) | (resets & ~firsts)) != 0
    kind = tl.where(several, SEVERAL, ((firsts | lasts) != 0).to(tl.int32))
    kind = tl.max(tl.reshape(kind, TILES, SEGMENTS // TILES), 1)
    n_first = tl.max(tl.where(is_first, n, 0), 1)
    n_last = tl.min(tl.where(is_last, n, 0x7FFFFFFF), 1)
    n_tiles = tl.cdiv(T, ROWS * (SEGMENTS // TILES))
    i_tile = program * TILES + tl.arange(0, TILES)
    tl.store(p_marks + i_tile, kind, mask=i_tile < n_tiles)
    segment, n_segments = program * SEGMENTS + tl.arange(0, SEGMENTS), n_tiles * (SEGMENTS // TILES)
    tl.store(p_marks + n_tiles + segment, marks, mask=segment < n_segments)
    tl.store(p_marks + n_tiles + n_segments + segment, n_first, mask=segment < n_segments)
    tl.store(p_marks + n_tiles + 2 * n_segments + segment, n_last, mask=segment < n_segments)

    c = tl.arange(0, CHANNELS)
    i_n = program
    while i_n < N:
        if tl.load(p_cu_seqlens + i_n) == tl.load(p_cu_seqlens + i_n + 1):
            row = i_n.to(tl.int64) * C
            for first in range(0, C, CHANNELS):
                state = tl.full([CHANNELS], 0.0, tl.float32)
                if HAS_ENTERING:
                    state = tl.load(p_entering + row + first + c, mask=first + c < C, other=0.0)
                tl.store(p_leaving + row + first + c, state, mask=first + c < C)
        i_n += tl.num_programs(0)


@triton.jit(do_not_specialize=["T", "N"])
def walk_kernel(
    p_x, p_recurrence_gate, p_input_gate, p_log_decay, p_initial_state, p_reset, p_cu_seqlens, p_starts,
    p_hidden, p_last_state,
    T, N, C,
    HAS_INITIAL: tl.constexpr, HAS_RESET: tl.constexpr, HAS_STARTS: tl.constexpr, MASKED: tl.constexpr,
    EXACT: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """N sequences end to end, token after token: for about one each. Program N has what lies behind the last."""
    i_n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m, is_sequence = c < C, i_n < N
    t = tl.load(p_cu_seqlens + i_n).to(tl.int64)
    end = tl.load(p_cu_seqlens + i_n + 1, mask=is_sequence, other=T).to(tl.int64)
    fresh = t < end
    if HAS_STARTS:
        fresh = fresh & ((i_n == N) | (tl.load(p_starts + i_n, mask=is_sequence, other=1) != 0))
    log_decay = load(p_log_decay + c, m, 0.0, MASKED)
    state = tl.full([CHANNELS], 0.0, tl.float32)
    if HAS_INITIAL:
        state = tl.load(p_initial_state + i_n * C + c, mask=m & is_sequence & (fresh == 0), other=0.0)
    while t < end:
        offset = t * C + c
        r = load(p_recurrence_gate + offset, m, 0.0, MASKED)
        i = load(p_input_gate + offset, m, 0.0, MASKED)
        x = load(p_x + offset, m, 0.0, MASKED)
        if HAS_RESET:
            fresh = fresh | (tl.load(p_reset + t) != 0)
        a, y = decay(log_decay, sigmoid(to_float32(r), EXACT), EXACT, fresh)
        state = tl.fma(a, state, (square_root(y, EXACT) * sigmoid(to_float32(i), EXACT)) * to_float32(x))
        store(p_hidden + offset, state, m, MASKED)
        fresh = t < 0  # never
        t += 1
    tl.store(p_last_state + i_n * C + c, state, mask=m & is_sequence)
