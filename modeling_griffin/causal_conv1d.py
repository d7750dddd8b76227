"""The depthwise convolution over time: a whole sequence, a continued one, packed documents, padded rows.

Legend: B batch, T time, C channels, W taps.
"""  # SPDX-License-Identifier: Apache-2.0

import torch
from torch import nn

from .padding import inverse_of, zeros_first
from .slots import slot


class CausalConv1d(nn.Conv1d):
    """y_t = bias + sum_k weight[W - 1 - k] x_{t-k}, channel by channel, over real tokens of one document only.

    The parameters are those of `nn.Conv1d(channels, channels, W, groups=channels)`: weight (C, 1, W), bias (C,).
    """

    def __init__(self, channels: int, taps: int):
        super().__init__(channels, channels, taps, groups=channels)

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None = None, document_start: torch.Tensor | None = None,
        real: torch.Tensor | None = None, states_to_keep: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """
        Args:
            x: (B, T, C).
            state: (B, C, W), the last W real inputs of the document so far, zeros before its start; None means zeros.
            document_start: (B, T) bool; None when no document starts behind another.
            real: (B, T) bool, False for padding; None when there is none. Padding is skipped wherever it stands; what
                comes out at padding is finite and means nothing.
            states_to_keep: N, to get the states behind the last N tokens instead of the new state alone. With 0, which
                costs nothing, none.

        Returns:
            y (B, T, C) and the new state (B, C, W); or the last min(N, T) states, (B, min(N, T), C, W).
        """
        order = None
        if real is not None:
            # Real tokens move to the front of the row, so that they stand right behind the state.
            order = zeros_first(real.logical_not().long())
            x = _take(x, order)
            document_start = document_start.gather(1, order) if document_start is not None else None

        number = 1 if states_to_keep is None else states_to_keep
        y, new_states = convolve_with_states(x, state, self.weight, self.bias, document_start, real, number)
        if order is not None:
            y = _take(y, inverse_of(order))
        return y, new_states[:, -1] if states_to_keep is None else new_states


@slot
def convolve_with_states(
    x: torch.Tensor, state: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor,
    document_start: torch.Tensor | None, real: torch.Tensor | None, number: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """y and the last `number` states, of rows whose real tokens come first."""
    padded = behind_state(x, state, weight.shape[-1])
    age = None if document_start is None else tokens_since_start(document_start)
    y = convolve(padded[:, 1:], weight, bias, age)
    return y, states_behind(padded, weight.shape[-1], real, age, number)


def behind_state(x: torch.Tensor, state: torch.Tensor | None, taps: int) -> torch.Tensor:
    """(B, W + T, C): token t stands at W + t, and the state before, or zeros."""
    batch, _, channels = x.shape
    before = x.new_zeros(batch, taps, channels) if state is None else state.to(x.dtype).transpose(1, 2)
    return torch.cat([before, x], dim=1)


def convolve(padded: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, age: torch.Tensor | None) -> torch.Tensor:
    """(B, W - 1 + T, C) -> (B, T, C). age (B, T): the tap k back is used where age >= k; None means everywhere."""
    taps = weight.shape[-1]
    length = padded.shape[1] - taps + 1
    # In the dtype of the input: autocast does not cast products, and float32 weights would make the scan float32.
    weight, y = weight.to(padded.dtype), bias.to(padded.dtype)
    for back in range(taps):
        tap = padded[:, taps - 1 - back : taps - 1 - back + length] * weight[:, 0, taps - 1 - back]
        if age is not None and back:
            tap = tap.masked_fill((age < back)[..., None], 0.0)
        y = y + tap
    return y


def tokens_since_start(document_start: torch.Tensor) -> torch.Tensor:
    """(B, T): tokens since the document's start; where none started in this chunk, more than any tap looks back."""
    index = torch.arange(document_start.shape[1], device=document_start.device)
    last_start = torch.where(document_start, index, -(2**31)).cummax(dim=1).values
    return index - last_start


def states_behind(
    padded: torch.Tensor, taps: int, real: torch.Tensor | None, age: torch.Tensor | None, number: int
) -> torch.Tensor:
    """The last W real inputs of the document up to each of the last `number` tokens, zeros before its start.

    padded: (B, W + T, C), real tokens first. Returns (B, min(number, T), C, W); without tokens, the one state before.
    """
    batch, slots, _ = padded.shape
    length = slots - taps
    if number == 0:
        return no_states(padded, taps)
    if real is None and age is None or length == 0:
        return padded.unfold(1, taps, 1)[:, -min(number, max(length, 1)) :]
    if real is None:
        count = torch.arange(1, length + 1, device=padded.device).expand(batch, -1)
    else:
        count = real.long().cumsum(1)
    count = count[:, -number:]  # real tokens of the row up to each token
    columns = torch.arange(taps, device=padded.device)
    # Token count - W + column stands at count + column.
    states = _take(padded, (count[..., None] + columns).flatten(1)).unflatten(1, (-1, taps))
    if age is not None:
        # Age of the last real token; a row without one so far keeps its state.
        last_age = age.gather(1, (count - 1).clamp(min=0))
        outside = (taps - 1 - columns > last_age[..., None]) & (count > 0)[..., None]
        states = states.masked_fill(outside[..., None], 0.0)
    return states.transpose(2, 3)


def no_states(x: torch.Tensor, taps: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], 0, x.shape[2], taps)


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[b, index[b, t]] for x (B, S, C) and index (B, T)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
