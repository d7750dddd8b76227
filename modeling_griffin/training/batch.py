"""The arguments of a training step as a batch of a recorded shape: rows padded to a bucket, exactly.

Padding becomes a document of its own behind the row, whose labels are ignored.

Legend: B rows, T tokens of a row.
"""

from typing import NamedTuple

import torch
from torch import nn


STEP = 256  # tokens: without `lengths`, rows are padded to a multiple of it


class Batch(NamedTuple):
    """What a step reads, of a bucket's shape: padding is a document of its own with labels -100.

    input_ids, position_ids, labels: (B, T). num_items: () or None. real_length: T before padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    labels: torch.Tensor
    num_items: torch.Tensor | None
    real_length: int

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in self[:4] if tensor is not None]

    def shape_key(self) -> tuple:
        return (
            *self.input_ids.shape,
            self.position_ids is not None,
            None if self.num_items is None else self.num_items.dtype,
            torch.is_autocast_enabled(self.input_ids.device.type)
            and torch.get_autocast_dtype(self.input_ids.device.type),
        )


def read_batch(arguments: dict, lengths: list[int] | None) -> Batch | None:
    """The call's arguments as a batch of a bucket's length; None where there is none, or padding has holes."""
    ids, labels, positions = arguments["input_ids"], arguments["labels"], arguments.get("position_ids")
    mask, items = arguments.get("attention_mask"), arguments.get("num_items_in_batch")
    if ids.dim() != 2 or labels.shape != ids.shape or (mask is not None and mask.shape != ids.shape):
        return None
    if positions is not None:
        positions = positions.expand(ids.shape)
    length = ids.shape[1]
    bucket = _bucket(lengths, length)
    if bucket is None:
        return None
    if mask is not None and not bool(mask.all()):
        positions = _positions_of_padded_rows(mask.bool(), positions, labels)
        if positions is None:
            return None
    if bucket > length:
        if positions is None:
            positions = torch.arange(length, device=ids.device).expand(ids.shape)
        padding = torch.arange(bucket - length, device=ids.device).expand(ids.shape[0], -1)
        positions = torch.cat([positions, padding], dim=1)
        ids = nn.functional.pad(ids, (0, bucket - length))
        labels = nn.functional.pad(labels, (0, bucket - length), value=-100)
    if items is not None:
        items = torch.as_tensor(items, device=ids.device).reshape(())
    return Batch(ids, positions, labels, items, length)


def _bucket(lengths: list[int] | None, length: int) -> int | None:
    if lengths is None:
        return -(-length // STEP) * STEP
    return next((each for each in lengths if each >= length), None)


def _positions_of_padded_rows(real, positions: torch.Tensor | None, labels) -> torch.Tensor | None:
    """(B, T) positions under which the padding of each row is a document of its own.

    None, and the call runs as before, where padding is not on the right, or has labels, whose loss would be another.
    """
    index = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    length = real.sum(1, keepdim=True)
    positions = index if positions is None else positions
    if not bool(((index < length) == real).all() & (real | (labels == -100)).all()):
        return None
    return torch.where(real, positions, index - length)
