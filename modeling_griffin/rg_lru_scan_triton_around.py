"""Small kernels around those of `rg_lru_scan_triton_kernels`: clearing words, sums of partial gradients, a single step.

PDL: a kernel may start while the one before it ends (programmatic dependent launch, compute capability 9), and waits
for its end before it touches anything.
"""  # SPDX-License-Identifier: Apache-2.0

try:
    import triton
    import triton.language as tl

    from .rg_lru_scan_triton_math import decay, load, sigmoid, square_root, store, to_float32
except ImportError as error:
    raise ImportError("Triton is not installed") from error


@triton.jit(do_not_specialize=["N"])
def clear_kernel(p_words, N, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """N words of 64 bits become 0. The scan behind it gets into its place on the GPU meanwhile."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_words + i, tl.full([BLOCK], 0, tl.int64), mask=i < N)


@triton.jit(do_not_specialize=["N"])
def sum_rows_kernel(p_rows, p_sum, N, C, PDL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """rows (N, C) float32 -> their sum (C,), always in the same order. Program: CHANNELS channels."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    i = tl.arange(0, ROWS)[:, None]
    total = tl.full([ROWS, CHANNELS], 0.0, tl.float32)
    first = 0
    while first < N:
        mask = (first + i < N) & (c < C)[None, :]
        total += tl.load(p_rows + (first + i).to(tl.int64) * C + c[None, :], mask=mask, other=0.0)
        first += ROWS
    tl.store(p_sum + c, tl.sum(total, 0), mask=c < C)


@triton.jit
def step_kernel(
    p_x, p_recurrence_gate, p_input_gate, p_log_decay, p_initial_state, p_reset,
    p_hidden, p_last_state,
    C,
    HAS_INITIAL: tl.constexpr, HAS_RESET: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """One step of time, as long as its launch and one trip to memory: every load comes first, none waits for another,
    and the grid gives batch and channels without a division."""
    i_b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    offset, m = i_b * C + c, c < C
    r = load(p_recurrence_gate + offset, m, 0.0, MASKED)
    i = load(p_input_gate + offset, m, 0.0, MASKED)
    x = load(p_x + offset, m, 0.0, MASKED)
    log_decay = load(p_log_decay + c, m, 0.0, MASKED)
    if HAS_INITIAL:
        state = load(p_initial_state + offset, m, 0.0, MASKED)
    reset = tl.load(p_reset + i_b) != 0 if HAS_RESET else None

    a, y = decay(log_decay, sigmoid(to_float32(r), EXACT), EXACT, reset)
    h = (square_root(y, EXACT) * sigmoid(to_float32(i), EXACT)) * to_float32(x)
    if HAS_INITIAL:
        h = tl.fma(a, state, h)
    store(p_hidden + offset, h, m, MASKED)
    store(p_last_state + offset, h, m, MASKED)
