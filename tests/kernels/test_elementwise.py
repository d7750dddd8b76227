"""The Triton kernels of norm and gated activation against float64, with PyTorch's operations as the measure of error.

On a GPU, or without one by `TRITON_INTERPRET=1 pytest tests/kernels/test_elementwise.py` in Triton's interpreter.
"""

import os

import pytest
import torch
from torch.nn.functional import gelu

from modeling_griffin.elementwise import rotate
from modeling_griffin.kernels.elementwise import (
    gelu_gated_backward,
    triton,
    triton_add_rms_norm,
    triton_gelu_gated,
    triton_rms_norm,
    triton_rotate,
)


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 5), (3, 130), (37, 16), (300, 24), (0, 8), (130, 257), (5, 1100)]
# Of the norm, beside that of PyTorch's operations one by one; the interpreter cuts to bfloat16 where a GPU rounds.
UNSEEN = {torch.float32: 3e-7, torch.float16: 2e-4, torch.bfloat16: 4e-3 if INTERPRETED else 1e-3}
pytestmark = [pytest.mark.skipif(triton is None, reason="Triton is not installed")]
if not INTERPRETED:
    pytestmark.append(pytest.mark.gpu)


def norm(x, residual, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + weight)


def add_norm(x, residual, weight):
    total = x + residual
    return norm(total, None, weight), total


def gated(x, residual, weight):
    return gelu(x, approximate="tanh") * residual


def kept_norm(x, residual, weight):
    return norm(x, None, weight), x * 1


CASES = {
    "norm": (norm, lambda x, residual, weight: triton_rms_norm(x, weight, 1e-6)),
    "sum and norm": (add_norm, lambda x, residual, weight: triton_add_rms_norm(x, residual, weight, 1e-6)),
    "norm beside its input": (kept_norm, lambda x, residual, weight: triton_add_rms_norm(None, x, weight, 1e-6)),
    "gated activation": (gated, lambda x, residual, weight: triton_gelu_gated(x, residual)),
}


def outcome(function, inputs, weights):
    """Results and gradients of all inputs, flat; weights: the gradients that come in."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    gradients = torch.autograd.grad(results, leaves, weights[: len(results)], allow_unused=True)
    return [*(r.detach() for r in results), *(g for g in gradients if g is not None)]


def share(actual, right):
    assert actual.isfinite().all()
    return ((actual.double() - right).norm() / right.norm()).item() if right.norm() else actual.norm().item()


def poison():
    """NaN into the memory that the next outputs will get."""
    for size in (2**6, 2**10, 2**13, 2**16):
        [torch.full((size,), torch.nan, device=DEVICE) for _ in range(8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, shape, dtype):
    inputs = [torch.randn(2, *shape, device=DEVICE).to(dtype) for _ in range(2)]
    inputs.append(torch.randn(shape[-1], device=DEVICE).to(dtype))
    weights = [torch.randn(2, *shape, device=DEVICE).to(dtype) for _ in range(2)]
    plain, ours = CASES[case]
    right = outcome(plain, [x.double() for x in inputs], [w.double() for w in weights])
    allowed = outcome(plain, inputs, weights)
    poison()
    for found, there, r in zip(outcome(ours, inputs, weights), allowed, right, strict=True):
        assert found.dtype == dtype
        assert share(found, r) <= 1.1 * share(there, r) + UNSEEN[dtype]


def test_inputs_that_are_not_contiguous_and_residuals_of_another_dtype():
    """As under autocast: what a layer adds is bfloat16, what it is added to float32."""
    x = torch.randn(24, 2, 40, device=DEVICE).bfloat16().transpose(0, 1)
    inputs = [x, torch.randn(2, 40, 24, device=DEVICE).mT, torch.randn(40, device=DEVICE)]
    weights = [torch.randn(2, 24, 40, device=DEVICE) for _ in range(2)]
    right = outcome(add_norm, [x.double() for x in inputs], [w.double() for w in weights])
    found = outcome(CASES["sum and norm"][1], inputs, weights)
    assert [f.dtype for f in found] == [torch.float32] * 2 + [torch.bfloat16] + [torch.float32] * 2
    for f, r in zip(found, right, strict=True):
        assert share(f, r) <= (4e-3 if f.dtype == torch.bfloat16 else 4e-7)


def test_only_one_result_is_used():
    """The gradient through either result alone."""
    inputs = [torch.randn(3, 7, 40, device=DEVICE) for _ in range(2)] + [torch.randn(40, device=DEVICE)]
    weights = [torch.randn(3, 7, 40, device=DEVICE)]
    for one in (0, 1):
        right = outcome(lambda *i, one=one: add_norm(*i)[one], [x.double() for x in inputs], [weights[0].double()])
        found = outcome(lambda *i, one=one: CASES["sum and norm"][1](*i)[one], inputs, weights)
        for f, r in zip(found, right, strict=True):
            assert share(f, r) <= 4e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, dim, rotated", [(1, 8, 4), (3, 24, 12), (20, 128, 64), (2, 16, 16), (5, 10, 2)])
def test_rotation(heads, dim, rotated, dtype):
    """Against the operations in float64; cos and sin as expanded rows, of float32 or of x's dtype."""
    x, d_y = (torch.randn(2, 9, heads, dim, device=DEVICE).to(dtype) for _ in range(2))
    angles = torch.randn(1, 9, rotated, device=DEVICE).expand(2, -1, -1)
    for cos, sin in ((angles.cos(), angles.sin()), (angles.cos().to(dtype), angles.sin().to(dtype))):
        right = outcome(lambda x, c=cos, s=sin: rotate(x, c.double(), s.double()), [x.double()], [d_y.double()])
        allowed = outcome(lambda x, c=cos, s=sin: rotate(x, c, s), [x], [d_y])
        poison()
        for f, there, r in zip(outcome(lambda x, c=cos, s=sin: triton_rotate(x, c, s), [x], [d_y]), allowed, right):
            assert f.dtype == dtype and share(f, r) <= 1.1 * share(there, r) + UNSEEN[dtype]


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_over_rows(shape):
    """Gradients of the biases in front, the same bits every time."""
    d_y, gate, x = (torch.randn(2, *shape, device=DEVICE) for _ in range(3))
    poison()
    d_gate, d_x, sums = gelu_gated_backward(d_y, gate, x, sums=True)
    again = gelu_gated_backward(d_y, gate, x, sums=True)[2]
    for found, same, gradient in zip(sums, again, (d_gate, d_x), strict=True):
        assert torch.equal(found, same)
        assert share(found, gradient.double().flatten(0, 1).sum(0)) <= 1e-6
