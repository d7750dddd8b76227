"""How the kernels of a decoding step divide their work: what was fastest on one H100 in bfloat16, made to fit others.

What decides is how many bytes of weights are on their way at a time. GEMV, one row: a thread loads 16 bytes of each of
BLOCK_N outputs and asks for AHEAD such tiles before it uses the first. GEMM, many rows: a program asks for STAGES - 1
tiles (BLOCK_N, BLOCK_D) at once, and for as many of all rows, from the cache. Which tiles are fastest depends on the
kernels before and behind, so that whole steps were timed. Numbers of programs are given per multiprocessor.

Legend: N outputs of a product, D inputs, K head dimension, W attention window.
"""

import torch

from ...gpu import GPU, multiprocessors, triton_refusal
from .known import SPILLING


OLDEST_FOR_DECODING = (8, 0)
# Rows for which a product can be done one row after the other on each tile of weights.
MATVEC_ROWS = (1, 2, 4)
INPUTS_OF_A_WARP = 256  # 16 bytes a thread in bfloat16; nothing has to be exchanged between threads
# (least outputs, least inputs): (BLOCK_N, warps, AHEAD); the first line that fits
PROJECT = {
    (16384, 0): (4, 2, 3),
    (0, 5120): (2, 2, 5),
    (4096, 0): (4, 2, 3),
    (2561, 0): (4, 2, 3),
    (0, 0): (4, 2, 3),
}
GATED = {(0, 0): (2, 2, 3)}
# Of weights in 8 bits: the fastest of some on one H200, of int8 and in whole steps.
PROJECT_BYTES = {(0, 5120): (2, 2, 5), (2561, 0): (4, 2, 3), (0, 0): (4, 4, 2)}
GATED_BYTES = {(0, 4096): (2, 2, 3), (0, 0): (4, 2, 3)}  # with 4 outputs of so many inputs int8 spills
# Of weights in 4 bits, which take eight times the registers once they are numbers. Not measured: compiled for
# compute capability 9.0, more outputs or tiles spill.
PROJECT_NF4 = {(0, 0): (2, 2, 3)}
GATED_NF4 = {(0, 0): (1, 4, 2)}
# The same by matrix units. MATVEC_ROWS: (warps that share the inputs of 16 outputs, tiles of 128 inputs that each asks
# for ahead, programs that a multiprocessor has registers for; 0: no limit). One row: the fastest of some on one H200;
# others were not timed.
MATVEC_NF4 = {
    1: {(0, 5120): (8, 4, 2), (4096, 0): (4, 5, 0), (2561, 0): (8, 4, 2), (0, 0): (4, 5, 0)},
    2: {(0, 0): (8, 3, 2)},
    4: {(0, 0): (8, 3, 0)},
}
MATVEC_GATED_NF4 = {1: {(0, 0): (8, 4, 2)}, 2: {(0, 0): (8, 2, 2)}, 4: {(0, 0): (8, 2, 0)}}
REGISTERS = 65536  # of a multiprocessor
MATVEC_NF4_DTYPES = (torch.bfloat16,)
NF4_OUTPUTS = 16  # of a program
RECURRENT_ROW = {"BLOCK_C": 32, "num_warps": 4}

# From 2 rows up to these a product is one GEMM in one kernel. Beyond, and in other dtypes, it is cuBLAS's, except for
# MATVEC_ROWS.
MATMUL_ROWS = 64
MATMUL_DTYPES = (torch.bfloat16,)  # in float16, x (1 + norm) could leave its range before it is divided by rms(x)
# rows: {(least outputs, least inputs): (BLOCK_N, BLOCK_D, STAGES, warps, programs a multiprocessor)}, the first that
# fits the product; where it asks for more shared memory than there is, see `_made_to_fit`
_SOME = {
    (16384, 0): (128, 128, 3, 8, 2),  # lm_head
    (0, 5120): (64, 128, 8, 4, 1),  # down_proj
    (4096, 0): (128, 128, 4, 8, 1),  # linear_x and linear_y
    (2561, 0): (64, 256, 3, 4, 1),  # q_proj, k_proj and v_proj
    (0, 0): (16, 256, 6, 1, 1),  # linear_out, o_proj
}
_MANY = {
    (16384, 0): (128, 64, 4, 4, 2),
    (0, 5120): (64, 128, 6, 4, 1),
    (4096, 0): (128, 128, 3, 8, 1),
    (2561, 0): (64, 64, 8, 4, 1),
    (0, 0): (64, 128, 4, 4, 1),
}
MATMUL = {16: _SOME, 32: _MANY, 64: _MANY}
# BLOCK_N of each of both matrices
MATMUL_GATED = {
    16: {(0, 0): (64, 128, 5, 8, 1)},
    32: {(0, 0): (64, 128, 4, 8, 1)},
    64: {(0, 0): (64, 128, 4, 8, 1)},
}
# Of weights in 8 bits, and in 4: of 64 rows the fastest of some on one H200, in whole steps; fewer rows were not timed.
_BYTES = {
    (0, 5120): (128, 128, 3, 8, 1),
    (2561, 0): (128, 128, 3, 8, 1),
    (0, 0): (64, 128, 6, 4, 1),
}
MATMUL_BYTES = {16: _SOME, 32: _BYTES, 64: _BYTES}
MATMUL_GATED_BYTES = {rows: {(0, 0): (64, 128, 5, 8, 1)} for rows in (16, 32, 64)}
_NF4 = {
    (0, 5120): (128, 128, 4, 8, 1),
    (4096, 0): (128, 128, 3, 8, 1),
    (0, 0): (64, 256, 3, 8, 1),
}
MATMUL_NF4 = {16: _NF4, 32: _NF4, 64: _NF4}
MATMUL_GATED_NF4 = {rows: {(0, 0): (128, 64, 4, 8, 1)} for rows in (16, 32, 64)}
RECURRENT = {"BLOCK_B": 16, "BLOCK_C": 32, "num_warps": 4}
OLDEST_FOR_FLOAT8 = (8, 9)  # before, there is no conversion from float8 e4m3, which weights may be packed in
LEAST_STAGES = 3  # below, a program waits for each tile

ATTENTION_PROGRAMS, DRAFT_PROGRAMS = 2, 1  # a multiprocessor, where the window has as many blocks
# (largest K, bytes an element): slots of the ring that a program reads at a time, and STAGES: blocks on their way
ATTENTION = {(128, 2): (64, 3), (256, 2): (32, 3), (128, 4): (32, 2), (256, 4): (16, 2)}
# Warps, and those of a wide head in 16 bits whose splits are one block each: with these, no Triton from 3.6 to 3.9
# lets more than 16 bytes a thread spill.
ATTENTION_WARPS, FEW_WARPS = 8, 4
PARTS_AHEAD, MOST_AHEAD = 3072, 8  # numbers a warp, and splits, that the last split asks for at a time: 96 registers
# Warps of the kernels around the products: at the start of a step, of a norm, at its end, of the drafts' bookkeeping.
BEGIN_WARPS, NORM_WARPS, END_WARPS, BOOKKEEPING_WARPS = 8, 8, 16, 1
KEPT_CHANNELS = 256  # a program that keeps the states of accepted drafts
LOGITS_BLOCK = 16384  # that argmax compares at a time: 64 bytes of bfloat16 a thread
MOST_ENDS = 8  # tokens that end a row, which a step looks for itself; a power of two


def product_tile(table: dict, outputs: int, inputs: int, rows: int) -> dict[str, int]:
    """Of a GEMV: fewer outputs a program where each has several rows to sum; no more tiles ahead than there are."""
    block_n, warps, ahead = _first_fit(table, outputs, inputs)
    block_d = INPUTS_OF_A_WARP * warps * (2 if table is PROJECT_NF4 or table is GATED_NF4 else 1)
    return {
        "BLOCK_N": max(1, block_n // rows),
        "BLOCK_D": block_d,
        "AHEAD": min(ahead, -(-inputs // block_d)),
        "num_warps": warps,
    }


def nf4_matvec_tile(table: dict, outputs: int, inputs: int, rows: int, gpu: GPU) -> dict[str, int]:
    """Of NF4 weights by matrix units."""
    warps, ahead, programs = _first_fit(table[rows], outputs, inputs)
    tile = {"WARPS": warps, "AHEAD": ahead, "num_warps": warps}
    if programs and gpu.vendor == "nvidia":
        tile["maxnreg"] = REGISTERS // (32 * warps * programs) // 8 * 8
    return tile


def matmul_tile(table: dict, sizes: list[int], inputs: int, rows: int, gpu: GPU) -> dict[str, int]:
    """Of a GEMM. sizes: outputs of each matrix, whose tiles are shared by as many programs as there is room for."""
    block_m = next(size for size in table if rows <= size)
    block_n, block_d, stages, warps, programs = _first_fit(table[block_m], sum(sizes), inputs)
    matrices = 2 if _is_one_of(table, MATMUL_GATED, MATMUL_GATED_BYTES, MATMUL_GATED_NF4) else 1
    bits = 8 if _is_one_of(table, MATMUL_BYTES, MATMUL_GATED_BYTES) else 16
    bits = 4 if _is_one_of(table, MATMUL_NF4, MATMUL_GATED_NF4) else bits
    block_d, stages = _made_to_fit(matrices * block_n, bits, block_m, block_d, stages, gpu.shared_memory)
    tiles = sum(-(-size // block_n) for size in sizes)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "SPLITS": max(1, min(programs * gpu.multiprocessors // tiles, -(-inputs // block_d))),
        "STAGES": stages,
        "num_warps": warps,
    }


def float8_fits(gpu: GPU) -> bool:
    """Whether kernels can read weights of 8 floating bits."""
    return gpu.capability >= OLDEST_FOR_FLOAT8


def _first_fit(table: dict, outputs: int, inputs: int) -> tuple[int, ...]:
    return next(tile for least, tile in table.items() if outputs >= least[0] and inputs >= least[1])


def _is_one_of(table: dict, *tables: dict) -> bool:
    """Not another one with the same tiles."""
    return any(table is each for each in tables)


def gemm_shared_memory(height: int, bits: int, block_m: int, block_d: int, stages: int) -> int:
    """Bytes of a program at most: stages of weights of so many bits and of rows, and once more the rows times the norm
    and, of 4 bits, the numbers that a tile becomes."""
    as_numbers = height * 2 if bits == 4 else 0
    return (stages * (height * bits // 8 + block_m * 2) + block_m * 2 + as_numbers) * block_d


def _made_to_fit(height: int, bits: int, block_m: int, block_d: int, stages: int, limit: int) -> tuple[int, int]:
    """BLOCK_D and STAGES for `limit` bytes (0: no limit): fewer stages while enough are left, then half the inputs."""
    fewest = min(stages, LEAST_STAGES)
    while limit and gemm_shared_memory(height, bits, block_m, block_d, fewest) > limit:
        block_d //= 2
    while limit and gemm_shared_memory(height, bits, block_m, block_d, stages) > limit:
        stages -= 1
    return block_d, stages


def decode_refusal(gpu: GPU) -> str | None:
    """None where the kernels of a decoding step run, else why not. On Turing and RDNA 3 they spill registers."""
    if (reason := triton_refusal(gpu)) is not None:
        return reason
    if gpu.vendor == "nvidia" and gpu.capability < OLDEST_FOR_DECODING:
        found, needed = (".".join(map(str, each)) for each in (gpu.capability, OLDEST_FOR_DECODING))
        return f"{gpu.name} has compute capability {found}, the kernels of a decoding step need {needed}"
    if gpu.architecture in SPILLING:
        return f"on {gpu.architecture} the kernels of a decoding step spill registers"
    return None


def decode_gemm_fits(gpu: GPU) -> bool:
    """Whether decode GEMMs of many rows are kernels here: their pipelines need asynchronous copies, from Ampere on."""
    return decode_refusal(gpu) is None and gpu.capability >= OLDEST_FOR_DECODING


def attention_split(
    heads: int, group: int, window: int, head_dim: int, itemsize: int, device: torch.device
) -> dict[str, int]:
    """Of one query's attention: heads are key heads of all rows, group the query heads that share one."""
    programs = ATTENTION_PROGRAMS * multiprocessors(device)
    return _split(heads, _block(group), window, head_dim, itemsize, programs)


def draft_attention_split(
    tiles: int, queries: int, window: int, head_dim: int, itemsize: int, device: torch.device
) -> dict[str, int]:
    """Of the attention of several tokens of a row: `tiles` programs of `queries` queries each share a ring."""
    return _split(tiles, queries, window, head_dim, itemsize, DRAFT_PROGRAMS * multiprocessors(device))


def _split(heads: int, queries: int, window: int, head_dim: int, itemsize: int, programs: int) -> dict[str, int]:
    """How a ring of W slots is divided: into about as many splits as make `programs`, each of whole blocks."""
    fitting = (tile for (largest, size), tile in ATTENTION.items() if head_dim <= largest and itemsize <= size)
    block_s, stages = next(fitting)
    blocks = -(-window // block_s)
    wanted = min(blocks, max(1, programs // heads))
    each = (2 * blocks + wanted) // (2 * wanted)  # blocks of a split, rounded to the nearest,
    each = -(-blocks // -(-blocks // each))  # and as even as so many splits can be
    block_k = _block(head_dim)
    warps = FEW_WARPS if block_k > 128 and itemsize == 2 and each == 1 else ATTENTION_WARPS
    return {
        "SPLIT": each * block_s,
        "SPLITS": -(-blocks // each),
        "BLOCK_K": block_k,
        "BLOCK_S": block_s,
        "STAGES": stages,
        "AHEAD": max(1, min(MOST_AHEAD, PARTS_AHEAD * warps // (queries * block_k))),
        "num_warps": warps,
    }


def recurrent_tile(rows: int, block_width: int) -> dict[str, int]:
    """Of the recurrent branch: a GEMV of the gates for MATVEC_ROWS, else a GEMM."""
    power = 1 << (block_width - 1).bit_length()
    if rows in MATVEC_ROWS:
        return {"BLOCK_P": min(256, power), **RECURRENT_ROW}
    return {"BLOCK_P": min(128, max(32, power // 8)), **RECURRENT}


def largest_logits_block(vocabulary: int) -> int:
    return min(LOGITS_BLOCK, 1 << (vocabulary - 1).bit_length())


def _block(size: int) -> int:
    """A side of a matrix product that holds so many."""
    return max(16, 1 << (size - 1).bit_length())
