"""The Triton kernels of `chunk_summary`: short segments of a chunk, each reduced to one step a channel.

Each program walks over the rows of a segment. Segments are so many that waiting programs cost nothing, and what they
leave, 1 / ROWS of what they read, is folded afterwards.
"""

try:
    import triton
    import triton.language as tl

    from ..rg_lru_scan_triton_math import decay, load, sigmoid, square_root, store, to_float32
except ImportError as error:
    raise ImportError("Triton is not installed") from error


@triton.jit
def summary_kernel(
    p_x, p_recurrence_gate, p_input_gate, p_log_decay, p_reset,
    p_products, p_states,
    T, C,
    HAS_RESET: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    segment, i_b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m = c < C
    log_decay = load(p_log_decay + c, m, 0.0, MASKED)
    product, state = tl.full((CHANNELS,), 1.0, tl.float32), tl.zeros((CHANNELS,), tl.float32)
    for t in range(segment * ROWS, tl.minimum(segment * ROWS + ROWS, T)):
        offset = (i_b * T + t) * C + c
        r = load(p_recurrence_gate + offset, m, 0.0, MASKED)
        i = load(p_input_gate + offset, m, 0.0, MASKED)
        x = load(p_x + offset, m, 0.0, MASKED)
        reset = tl.load(p_reset + i_b * T + t) != 0 if HAS_RESET else None
        a, y = decay(log_decay, sigmoid(to_float32(r), EXACT), EXACT, reset)
        state = tl.fma(a, state, (square_root(y, EXACT) * sigmoid(to_float32(i), EXACT)) * to_float32(x))
        product = product * a
    out = (i_b * tl.num_programs(0) + segment) * C + c
    store(p_products + out, product, m, MASKED)
    store(p_states + out, state, m, MASKED)


@triton.jit
def backward_summary_kernel(
    p_d_hidden, p_recurrence_gate, p_log_decay, p_reset,
    p_products, p_owed,
    T, C,
    HAS_RESET: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    segment, i_b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m = c < C
    log_decay = load(p_log_decay + c, m, 0.0, MASKED)
    product, owed = tl.full((CHANNELS,), 1.0, tl.float32), tl.zeros((CHANNELS,), tl.float32)
    first, end = segment * ROWS, tl.minimum(segment * ROWS + ROWS, T)
    for back in range(first, end):
        t = first + end - 1 - back
        offset = (i_b * T + t) * C + c
        r = load(p_recurrence_gate + offset, m, 0.0, MASKED)
        d = load(p_d_hidden + offset, m, 0.0, MASKED)
        reset = tl.load(p_reset + i_b * T + t) != 0 if HAS_RESET else None
        a, _ = decay(log_decay, sigmoid(to_float32(r), EXACT), EXACT, reset)
        owed = a * (owed + to_float32(d))
        product = product * a
    out = (i_b * tl.num_programs(0) + segment) * C + c
    store(p_products + out, product, m, MASKED)
    store(p_owed + out, owed, m, MASKED)
