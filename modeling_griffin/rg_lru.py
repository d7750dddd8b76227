"""The Real-Gated Linear Recurrent Unit: two block-diagonal gates, the learnt decay, the recurrence.

Legend: B batch, T time, C channels, N gate blocks.
"""

import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .fused import pays
from .fused_linear import as_autocast, is_plain
from .gates_triton import gates_unavailable_reason, rg_lru_gates
from .rg_lru_scan import rg_lru_scan


class BlockDiagonalLinear(nn.Module):
    """x W + b with W block-diagonal: weight (N, C/N, C/N) with the input axis first, bias (N, C/N)."""

    def __init__(self, width: int, num_blocks: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_blocks, width // num_blocks, width // num_blocks))
        self.bias = nn.Parameter(torch.empty(num_blocks, width // num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        if pays(x, self.weight, self.bias):
            return _BlockDiagonalProduct.apply(*as_autocast(x, self.weight, self.bias))
        blocks = x.unflatten(-1, self.weight.shape[:2])  # sizes come from tensors: they may be shards
        y = torch.einsum("btni,nij->btnj", blocks, self.weight)
        return (y + self.bias.to(y.dtype)).flatten(-2)  # under autocast y is bfloat16 and the bias float32

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}"  # whole: a launcher may have left an empty shard


class _BlockDiagonalProduct(torch.autograd.Function):
    """The same, with each product written where it belongs.

    The batched product that einsum calls puts the blocks first, and then the bias, the scan and the way back each pay
    for a copy of (B, T, C) into another order: more time than the products themselves.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        y, wide = x.new_empty(x.shape), _join_narrow_blocks(weight)
        torch.bmm(_by_block(x, wide), wide, out=_by_block(y, wide))
        return y.add_(bias.flatten())

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
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

    def extra_repr(self) -> str:
        return f"{tuple(self.lambda_bias.shape)}, c={self.c}"


class RGLRU(nn.Module):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t), equations 1 to 4 of the paper."""

    def __init__(self, width: int, num_gate_blocks: int, c: float):
        super().__init__()
        # Differs: equations 1 and 2 have dense matrices; the paper's models and DeepMind's code block-diagonal ones.
        self.recurrence_gate = BlockDiagonalLinear(width, num_gate_blocks)
        self.input_gate = BlockDiagonalLinear(width, num_gate_blocks)
        self.decay = Decay(width, c)

    def forward(
        self,
        x: torch.Tensor,
        document_start: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        states_to_keep: int | None = None,
        cu_seqlens: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
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
        recurrence_gate, input_gate, x = self._gates(x)
        if real is not None:
            padding = real.logical_not()[..., None]
            x, recurrence_gate = x.masked_fill(padding, 0.0), recurrence_gate.masked_fill(padding, -torch.inf)
        dtype = x.dtype
        if states_to_keep is not None:
            x = x.to(torch.promote_types(dtype, torch.float32))  # then hidden is the states themselves, not rounded
        # With an argument: where activations are made anew, FSDP2 of PyTorch 2.9 to 2.11 cannot call a module without.
        log_decay = self.decay(torch.float32)
        sequences = {"cu_seqlens": cu_seqlens, "starts": starts}
        hidden, state = rg_lru_scan(
            x, recurrence_gate, input_gate, log_decay, initial_state=state, reset=document_start, **sequences
        )
        return hidden.to(dtype), state if states_to_keep is None else hidden[:, -states_to_keep:]

    def _gates(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Both pre-activations (B, T, C), and x: on a GPU by kernels, of modules that are only numbers."""
        gates = (self.recurrence_gate, self.input_gate)
        if all(is_plain(gate, BlockDiagonalLinear) for gate in gates):
            inputs = (x, *(parameter for gate in gates for parameter in (gate.weight, gate.bias)))
            if pays(*inputs):
                inputs = as_autocast(*inputs)
                if gates_unavailable_reason(*inputs) is None:
                    recurrence_gate, input_gate, same = rg_lru_gates(*inputs)
                    return recurrence_gate, input_gate, same if same.dtype == x.dtype else x
        return self.recurrence_gate(x), self.input_gate(x), x
