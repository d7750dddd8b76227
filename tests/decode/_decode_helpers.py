"""For the tests of the decoding kernels: layers with random weights, and both kinds of operations side by side.

On a GPU these tests all run. Without one, `TRITON_INTERPRET=1 pytest tests/decode` runs them in Triton's
interpreter.
"""

import os

import pytest
import torch
from torch import nn

import modeling_griffin.decode.linear as decode_linear
import modeling_griffin.decode.ops as decode_ops
from modeling_griffin.decode.ops import KernelOps, PlainOps
from modeling_griffin.modeling_griffin import GriffinRMSNorm


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16]
# The interpreter multiplies matrices of bfloat16 as if they were whole numbers, and cuts float32 off to it.
DTYPES_OF_STEPS = [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]
LOGITS = {torch.float32: "logits", torch.float16: "float16 logits", torch.bfloat16: "bfloat16 logits"}

needs_kernels = [pytest.mark.skipif(decode_ops.triton is None, reason="Triton is not installed")]
if not INTERPRETED:
    needs_kernels.append(pytest.mark.gpu)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def make_linear(inputs, outputs, dtype, bias=True):
    return nn.Linear(inputs, outputs, bias=bias).to(DEVICE, dtype)


def make_norm(width, dtype):
    norm = GriffinRMSNorm(width, 1e-6)
    norm.weight.data.normal_()
    return norm.to(DEVICE, dtype)


def multiply_matrices(monkeypatch):
    """In the interpreter the kernels of many rows take the types that it can multiply."""
    if INTERPRETED:
        monkeypatch.setattr(decode_linear, "MATMUL_DTYPES", (torch.float32, torch.float16))


def poison_what_is_new(monkeypatch):
    """What a kernel leaves unwritten is not a number."""

    def poison(*shape, dtype, device):
        return torch.full(shape, float("nan") if dtype.is_floating_point else 0, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", poison)
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda x, *shape, device=None: poison(*shape, dtype=x.dtype, device=device or x.device),
    )


def both(call, **options):
    """The results of the plain operations and of the kernels, and what each left of the tensors that `call` changes."""
    return call(PlainOps()), call(KernelOps(**options))
