"""The convolution over sequences end to end: as each of them alone.

The kernel runs on a GPU, or without one under `TRITON_INTERPRET=1`.
"""

import os

import pytest
import torch

from modeling_griffin.causal_conv1d import CausalConv1d
from modeling_griffin.kernels.convolution_varlen import causal_conv1d_varlen, causal_conv1d_varlen_triton
from modeling_griffin.rg_lru_scan_triton import triton_unavailable_reason
from tests.tolerances import assert_close


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTHS = [[17], [1] * 9, [0, 0, 5, 0, 1, 0, 0, 7, 0], [0, 0], [2, 3, 4, 5, 1, 30]]


def make_inputs(lengths, channels, taps, dtype, device, tail=0):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    x, state = normal(1, sum(lengths) + tail, channels), normal(len(lengths), channels, taps)
    layer = CausalConv1d(channels, taps).to(device, dtype)
    starts = (torch.rand(len(lengths), generator=generator) < 0.5).to(device)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    return x, state, layer, cu_seqlens, starts


def alone(x, state, layer, lengths, starts):
    """The definition: `CausalConv1d` on each sequence by itself."""
    outputs, states = [], []
    for n, part in enumerate(x[:, : sum(lengths)].split(lengths, dim=1)):
        before = state[n : n + 1]
        if part.shape[1] == 0:
            states.append(before)
            continue
        y, new = layer(part, None if starts[n] else before)
        outputs.append(y)
        states.append(new)
    return torch.cat([x[:, :0], *outputs], dim=1), torch.cat(states)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_as_each_sequence_alone(lengths, tail, taps, device):
    x, state, layer, cu_seqlens, starts = make_inputs(lengths, 5, taps, torch.float64, device, tail)
    actual = causal_conv1d_varlen(x, state, layer.weight, layer.bias, cu_seqlens, starts)
    actual = (actual[0][:, : sum(lengths)], actual[1])
    expected = alone(x, state, layer, lengths, starts)
    leaves = (x, state, layer.weight, layer.bias)
    weights = [torch.randn_like(e) for e in expected]
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e)
    for a, e in zip(*(torch.autograd.grad(each, leaves, weights, allow_unused=True) for each in (actual, expected))):
        torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros_like(a) if e is None else e)


def test_without_state_or_starts():
    x, state, layer, cu_seqlens, starts = make_inputs([3, 4], 5, 4, torch.float32, "cpu")
    expected = alone(x, state, layer, [3, 4], torch.ones(2, dtype=torch.bool))
    state = torch.full_like(state, torch.nan)  # of a sequence that starts it is not read
    for arguments in ((state, cu_seqlens, None), (None, cu_seqlens, None), (None, cu_seqlens, ~starts)):
        before, *rest = arguments
        actual = causal_conv1d_varlen(x, before, layer.weight, layer.bias, *rest)
        for a, e in zip(actual, expected):
            torch.testing.assert_close(a, e)


def test_refuses():
    x, state, layer, cu_seqlens, starts = make_inputs([3, 4], 5, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"state has shape \(2, 5, 3\): allowed is \(2, 5, 4\)"):
        causal_conv1d_varlen(x, state[..., 1:], layer.weight, layer.bias, cu_seqlens, starts)
    with pytest.raises(ValueError, match="x has shape"):
        causal_conv1d_varlen(x[..., 1:], state, layer.weight, layer.bias, cu_seqlens, starts)
    with pytest.raises(ValueError, match="at most 6 last"):
        causal_conv1d_varlen(x[:, 1:], state, layer.weight, layer.bias, cu_seqlens, starts)


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


@pytest.mark.skipif(
    triton_unavailable_reason(torch.empty(0, device=DEVICE)) is not None, reason="needs Triton and a GPU or interpreter"
)
@torch.no_grad()
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("left_out", [None, "state", "starts"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_kernel_as_each_sequence_alone(lengths, left_out, tail, taps):
    x, state, layer, cu_seqlens, starts = make_inputs(lengths, 130, taps, torch.float32, DEVICE, tail)
    given = {"state": None if left_out == "state" else state, "starts": None if left_out == "starts" else starts}
    if left_out == "state":
        state = torch.zeros_like(state)
    if left_out == "starts":
        starts = torch.ones_like(starts)
    state[starts & (cu_seqlens[1:] > cu_seqlens[:-1])] = torch.nan  # not read
    y, new_state = causal_conv1d_varlen_triton(x, given["state"], layer.weight, layer.bias, cu_seqlens, given["starts"])
    assert bool(y.isfinite().all())
    for a, e in zip((y[:, : sum(lengths)], new_state), alone(x, state, layer, lengths, starts)):
        torch.testing.assert_close(a, e)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_on_a_gpu(dtype):
    """Large enough for the kernel; without the host reading anything."""
    lengths = [0, 1, 700, 2, 3, 1000, 1, 341]
    x, state, layer, cu_seqlens, starts = make_inputs(lengths, 1024, 4, dtype, "cuda")
    exact = CausalConv1d(1024, 4).to("cuda", torch.float64)
    exact.load_state_dict(layer.state_dict())
    expected = alone(x.double(), state.double(), exact, lengths, starts.tolist())
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = causal_conv1d_varlen(x, state, layer.weight, layer.bias, cu_seqlens, starts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, e in zip(actual, expected):
        assert_close("bfloat16 rounding" if dtype == torch.bfloat16 else "layer", a, e)
