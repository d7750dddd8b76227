"""The scan over sequences end to end, beyond the plain scan: its layout, and a walk where each has about one token.

A process that serves many requests needs it; a model does not, so that it does not go to the Hub.
"""

from typing import Any

import torch

from ..gpu import ceil_div
from ..rg_lru_scan_triton import Tile, overlap_options
from .device.training import LAID_OUT, WALKED_CHANNELS
from .launch import launch


try:
    import triton

    from .scan_sequences_kernels import lay_out_kernel, walk_kernel
except ImportError:
    triton = None


def lay_out_sequences(
    layout: Any, x: torch.Tensor, reset: torch.Tensor | None, tile: Tile, count: int
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """`count` cleared words, or None for 0, and the marks and sequence numbers of `lay_out_kernel`."""
    (_, length, channels), number = x.shape, layout.cu_seqlens.shape[0] - 1
    words = x.new_empty(count, dtype=torch.int64) if count else None
    marks = x.new_empty(ceil_div(length, tile.steps) * (1 + 3 * tile.segments), dtype=torch.int64)
    sequence = x.new_empty(length, dtype=torch.int32 if number * channels < 2**31 else torch.int64)
    segments, (block, channels_each, warps) = 256 // tile.rows, LAID_OUT
    programs = max(ceil_div(count, block), ceil_div(length, 256), min(number, 128))
    launch(
        *(lay_out_kernel, (programs,)),
        layout.cu_seqlens,
        layout.starts,
        reset,
        layout.entering,
        words,
        marks,
        sequence,
        layout.leaving,
        count,
        length,
        number,
        channels,
        HAS_STARTS=layout.starts is not None,
        HAS_RESET=reset is not None,
        HAS_ENTERING=layout.entering is not None,
        CHAINED=count > 0,
        PDL=overlap_options(x)["PDL"],
        BLOCK=block,
        SEGMENTS=segments,
        TILES=256 // tile.steps,
        ROWS=tile.rows,
        CHANNELS=channels_each,
        SAMPLES=512,
        num_warps=warps,
    )
    return words, marks, sequence


def launch_walk(
    exact: bool,
    inputs: tuple[torch.Tensor, ...],
    sequences: tuple[torch.Tensor, torch.Tensor | None],
    outputs: tuple[torch.Tensor, ...],
    channels_each: int = WALKED_CHANNELS,
) -> None:
    x, (cu_seqlens, starts) = inputs[0], sequences
    _, length, channels = x.shape
    number = cu_seqlens.shape[0] - 1
    launch(
        *(walk_kernel, (number + 1, ceil_div(channels, channels_each))),
        *(*inputs, *sequences, *outputs, length, number, channels),
        HAS_INITIAL=inputs[4] is not None,
        HAS_RESET=inputs[5] is not None,
        HAS_STARTS=starts is not None,
        MASKED=channels % channels_each != 0,
        EXACT=exact,
        CHANNELS=channels_each,
        num_warps=channels_each // 64,
    )
