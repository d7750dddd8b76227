"""One gate's block-diagonal product on a GPU, where both gates cannot be made as a pair (`gates.py`).

Legend: B batch, T time, C channels, N gate blocks, W = C / N their width.
"""

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class BlockDiagonalProduct(torch.autograd.Function):
    """A block-diagonal product with each block written where it belongs.

    The batched product that einsum calls puts the blocks first, and then the bias, the scan and the way back each pay
    for a copy of (B, T, C) into another order: more time than the products themselves.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        y, wide = x.new_empty(x.shape), _join_narrow_blocks(weight)
        torch.bmm(_by_block(x, wide), wide, out=_by_block(y, wide))
        return y.add_(bias.flatten())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight = ctx.saved_tensors
        d_y, d_x, wide = d_y.contiguous(), x.new_empty(x.shape), _join_narrow_blocks(weight)
        torch.bmm(_by_block(d_y, wide), wide.mT, out=_by_block(d_x, wide))
        d_weight = _diagonal_blocks(_products_of_rows(x, d_y, wide), weight)
        return d_x, d_weight, d_y.flatten(0, -2).sum(0).view(weight.shape[:2])


def _by_block(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B, T, C) -> a view (N, B * T, C/N)."""
    return x.reshape(-1, *weight.shape[:2]).transpose(0, 1)


JOINED_WIDTH = 64  # GPUs multiply a block of this width as fast as one of 4


def _join_narrow_blocks(weight: torch.Tensor) -> torch.Tensor:
    """(N, W, W) -> (N / k, k W, k W): k neighbours on the diagonal of one block, as many as fit JOINED_WIDTH."""
    blocks, width, _ = weight.shape
    k = max(k for k in range(1, max(1, JOINED_WIDTH // width) + 1) if blocks % k == 0)
    if k == 1:
        return weight
    wide = weight.new_zeros(blocks // k, k, width, k, width)
    wide.diagonal(dim1=1, dim2=3).copy_(weight.unflatten(0, (-1, k)).permute(0, 2, 3, 1))
    return wide.view(blocks // k, k * width, k * width)


def _diagonal_blocks(wide: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The way back from `_join_narrow_blocks`: (N / k, k W, k W) -> (N, W, W)."""
    width, k = weight.shape[1], weight.shape[0] // wide.shape[0]
    return wide.view(-1, k, width, k, width).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(weight.shape)


SMALL_RESULT, PARTS = 2**14, 64


def _products_of_rows(x: torch.Tensor, d_y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The sum over rows of x^T d_y by block, (N, W, W).

    A small result is few programs' work, each of which would walk over all rows: so they are summed in parts.
    """
    rows = x.numel() // x.shape[-1]
    parts = math.gcd(rows, PARTS) if weight.numel() <= SMALL_RESULT else 1
    x, d_y = (each.reshape(parts, -1, *weight.shape[:2]).transpose(1, 2) for each in (x, d_y))
    return torch.matmul(x.mT, d_y).sum(0)
