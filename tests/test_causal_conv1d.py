"""CausalConv1d against torch's own convolution: whole, in chunks, over documents, around padding.

Legend: B batch, T time, C channels, W taps.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_griffin.causal_conv1d import CausalConv1d
from tests.tolerances import assert_close


B, C = 3, 5
TAPS = (1, 2, 4, 7)


def make(taps):
    conv = CausalConv1d(C, taps)
    torch.nn.init.normal_(conv.weight)
    torch.nn.init.normal_(conv.bias)
    return conv


def plain(conv, x):
    """One document, (B, T, C) -> (B, T, C), by torch."""
    taps = conv.weight.shape[-1]
    if not x.shape[1]:
        return x
    padded = torch.nn.functional.pad(x.mT, (taps - 1, 0))
    return torch.nn.functional.conv1d(padded, conv.weight, conv.bias, groups=C).mT


def random_chunks(length):
    chunks = []
    while sum(chunks) < length:
        chunks.append(min(int(torch.randint(1, 6, ())), length - sum(chunks)))
    return chunks


def in_chunks(conv, x, document_start=None, real=None):
    outputs, state, begin = [], None, 0
    for size in random_chunks(x.shape[1]):
        part = slice(begin, begin + size)
        y, state = conv(
            x[:, part],
            state,
            None if document_start is None else document_start[:, part],
            None if real is None else real[:, part],
        )
        outputs.append(y)
        begin += size
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 11])
def test_whole_sequence(taps, length):
    conv, x = make(taps), torch.randn(B, length, C, requires_grad=True)
    y, state = conv(x)
    assert_close("layer", y, plain(conv, x))
    assert_close("exact", state, torch.nn.functional.pad(x, (0, 0, taps, 0))[:, -taps:].mT)
    upstream = torch.randn_like(y)
    inputs = (x, conv.weight, conv.bias)
    expected = torch.autograd.grad(plain(conv, x), inputs, upstream)
    for actual, gradient in zip(torch.autograd.grad(y, inputs, upstream), expected):
        assert_close("layer", actual, gradient)


@pytest.mark.parametrize("taps", TAPS)
def test_chunks_are_the_whole(taps):
    conv, x = make(taps), torch.randn(B, 17, C)
    whole, state = conv(x)
    actual, last_state = in_chunks(conv, x)
    assert_close("layer", actual, whole)
    assert_close("exact", last_state, state)


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("chunked", [False, True])
def test_documents_and_padding(taps, chunked):
    """Random documents (some of one token) with random padding between and inside: each is as if alone."""
    conv, length = make(taps), 23
    for _ in range(10):
        x = torch.randn(B, length, C)
        real = torch.rand(B, length) < 0.7
        start = (torch.rand(B, length) < 0.4) & real
        x_given = torch.where(real[..., None], x, torch.full_like(x, 1e4))  # what stands at padding does not matter
        y, state = (in_chunks if chunked else lambda c, x, s, r: c(x, None, s, r))(conv, x_given, start, real)
        assert y.isfinite().all()
        for row in range(B):
            document = start[row].cumsum(0)
            for number in document.unique():
                slots = ((document == number) & real[row]).nonzero()[:, 0]
                assert_close("layer", y[row, slots], plain(conv, x[row, slots][None])[0])
            last = x[row, (document == document[-1]) & real[row]]
            assert_close("exact", state[row], torch.nn.functional.pad(last, (0, 0, taps, 0))[-taps:].T)


def test_no_gradient_crosses_a_boundary_or_comes_from_padding():
    conv, x = make(4), torch.randn(1, 8, C, requires_grad=True)
    real = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1]], dtype=torch.bool)
    start = torch.tensor([[0, 1, 0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    y, _ = conv(x, None, start, real)
    (gradient,) = torch.autograd.grad(y[:, 5:].sum(), x, retain_graph=True)
    assert (gradient[:, :5] == 0).all() and (gradient[:, 5:] != 0).all()
    (gradient,) = torch.autograd.grad(y[:, 4].sum(), x)
    assert (gradient[0, [1, 2, 4]] != 0).all() and (gradient[0, [0, 3, 5, 6, 7]] == 0).all()


def test_gradient_through_the_state():
    conv, x = make(4), torch.randn(B, 9, C, requires_grad=True)
    y, _ = in_chunks(conv, x)
    upstream = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, x, upstream)
    assert_close("layer", actual, torch.autograd.grad(plain(conv, x), x, upstream)[0])


def test_parameters_are_those_of_conv1d():
    conv = CausalConv1d(C, 4)
    expected = torch.nn.Conv1d(C, C, 4, groups=C)
    assert {k: v.shape for k, v in conv.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    conv, x = make(4).to(dtype), torch.randn(B, 9, C, dtype=dtype)
    y, state = conv(x)
    assert y.dtype == state.dtype == dtype
    assert_close("bfloat16 logits", y, plain(conv.double(), x.double()))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_kernels_in_the_interpreter():
    """Triton decides when it is imported, hence another process."""
    file = Path(__file__).parent / "kernels" / "test_convolution.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-m", "not gpu and not common", str(file)]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout and "skipped" not in run.stdout, run.stdout + run.stderr
