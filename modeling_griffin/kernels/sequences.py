"""Sequences of any lengths laid end to end in one row, each with a state in front of it.

With its state written as tokens in front of it, a sequence is an ordinary document: what knows documents then needs to
know nothing of sequences, and autograd finds the states' gradients. Lengths stay on the device.

Legend: T tokens, N sequences, C channels.
"""

from collections.abc import Callable

import torch


class Sequences:
    """Where tokens and states stand once `slots` tokens of state are put in front of each sequence.

    cu_seqlens: (N + 1,) int32 or int64: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1]. Tokens behind the last
    sequence are a sequence of their own, N, which starts and whose state nobody asks for.
    """

    def __init__(self, cu_seqlens: torch.Tensor, tokens: int, slots: int):
        index = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        number = torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)  # (T,): ends at or before it
        self.slots = slots
        self.width = tokens + cu_seqlens.shape[0] * slots
        self.tokens = index + (sequence + 1) * slots  # (T,) places
        self.begin = cu_seqlens + number * slots  # (N + 1,): the first slot of each sequence, and of what lies behind
        self.is_empty = cu_seqlens[1:] == cu_seqlens[:-1]  # (N,)

    def spread(self, tokens: torch.Tensor, states: torch.Tensor | None, fill: float) -> torch.Tensor:
        """tokens (T, ...) and states (N, slots, ...) in their places, the rest `fill`: (width, ...)."""
        wide = tokens.new_full((self.width, *tokens.shape[1:]), fill).index_copy(0, self.tokens, tokens)
        if states is None:
            return wide
        return wide.index_copy(0, self.slots_behind(self.begin[:-1]).flatten(), states.flatten(0, 1))

    def last(self, wide: torch.Tensor) -> torch.Tensor:
        """(width, ...) -> (N, slots, ...): what stands at the end of each sequence, its own state included."""
        return wide[self.slots_behind(self.begin[1:] - self.slots)]

    def slots_behind(self, place: torch.Tensor) -> torch.Tensor:
        """(N,) -> (N, slots)"""
        return place[:, None] + torch.arange(self.slots, device=place.device)


def check_sequences(cu_seqlens: torch.Tensor, starts: torch.Tensor | None, x: torch.Tensor) -> None:
    """Raises ValueError, naming the argument. Values are read on a CPU only: on a GPU that would stall the stream."""
    if x.shape[0] != 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: allowed with cu_seqlens is one row, (1, time, channels)")
    for name, tensor in (("cu_seqlens", cu_seqlens), ("starts", starts)):
        if not isinstance(tensor, torch.Tensor | None):
            raise ValueError(f"{name} is a {type(tensor).__name__}: allowed is a tensor")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: allowed is (sequences + 1,), 2 or more")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens has dtype {cu_seqlens.dtype}: allowed are torch.int32 and torch.int64")
    if starts is not None and (starts.dtype != torch.bool or starts.shape != (cu_seqlens.shape[0] - 1,)):
        shape = (cu_seqlens.shape[0] - 1,)
        raise ValueError(f"starts is {starts.dtype} {tuple(starts.shape)}: allowed is torch.bool {shape}")
    for name, tensor in (("cu_seqlens", cu_seqlens), ("starts", starts)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}: allowed is the device of x, {x.device}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] > x.shape[1] or values != sorted(values):
        shown = f"{values[:4]} ... {values[-2:]}" if len(values) > 8 else values
        raise ValueError(f"cu_seqlens = {shown}: allowed is 0 first, never falling, at most {x.shape[1]} last")


def scan_sequences(
    scan: Callable,
    x: torch.Tensor,
    recurrence_gate: torch.Tensor,
    input_gate: torch.Tensor,
    log_decay: torch.Tensor,
    initial_state: torch.Tensor | None,
    reset: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scan` over one row, with the state before each sequence as a token in front of it: a reset of which h is x."""
    dtype = torch.promote_types(x.dtype, torch.float32)  # the states must not be rounded
    number, (_, length, channels) = cu_seqlens.shape[0] - 1, x.shape
    places = Sequences(cu_seqlens, length, slots=1)
    state = x.new_zeros(number, channels, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    starts = torch.ones(number, dtype=torch.bool, device=x.device) if starts is None else starts
    entering = state.masked_fill(starts[:, None], 0.0)
    reset = torch.zeros(length, dtype=torch.bool, device=x.device) if reset is None else reset[0]
    reset = places.spread(reset, None, True)
    first = places.begin[:-1] + 1  # of an empty sequence: the slot of the next one, a reset already
    reset = reset.index_copy(0, first, reset[first] | starts)
    hidden, _ = scan(
        places.spread(x[0].to(dtype), entering[:, None], 0.0)[None],
        places.spread(recurrence_gate[0], None, 0.0)[None],
        places.spread(input_gate[0], None, torch.inf)[None],
        log_decay,
        None,
        reset[None],
    )
    last_state = torch.where(places.is_empty[:, None], state, places.last(hidden[0])[:, 0])
    return hidden[:, places.tokens].to(x.dtype), last_state
