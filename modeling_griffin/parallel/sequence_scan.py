"""The RG-LRU over rows of which each rank holds a chunk: one scan a rank, each way, at the same time on all ranks.

A chunk is h_out = A h_in + h_local, with A the product of its decays. Each rank reduces its chunk to (A, h_local), all
gather these once, (2, B, C) a rank, each rank folds those on its left into its initial state, and scans once. The other
way, to scan from zeros and add A_t h_in to every h_t, would read and write the hidden states again: 16 bytes an element
in bfloat16, where reducing (x and both gates, 6) and scanning (8) are 14.

On the way back the chain is the same from the right: a chunk owes the gradient of its initial state, g_out = A g_in +
g_local, and with g_in known the scan's own backward pass runs once. Reducing reads the gradient and one gate.

Legend: N ranks, B batch, T time (of the chunk), C channels.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from ..rg_lru_scan import rg_lru_scan
from .chunk_summary import summarize, summarize_backwards
from .neighbours import Ranks, gather


class SequenceScan:
    """Takes the place of `rg_lru_scan` on a rank of a group; a chunk's last state is that of the row so far.

    before: (B, C), the state in front of rank 0; None: zeros. collect: called with each last state (B, C), or None.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.before: torch.Tensor | None = None
        self.collect: Callable[[torch.Tensor], None] | None = None

    @torch.compiler.disable
    def __call__(
        self,
        x: torch.Tensor,
        recurrence_gate: torch.Tensor,
        input_gate: torch.Tensor,
        log_decay: torch.Tensor,
        *,
        initial_state: torch.Tensor | None = None,
        reset: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Arguments and results as in `rg_lru_scan`; initial_state must be None, see `before`."""
        arguments = (x, recurrence_gate, input_gate, log_decay)
        with torch.no_grad():
            products, states = gather(self.ranks, summarize(*arguments, reset)).unbind(1)
            incoming = torch.zeros_like(states[0]) if self.before is None else self.before
            for left in range(self.ranks.rank):
                incoming = torch.addcmul(states[left], products[left], incoming)
        hidden, last = rg_lru_scan(*arguments, initial_state=incoming, reset=reset)
        if self.collect is not None:
            self.collect(last.detach())
        return _FromTheRight.apply(hidden, last, recurrence_gate, log_decay, reset, products, self.ranks)


class _FromTheRight(torch.autograd.Function):
    """hidden and last state as they are; on the way back, the gradient that the chunks on the right owe the last state.

    The initial state is a constant of the graph: that it depends on the chunks on the left is what those ranks add
    here. So the scan's own backward pass runs once, with everything that its results were used for.
    """

    @staticmethod
    def forward(ctx, hidden, last, recurrence_gate, log_decay, reset, products, ranks):
        ctx.save_for_backward(recurrence_gate, log_decay, reset, products)
        ctx.ranks = ranks
        return hidden.view_as(hidden), last.view_as(last)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_hidden, d_last):
        recurrence_gate, log_decay, reset, products = ctx.saved_tensors
        ranks = ctx.ranks
        owed = summarize_backwards(d_hidden, recurrence_gate, log_decay, reset)
        owed = torch.addcmul(owed, products[ranks.rank], d_last)
        owed = gather(ranks, owed)
        incoming = torch.zeros_like(d_last)
        for right in range(ranks.size - 1, ranks.rank, -1):
            incoming = torch.addcmul(owed[right], products[right], incoming)
        return d_hidden, d_last + incoming, None, None, None, None, None
