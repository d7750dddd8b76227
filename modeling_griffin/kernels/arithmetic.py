"""What several Triton kernels compute, of training and of decoding: matrix products and the gated activation.

The recurrence's arithmetic is in `rg_lru_scan_triton_math`, which ships with the scan and serves decoding too.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def dot(a, b, total=None):
    """a b + total by tensor cores, summed in float32."""
    if INTERPRETED:  # it would multiply the bits of bfloat16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@triton.jit
def gelu_and_slope(x):
    """The tanh form, gelu(x) = x sigmoid(sqrt(8 / pi) (x + 0.044715 x^3)), and its derivative."""
    square = x * x
    s = tl.sigmoid(SQRT_8_OVER_PI * x * (1.0 + 0.044715 * square))
    return x * s, s + x * s * (1.0 - s) * (SQRT_8_OVER_PI * (1.0 + 0.134145 * square))


@triton.jit
def gelu(x):
    """The tanh form."""
    y, _ = gelu_and_slope(x)
    return y
