"""How the kernels of a decoding step divide their work: what was fastest on one H100 in bfloat16.

What decides is how many bytes of weights are on their way at a time. One row: a thread loads 16 bytes of each of
BLOCK_N outputs and asks for AHEAD such tiles before it uses the first. Many rows: a program asks for STAGES - 1 tiles
(BLOCK_N, BLOCK_D) at once, and for as many of all rows, from the cache. Which tiles are fastest depends on the kernels
before and behind, so that whole steps were timed.

Legend: N outputs of a product, D inputs.
"""

import torch

from ..gpu import capability


# Rows for which a product can be done one row after the other on each tile of weights.
MATVEC_ROWS = (1, 2, 4)
INPUTS_OF_A_WARP = 256  # 16 bytes a thread in bfloat16; nothing has to be exchanged between threads
# (least outputs, least inputs): (BLOCK_N, warps, AHEAD); the first line that fits
PROJECT = {
    (16384, 0): (4, 2, 3),
    (0, 5120): (2, 2, 5),
    (4096, 0): (4, 2, 3),
    (0, 0): (4, 2, 3),
}
GATED = {(0, 0): (2, 2, 3)}
RECURRENT_ROW = {"BLOCK_C": 32, "num_warps": 4}

# From 2 rows up to these a product is one of matrices in one kernel. Beyond, and in other dtypes, it is cuBLAS's,
# except for MATVEC_ROWS.
MATMUL_ROWS = 64
MATMUL_DTYPES = (torch.bfloat16,)  # in float16, x (1 + norm) could leave its range before it is divided by rms(x)
# rows: {(least outputs, least inputs): (BLOCK_N, BLOCK_D, STAGES, warps, programs to aim at)}, the first that fit
_SOME = {
    (16384, 0): (128, 128, 3, 8, 264),  # lm_head
    (0, 5120): (64, 128, 8, 4, 132),  # down_proj
    (4096, 0): (128, 128, 4, 8, 132),  # linear_x and linear_y
    (2561, 0): (64, 256, 3, 4, 132),  # q_proj, k_proj and v_proj
    (0, 0): (16, 256, 6, 1, 132),  # linear_out, o_proj
}
_MANY = {
    (16384, 0): (128, 64, 4, 4, 264),
    (0, 5120): (64, 128, 6, 4, 132),
    (4096, 0): (128, 128, 3, 8, 132),
    (2561, 0): (64, 64, 8, 4, 132),
    (0, 0): (64, 128, 4, 4, 132),
}
MATMUL = {16: _SOME, 32: _MANY, 64: _MANY}
# BLOCK_N of each of both matrices
MATMUL_GATED = {
    16: {(0, 0): (64, 128, 5, 8, 132)},
    32: {(0, 0): (64, 128, 4, 8, 132)},
    64: {(0, 0): (64, 128, 4, 8, 132)},
}
RECURRENT = {"BLOCK_B": 16, "BLOCK_C": 32, "num_warps": 4}


def product_tile(table: dict, outputs: int, inputs: int, rows: int) -> dict[str, int]:
    """Fewer outputs a program where each has several rows to sum; no more tiles ahead than a row of weights has."""
    block_n, warps, ahead = _first_fit(table, outputs, inputs)
    block_d = INPUTS_OF_A_WARP * warps
    return {
        "BLOCK_N": max(1, block_n // rows),
        "BLOCK_D": block_d,
        "AHEAD": min(ahead, -(-inputs // block_d)),
        "num_warps": warps,
    }


def matmul_tile(table: dict, sizes: list[int], inputs: int, rows: int) -> dict[str, int]:
    """sizes: outputs of each matrix, whose tiles are shared by as many programs as there is room for."""
    block_m = next(size for size in table if rows <= size)
    block_n, block_d, stages, warps, programs = _first_fit(table[block_m], sum(sizes), inputs)
    tiles = sum(-(-size // block_n) for size in sizes)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "SPLITS": max(1, min(programs // tiles, -(-inputs // block_d))),
        "STAGES": stages,
        "num_warps": warps,
    }


def _first_fit(table: dict, outputs: int, inputs: int) -> tuple[int, ...]:
    return next(tile for least, tile in table.items() if outputs >= least[0] and inputs >= least[1])


def decode_gemm_fits(device: torch.device) -> bool:
    """Whether the tiles of `MATMUL` fit this GPU: they were chosen for compute capability 9.0."""
    return capability(device)[0] == 9
