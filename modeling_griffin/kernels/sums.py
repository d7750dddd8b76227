"""Sums over rows on a GPU: what the programs of a backward kernel have each added up of the parameters' gradients.

PyTorch's sum and the cast behind it are two launches and two tensors, about a hundred times in a training step: for a
short one the host's time. Here they are one, which starts while the kernel in front of it ends.
"""

import torch

from ..gpu import ceil_div
from ..rg_lru_scan_triton import overlap_options
from .launch import launch


try:
    from ..rg_lru_scan_triton_around import sum_rows_kernel
except ImportError:
    sum_rows_kernel = None

ROWS, CHANNELS = 256, 16  # at a time, and of a program


def sum_of_rows(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(N, C) float32, contiguous -> (C,) in `dtype`: added in float32, always in the same order, and rounded once."""
    number, channels = rows.shape
    total = rows.new_empty(channels, dtype=dtype)
    grid, options = (ceil_div(channels, CHANNELS),), overlap_options(rows)
    launch(sum_rows_kernel, grid, rows, total, number, channels, ROWS=ROWS, CHANNELS=CHANNELS, num_warps=8, **options)
    return total
