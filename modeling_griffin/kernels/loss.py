"""The loss of each row of logits on a GPU, one pass over the logits each way.

Legend: N rows, V vocabulary. Kernels: p_ pointer, i_ index, m_ mask.
"""

from typing import Any

import torch

from ..causal_lm_loss import columns_and_scale, softmax_gradient
from ..gpu import on_its_device
from .device.training import LOSS_GRADIENTS, LOSSES


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


class KernelRowLosses(torch.autograd.Function):
    """`RowLosses` by Triton kernels. A target that is no token gives NaN; PyTorch's operator ends the process."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
        losses, log_sums = row_losses(logits, targets, ignore_index)
        ctx.save_for_backward(logits, targets, log_sums)
        ctx.ignore_index = ignore_index
        return losses

    @staticmethod
    def backward(ctx: Any, d_losses: torch.Tensor) -> tuple:
        logits, targets, log_sums = ctx.saved_tensors
        columns, scale = columns_and_scale(targets, d_losses, ctx.ignore_index)
        if torch.is_grad_enabled():
            return softmax_gradient(logits, columns, scale), None, None
        return row_gradients(logits, targets, log_sums, scale[:, 0]), None, None


def row_losses(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (N, V), targets (N,) -> losses and log-sum-exps, (N,) float32 each.

    A loss is 0 where the target is `ignore_index`, and NaN where it is no token.
    """
    losses, log_sums = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    with on_its_device(logits):
        _losses_kernel[(len(logits),)](
            *(logits.contiguous(), targets, losses, log_sums, logits.shape[1], ignore_index),
            COLUMNS=LOSSES[0],
            num_warps=LOSSES[1],
        )
    return losses, log_sums


def row_gradients(
    logits: torch.Tensor, targets: torch.Tensor, log_sums: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """(softmax - one-hot) * scale in the dtype of the logits; scale (N,) float32, 0 for rows that are left out."""
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    with on_its_device(logits):
        _gradients_kernel[(len(logits),)](
            *(logits.contiguous(), targets, log_sums, scale.contiguous(), gradient, logits.shape[1]),
            COLUMNS=LOSS_GRADIENTS[0],
            num_warps=LOSS_GRADIENTS[1],
        )
    return gradient


if triton is not None:

    @triton.jit
    def _losses_kernel(p_logits, p_targets, p_losses, p_log_sums, V, ignore_index, COLUMNS: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        top = tl.full([COLUMNS], float("-inf"), tl.float32)
        total = tl.zeros([COLUMNS], tl.float32)
        start = row * 0
        while start < V:
            i = start + tl.arange(0, COLUMNS)
            x = tl.load(p_logits + row * V + i, mask=i < V, other=float("-inf")).to(tl.float32)
            higher = tl.where(x > top, x, top)  # of each lane; NaN goes into the total
            both = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - both) + tl.exp(x - both)
            top = higher
            start += COLUMNS
        highest = tl.max(top, 0)
        total = tl.sum(total * tl.exp(top - highest), 0)
        log_sum = highest + tl.log(total)
        target = tl.load(p_targets + row)
        is_token = (target >= 0) & (target < V)
        loss = log_sum - tl.load(p_logits + row * V + target, mask=is_token, other=0.0).to(tl.float32)
        loss = tl.where(is_token, loss, float("nan"))
        tl.store(p_losses + row, tl.where(target == ignore_index, 0.0, loss))
        tl.store(p_log_sums + row, log_sum)

    @triton.jit
    def _gradients_kernel(p_logits, p_targets, p_log_sums, p_scale, p_gradient, V, COLUMNS: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        log_sum, scale, target = tl.load(p_log_sums + row), tl.load(p_scale + row), tl.load(p_targets + row)
        start = row * 0
        while start < V:
            i = start + tl.arange(0, COLUMNS)
            x = tl.load(p_logits + row * V + i, mask=i < V, other=float("-inf")).to(tl.float32)
            gradient = (tl.exp(x - log_sum) - tl.where(i == target, 1.0, 0.0)) * scale
            tl.store(p_gradient + row * V + i, gradient.to(p_gradient.dtype.element_ty), mask=i < V)
            start += COLUMNS
