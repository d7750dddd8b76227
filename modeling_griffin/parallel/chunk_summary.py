"""A chunk of the RG-LRU in two numbers a channel, (A, h_local): h behind the chunk is A h_in + h_local. And backwards.

On a GPU in one pass over the inputs by a Triton kernel, elsewhere in plain PyTorch.

Legend: B batch, T time, C channels, S segments of a chunk.
"""

import torch

from ..gpu import ceil_div
from ..kernels.device.training import CHUNK_SUMMARY
from ..kernels.launch import launch
from ..rg_lru_scan_triton import triton_unavailable_reason


try:
    import triton

    from .chunk_summary_kernels import backward_summary_kernel, summary_kernel
except ImportError:
    triton = None


BLOCK = 1024  # steps whose decays and inputs are held in float32 at a time
ROWS, CHANNELS, WARPS = CHUNK_SUMMARY  # of a program of the kernels


def fold(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The steps h -> a_t h + b_t along dim 1 as one step, by halves: (B, T, C), T >= 1 -> (B, C) twice."""
    while (length := a.shape[1]) > 1:
        even = length // 2 * 2
        a_first, a_second = a[:, 0:even:2], a[:, 1:even:2]
        folded = a_first * a_second, torch.addcmul(b[:, 1:even:2], a_second, b[:, 0:even:2])
        a, b = (torch.cat([new, old[:, even:]], dim=1) for new, old in zip(folded, (a, b)))
    return a[:, 0], b[:, 0]


def decays(
    recurrence_gate: torch.Tensor, log_decay: torch.Tensor, reset: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """a (B, T, C), 0 at a reset, and what the input is multiplied by, 1 at a reset."""
    log_a = log_decay.to(dtype) * torch.sigmoid(recurrence_gate.to(dtype))
    a, multiplier = torch.exp(log_a), torch.sqrt(-torch.expm1(2 * log_a))
    if reset is not None:
        a, multiplier = a.masked_fill(reset[..., None], 0.0), multiplier.masked_fill(reset[..., None], 1.0)
    return a, multiplier


def summarize(
    x: torch.Tensor,
    recurrence_gate: torch.Tensor,
    input_gate: torch.Tensor,
    log_decay: torch.Tensor,
    reset: torch.Tensor | None,
) -> torch.Tensor:
    """(2, B, C) in float32 (float64 where x is): the product of the decays, and the last state from a zero state."""
    if triton_unavailable_reason(x) is None:
        segments = _reduce_segments(summary_kernel, (x, recurrence_gate, input_gate), log_decay, reset)
        return torch.stack(fold(*segments))
    dtype = torch.promote_types(x.dtype, torch.float32)
    steps = []
    for inputs, gate, scale, starts in _blocks(x, recurrence_gate, input_gate, reset):
        a, multiplier = decays(gate, log_decay, starts, dtype)
        steps.append(fold(a, multiplier * torch.sigmoid(scale.to(dtype)) * inputs.to(dtype)))
    return torch.stack(fold(*(torch.stack(each, dim=1) for each in zip(*steps))))


def summarize_backwards(
    d_hidden: torch.Tensor, recurrence_gate: torch.Tensor, log_decay: torch.Tensor, reset: torch.Tensor | None
) -> torch.Tensor:
    """(B, C): the gradient of the initial state, as far as it comes from `d_hidden` (B, T, C) of this chunk."""
    if triton_unavailable_reason(d_hidden) is None:
        segments = _reduce_segments(backward_summary_kernel, (d_hidden, recurrence_gate), log_decay, reset)
        return fold(*(each.flip(1) for each in segments))[1]
    dtype = torch.promote_types(d_hidden.dtype, torch.float32)
    steps = []
    for gradient, gate, starts in _blocks(d_hidden, recurrence_gate, reset):
        a, _ = decays(gate, log_decay, starts, dtype)
        steps.append(fold(a.flip(1), (a * gradient.to(dtype)).flip(1)))
    _, owed = fold(*(torch.stack(each[::-1], dim=1) for each in zip(*steps)))
    return owed


def _blocks(*tensors):
    """The tensors' blocks of at most BLOCK steps, side by side; None stays None."""
    count = -(-tensors[0].shape[1] // BLOCK)
    return zip(*([None] * count if tensor is None else tensor.split(BLOCK, dim=1) for tensor in tensors))


def _reduce_segments(kernel, inputs, log_decay, reset) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S, C) float32 twice: of each ROWS steps the product of the decays, and what they add."""
    inputs = [each.contiguous() for each in inputs]
    batch, length, channels = inputs[0].shape
    segments = ceil_div(length, ROWS)
    products, sums = log_decay.new_empty(2, batch, segments, channels, dtype=torch.float32)
    launch(
        *(kernel, (segments, ceil_div(channels, CHANNELS), batch)),
        *(*inputs, log_decay.float().contiguous(), None if reset is None else reset.contiguous()),
        *(products, sums, length, channels),
        HAS_RESET=reset is not None,
        MASKED=channels % CHANNELS != 0,
        EXACT=any(each.dtype == torch.float32 for each in inputs),
        ROWS=ROWS,
        CHANNELS=CHANNELS,
        num_warps=WARPS,
    )
    return products, sums
