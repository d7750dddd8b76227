"""The depthwise convolution over time on a GPU: one fused Triton kernel forward, one backward, at the speed of memory.

Forward moves 2 tensors of (B, T, C), backward 3: each is read or written once, and nothing is put in front of x.
`convolution_kernels` has the kernels; this file launches and tells autograd; `device.training` has the tiles.

Legend: B batch, T time, C channels, W taps.
"""

import torch
from torch.autograd.function import once_differentiable

from ..causal_conv1d import behind_state, no_states, states_behind, tokens_since_start
from ..gpu import ceil_div
from .device.training import CONVOLUTION_BACKWARD, CONVOLUTION_FORWARD
from .device.training import ConvolutionTile as Tile
from .launch import launch, power_of_2
from .sums import sum_of_rows


try:
    import triton

    from .convolution_kernels import backward_kernel, forward_kernel
except ImportError:
    triton = None


def causal_conv1d_triton(
    x: torch.Tensor,
    state: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    document_start: torch.Tensor | None,
) -> torch.Tensor:
    """y_t = bias + sum_k weight[W - 1 - k] x_{t-k} over tokens of one document, in float32, rounded once.

    Gradients are deterministic, and rounded once to the dtype of what they belong to. Second derivatives raise.

    Args:
        x: (B, T, C), float32, float16 or bfloat16; `triton_unavailable_reason(x)` must be None.
        state: (B, C, W), the last W inputs of the document so far; None means zeros.
        weight: (C, 1, W). This, bias and state are taken in the dtype of x.
        bias: (C,).
        document_start: (B, T) bool; None when no document starts behind another.

    Returns:
        (B, T, C) in the dtype of x.
    """
    return _CausalConv1d.apply(x, state, weight, bias, document_start)


def convolve_on_gpu(
    x: torch.Tensor,
    state: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    document_start: torch.Tensor | None,
    real: torch.Tensor | None,
    number: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`convolve_with_states` in one kernel; x is copied only where the states cannot do without."""
    taps, age = weight.shape[-1], None
    y = causal_conv1d_triton(x, state, weight, bias, document_start)
    if number == 0:
        return y, no_states(x, taps)
    slots = number + taps
    if real is None and x.shape[1] >= slots:  # then no state has anything from before the last slots
        padded = x[:, -slots:]
        document_start = None if document_start is None else document_start[:, -slots:]
    else:
        padded = behind_state(x, state, taps)
    if document_start is not None:
        age = tokens_since_start(document_start)[:, taps - padded.shape[1] :]
    return y, states_behind(padded, taps, real, age, number)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, state, weight, bias, document_start):
        x, state, weight, bias, document_start = _contiguous(x, state, weight, bias, document_start)
        ctx.bias_dtype = bias.dtype
        ctx.needs_x = any(ctx.needs_input_grad[2:4])
        ctx.save_for_backward(x if ctx.needs_x else None, state, weight, document_start)
        y = torch.empty_like(x)
        if y.numel():
            _launch(forward_kernel, _tile(CONVOLUTION_FORWARD, x), (x, weight, state, bias, document_start, y))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, state, weight, document_start = ctx.saved_tensors  # once: checkpointing computes them at each access
        d_y = d_y.contiguous()
        d_x = torch.empty_like(d_y)
        d_state = None if state is None else torch.empty_like(state)
        tile = _tile(CONVOLUTION_BACKWARD, d_y)
        # Sums over each run, then over the runs in a fixed order: no atomics, the same result every time.
        runs = d_y.shape[0] * ceil_div(d_y.shape[1], tile.steps)
        partial = d_y.new_empty(runs, weight.numel() + d_y.shape[2], dtype=torch.float32) if ctx.needs_x else None
        if d_y.numel():
            arguments = (d_y, weight, state, x, document_start, d_x, d_state, partial)
            _launch(backward_kernel, tile, arguments, HAS_D_WEIGHT=ctx.needs_x)
        elif state is not None:
            d_state.zero_()
        d_weight, d_bias = _parameter_gradients(partial, weight, ctx.bias_dtype) if ctx.needs_x else (None, None)
        return d_x, d_state, d_weight, d_bias, None


def _parameter_gradients(partial, weight, bias_dtype) -> tuple[torch.Tensor, torch.Tensor]:
    total = sum_of_rows(partial, bias_dtype if weight.dtype == bias_dtype else torch.float32)
    d_weight, d_bias = total.split((weight.numel(), total.numel() - weight.numel()))
    return d_weight.view(weight.shape).to(weight.dtype), d_bias.to(bias_dtype)


def _contiguous(*tensors):
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _tile(tile: Tile, x: torch.Tensor) -> Tile:
    """`tile`, or for few steps a lower one."""
    length = x.shape[1]
    rows = min(tile.rows, power_of_2(length))
    return tile._replace(rows=rows, chunks=min(tile.chunks, power_of_2(ceil_div(length, rows)))) if length else tile


def _launch(kernel, tile: Tile, arguments, **flags) -> None:
    """arguments: x or d_y, weight, state, one more, document_start, and outputs."""
    x, weight, state, _, document_start = arguments[:5]
    batch, length, channels = x.shape
    programs = batch * ceil_div(length, tile.steps) * ceil_div(channels, tile.channels)
    launch(
        *(kernel, (programs,)),
        *(*arguments, length, channels, weight.shape[-1]),
        HAS_STATE=state is not None,
        HAS_START=document_start is not None,
        MASKED=length % tile.steps != 0 or channels % tile.channels != 0,
        CHUNKS=tile.chunks,
        ROWS=tile.rows,
        CHANNELS=tile.channels,
        num_warps=tile.num_warps,
        **flags,
    )
