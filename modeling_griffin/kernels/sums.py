"""Sums over rows on a GPU: what the programs of a backward kernel have each added up of the parameters' gradients.

PyTorch's sum and the cast behind it are two launches and two tensors, about a hundred times in a training step: for a
short one the host's time. Here they are one, which starts while the kernel in front of it ends.
"""

import torch

from ..rg_lru_scan_triton import sum_rows


def sum_of_rows(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(N, C) float32, contiguous -> (C,) in `dtype`: added in float32, always in the same order, and rounded once."""
    total = rows.new_empty(rows.shape[1], dtype=dtype)
    sum_rows(rows, total)
    return total
