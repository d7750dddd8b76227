"""How the kernels of a decoding step divide their work: what was fastest on one H100 in bfloat16.

What decides is how many bytes of weights are on their way at a time. A thread loads 16 bytes of each of BLOCK_N outputs
and asks for AHEAD such tiles before it uses the first.

Legend: N outputs of a product, D inputs.
"""

# Rows up to which a product is done one row after the other on each tile of weights; beyond, by cuBLAS.
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


def product_tile(table: dict, outputs: int, inputs: int, rows: int) -> dict[str, int]:
    """Fewer outputs a program where each has several rows to sum; no more tiles ahead than a row of weights has."""
    block_n, warps, ahead = next(tile for least, tile in table.items() if outputs >= least[0] and inputs >= least[1])
    block_d = INPUTS_OF_A_WARP * warps
    return {
        "BLOCK_N": max(1, block_n // rows),
        "BLOCK_D": block_d,
        "AHEAD": min(ahead, -(-inputs // block_d)),
        "num_warps": warps,
    }
