"""Two small kernels around those of `rg_lru_scan_triton_kernels`: one clears the words, one sums partial gradients.

PDL: a kernel may start while the one before it ends (programmatic dependent launch, compute capability 9), and waits
for its end before it touches anything.
"""  # SPDX-License-Identifier: Apache-2.0

try:
    import triton
    import triton.language as tl
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
