"""Tiles of the training kernels: what was fastest on an H100, and what fits GPUs with less shared memory.

A table's value is a list of tiles, of which the first is taken that fits the GPU. `shared_memory` of a tile is what a
GPU must have for it: what its kernel asks for from Ampere to Ada, where matrix products take their operands from
registers, or LARGE for tiles that are for Hopper only, whose own products take more. `scripts/check_portability.py`
compiles every tile for the GPUs that take it, and compares with what these have.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from ...gpu import GPU, triton_refusal
from .known import SPILLING


class AttentionTile(NamedTuple):
    """A program holds `held` tokens of `pack` heads and walks over `walked` at a time. pack: 1 where keys are held."""

    pack: int
    held: int
    walked: int
    num_warps: int
    num_stages: int
    shared_memory: int = 0
    max_registers: int | None = None  # of a thread


class GateTile(NamedTuple):
    """A program's share of the work and of the GPU."""

    rows: int
    depth: int  # at most; channels summed over at a time
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread


class ConvolutionTile(NamedTuple):
    """A program's share: chunks * rows steps of `channels` channels; a chunk is loaded at once, then walked."""

    chunks: int
    rows: int
    channels: int
    num_warps: int

    @property
    def steps(self) -> int:
        return self.chunks * self.rows


OLDEST_FOR_FLASH = (8, 0)
FULL_FLASH_BACKWARD = ((8, 0), (9, 0), (10, 0))  # where PyTorch's takes heads of 193 to 224 too
LARGE = 227 * 1024  # of Hopper and of Blackwell's data-centre GPUs
# Local attention, by the head dimension rounded up to a power of two. 128: the fastest of a sweep on an H100; the
# others were not timed. 256: what spills least on GPUs that multiply by warps, from Ampere to the RTX 5090.
ATTENTION_FORWARD = {
    64: [AttentionTile(1, 128, 128, 8, 3, 81920)],
    128: [AttentionTile(1, 64, 64, 4, 3, 90112)],
    256: [AttentionTile(1, 128, 64, 8, 2, LARGE), AttentionTile(1, 64, 32, 8, 2, 69632)],
}
ATTENTION_QUERY_GRADIENT = {
    64: [AttentionTile(1, 128, 64, 8, 2, 49152)],
    128: [AttentionTile(1, 64, 64, 4, 2, 73728)],
    256: [
        AttentionTile(1, 128, 32, 8, 2, LARGE),
        AttentionTile(1, 64, 32, 8, 2, 102400),
        AttentionTile(1, 64, 32, 8, 1, 98304),
    ],
}
ATTENTION_KEY_GRADIENTS = {
    64: [AttentionTile(1, 128, 64, 8, 3, 67072)],
    128: [AttentionTile(1, 64, 64, 4, 2, 74496)],
    256: [AttentionTile(1, 64, 32, 8, 2, 102784), AttentionTile(1, 64, 16, 8, 2, 84160)],
}
ATTENTION_BLOCK = 128  # tokens; programs are ordered by blocks of this size, and have such a block or a part of it
ATTENTION_PROGRAMS = 4  # a multiprocessor, at least, with keys: where there are fewer blocks, heads are divided

# Gates: up to NARROW_GATES columns, 128 registers hold what a thread needs, and two programs share a multiprocessor.
NARROW_GATES = 160
GATES_FORWARD, GATES_FORWARD_WIDE = GateTile(64, 32, 4, 4), GateTile(128, 32, 8, 3)
GATES_BACKWARD, GATES_BACKWARD_WIDE = GateTile(128, 32, 8, 3, 128), GateTile(128, 32, 8, 2)

CONVOLUTION_FORWARD, CONVOLUTION_BACKWARD = ConvolutionTile(1, 16, 128, 1), ConvolutionTile(16, 16, 64, 1)

# Chosen on an H100, see docs/designs/training.md.
NORM_BACKWARD = (4, 64)  # programs a multiprocessor, which walk over rows; registers of a thread
NORM_ELEMENTS = 1024  # a program of the norm takes several rows where they have fewer columns
ROTATED_ROWS = 32  # heads of tokens a program rotates
GATED_FORWARD, GATED_BACKWARD = (16, 128, 2), (8, 128, 8)  # rows and columns at a time, and how often
LAID_OUT = (4096, 512, 4)  # words a program clears for the scan over sequences, channels it takes at a time, its warps
WALKED_CHANNELS = 256  # of a program of that scan where sequences have about one token; two to a thread
CHUNK_SUMMARY = (256, 256, 4)  # steps and channels of a program, and its warps
LOSSES, LOSS_GRADIENTS = (2048, 8), (4096, 8)  # logits a program reads at a time, and its warps


def first_that_fits(tiles: Sequence[AttentionTile], gpu: GPU) -> AttentionTile | None:
    """The first that the GPU's shared memory holds, None if none; on a CPU, under the interpreter, the first."""
    return next((tile for tile in tiles if tile.shared_memory <= gpu.shared_memory or gpu.vendor == "none"), None)


@functools.cache
def norm_tile(columns: int) -> dict[str, int]:
    """Whole rows, as many as give each thread something to do: one of 1024 columns, 16 of 64."""
    num_warps, width = 4 if columns <= 1024 else 8 if columns <= 8192 else 16, 1 << (columns - 1).bit_length()
    return {"ROWS": max(1, NORM_ELEMENTS // width), "COLUMNS": width, "num_warps": num_warps}


def flash_refusal(gpu: GPU, head_dim: int) -> str | None:
    """None where PyTorch's flash attention, forward and backward, takes heads of this size, else why not."""
    if gpu.capability < OLDEST_FOR_FLASH:
        return "the GPU is older than compute capability 8.0"
    if head_dim % 8 or head_dim > 256:
        return f"head_dim is {head_dim}, flash attention takes multiples of 8 up to 256"
    if 192 < head_dim <= 224 and gpu.capability not in FULL_FLASH_BACKWARD:
        return f"head_dim is {head_dim}, flash attention takes no multiples of 8 from 200 to 224 on {gpu.name}"
    return None


def attention_refusal(head_dim: int, gpu: GPU) -> str | None:
    """None where the kernels of local attention run on this GPU, else why not. They need tensor cores of Ampere."""
    if gpu.vendor == "none":
        return None
    if (reason := triton_refusal(gpu)) is not None:
        return reason
    if gpu.vendor == "nvidia" and gpu.capability < (8, 0):
        return "the GPU is older than compute capability 8.0"
    padded = max(64, 1 << (head_dim - 1).bit_length())
    tables = (ATTENTION_FORWARD, ATTENTION_QUERY_GRADIENT, ATTENTION_KEY_GRADIENTS)
    if any(first_that_fits(table[padded], gpu) is None for table in tables):
        return f"no tiles for heads of {head_dim} fit {gpu.shared_memory} bytes of shared memory"
    return None


def gates_refusal(gpu: GPU) -> str | None:
    """None where both gates are made by their kernels, else why not."""
    if gpu.vendor == "nvidia" and gpu.capability < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if gpu.architecture in SPILLING:
        return f"on {gpu.architecture} their kernels spill registers"
    return None
