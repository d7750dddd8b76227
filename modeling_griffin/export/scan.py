"""The scan as plain operators for any length: what an exported graph holds where its length is dynamic.

Legend: B batch, T time, C channels.
"""

import torch
from torch.nn.functional import pad

from ..rg_lru_scan_torch import _gates


BLOCK = 128
LEVELS = 3  # blocks of blocks: up to BLOCK**LEVELS = 2,097,152 steps


def rg_lru_scan_any_length(
    x: torch.Tensor,
    recurrence_gate: torch.Tensor,
    input_gate: torch.Tensor,
    log_decay: torch.Tensor,
    initial_state: torch.Tensor | None,
    reset: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as in `rg_lru_scan`, for T from 1 to BLOCK**LEVELS; nothing depends on the value of T.

    The torch backend halves the length until one step is left: each halving would be a guard on the length. Here the
    number of operators is fixed, for up to 7 passes over the steps instead of 2. Gradients are those of plain
    operators, NaN at padding: exported graphs are for inference.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    _, i, a, multiplier = _gates(recurrence_gate, input_gate, log_decay, reset, dtype)
    b = multiplier * i * x.to(dtype)
    if initial_state is not None:  # a step before the first that leaves this state
        a, b = pad(a, (0, 0, 1, 0)), torch.cat([initial_state.to(dtype)[:, None], b], dim=1)
    hidden = scan_in_blocks(a, b, LEVELS)
    if initial_state is not None:
        hidden = hidden[:, 1:]
    return hidden.to(x.dtype), hidden[:, -1].clone()


def scan_in_blocks(a: torch.Tensor, b: torch.Tensor, levels: int) -> torch.Tensor:
    """h_t = a_t h_{t-1} + b_t along dim 1 with h_{-1} = 0; a, b (B, T, C) with T at most BLOCK**levels.

    A run of steps is itself a step, h -> A h + H. Within each block both come by doubling (Hillis and Steele 1986); the
    states between blocks are a scan over blocks.
    """
    # Windows of a longer row, and indices at the end: of a reshaped or cut one PyTorch asks whether and where T fits,
    # and of a single block whether there is ever another.
    blocks = (pad(steps, (0, 0, 0, 2 * BLOCK - 1)).unfold(1, BLOCK, BLOCK) for steps in (a, b))
    real = torch.arange(b.shape[1], device=b.device)
    a, b = blocks  # (B, blocks, C, BLOCK)
    reach = 1
    while reach < BLOCK:
        b = torch.addcmul(b, a, pad(b[..., :-reach], (reach, 0)))
        a = a * pad(a[..., :-reach], (reach, 0), value=1.0)
        reach *= 2
    if levels > 1:
        behind = scan_in_blocks(a[..., -1], b[..., -1], levels - 1)
        b = torch.addcmul(b, a, pad(behind, (0, 0, 1, 0))[:, :-1, :, None])
    return b.transpose(2, 3).flatten(1, 2).index_select(1, real)
