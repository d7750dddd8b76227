"""The GEMVs and GEMMs of a decoding step as launches of its own kernels: which kernel, and how it divides the work.

A launch has up to three matrices of the same inputs and may take the norm in front of it and the residual stream behind
it along. One row: GEMV, sums on each tile of weights; up to MATMUL_ROWS: GEMM, and where its kernels do not serve, GEMV
again for two or four rows.

Packed weights of 8 bits go through the same kernels, those of 4 bits have kernels of their own: in bfloat16 by matrix
units for any number of rows up to MATMUL_ROWS, else a GEMV, and for more rows they are dequantised in front of cuBLAS.

Legend: M rows, D inputs, N outputs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..kernels.device import (
    GATED,
    GATED_BYTES,
    GATED_NF4,
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
    NF4_OUTPUTS,
    PROJECT,
    PROJECT_BYTES,
    PROJECT_NF4,
    matmul_tile,
    nf4_matvec_tile,
    product_tile,
    properties,
)
from .packed import NF4, NF4_BLOCK, Rows, unpack, weight_of


try:
    import triton

    from .kernels.gemm import gated_matmul_kernel, matmul_kernel
    from .kernels.gemm_nf4 import nf4_gated_matmul_kernel, nf4_matmul_kernel
    from .kernels.gemv import gated_project_kernel, project_kernel
    from .kernels.gemv_nf4 import nf4_dequantise_kernel, nf4_gated_project_kernel, nf4_project_kernel
    from .kernels.matvec_nf4 import nf4_gated_matvec_kernel, nf4_matvec_kernel
except ImportError:
    triton = None

COUNTERS = 1024  # tiles of outputs that are shared at most; a shared one has a multiprocessor of its own


class _Matrix(NamedTuple):
    """A linear layer as kernels get it. weight (N, D): what is stored; packed: what it means."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    y: torch.Tensor
    packed: Rows | NF4 | None

    @classmethod
    def of(cls, linear: nn.Module, y: torch.Tensor) -> "_Matrix":
        packed = unpack(linear)
        return cls(linear.weight if packed is None else packed.data, linear.bias, y, packed)

    @property
    def scale(self) -> torch.Tensor | None:
        return None if self.packed is None else self.packed.scale

    @property
    def unit(self) -> float:
        return getattr(self.packed, "unit", 1.0)

    @property
    def kind(self) -> tuple:
        """Those alike can share a launch."""
        scale = None if self.scale is None else self.scale.dtype
        return type(self.packed), self.weight.dtype, scale, self.unit, self.bias is None

    @property
    def nf4(self) -> NF4:
        assert isinstance(self.packed, NF4)
        return self.packed

    def nf4_tensors(self) -> tuple[torch.Tensor, ...]:
        return _nf4_tensors(self.nf4)


def _nf4_tensors(packed: NF4) -> tuple[torch.Tensor, ...]:
    """The weights, their scales, and what these mean."""
    nested = packed.nested_code, packed.nested_scale, packed.offset
    return (packed.data, packed.scale, *(packed.scale if each is None else each for each in nested))


class Gemms:
    """launch: options of every launch. matmul: whether the kernels of many rows are used; `takes` says when."""

    def __init__(self, launch: dict, matmul: bool):
        self.launch, self.matmul = launch, matmul
        self.counters: torch.Tensor | None = None

    def takes(self, x: torch.Tensor, *linears: nn.Module, together: bool = False) -> bool:
        """Whether there is a kernel for the rows x (M, D); else it is cuBLAS's work. together: both in one tile."""
        if together and len({_Matrix.of(each, x).kind for each in linears}) > 1:
            return False
        return x.shape[0] in MATVEC_ROWS or self._as_matrices(x, *linears, together=together)

    def _as_matrices(self, x: torch.Tensor, *linears: nn.Module, together: bool = False) -> bool:
        matrices = [_Matrix.of(each, x) for each in linears]
        aligned = not together or len({each.weight.data_ptr() % 16 for each in matrices}) < 2
        aligned = aligned and all(_begins_at_16_bytes(x, None, [m]) for m in matrices if type(m.packed) is NF4)
        return self.matmul and 1 < x.shape[0] <= MATMUL_ROWS and x.dtype in MATMUL_DTYPES and aligned

    def project(
        self,
        x: torch.Tensor,
        norm: nn.Module | None,
        linears: Sequence[nn.Module],
        residual: torch.Tensor | None = None,
        outputs: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """norm(x) through each of the linears, plus the residual (M, N), into outputs or new tensors (M, N)."""
        ys = outputs or [x.new_empty(x.shape[0], each.out_features) for each in linears]
        matrices = [_Matrix.of(linear, y) for linear, y in zip(linears, ys)]
        alike = [[each for each in matrices if each.kind == kind] for kind in dict.fromkeys(m.kind for m in matrices)]
        for some in alike:
            if _is_matvec_of_nf4(x, norm, some):
                self._matvec_nf4(x, norm, some, residual)
            elif type(some[0].packed) is NF4 and self._as_matrices(x):
                self._matmul_nf4(x, norm, some, residual)
            elif type(some[0].packed) is NF4:
                for matrix in some:
                    self._project_nf4(x, norm, matrix, residual)
            else:
                self._project(x, norm, some, residual)
        return ys

    def _project(
        self, x: torch.Tensor, norm: nn.Module | None, matrices: list["_Matrix"], residual: torch.Tensor | None
    ) -> None:
        """One launch."""
        sizes = [len(each.weight) for each in matrices]
        padded = [*matrices, *[matrices[0]] * (3 - len(matrices))]
        given = (tensor for each in padded for tensor in (each.weight, each.scale, each.bias, each.y))
        tensors = (x, x if norm is None else norm.weight, *(x if tensor is None else tensor for tensor in given))
        tensors = (*tensors, x if residual is None else residual)
        eps, padded_sizes = 1.0 if norm is None else norm.eps, (*sizes, *[0] * (3 - len(sizes)))
        options = {
            "D": x.shape[1],
            "MATRICES": len(matrices),
            "NORM": norm is not None,
            "SCALED": matrices[0].scale is not None,
            "BIAS": matrices[0].bias is not None,
            "RESIDUAL": residual is not None,
            **self.launch,
        }
        if not self._as_matrices(x):
            table = PROJECT_BYTES if matrices[0].weight.itemsize == 1 else PROJECT
            tile = product_tile(table, sum(sizes), x.shape[1], x.shape[0])
            even = all(size % tile["BLOCK_N"] == 0 for size in sizes)
            programs = sum(triton.cdiv(size, tile["BLOCK_N"]) for size in sizes)
            options |= {"ROWS": x.shape[0], "EVEN": even, **tile}
            project_kernel[(programs,)](*tensors, eps, matrices[0].unit, *padded_sizes, **options)
        else:
            table = MATMUL_BYTES if matrices[0].weight.itemsize == 1 else MATMUL
            tile = matmul_tile(table, sizes, x.shape[1], x.shape[0], properties(x.device))
            grid, scratch = self._shared(tile, sizes, 1, x)
            options |= {"EVEN": _is_even(tile, sizes, x.shape[1]), **tile}
            matmul_kernel[grid](*tensors, *scratch, eps, matrices[0].unit, x.shape[0], *padded_sizes, **options)

    def _project_nf4(
        self, x: torch.Tensor, norm: nn.Module | None, matrix: "_Matrix", residual: torch.Tensor | None
    ) -> None:
        width, options = matrix.y.shape[1], self._nf4_options(PROJECT_NF4, x, matrix.y.shape[1], matrix)
        options |= {"NORM": norm is not None, "BIAS": matrix.bias is not None, "RESIDUAL": residual is not None}
        given = (matrix.bias, residual)
        nf4_project_kernel[(triton.cdiv(width, options["BLOCK_N"]),)](
            *(x, x if norm is None else norm.weight, matrix.nf4.code, *matrix.nf4_tensors()),
            *(x if tensor is None else tensor for tensor in given),
            *(matrix.y, 1.0 if norm is None else norm.eps, width),
            **options,
        )

    def _matvec_nf4(
        self, x: torch.Tensor, norm: nn.Module | None, matrices: list["_Matrix"], residual: torch.Tensor | None
    ) -> None:
        """One launch."""
        sizes = [matrix.y.shape[1] for matrix in matrices]
        options = {
            **_nf4_roles(norm, matrices, residual),
            **self._matvec_nf4_options(MATVEC_NF4, x, sum(sizes), matrices[0]),
        }
        programs = sum(triton.cdiv(size, NF4_OUTPUTS) for size in sizes)
        eps, padded_sizes = 1.0 if norm is None else norm.eps, (*sizes, *[0] * (3 - len(sizes)))
        nf4_matvec_kernel[(programs,)](*_nf4_given(x, norm, matrices, residual), eps, *padded_sizes, **options)

    def _matmul_nf4(
        self, x: torch.Tensor, norm: nn.Module | None, matrices: list["_Matrix"], residual: torch.Tensor | None
    ) -> None:
        """One launch."""
        sizes = [matrix.y.shape[1] for matrix in matrices]
        tile = matmul_tile(MATMUL_NF4, sizes, x.shape[1], x.shape[0], properties(x.device))
        grid, scratch = self._shared(tile, sizes, 1, x)
        options = {
            **_nf4_roles(norm, matrices, residual),
            **self._matmul_nf4_options(tile, sizes, x, matrices[0]),
        }
        eps, padded_sizes = 1.0 if norm is None else norm.eps, (*sizes, *[0] * (3 - len(sizes)))
        given = (*_nf4_given(x, norm, matrices, residual), *scratch)
        nf4_matmul_kernel[grid](*given, eps, x.shape[0], *padded_sizes, **options)

    def _matmul_nf4_options(self, tile: dict, sizes: list[int], x: torch.Tensor, matrix: "_Matrix") -> dict:
        return {
            "D": x.shape[1],
            "NESTED": matrix.nf4.nested_code is not None,
            "EVEN": _is_even(tile, sizes, x.shape[1]),
            **tile,
            **self.launch,
        }

    def _matvec_nf4_options(self, table: dict, x: torch.Tensor, outputs: int, matrix: "_Matrix") -> dict:
        return {
            "D": x.shape[1],
            "ROWS": x.shape[0],
            "NESTED": matrix.nf4.nested_code is not None,
            **nf4_matvec_tile(table, outputs, x.shape[1], x.shape[0], properties(x.device)),
            **self.launch,
        }

    def _nf4_options(self, table: dict, x: torch.Tensor, outputs: int, matrix: "_Matrix") -> dict:
        tile = product_tile(table, outputs, x.shape[1], x.shape[0])
        return {
            "D": x.shape[1],
            "ROWS": x.shape[0],
            "NESTED": matrix.nf4.nested_code is not None,
            "EVEN": matrix.y.shape[1] % tile["BLOCK_N"] == 0,
            "G": tile.pop("BLOCK_D") // NF4_BLOCK,
            **tile,
            **self.launch,
        }

    def gated(self, x: torch.Tensor, norm: nn.Module, gate: nn.Module, up: nn.Module) -> torch.Tensor:
        """gelu(gate(norm(x))) * up(norm(x)), of weights of one kind."""
        width = gate.out_features
        y = x.new_empty(x.shape[0], width)
        first, second = _Matrix.of(gate, y), _Matrix.of(up, y)
        if _is_matvec_of_nf4(x, norm, [first, second]):
            options = self._matvec_nf4_options(MATVEC_GATED_NF4, x, 2 * width, first)
            both = (tensor for each in (first, second) for tensor in (*each.nf4_tensors(), each.bias))
            grid = (triton.cdiv(width, NF4_OUTPUTS),)
            nf4_gated_matvec_kernel[grid](x, norm.weight, first.nf4.code, *both, y, norm.eps, width, **options)
            return y
        if type(first.packed) is NF4 and self._as_matrices(x, gate, up, together=True):
            tile = matmul_tile(MATMUL_GATED_NF4, [width], x.shape[1], x.shape[0], properties(x.device))
            grid, scratch = self._shared(tile, [width], 2, x)
            options = self._matmul_nf4_options(tile, [width], x, first)
            both = (tensor for each in (first, second) for tensor in (*each.nf4_tensors(), each.bias))
            given = (x, norm.weight, first.nf4.code, *both, y, *scratch, norm.eps, x.shape[0], width)
            nf4_gated_matmul_kernel[grid](*given, **options)
            return y
        if type(first.packed) is NF4:
            options = self._nf4_options(GATED_NF4, x, 2 * width, first)
            both = (tensor for each in (first, second) for tensor in (*each.nf4_tensors(), each.bias))
            grid = (triton.cdiv(width, options["BLOCK_N"]),)
            nf4_gated_project_kernel[grid](x, norm.weight, first.nf4.code, *both, y, norm.eps, width, **options)
            return y
        given = (tensor for each in (first, second) for tensor in (each.weight, each.scale, each.bias))
        tensors = (x, norm.weight, *(x if tensor is None else tensor for tensor in given), y)
        options = {"D": x.shape[1], "SCALED": first.scale is not None, **self.launch}
        if not self._as_matrices(x, gate, up, together=True):
            table = GATED_BYTES if first.weight.itemsize == 1 else GATED
            tile = product_tile(table, 2 * width, x.shape[1], x.shape[0])
            options |= {"ROWS": x.shape[0], "EVEN": width % tile["BLOCK_N"] == 0, **tile}
            grid = (triton.cdiv(width, tile["BLOCK_N"]),)
            gated_project_kernel[grid](*tensors, norm.eps, first.unit, width, **options)
        else:
            table = MATMUL_GATED_BYTES if first.weight.itemsize == 1 else MATMUL_GATED
            tile = matmul_tile(table, [width], x.shape[1], x.shape[0], properties(x.device))
            grid, scratch = self._shared(tile, [width], 2, x)
            options |= {"EVEN": _is_even(tile, [width], x.shape[1]), **tile}
            gated_matmul_kernel[grid](*tensors, *scratch, norm.eps, first.unit, x.shape[0], width, **options)
        return y

    def weight(self, linear: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        """(N, D), for cuBLAS. NF4 in one pass; PyTorch's own operations write each index as a number of 64 bits."""
        packed = unpack(linear)
        if type(packed) is not NF4:
            return weight_of(linear, dtype)
        y = torch.empty(*packed.shape, dtype=dtype, device=packed.data.device)
        rows, inputs = packed.shape
        nf4_dequantise_kernel[(triton.cdiv(rows, 4), triton.cdiv(inputs, 16 * NF4_BLOCK))](
            *(packed.code, *_nf4_tensors(packed), y, rows),
            D=inputs,
            NESTED=packed.nested_code is not None,
            BLOCK_N=4,
            G=16,
        )
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


def _nf4_given(
    x: torch.Tensor, norm: nn.Module | None, matrices: list[_Matrix], residual: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """The tensors of a launch with one to three matrices."""
    padded = [*matrices, *[matrices[0]] * (3 - len(matrices))]
    given = (tensor for each in padded for tensor in (*each.nf4_tensors(), each.bias, each.y))
    first = (x, x if norm is None else norm.weight, matrices[0].nf4.code)
    return (*first, *(x if tensor is None else tensor for tensor in (*given, residual)))


def _nf4_roles(norm: nn.Module | None, matrices: list[_Matrix], residual: torch.Tensor | None) -> dict:
    return {
        "MATRICES": len(matrices),
        "NORM": norm is not None,
        "BIAS": matrices[0].bias is not None,
        "RESIDUAL": residual is not None,
    }


def _is_matvec_of_nf4(x: torch.Tensor, norm: nn.Module | None, matrices: list[_Matrix]) -> bool:
    """Whether matrix units take the rows x (M, D): in bfloat16, where all can be read 16 bytes at a time."""
    if type(matrices[0].packed) is not NF4 or x.dtype not in MATVEC_NF4_DTYPES or x.shape[0] not in MATVEC_ROWS:
        return False
    return _begins_at_16_bytes(x, norm, matrices)


def _begins_at_16_bytes(x: torch.Tensor, norm: nn.Module | None, matrices: list[_Matrix]) -> bool:
    read = [x, *([] if norm is None else [norm.weight]), *(each.weight for each in matrices)]
    return all(each.data_ptr() % 16 == 0 for each in read)


def _is_even(tile: dict, sizes: list[int], inputs: int) -> bool:
    return inputs % tile["BLOCK_D"] == 0 and all(size % tile["BLOCK_N"] == 0 for size in sizes)
