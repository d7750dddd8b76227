"""Both gates of the RG-LRU on a GPU: pre-activations r = x W_r + b_r and i = x W_i + b_i, W block-diagonal, as a pair.

Apart, each gate costs a product, a pass for its bias, and on the way back a pass for the bias and one to add its d_x to
the other's. Here x and both results go through memory once forward, and backward the gradients of both and d_x once;
the scan, which reads x too, gets it from here, so that its share of d_x is added on the way. The weights' gradients are
plain batched products. `gates_kernels` has the kernels.

Legend: C channels, N gate blocks, W = C / N their width, M rows: all axes of x but the last, flattened.
"""

import torch
from torch.autograd.function import once_differentiable

from ..gpu import ceil_div, properties, register_limit
from .device.training import (
    GATES_BACKWARD,
    GATES_BACKWARD_WIDE,
    GATES_FORWARD,
    GATES_FORWARD_WIDE,
    NARROW_GATES,
    GateTile,
    gates_refusal,
)
from .launch import launch, power_of_2


try:
    import triton

    from .gates_kernels import backward_kernel, forward_kernel
except ImportError:
    triton = None

DTYPES = (torch.float16, torch.bfloat16)
LARGEST_WIDTH = 256  # a program holds ROWS * W sums in registers


def gates_unavailable_reason(x: torch.Tensor, *parameters: torch.Tensor) -> str | None:
    """None where `rg_lru_gates` can run on these, else why not. `dispatch.pays` is asked before."""
    if x.dtype not in DTYPES or any(parameter.dtype != x.dtype for parameter in parameters):
        return f"x and parameters are {[t.dtype for t in (x, *parameters)]}, allowed is one of float16 and bfloat16"
    if (width := parameters[0].shape[-1]) > LARGEST_WIDTH:
        return f"gate blocks are {width} wide, the kernels take up to {LARGEST_WIDTH}"
    return gates_refusal(properties(x.device))


def rg_lru_gates(
    x: torch.Tensor,
    recurrence_weight: torch.Tensor,
    recurrence_bias: torch.Tensor,
    input_weight: torch.Tensor,
    input_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both pre-activations (..., C) of x (..., C), summed in float32 and rounded once to the dtype of all, 16 bits.

    And x itself: the gradient of what is computed from this one is added to d_x in the same pass.

    Weights are (N, W, W) with the input axis first, biases (N, W). `gates_unavailable_reason` must be None, Triton
    installed. Gradients of x and the biases are deterministic, those of the weights as `torch.bmm` is. Second
    derivatives raise.
    """
    return _Gates.apply(x, recurrence_weight, recurrence_bias, input_weight, input_bias)


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_r, bias_r, weight_i, bias_i):
        ctx.save_for_backward(x, weight_r, weight_i)
        ctx.set_materialize_grads(False)
        r, i = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
        inputs = _contiguous(x, weight_r, bias_r, weight_i, bias_i)
        tile = GATES_FORWARD if weight_r.shape[-1] <= NARROW_GATES else GATES_FORWARD_WIDE
        _launch(forward_kernel, tile, weight_r, (*inputs, r, i), programs_per_tile=2)
        return r, i, x

    @staticmethod
    @once_differentiable
    def backward(ctx, d_r, d_i, d_same):
        if d_r is None and d_i is None:
            return d_same, None, None, None, None
        x, weight_r, weight_i = ctx.saved_tensors  # once: activation checkpointing computes them at each access
        d_r, d_i = (torch.zeros_like(x) if d is None else d.contiguous() for d in (d_r, d_i))
        d_x, d_bias_r, d_bias_i = _backward(d_r, d_i, d_same, weight_r, weight_i)
        d_weight_r = _weight_gradient(x, d_r, weight_r) if ctx.needs_input_grad[1] else None
        d_weight_i = _weight_gradient(x, d_i, weight_i) if ctx.needs_input_grad[3] else None
        return d_x, d_weight_r, d_bias_r, d_weight_i, d_bias_i


def _backward(d_r, d_i, d_same, weight_r, weight_i):
    tile = GATES_BACKWARD if weight_r.shape[-1] <= NARROW_GATES else GATES_BACKWARD_WIDE
    d_x = torch.empty_like(d_r)
    tiles = ceil_div(d_r.numel() // d_r.shape[-1], tile.rows)
    # Sums over each tile, then over the tiles in a fixed order: no atomics, the same result every time.
    d_bias = torch.empty(tiles, 2, *weight_r.shape[:2], dtype=torch.float32, device=d_r.device)
    d_same = None if d_same is None else d_same.contiguous()
    _launch(backward_kernel, tile, weight_r, (d_r, d_i, d_same, *_contiguous(weight_r, weight_i), d_x, d_bias))
    return d_x, *d_bias.sum(0).to(d_r.dtype).unbind(0)


def _weight_gradient(x: torch.Tensor, d_y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x, d_y = (tensor.reshape(-1, *weight.shape[:2]).transpose(0, 1) for tensor in (x, d_y))
    return torch.bmm(x.mT, d_y)


def _contiguous(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _launch(kernel, tile: GateTile, weight: torch.Tensor, tensors, programs_per_tile: int = 1) -> None:
    x, (blocks, width, _) = tensors[0], weight.shape
    rows = x.numel() // x.shape[-1]
    first, rest, depth = _cover(width, tile.depth)
    launch(
        kernel,
        (programs_per_tile * blocks * ceil_div(rows, tile.rows),),
        *(*tensors, rows, blocks),
        WIDTH=width,
        FIRST=first,
        REST=rest,
        ROWS=tile.rows,
        DEPTH=depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **register_limit(tile.max_registers, x.device),
    )


def _cover(width: int, largest_depth: int) -> tuple[int, int, int]:
    """FIRST, REST, DEPTH: powers of two of at least 16, which products need. 160 is 128 + 32, summed over in 5 x 32."""
    first = max(16, 1 << (width.bit_length() - 1))
    rest = max(16, power_of_2(width - first)) if width > first else 0
    return first, rest, min(max(16, width & -width), largest_depth)
