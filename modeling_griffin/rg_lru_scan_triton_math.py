"""What the scan's Triton kernels do to each element: load, convert, gates, decay, store.

EXACT (float32 in or out) means correctly rounded functions; else the hardware's, whose error 16 bits do not show.
"""  # SPDX-License-Identifier: Apache-2.0

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error


# Inline PTX where a kernel is compiled for NVIDIA; the interpreter runs the plain expression beside it.
PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)
AMD = tl.constexpr(torch.version.hip is not None)
LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_E_LOW = tl.constexpr(1.925963033500e-08)  # log2(e) minus its float32 rounding
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def to_float32(x):
    """bfloat16 is the upper half of float32: two channels are one shift and one mask."""
    if PTX and x.dtype == tl.bfloat16:
        asm: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return tl.inline_asm_elementwise(asm, "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        return x.to(tl.float32)


@triton.jit
def reciprocal(x, EXACT: tl.constexpr):
    if EXACT:
        return tl.div_rn(1.0, x)
    elif PTX:
        asm: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def square_root(x, EXACT: tl.constexpr):
    if EXACT:
        return tl.sqrt_rn(x)
    elif PTX:
        asm: tl.constexpr = "sqrt.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.sqrt(x)


@triton.jit
def exp_accurate(x):
    """To the last bits: exp2 with the rounding of x * log2(e) put back."""
    power = x * LOG2_E
    error = tl.fma(x, LOG2_E, -power) + x * LOG2_E_LOW
    e = tl.exp2(power)
    return tl.fma(e, error * LN_2, e)


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    if EXACT:
        return tl.div_rn(1.0, 1.0 + exp_accurate(-tl.where(x < -87.0, -87.0, x)))  # below, exp overflows
    else:
        return reciprocal(1.0 + tl.exp2(x * -LOG2_E), False)


@triton.jit
def decay(log_decay, r, EXACT: tl.constexpr, forgets=None):
    """a = exp(log_decay * r) and y = 1 - a^2: near a = 1 from a series, the difference has no digits there.

    forgets: where a is 0, and y 1. That takes one selection: exp(-200) is 0 in float32.
    """
    log_a = log_decay * r if EXACT else (log_decay * LOG2_E) * r  # to base 2 unless EXACT
    if forgets is not None:
        log_a = tl.where(forgets, -200.0, log_a)
    if EXACT:
        p = tl.fma(log_a, 1.0 / 40320, 1.0 / 5040)
        p = tl.fma(log_a, p, 1.0 / 720)
        p = tl.fma(log_a, p, 1.0 / 120)
        p = tl.fma(log_a, p, 1.0 / 24)
        p = tl.fma(log_a, p, 1.0 / 6)
        p = tl.fma(log_a, p, 0.5)
        q = -log_a * tl.fma(log_a, p, 1.0)  # 1 - a
        a_far = exp_accurate(log_a)
        near = log_a > -0.5
        return tl.where(near, 1.0 - q, a_far), tl.where(near, q * (2.0 - q), tl.fma(-a_far, a_far, 1.0))
    else:
        a = tl.exp2(log_a)
        # -expm1(2 ln2 z) to second order, for z > -0.008: 2e-5 off, far under the last bit of float16
        series = log_a * tl.fma(log_a, -0.9609060278364028, -1.3862943611198906)
        return a, tl.where(log_a > -0.008, series, tl.fma(-a, a, 1.0))


@triton.jit
def load(p, mask, other, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(p, mask=mask, other=other)
    else:
        return tl.load(p)


@triton.jit
def store(p, value, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(p, value, mask=mask)
    else:
        tl.store(p, value)
