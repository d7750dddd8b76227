"""The depthwise convolution over time: a whole sequence, a continued one, packed documents, padded rows.

Legend: B batch, T time, C channels, W taps.
"""

import torch
from torch import nn


class CausalConv1d(nn.Conv1d):
    """y_t = bias + sum_k weight[W - 1 - k] x_{t-k}, channel by channel, over real tokens of one document only.

    The parameters are those of `nn.Conv1d(channels, channels, W, groups=channels)`: weight (C, 1, W), bias (C,).
    """

    def __init__(self, channels: int, taps: int):
        super().__init__(channels, channels, taps, groups=channels)

    def forward(
        self,
        x: torch.Tensor,
        state: torch.Tensor | None = None,
        document_start: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: (B, T, C).
            state: (B, C, W), the last W real inputs of the document so far, zeros before its start; None means zeros.
            document_start: (B, T) bool; None when no document starts behind another.
            real: (B, T) bool, False for padding; None when there is none. Padding is skipped wherever it stands; what
                comes out at padding is finite and means nothing.

        Returns:
            y (B, T, C) and the new state (B, C, W).
        """
        batch, length, channels = x.shape
        taps = self.weight.shape[-1]
        order = None
        if real is not None:
            # Real tokens move to the front of the row, so that they stand right behind the state.
            order = torch.argsort(real.logical_not().long(), dim=1, stable=True)
            x = _take(x, order)
            document_start = document_start.gather(1, order) if document_start is not None else None

        before = x.new_zeros(batch, taps, channels) if state is None else state.to(x.dtype).transpose(1, 2)
        padded = torch.cat([before, x], dim=1)  # (B, W + T, C); token t stands at W + t
        age = None if document_start is None else _tokens_since_start(document_start)
        y = self._convolve(padded[:, 1:], age)
        new_state = _last_inputs(padded, taps, real, age)
        if order is not None:
            y = _take(y, torch.argsort(order, dim=1))
        return y, new_state.transpose(1, 2)

    def _convolve(self, padded: torch.Tensor, age: torch.Tensor | None) -> torch.Tensor:
        """(B, W - 1 + T, C) -> (B, T, C). age (B, T): the tap k back is used where age >= k; None means everywhere."""
        taps = self.weight.shape[-1]
        length = padded.shape[1] - taps + 1
        # In the dtype of the input: autocast does not cast products, and float32 weights would make the scan float32.
        weight, y = self.weight.to(padded.dtype), self.bias.to(padded.dtype)
        for back in range(taps):
            tap = padded[:, taps - 1 - back : taps - 1 - back + length] * weight[:, 0, taps - 1 - back]
            if age is not None and back:
                tap = tap.masked_fill((age < back)[..., None], 0.0)
            y = y + tap
        return y


def _tokens_since_start(document_start: torch.Tensor) -> torch.Tensor:
    """(B, T): tokens since the document's start; where none started in this chunk, more than any tap looks back."""
    index = torch.arange(document_start.shape[1], device=document_start.device)
    last_start = torch.where(document_start, index, -(2**31)).cummax(dim=1).values
    return index - last_start


def _last_inputs(padded: torch.Tensor, taps: int, real: torch.Tensor | None, age: torch.Tensor | None) -> torch.Tensor:
    """The last W real inputs of the row's last document, (B, W, C), zeros before its start."""
    batch, slots, _ = padded.shape
    device = padded.device
    if real is None and age is None:
        return padded[:, slots - taps :]
    count = torch.full((batch,), slots - taps, device=device) if real is None else real.sum(dim=1)
    columns = torch.arange(taps, device=device)
    last = _take(padded, count[:, None] + columns)  # token count - W + column stands at count + column
    if age is None or age.shape[1] == 0:
        return last
    # Age of the last real token; a row without one keeps its state.
    last_age = age.gather(1, (count - 1).clamp(min=0)[:, None])
    outside = (taps - 1 - columns > last_age) & (count > 0)[:, None]
    return last.masked_fill(outside[..., None], 0.0)


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[b, index[b, t]] for x (B, S, C) and index (B, T)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
