"""What follows from a GPU: whether a kernel runs on it, and by which tiles. Nothing else knows one GPU from another.

`gpu` (a flat file, which ships) asks PyTorch what a device is; `training` and `decode` have the tables of tiles, of
which the first that fits the GPU's shared memory is taken; `known` has the properties of GPUs that need not be there.
`python -m modeling_griffin.kernels.device` says what a machine gets, and why.

The scan's tiles stay in `rg_lru_scan_triton`: it ships to the Hub, alone, and takes 18 KB at most, which every GPU has.
"""

import os

from ...gpu import AMD_SWITCH, GPU, can_overlap, multiprocessors, properties, register_limit
from .decode import (
    BEGIN_WARPS,
    BOOKKEEPING_WARPS,
    END_WARPS,
    GATED,
    GATED_BYTES,
    GATED_NF4,
    KEPT_CHANNELS,
    MATMUL,
    MATMUL_BYTES,
    MATMUL_DTYPES,
    MATMUL_GATED,
    MATMUL_GATED_BYTES,
    MATMUL_GATED_NF4,
    MATMUL_NF4,
    MATMUL_ROWS,
    MATVEC_GATED_NF4,
    MATVEC_NF4,
    MATVEC_NF4_DTYPES,
    MATVEC_ROWS,
    MOST_ENDS,
    NF4_OUTPUTS,
    NORM_WARPS,
    PROJECT,
    PROJECT_BYTES,
    PROJECT_NF4,
    RECURRENT,
    RECURRENT_ROW,
    attention_split,
    decode_gemm_fits,
    decode_refusal,
    draft_attention_split,
    float8_fits,
    largest_logits_block,
    matmul_tile,
    nf4_matvec_tile,
    product_tile,
    recurrent_tile,
)
from .training import attention_refusal, first_that_fits, gates_refusal


__all__ = [
    "BEGIN_WARPS",
    "BOOKKEEPING_WARPS",
    "END_WARPS",
    "GATED",
    "GATED_BYTES",
    "GATED_NF4",
    "GPU",
    "KEPT_CHANNELS",
    "MATMUL",
    "MATMUL_BYTES",
    "MATMUL_DTYPES",
    "MATMUL_GATED",
    "MATMUL_GATED_BYTES",
    "MATMUL_GATED_NF4",
    "MATMUL_NF4",
    "MATMUL_ROWS",
    "MATVEC_GATED_NF4",
    "MATVEC_NF4",
    "MATVEC_NF4_DTYPES",
    "MATVEC_ROWS",
    "NORM_WARPS",
    "MOST_ENDS",
    "NF4_OUTPUTS",
    "PROJECT",
    "PROJECT_BYTES",
    "PROJECT_NF4",
    "RECURRENT",
    "RECURRENT_ROW",
    "attention_refusal",
    "attention_split",
    "can_overlap",
    "decode_gemm_fits",
    "decode_refusal",
    "draft_attention_split",
    "first_that_fits",
    "float8_fits",
    "gates_refusal",
    "largest_logits_block",
    "matmul_tile",
    "nf4_matvec_tile",
    "multiprocessors",
    "product_tile",
    "properties",
    "recurrent_tile",
    "wanted_on_amd",
    "register_limit",
]


def wanted_on_amd() -> bool:
    """Whether AMD_SWITCH, an environment variable, turns the kernels on where nobody has run them."""
    return os.environ.get(AMD_SWITCH, "0") not in ("", "0")
