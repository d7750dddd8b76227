"""The MLP over a piece of the tokens at a time, for rows so long that its wide activations are most of the memory.

Activation checkpointing keeps a layer's input, D numbers a token, and makes one layer's activations again on the way
back: about 27 D a token, of which 20 D are the MLP's and their gradients'. They owe other tokens nothing, so here they
exist for one piece of the tokens only. Nothing is computed more often: checkpointing stops making activations again at
the last one that was kept, which is the MLP's input, and the piece makes its own.

Legend: N tokens of all rows, D hidden size.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.utils import logging

from ..modeling_griffin import GriffinMLP


logger = logging.get_logger(__name__)

PIECE = 32768  # tokens: products of this size keep a GPU busy, and their activations are 1.5 GB at D = 2560


def mlp_in_pieces(model: nn.Module, piece: int = PIECE) -> None:
    """From now on the MLPs of `model` take at most `piece` tokens at a time; fewer tokens run as before.

    For long rows under activation checkpointing, where it costs no time. Without it, the MLP runs once more on the way
    back. Values and gradients stay those of the whole MLP, up to the order of sums; gradients of weights are summed in
    float32. Call it before DDP or FSDP2; `piece` of another call takes the place of the former.

    Raises:
        ValueError: for a model without a Griffin's MLPs, or a `piece` below 1.
    """
    if piece < 1:
        raise ValueError(f"piece = {piece}: allowed are whole numbers from 1")
    blocks = [module for module in model.modules() if isinstance(module, GriffinMLP)]
    if not blocks:
        raise ValueError(f"model is a {type(model).__name__} without a GriffinMLP: allowed are Griffin's models")
    for block in blocks:
        block.piece = piece


def run_in_pieces(block: GriffinMLP, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """(..., D) -> (..., D); None where all tokens at once are as good, or have to be."""
    tokens = hidden_states.shape[:-1].numel()
    if tokens <= block.piece or _draws_numbers(block):
        return None
    return _in_pieces(block.whole, block, hidden_states)


def _draws_numbers(block: nn.Module) -> bool:
    """Whether a piece would not be the same a second time."""
    active = any(isinstance(module, nn.Dropout) and module.p for module in block.modules())
    if block.training and active:
        logger.warning_once("mlp_in_pieces: the MLP has dropout and runs whole; without dropout it takes less memory")
    return block.training and active


@torch.compiler.disable
def _in_pieces(forward, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    if torch.is_grad_enabled() and (x.requires_grad or parameters):
        x = _Kept.apply(x if x.requires_grad else x.detach().requires_grad_())
    return _Pieces.apply(x, x.grad_fn, forward, block.piece, *parameters)


class _Kept(torch.autograd.Function):
    """The input, kept before anything is computed of it: where checkpointing stops."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d_x):
        return d_x


class _Pieces(torch.autograd.Function):
    """forward(x), keeping nothing; the way back reads x from `node`, `_Kept`'s."""

    @staticmethod
    def forward(ctx, x, node, forward, piece, *parameters):
        ctx.node, ctx.run, ctx.piece, ctx.parameters = node, forward, piece, parameters
        device = x.device.type
        ctx.autocast = {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}
        with torch.autocast(device, **ctx.autocast, cache_enabled=False):  # what it casts here has no graph
            pieces = [forward(part) for part in x.flatten(0, -2).split(piece)]
        return torch.cat(pieces).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        (x,) = ctx.node.saved_tensors
        inputs, sums = x.flatten(0, -2), [torch.zeros_like(each, dtype=_wide(each)) for each in ctx.parameters]
        d_x = torch.empty_like(inputs)
        parts = zip(*(tensor.split(ctx.piece) for tensor in (inputs, d_y.flatten(0, -2), d_x)))
        for part, d_part, d_input in parts:
            part = part.detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(x.device.type, **ctx.autocast, cache_enabled=False):
                y = ctx.run(part)
            found, *gradients = torch.autograd.grad(y, (part, *ctx.parameters), d_part, allow_unused=True)
            d_input.copy_(found)
            for total, gradient in zip(sums, gradients):
                if gradient is not None:
                    total.add_(gradient)
        d_parameters = [total.to(each.dtype) for total, each in zip(sums, ctx.parameters)]
        return d_x.view_as(x), None, None, None, *d_parameters


def _wide(parameter: torch.Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
