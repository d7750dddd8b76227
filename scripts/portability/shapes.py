"""Models as far as their kernels see them, and tensors that have a shape and a dtype and no memory."""

from typing import NamedTuple

import torch


META = torch.device("meta")


class Shape(NamedTuple):
    """A model as far as its kernels see it; blocks: of each gate."""

    width: int
    lru: int
    inner: int
    heads: int
    head_dim: int
    window: int
    vocabulary: int
    blocks: int


SHAPES = {
    "2B": Shape(2560, 2560, 7680, 10, 256, 2049, 256000, 10),
    "9B": Shape(4096, 4096, 12288, 16, 256, 2049, 256000, 16),
    "test 2B": Shape(2560, 2560, 7680, 20, 128, 1024, 32000, 16),
    "100M": Shape(768, 1024, 2304, 6, 128, 1024, 32000, 16),
    "heads of 64": Shape(1024, 1024, 3072, 16, 64, 1024, 32000, 16),
}


def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)
