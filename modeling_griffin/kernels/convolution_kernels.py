"""The two Triton kernels of `causal_conv1d_triton`: one pass over memory each way.

A program walks a run of CHUNKS * ROWS steps of time of CHANNELS channels of one batch row, and keeps in registers the
W - 1 rows that the taps reach, which it zeroes where a document starts. Rows are a tuple, not a tensor axis: a chunk's
loads are all in flight before the first use, and walking is multiply-adds without any exchange between threads.

Names: p_ pointer, i_ index, m_ mask, c channels; rows are (CHANNELS,) tensors.
"""

try:
    import triton
    import triton.language as tl

    from .scan_sequences_kernels import sequence_of
except ImportError as error:
    raise ImportError("Triton is not installed") from error

SIZES = ["T"]  # compile once, whatever it is


@triton.jit
def _load(p, m, MASKED: tl.constexpr):
    """What is masked out is 0."""
    if MASKED:
        return tl.load(p, mask=m, other=0.0)
    else:
        return tl.load(p)


@triton.jit
def _store(p, value, m, MASKED: tl.constexpr):
    value = value.to(p.dtype.element_ty)
    if MASKED:
        tl.store(p, value, mask=m)
    else:
        tl.store(p, value)


@triton.jit
def _load_rounded(p, m, DTYPE: tl.constexpr):
    """In float32 what `DTYPE` can show."""
    return tl.load(p, mask=m, other=0.0).to(DTYPE).to(tl.float32)


@triton.jit
def _load_weight(p_weight, c, m_c, DTYPE: tl.constexpr, W: tl.constexpr):
    """A tuple: [k] is for the tap k back."""
    weight = ()
    for k in tl.static_range(W):
        weight = weight + (_load_rounded(p_weight + c * W + (W - 1 - k), m_c, DTYPE),)
    return weight


@triton.jit
def _zeros(CHANNELS: tl.constexpr, NUMBER: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(NUMBER):
        zeros = zeros + (tl.full([CHANNELS], 0.0, tl.float32),)
    return zeros


@triton.jit
def _pushed(rows, new, W: tl.constexpr):
    """The W - 1 rows nearest to the next one, nearest first."""
    pushed = ()
    if W > 1:
        pushed = pushed + (new,)
    for k in tl.static_range(W - 2):
        pushed = pushed + (rows[k],)
    return pushed


@triton.jit
def _unless(start, rows, W: tl.constexpr):
    """The W - 1 rows, or zeros where a document starts in between."""
    kept = ()
    for k in tl.static_range(W - 1):
        kept = kept + (tl.where(start, 0.0, rows[k]),)
    return kept


@triton.jit
def _add_taps(y, weight, rows, W: tl.constexpr):
    for k in tl.static_range(W - 1):
        y = tl.fma(weight[k + 1], rows[k], y)
    return y


@triton.jit
def _add_products(sums, x, d_y, rows, W: tl.constexpr):
    """The gradients of the weights, and last of the bias, with this step."""
    added = (tl.fma(x, d_y, sums[0]),)
    for k in tl.static_range(W - 1):
        added = added + (tl.fma(x, rows[k], sums[k + 1]),)
    return added + (sums[W] + d_y,)


@triton.jit
def _is_start(p_start, t, T):
    return tl.load(p_start + t, mask=(t >= 0) & (t < T), other=0) != 0


@triton.jit
def _place(T, C, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """The number of the program's run, its row of the batch, its first step, and its channels."""
    n_blocks, n_runs = tl.cdiv(C, CHANNELS), tl.cdiv(T, STEPS)
    i_run = tl.program_id(0) // n_blocks
    c = (tl.program_id(0) % n_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    return i_run.to(tl.int64), (i_run // n_runs).to(tl.int64), (i_run % n_runs) * STEPS, c


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    p_x, p_weight, p_state, p_bias, p_start,
    p_y,
    T, C: tl.constexpr, W: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_START: tl.constexpr, MASKED: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    _, i_b, t, c = _place(T, C, CHUNKS * ROWS, CHANNELS)
    m_c = c < C
    dtype: tl.constexpr = p_x.dtype.element_ty
    p_x += (i_b * T + t) * C  # 64-bit; what is added to it fits 32
    p_y += (i_b * T + t) * C
    if HAS_START:
        p_start += i_b * T
    weight = _load_weight(p_weight, c, m_c, dtype, W)
    bias = _load_rounded(p_bias + c, m_c, dtype)

    past = _zeros(CHANNELS, W - 1)  # x one back, two back, ...
    for back in tl.static_range(W - 1, 0, -1):
        x = _load_rounded(p_x - back * C + c, m_c & (t >= back), dtype)
        if HAS_STATE:
            x += _load_rounded(p_state + (i_b * C + c) * W + (W + t - back), m_c & (t < back), dtype)
        if HAS_START:
            past = _unless(_is_start(p_start, t - back, T), past, W)
        past = _pushed(past, x, W)

    for _ in range(CHUNKS):
        # Every load comes before the first store: past one, the compiler may not move a load.
        xs, starts = (), ()
        for i in tl.static_range(ROWS):
            xs = xs + (_load(p_x + i * C + c, m_c & (t + i < T), MASKED),)
            if HAS_START:
                starts = starts + (_is_start(p_start, t + i, T),)
        for i in tl.static_range(ROWS):
            x = xs[i].to(tl.float32)
            if HAS_START:
                past = _unless(starts[i], past, W)
            y = _add_taps(tl.fma(weight[0], x, bias), weight, past, W)
            _store(p_y + i * C + c, y, m_c & (t + i < T), MASKED)
            past = _pushed(past, x, W)
        t += ROWS
        p_x += ROWS * C
        p_y += ROWS * C


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    p_d_y, p_weight, p_state, p_x, p_start,
    p_d_x, p_d_state, p_partial,
    T, C: tl.constexpr, W: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_START: tl.constexpr, HAS_D_WEIGHT: tl.constexpr, MASKED: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """From the end of a run to its start. p_partial: (runs, C W + C), each run's share of d_weight and d_bias.

    What x gives to later steps is what d_x and d_weight take from them, so x is needed at one step only.
    """
    i_run, i_b, t, c = _place(T, C, CHUNKS * ROWS, CHANNELS)
    m_c = c < C
    dtype: tl.constexpr = p_d_y.dtype.element_ty
    t += CHUNKS * ROWS
    p_d_y += (i_b * T + t) * C  # 64-bit; what is added to it fits 32
    p_d_x += (i_b * T + t) * C
    if HAS_D_WEIGHT:
        p_x += (i_b * T + t) * C
    if HAS_START:
        p_start += i_b * T
    weight = _load_weight(p_weight, c, m_c, dtype, W)
    sums = _zeros(CHANNELS, W + 1)

    future = _zeros(CHANNELS, W - 1)  # d_y one ahead, two ahead, ...
    for ahead in tl.static_range(W - 2, -1, -1):
        future = _pushed(future, _load_rounded(p_d_y + ahead * C + c, m_c & (t + ahead < T), dtype), W)
        if HAS_START:
            future = _unless(_is_start(p_start, t + ahead, T), future, W)

    for _ in range(CHUNKS):
        t -= ROWS
        p_d_y -= ROWS * C
        p_d_x -= ROWS * C
        if HAS_D_WEIGHT:
            p_x -= ROWS * C
        d_ys, xs, starts = (), (), ()
        for i in tl.static_range(ROWS):
            d_ys = d_ys + (_load(p_d_y + i * C + c, m_c & (t + i < T), MASKED),)
            if HAS_D_WEIGHT:
                xs = xs + (_load(p_x + i * C + c, m_c & (t + i < T), MASKED),)
            if HAS_START:
                starts = starts + (_is_start(p_start, t + i, T),)
        for i in tl.static_range(ROWS - 1, -1, -1):
            d_y = d_ys[i].to(tl.float32)
            d_x = _add_taps(weight[0] * d_y, weight, future, W)
            _store(p_d_x + i * C + c, d_x, m_c & (t + i < T), MASKED)
            if HAS_D_WEIGHT:
                sums = _add_products(sums, xs[i].to(tl.float32), d_y, future, W)
            future = _pushed(future, d_y, W)
            if HAS_START:
                future = _unless(starts[i], future, W)

    if HAS_STATE:  # the steps before the first one: only they have inputs that give nothing at their own step
        p_state += (i_b * C + c) * W
        p_d_state += (i_b * C + c) * W
        zero, m_first = tl.full([CHANNELS], 0.0, tl.float32), m_c & (t == 0)
        for back in tl.static_range(1, W):
            _store(p_d_state + (W - back), _add_taps(zero, weight, future, W), m_first, True)
            sums = _add_products(sums, _load_rounded(p_state + (W - back), m_first, dtype), zero, future, W)
            future = _pushed(future, zero, W)
        _store(p_d_state, zero, m_first, True)  # no tap reaches the oldest input
    if HAS_D_WEIGHT:
        p_partial += i_run * C * (W + 1)
        for k in tl.static_range(W):
            _store(p_partial + c * W + (W - 1 - k), sums[k], m_c, True)
        _store(p_partial + C * W + c, sums[W], m_c, True)


@triton.jit
def _goes_on(p_starts, n, N, HAS_STATE: tl.constexpr, HAS_STARTS: tl.constexpr):
    """Which sequences have a state to go on from; N, behind the last, has none."""
    if HAS_STATE and HAS_STARTS:
        return (n < N) & (tl.load(p_starts + n, mask=n < N, other=1) == 0)
    else:
        return n < 0


@triton.jit
def _end_of(p_cu_seqlens, n, N):
    """The token behind sequence n; for N, behind the last, beyond all tokens."""
    return tl.load(p_cu_seqlens + n + 1, mask=n < N, other=2**31 - 1).to(tl.int32)


@triton.jit
def _rows_in_front(
    p_x, p_state, p_starts, n, age, c, m_c, N, C,
    DTYPE: tl.constexpr, W: tl.constexpr, HAS_STATE: tl.constexpr, HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """The W - 1 rows in front of the token at p_x, nearest first, which is the age-th of sequence n."""
    goes_on = _goes_on(p_starts, n, N, HAS_STATE, HAS_STARTS)
    rows = ()
    for k in tl.static_range(1, W):
        x = _load_rounded(p_x - k * C + c, m_c & (age >= k), DTYPE)
        if HAS_STATE:
            x += _load_rounded(p_state + (n.to(tl.int64) * C + c) * W + (W - k + age), m_c & (age < k) & goes_on, DTYPE)
        rows = rows + (x,)
    return rows


@triton.jit
def _convolve_run(
    p_x, p_weight, p_state, p_bias, p_cu_seqlens, p_starts, p_y, t, c, T, N, C, halvings,
    W: tl.constexpr, HAS_STATE: tl.constexpr, HAS_STARTS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Walks as `forward_kernel` does; where the next sequence begins, the rows in front are those of its state."""
    dtype: tl.constexpr = p_x.dtype.element_ty
    m_c = c < C
    weight = _load_weight(p_weight, c, m_c, dtype, W)
    bias = _load_rounded(p_bias + c, m_c, dtype)
    p_x += t.to(tl.int64) * C
    p_y += t.to(tl.int64) * C
    n = sequence_of(p_cu_seqlens, t, N, halvings)
    age, end = t - tl.load(p_cu_seqlens + n).to(tl.int32), _end_of(p_cu_seqlens, n, N)
    past = _rows_in_front(p_x, p_state, p_starts, n, age, c, m_c, N, C, dtype, W, HAS_STATE, HAS_STARTS)
    xs = ()
    for i in tl.static_range(ROWS):
        xs = xs + (_load(p_x + i * C + c, m_c & (t + i < T), True),)
    for i in tl.static_range(ROWS):
        if t + i == end:
            while end <= t + i:  # past the empty ones
                n += 1
                end = _end_of(p_cu_seqlens, n, N)
            past = _rows_in_front(p_x, p_state, p_starts, n, t * 0, c, m_c, N, C, dtype, W, HAS_STATE, HAS_STARTS)
        x = xs[i].to(tl.float32)
        y = _add_taps(tl.fma(weight[0], x, bias), weight, past, W)
        _store(p_y + i * C + c, y, m_c & (t + i < T), True)
        past = _pushed(past, x, W)


@triton.jit
def _new_state(
    p_x, p_state, p_cu_seqlens, p_starts, p_new_state, n, c, N, C,
    W: tl.constexpr, HAS_STATE: tl.constexpr, HAS_STARTS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p_x.dtype.element_ty
    begin = tl.load(p_cu_seqlens + n).to(tl.int64)
    length = tl.load(p_cu_seqlens + n + 1).to(tl.int64) - begin
    place = (n.to(tl.int64) * C + c) * W
    # An empty sequence hands its state on.
    goes_on = (length == 0) | _goes_on(p_starts, n, N, HAS_STATE, HAS_STARTS)
    for j in tl.static_range(W):
        age = length - W + j  # of the input that the state has at j
        x = tl.load(p_x + (begin + age) * C + c, mask=(c < C) & (age >= 0), other=0.0).to(tl.float32)
        if HAS_STATE:
            x += _load_rounded(p_state + place + W + age, (c < C) & (age < 0) & goes_on, dtype)
        tl.store(p_new_state + place + j, x.to(dtype), mask=c < C)


@triton.jit(do_not_specialize=["T", "N", "n_runs", "halvings"])
def varlen_kernel(
    p_x, p_weight, p_state, p_bias, p_cu_seqlens, p_starts,
    p_y, p_new_state,
    T, N, n_runs, halvings, C: tl.constexpr,
    W: tl.constexpr, HAS_STATE: tl.constexpr, HAS_STARTS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """N sequences end to end in one row. n_runs programs have ROWS steps each, and one a sequence its new state."""
    i_run = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    if i_run < n_runs:
        _convolve_run(
            p_x, p_weight, p_state, p_bias, p_cu_seqlens, p_starts, p_y, i_run * ROWS, c, T, N, C, halvings,
            W, HAS_STATE, HAS_STARTS, ROWS, CHANNELS,
        )  # fmt: skip
    else:
        _new_state(p_x, p_state, p_cu_seqlens, p_starts, p_new_state, i_run - n_runs, c, N, C, W, HAS_STATE, HAS_STARTS)
