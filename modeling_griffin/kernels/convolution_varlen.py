"""The convolution over sequences end to end, each with a state of its own: for engines that serve many requests.

Legend: T time, C channels, W taps, N sequences.
"""

import torch

from ..causal_conv1d import convolve
from ..gpu import ceil_div
from . import dispatch
from .convolution import _contiguous, causal_conv1d_triton
from .device.training import CONVOLUTION_FORWARD
from .launch import launch, power_of_2
from .sequences import Sequences, check_sequences


try:
    import triton

    from .convolution_kernels import varlen_kernel
except ImportError:
    triton = None


def causal_conv1d_varlen(
    x: torch.Tensor,
    state: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    cu_seqlens: torch.Tensor,
    starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The convolution over N sequences end to end in one row, as `rg_lru_scan` takes them. Differentiable.

    Args:
        x: (1, T, C), any floating dtype.
        state: (N, C, W), the last W inputs of each sequence so far; None means zeros.
        weight, bias: (C, 1, W) and (C,).
        cu_seqlens: (N + 1,) int32 or int64, on the device of x, never read by the host on a GPU.
        starts: (N,) bool, which sequences start, whatever their state holds; the others go on. None means all.

    Returns:
        y (1, T, C) and the new state (N, C, W), both in the dtype of x; an empty sequence hands its state on.

    Raises:
        ValueError: naming the argument, for a wrong shape, dtype or device.
    """
    channels, _, taps = weight.shape
    if x.dim() != 3 or x.shape[2] != channels:
        raise ValueError(f"x has shape {tuple(x.shape)}: allowed is (1, time, {channels})")
    check_sequences(cu_seqlens, starts, x)
    number = cu_seqlens.shape[0] - 1
    if state is not None and state.shape != (number, channels, taps):
        raise ValueError(f"state has shape {tuple(state.shape)}: allowed is {(number, channels, taps)}")
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, state, weight, bias))
    # Beside one kernel stand some thirty operations, not one: it pays at any size.
    on_gpu = dispatch.pays(x, state, weight, bias, least=None if learns else 1)
    if on_gpu and not learns:
        return causal_conv1d_varlen_triton(x, state, weight, bias, cu_seqlens, starts)
    places = Sequences(cu_seqlens, x.shape[1], slots=taps)
    before = x.new_zeros(number, taps, channels) if state is None else state.to(x.dtype).transpose(1, 2)
    entering = torch.zeros_like(before) if starts is None else before.masked_fill(starts[:, None, None], 0.0)
    wide = places.spread(x[0], entering, 0.0)[None]
    if on_gpu:
        y = causal_conv1d_triton(wide, None, weight, bias, None)[:, places.tokens]
    else:
        y = convolve(wide, weight, bias, None)[:, places.tokens - (taps - 1)]
    leaving = torch.where(places.is_empty[:, None, None], before, places.last(wide[0]))
    return y, leaving.transpose(1, 2)


def causal_conv1d_varlen_triton(
    x: torch.Tensor,
    state: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    cu_seqlens: torch.Tensor,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as in `causal_conv1d_varlen`, in one launch, without gradients; x as above."""
    x, state, weight, bias, cu_seqlens, starts = _contiguous(x, state, weight, bias, cu_seqlens, starts)
    (_, length, channels), number = x.shape, cu_seqlens.shape[0] - 1
    y, new_state = torch.empty_like(x), x.new_empty(number, channels, weight.shape[-1])
    tile = CONVOLUTION_FORWARD
    # Where a sequence ends, a program waits for the next one's state: it should not walk over many.
    rows = min(tile.rows, power_of_2(max(length // max(number, 1), 1)))
    runs = ceil_div(length, rows)
    launch(
        *(varlen_kernel, (runs + number, ceil_div(channels, tile.channels))),
        *(x, weight, state, bias, cu_seqlens, starts, y, new_state),
        *(length, number, runs, number.bit_length(), channels),
        W=weight.shape[-1],
        HAS_STATE=state is not None,
        HAS_STARTS=starts is not None,
        ROWS=rows,
        CHANNELS=tile.channels,
        num_warps=tile.num_warps,
    )
    return y, new_state
