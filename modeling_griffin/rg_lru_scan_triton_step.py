"""The Triton kernel of `rg_lru_scan_triton` for one step of time, as in decoding: no tiles, no carry.

A decode step is as long as its launch and one trip to memory. So every load comes first, none waits for another, and
the grid gives batch and channels without a division.
"""  # SPDX-License-Identifier: Apache-2.0

try:
    import triton
    import triton.language as tl

    from .rg_lru_scan_triton_math import decay, load, sigmoid, square_root, store, to_float32
except ImportError as error:
    raise ImportError("Triton is not installed") from error


@triton.jit
def step_kernel(
    p_x, p_recurrence_gate, p_input_gate, p_log_decay, p_initial_state, p_reset,
    p_hidden, p_last_state,
    C,
    HAS_INITIAL: tl.constexpr, HAS_RESET: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    offset, m = i_b * C + c, c < C
    r = load(p_recurrence_gate + offset, m, 0.0, MASKED)
    i = load(p_input_gate + offset, m, 0.0, MASKED)
    x = load(p_x + offset, m, 0.0, MASKED)
    log_decay = load(p_log_decay + c, m, 0.0, MASKED)
    if HAS_INITIAL:
        state = load(p_initial_state + offset, m, 0.0, MASKED)
    if HAS_RESET:
        reset = tl.load(p_reset + i_b) != 0

    a, y = decay(log_decay, sigmoid(to_float32(r), EXACT), EXACT)
    multiplier = square_root(y, EXACT)
    if HAS_RESET:
        a = tl.where(reset, 0.0, a)
        multiplier = tl.where(reset, 1.0, multiplier)
    h = (multiplier * sigmoid(to_float32(i), EXACT)) * to_float32(x)
    if HAS_INITIAL:
        h = tl.fma(a, state, h)
    store(p_hidden + offset, h, m, MASKED)
    store(p_last_state + offset, h, m, MASKED)
