"""The GEMVs and GEMMs of a decoding step as launches of its own kernels: which kernel, and how it divides the work.

A launch has up to three matrices of the same inputs and may take the norm in front of it and the residual stream behind
it along. One row: GEMV, sums on each tile of weights; up to MATMUL_ROWS: GEMM, and where its kernels do not serve, GEMV
again for two or four rows.

Legend: M rows, D inputs, N outputs.
"""

from collections.abc import Sequence

import torch
from torch import nn

from ..kernels.device import (
    GATED,
    MATMUL,
    MATMUL_DTYPES,
    MATMUL_GATED,
    MATMUL_ROWS,
    MATVEC_ROWS,
    PROJECT,
    matmul_tile,
    product_tile,
    properties,
)


try:
    import triton

    from .kernels.gemm import gated_matmul_kernel, matmul_kernel
    from .kernels.gemv import gated_project_kernel, project_kernel
except ImportError:
    triton = None

COUNTERS = 1024  # tiles of outputs that are shared at most; a shared one has a multiprocessor of its own


class Gemms:
    """launch: options of every launch. matmul: whether the kernels of many rows are used; `takes` says when."""

    def __init__(self, launch: dict, matmul: bool):
        self.launch, self.matmul = launch, matmul
        self.counters: torch.Tensor | None = None

    def takes(self, x: torch.Tensor, *pair: torch.Tensor) -> bool:
        """Whether there is a kernel for the rows x (M, D); else it is cuBLAS's work. pair: weights of one tile."""
        return x.shape[0] in MATVEC_ROWS or self._as_matrices(x, *pair)

    def _as_matrices(self, x: torch.Tensor, *pair: torch.Tensor) -> bool:
        aligned = len({weight.data_ptr() % 16 for weight in pair}) < 2
        return self.matmul and 1 < x.shape[0] <= MATMUL_ROWS and x.dtype in MATMUL_DTYPES and aligned

    def project(
        self,
        x: torch.Tensor,
        norm: nn.Module | None,
        linears: Sequence[nn.Linear],
        residual: torch.Tensor | None = None,
        outputs: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """norm(x) through each of the linears, plus the residual (M, N), into outputs or new tensors (M, N)."""
        ys = outputs or [x.new_empty(x.shape[0], each.out_features) for each in linears]
        sizes = [each.out_features for each in linears]
        matrices = [(each.weight, x if each.bias is None else each.bias, y) for each, y in zip(linears, ys)]
        padded = [*matrices, *[matrices[0]] * (3 - len(matrices))]
        tensors = (x, x if norm is None else norm.weight, *(tensor for matrix in padded for tensor in matrix))
        tensors = (*tensors, x if residual is None else residual)
        eps, padded_sizes = 1.0 if norm is None else norm.eps, (*sizes, *[0] * (3 - len(sizes)))
        options = {
            "D": x.shape[1],
            "MATRICES": len(linears),
            "NORM": norm is not None,
            "BIAS": linears[0].bias is not None,
            "RESIDUAL": residual is not None,
            **self.launch,
        }
        if not self._as_matrices(x):
            tile = product_tile(PROJECT, sum(sizes), x.shape[1], x.shape[0])
            even = all(size % tile["BLOCK_N"] == 0 for size in sizes)
            programs = sum(triton.cdiv(size, tile["BLOCK_N"]) for size in sizes)
            options |= {"ROWS": x.shape[0], "EVEN": even, **tile}
            project_kernel[(programs,)](*tensors, eps, *padded_sizes, **options)
        else:
            tile = matmul_tile(MATMUL, sizes, x.shape[1], x.shape[0], properties(x.device))
            grid, scratch = self._shared(tile, sizes, 1, x)
            options |= {"EVEN": _is_even(tile, sizes, x.shape[1]), **tile}
            matmul_kernel[grid](*tensors, *scratch, eps, x.shape[0], *padded_sizes, **options)
        return ys

    def gated(self, x: torch.Tensor, norm: nn.Module, gate: nn.Linear, up: nn.Linear) -> torch.Tensor:
        """gelu(gate(norm(x))) * up(norm(x))."""
        width = gate.out_features
        y = x.new_empty(x.shape[0], width)
        tensors = (x, norm.weight, gate.weight, gate.bias, up.weight, up.bias, y)
        if not self._as_matrices(x, gate.weight, up.weight):
            tile = product_tile(GATED, 2 * width, x.shape[1], x.shape[0])
            options = {"ROWS": x.shape[0], "EVEN": width % tile["BLOCK_N"] == 0, **self.launch, **tile}
            grid = (triton.cdiv(width, tile["BLOCK_N"]),)
            gated_project_kernel[grid](*tensors, norm.eps, width, D=x.shape[1], **options)
        else:
            tile = matmul_tile(MATMUL_GATED, [width], x.shape[1], x.shape[0], properties(x.device))
            grid, scratch = self._shared(tile, [width], 2, x)
            options = {"EVEN": _is_even(tile, [width], x.shape[1]), **self.launch, **tile}
            gated_matmul_kernel[grid](*tensors, *scratch, norm.eps, x.shape[0], width, D=x.shape[1], **options)
        return y

    def _shared(self, tile: dict, sizes: list[int], matrices: int, x: torch.Tensor) -> tuple:
        """The grid, and where programs that share outputs leave their sums, their squares and their count."""
        tiles, splits = sum(triton.cdiv(size, tile["BLOCK_N"]) for size in sizes), tile["SPLITS"]
        if splits == 1:
            return (tiles, 1), (x, x, x)
        if self.counters is None:
            self.counters = torch.zeros(COUNTERS, dtype=torch.int32, device=x.device)
        new = {"dtype": torch.float32, "device": x.device}
        parts = torch.empty(tiles * splits * matrices * tile["BLOCK_N"] * tile["BLOCK_M"], **new)
        return (tiles, splits), (parts, torch.empty(tiles * splits * tile["BLOCK_M"], **new), self.counters)


def _is_even(tile: dict, sizes: list[int], inputs: int) -> bool:
    return inputs % tile["BLOCK_D"] == 0 and all(size % tile["BLOCK_N"] == 0 for size in sizes)
