"""What ranks that hold consecutive chunks of the same rows send each other, with gradients that travel back.

All ranks of a group make the same calls in the same order, whatever they have to send: each call is one collective, in
which a pair of ranks that owe each other nothing exchanges nothing. Sums have a fixed order, so that results repeat bit
for bit.

Legend: N ranks, B batch, C channels.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


class Ranks(NamedTuple):
    """A process group, this process's rank in it, and their number N."""

    group: dist.ProcessGroup
    rank: int
    size: int


_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from PyTorch 2.13 on


class Pending:
    """An exchange under way: each rank sends the last entries of its tensor to ranks on its right.

    sends, receives: entries for and from each rank of the group. Nothing may be read before `wait`.
    """

    def __init__(self, ranks: Ranks, sends: list[int], receives: list[int]):
        self.group, self.sends, self.receives = ranks.group, sends, receives
        self.received: torch.Tensor | None = None
        self._flight: tuple | None = None

    def start(self, tail: torch.Tensor) -> "Pending":
        """tail: (entries, ...), entries in the order of the sequence. Returns at once."""
        self.received = _Start.apply(tail, self)
        return self

    def wait(self) -> torch.Tensor:
        """(sum of `receives`, ...): what came, in the order of the ranks, which is that of the sequence."""
        received, self.received = self.received, None  # held no longer than its user holds it
        return _Wait.apply(received, self)

    def _launch(self, buffer: torch.Tensor, sends: list[int], receives: list[int]) -> torch.Tensor:
        result = buffer.new_empty(sum(receives), *buffer.shape[1:])
        work = dist.all_to_all_single(result, buffer, receives, sends, group=self.group, async_op=True)
        self._flight = work, buffer, result  # which must live until all is sent
        return result

    def _land(self) -> torch.Tensor:
        work, _, result = self._flight
        work.wait()
        self._flight = None
        return result


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tail, pending):
        ctx.pending, ctx.shape = pending, tail.shape
        pieces = [tail[len(tail) - count :] for count in pending.sends]
        return pending._launch(torch.cat(pieces), pending.sends, pending.receives)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_received):
        """Waits for what `_Wait.backward` has asked for; what that hands over here was for other ranks."""
        returned = ctx.pending._land()
        d_tail = returned.new_zeros(ctx.shape)
        for piece in returned.split(ctx.pending.sends):
            d_tail[len(d_tail) - len(piece) :] += piece
        return d_tail, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, received, pending):
        ctx.pending = pending
        pending._land()
        return received.view_as(received)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_received):
        """Sends the gradients back where the entries came from."""
        ctx.pending._launch(d_received.contiguous(), ctx.pending.receives, ctx.pending.sends)
        return d_received, None


def exchange_positions(ranks: Ranks, chunk: int, reach: int) -> Pending:
    """So that each rank gets the `reach` positions in front of its chunk, or all where there are fewer.

    They come from several ranks where chunks are shorter than `reach`.
    """
    overlap = [max(0, min(chunk, reach - (distance - 1) * chunk)) for distance in range(1, ranks.size)]
    sends = [0] * (ranks.rank + 1) + overlap[: ranks.size - ranks.rank - 1]
    receives = overlap[: ranks.rank][::-1] + [0] * (ranks.size - ranks.rank)
    return Pending(ranks, sends, receives)


def exchange_tails(ranks: Ranks, entries: int) -> Pending:
    """So that each rank gets `entries` from every rank on its left, for when only values tell how far left to look."""
    sends = [0] * (ranks.rank + 1) + [entries] * (ranks.size - ranks.rank - 1)
    return Pending(ranks, sends, [entries] * ranks.rank + [0] * (ranks.size - ranks.rank))


def gather(ranks: Ranks, tensor: torch.Tensor) -> torch.Tensor:
    """(N, ...): the tensor of each rank, on all ranks. Without gradients."""
    tensor = tensor.contiguous()
    gathered = tensor.new_empty(ranks.size * tensor.numel())
    _all_gather(gathered, tensor.flatten(), group=ranks.group)
    return gathered.view(ranks.size, *tensor.shape)
