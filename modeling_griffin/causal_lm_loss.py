"""The causal language-model loss, without the logits in float32.

Transformers' loss holds them three times, 4 N V bytes each: a copy of the logits, their log-softmax and its gradient.
Here rows are taken in chunks, computed in float32 and let go; kept for the backward pass are the logits, which the
model's output holds anyway, and the labels. The log-sum-exp is not kept: its softmax takes the logits alone, in one
fused operator, where with it there would be three passes over each chunk.

Legend: B batch, T time, V vocabulary, N = B T rows.
"""  # SPDX-License-Identifier: Apache-2.0

from typing import Any

import torch
from torch.nn import functional as F

from .slots import slot


# Elements of a chunk. A CPU is fastest where chunks stay in its caches, 4 MiB of float32. A GPU needs enough rows to be
# busy and enough work to hide the launches: 128 MiB of float32 are 1,048 rows of 32,000 logits, 131 of 256,000.
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
# Up to here float32 logits, 16 MiB, go to PyTorch's own operator: on a CPU a tenth faster, and nothing to save.
SMALL_ELEMENTS = 2**22


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: object,
) -> torch.Tensor:
    """The arguments and the value of Transformers' `ForCausalLMLoss`, a number in float32.

    Args:
        logits: (B, T, V), any floating dtype; of float64, the loss is in float64 too (Transformers' is in float32).
        labels: (B, T) int64, on any device; labels[t + 1] is predicted from logits[t], `ignore_index` is left out.
        vocab_size: V.
        num_items_in_batch: what the sum is divided by, in place of the number of labels that are not left out.
        shift_labels: (B, T), labels that are shifted already: shift_labels[t] belongs to logits[t]; `labels` is unused.
        kwargs: ignored, what else the model was called with.

    Raises:
        ValueError: for another number of labels than of logits; further errors are `torch.nn.functional.nll_loss`'s.

    Values and gradients where logits are not finite, or all labels left out (a mean of NaN), are those of
    `torch.nn.functional.cross_entropy`. Nothing waits for the device. With `create_graph=True`, as always under
    `torch.func`, the backward pass is made of ordinary operators, and holds float32 for all rows at once.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
    logits, targets = logits.reshape(-1, vocab_size), shift_labels.reshape(-1).to(logits.device)
    if len(targets) != len(logits):
        raise ValueError(f"labels has {len(targets)} tokens: allowed is one for each of the {len(logits)} of logits")
    if num_items_in_batch is None:
        return _cross_entropy(logits, targets, ignore_index, "mean")
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return _cross_entropy(logits, targets, ignore_index, "sum") / num_items_in_batch


def _cross_entropy(logits, targets, ignore_index: int, reduction: str) -> torch.Tensor:
    """PyTorch's own for few logits that need no cast, and where a compiler does the work of the chunks.

    Inductor fuses cast, softmax and gradient into loops over the logits and stores no float32 of their size, while a
    loop over chunks would be unrolled.
    """
    dtype = _computed_in(logits)
    small = logits.dtype == dtype and logits.numel() <= SMALL_ELEMENTS
    if small or torch.compiler.is_compiling():
        return F.cross_entropy(logits.to(dtype), targets, ignore_index=ignore_index, reduction=reduction)
    total = row_losses(logits, targets, ignore_index).sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum(dtype=dtype)


@slot
def row_losses(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """-log softmax(logits)[target] of each row, 0 where the target is `ignore_index`: (N, V), (N,) -> (N,)."""
    return RowLosses.apply(logits, targets, ignore_index)


class CausalLMName(str):
    """A class's name that also equals one in Transformers' table of causal language models.

    With `label_smoothing_factor`, `Trainer` computes the loss itself and shifts labels only for names in that table.
    Griffin, a subclass and FSDP2's FSDP<name> are not in it, and would learn to repeat each token.
    """

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str(self) == other or other == "RecurrentGemmaForCausalLM"

    def __ne__(self, other: object) -> bool:
        return not self == other


class RowLosses(torch.autograd.Function):
    """-log softmax(logits)[target] of each row, 0 where the target is `ignore_index`: (N, V), (N,) -> (N,)."""

    @staticmethod
    def forward(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
        dtype, rows = _computed_in(logits), _chunk_rows(logits)
        losses = [
            F.nll_loss(F.log_softmax(chunk, -1, dtype=dtype), target, ignore_index=ignore_index, reduction="none")
            for chunk, target in zip(logits.split(rows), targets.split(rows))
        ]
        return torch.cat(losses)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        logits, targets, ctx.ignore_index = inputs
        ctx.save_for_backward(logits, targets)

    @staticmethod
    def backward(ctx: Any, d_losses: torch.Tensor) -> tuple:
        logits, targets = ctx.saved_tensors
        columns, scale = columns_and_scale(targets, d_losses, ctx.ignore_index)
        with_graph = torch.is_grad_enabled()  # create_graph=True: to be differentiated again
        return (softmax_gradient if with_graph else _gradient_in_chunks)(logits, columns, scale), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Rows know nothing of each other: those of the whole batch, one after another."""
        logits, targets = (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(inputs[:2], in_dims)
        )
        losses = RowLosses.apply(logits.flatten(0, 1), targets.flatten(), *inputs[2:])
        return losses.view(targets.shape), 0


def columns_and_scale(targets: torch.Tensor, d_losses: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, ...]:
    """(N, 1) each: the target or 0, and the gradient that comes in, 0 for rows that are left out."""
    counted = targets != ignore_index
    return torch.where(counted, targets, 0)[:, None], torch.where(counted, d_losses, 0.0)[:, None]


def softmax_gradient(logits: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(softmax - one-hot) * scale in the dtype of the logits; columns (N, 1) of the targets, scale (N, 1)."""
    softmax = torch.softmax(logits, -1, dtype=_computed_in(logits))
    return (softmax.scatter(1, columns, softmax.gather(1, columns) - 1) * scale).to(logits.dtype)


def _gradient_in_chunks(logits, columns, scale) -> torch.Tensor:
    """The same, of one chunk after another, in place."""
    gradient, rows = torch.empty_like(logits), _chunk_rows(logits)
    for chunk, column, factor, out in zip(*(x.split(rows) for x in (logits, columns, scale, gradient))):
        softmax = torch.softmax(chunk, -1, dtype=_computed_in(logits))
        softmax.scatter_(1, column, softmax.gather(1, column) - 1)
        torch.mul(softmax, factor, out=out)
    return gradient


def _computed_in(logits) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _chunk_rows(logits) -> int:
    return max(1, CHUNK_ELEMENTS.get(logits.device.type, CHUNK_ELEMENTS["cuda"]) // logits.shape[1])
