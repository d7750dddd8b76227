"""The Real-Gated Linear Recurrent Unit: two block-diagonal gates, the learnt decay, the recurrence.

Legend: B batch, T time, C channels, N gate blocks.
"""  # SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

import torch
from torch import nn

from .rg_lru_scan import rg_lru_scan
from .slots import slot


class BlockDiagonalLinear(nn.Module):
    """x W + b with W block-diagonal: weight (N, C/N, C/N) with the input axis first, bias (N, C/N)."""

    def __init__(self, width: int, num_blocks: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_blocks, width // num_blocks, width // num_blocks))
        self.bias = nn.Parameter(torch.empty(num_blocks, width // num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        return block_diagonal(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}"  # whole: a launcher may have left an empty shard


@slot
def block_diagonal(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x (B, T, C) through weight (N, C/N, C/N) and bias (N, C/N)."""
    blocks = x.unflatten(-1, weight.shape[:2])  # sizes come from tensors: they may be shards
    y = torch.einsum("btni,nij->btnj", blocks, weight)
    return (y + bias.to(y.dtype)).flatten(-2)  # under autocast y is bfloat16 and the bias float32


@slot
def gates(x: torch.Tensor, recurrence_gate: nn.Module, input_gate: nn.Module) -> tuple[torch.Tensor, ...]:
    """Both pre-activations (B, T, C), and the x that the recurrence reads."""
    return recurrence_gate(x), input_gate(x), x


class Decay(nn.Module):
    """Holds Λ and nothing else, so that it can stay float32 while its neighbours are bfloat16.

    Λ is called `lambda_bias` because stock optimisers leave names with "bias" out of weight decay, and decaying Λ would
    pull every channel towards a = sigmoid(0) = 0.5, a memory of one token.
    """

    def __init__(self, width: int, c: float):
        super().__init__()
        self.c = c
        self.lambda_bias = nn.Parameter(torch.empty(width, dtype=torch.float32))

    def forward(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """log(a^c) = -c * softplus(Λ) (C,) in `dtype`, <= 0. Stored sign: see `lambda_init.py`."""
        return -self.c * nn.functional.softplus(self.lambda_bias.to(dtype))

    def _apply(self, fn, *args, **kwargs):
        """Casts to 16 bits, as by `model.to(torch.bfloat16)`, leave Λ float32; moves and float64 take it along."""

        def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            dtype = torch.promote_types(moved.dtype, torch.float32)
            return moved if moved.dtype == dtype else tensor.to(moved.device, dtype)

        return super()._apply(at_least_float32, *args, **kwargs)

    def train(self, mode: bool = True) -> nn.Module:
        """Float32 again where something has cast the parameter itself, as TRL does with all that QLoRA trains."""
        if self.lambda_bias.dtype.itemsize < 4:
            self._apply(lambda tensor: tensor)
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{tuple(self.lambda_bias.shape)}, c={self.c}"


class RGLRU(nn.Module):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t), equations 1 to 4 of the paper.

    scan: what takes the place of `rg_lru_scan` in one module, where its rows go on elsewhere; None: nothing.
    """

    scan: Callable | None = None

    def __init__(self, width: int, num_gate_blocks: int, c: float):
        super().__init__()
        # Differs: equations 1 and 2 have dense matrices; the paper's models and DeepMind's code block-diagonal ones.
        self.recurrence_gate = BlockDiagonalLinear(width, num_gate_blocks)
        self.input_gate = BlockDiagonalLinear(width, num_gate_blocks)
        self.decay = Decay(width, c)

    def forward(
        self, x: torch.Tensor, document_start: torch.Tensor | None = None, real: torch.Tensor | None = None,
        state: torch.Tensor | None = None, states_to_keep: int | None = None, cu_seqlens: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """
        Args:
            x: (B, T, C).
            document_start: (B, T) bool, where the state is forgotten.
            real: (B, T) bool, False for padding, which carries the state; None when there is none.
            state: (B, C) float32, h before the first token; None means zeros.
            states_to_keep: N, to get the states behind the last N tokens instead of the last state alone.
            cu_seqlens, starts: sequences end to end in one row, with a state each, as in `rg_lru_scan`.

        Returns:
            hidden (B, T, C) in the dtype of x and the last state (B, C) float32; or the last states (B, min(N, T), C).
        """
        recurrence_gate, input_gate, x = gates(x, self.recurrence_gate, self.input_gate)
        if real is not None:
            padding = real.logical_not()[..., None]
            x, recurrence_gate = x.masked_fill(padding, 0.0), recurrence_gate.masked_fill(padding, -torch.inf)
        dtype = x.dtype
        if states_to_keep is not None:
            x = x.to(torch.promote_types(dtype, torch.float32))  # then hidden is the states themselves, not rounded
        # With an argument: where activations are made anew, FSDP2 of PyTorch 2.9 to 2.11 cannot call a module without.
        log_decay = self.decay(torch.float32)
        scan, sequences = self.scan or rg_lru_scan, {}
        if cu_seqlens is not None:
            sequences = {"cu_seqlens": cu_seqlens, "starts": starts}
        hidden, state = scan(
            x, recurrence_gate, input_gate, log_decay, initial_state=state, reset=document_start, **sequences
        )
        return hidden.to(dtype), state if states_to_keep is None else hidden[:, -states_to_keep:]
