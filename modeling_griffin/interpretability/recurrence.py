"""a_t, i_t, r_t and h_t of every recurrent layer, as nodes of the graph: to be looked at, and differentiated both ways.

The fused scan never makes these tensors. While they are recorded, each layer computes its recurrence from them, by the
linear scan in plain PyTorch: the loss depends on them, and they on the weights.

Legend: B batch, T time, C channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from ..rg_lru_scan_reference import MAX_SQRT_GRADIENT
from ..rg_lru_scan_torch import linear_scan


class Recurrence(NamedTuple):
    """One layer's recurrence over the tokens of one forward pass, in the paper's letters (equations 1 to 4).

        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)

    Each is (B, T, C) in float32, or in float64 of a float64 model.

    a: the decay. 0 where a document starts (there the input is not scaled either), 1 at padding.
    i: the input gate. Padding has one too; its input is 0.
    r: the recurrence gate, log a_t = -c softplus(Λ) r_t. 0 at padding, which so carries the state.
    h: the hidden states.
    """

    a: torch.Tensor
    i: torch.Tensor
    r: torch.Tensor
    h: torch.Tensor


@contextmanager
def record_recurrences(model: nn.Module) -> Iterator[dict[int, Recurrence]]:
    """Within the block, every forward pass leaves the recurrences of its layers in the dictionary that this yields.

    The keys are the numbers of the recurrent layers; the next forward pass replaces what the one before has left, and
    what is there at the end stays. Logits and gradients are the model's own to rounding; a pass takes the time of the
    recurrence in plain PyTorch, and `generate` and `record_training` run without their recordings.

    Args:
        model: any Griffin, or what PEFT made of it; not compiled.

    Raises:
        ValueError: for a model without recurrent layers, with activation checkpointing (each layer runs again for the
            backward pass, on tensors that the loss does not depend on), or whose recurrences are recorded already or
            shared among ranks.
    """
    blocks = [module for module in model.modules() if hasattr(module, "rg_lru")]
    _check(model, blocks)
    recorded: dict[int, Recurrence] = {}
    recorders = [_LayerRecorder(block.rg_lru, block.layer_idx, recorded) for block in blocks]
    try:
        yield recorded
    finally:
        for recorder in recorders:
            recorder.remove()


def _check(model: nn.Module, blocks: list[nn.Module]) -> None:
    if not blocks:
        raise ValueError(f"model is a {type(model).__name__} without recurrent layers: allowed are Griffins and Hawks")
    if any(block.rg_lru.scan is not None for block in blocks):
        raise ValueError("model is recorded already, or its rows are shared among ranks: allowed is one at a time")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError("model has gradient checkpointing: allowed is without, gradient_checkpointing_disable()")


class _LayerRecorder:
    """Takes the place of one layer's scan."""

    def __init__(self, rg_lru: nn.Module, layer_idx: int, recorded: dict[int, Recurrence]):
        self.rg_lru, self.layer_idx, self.recorded = rg_lru, layer_idx, recorded
        self.last: Recurrence | None = None
        rg_lru.scan = self.scan
        # A hook, so that what replays recorded steps sees Python that has to run at each of them.
        self.hook = rg_lru.register_forward_hook(self.keep)

    def remove(self) -> None:
        self.hook.remove()
        del self.rg_lru.scan

    def keep(self, *_) -> None:
        self.recorded[self.layer_idx], self.last = self.last, None

    def scan(self, x, recurrence_gate, input_gate, log_decay, *, initial_state=None, reset=None):
        """Arguments and results as of `rg_lru_scan`; h_t as `Recurrence` has it."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        r, i = torch.sigmoid(recurrence_gate.to(dtype)), torch.sigmoid(input_gate.to(dtype))
        log_a = log_decay.to(dtype) * r
        a = torch.exp(log_a)
        if reset is not None:
            a = a.masked_fill(reset[..., None], 0.0)
        multiplier = _InputScale.apply(a, log_a)
        if reset is not None:
            multiplier = multiplier.masked_fill(reset[..., None], 1.0)
        b = multiplier * i * x.to(dtype)
        if initial_state is not None:
            b = torch.cat([b[:, :1] + a[:, :1] * initial_state.to(dtype)[:, None], b[:, 1:]], dim=1)
        h = linear_scan(a, b)
        self.last = Recurrence(a, i, r, h)
        return h.to(x.dtype), h[:, -1].clone()


class _InputScale(torch.autograd.Function):
    """sqrt(1 - a^2), from log a, where it keeps its digits near a = 1; its gradient goes to a, bounded as elsewhere."""

    @staticmethod
    def forward(ctx, a: torch.Tensor, log_a: torch.Tensor) -> torch.Tensor:
        multiplier = torch.sqrt(-torch.expm1(2 * log_a))
        ctx.save_for_backward(a, multiplier)
        return multiplier

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        a, multiplier = ctx.saved_tensors
        return grad * -a / multiplier.clamp(min=0.5 / MAX_SQRT_GRADIENT), None
