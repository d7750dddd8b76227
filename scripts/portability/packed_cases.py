"""Launches of decoding over weights that a quantisation library has packed, on meta tensors as in `cases`."""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from modeling_griffin.decode.ops import KernelOps, Stream
from modeling_griffin.gpu import properties
from modeling_griffin.kernels.device import (
    MATMUL_DTYPES,
    MATVEC_NF4_DTYPES,
    MATVEC_ROWS,
    can_overlap,
    decode_gemm_fits,
    float8_fits,
)
from modeling_griffin.modeling_griffin import GriffinRMSNorm

from .shapes import META, Shape, new


class _Linear8bitLt(nn.Linear):
    """As bitsandbytes' layer of this name holds its weights, or with such rows of float8, as torchao's do."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, packed: torch.dtype):
        super().__init__(inputs, outputs, device=META, dtype=dtype)
        self.weight = nn.Parameter(new(outputs, inputs, dtype=torch.int8), False)
        self.state = SimpleNamespace(CB=new(outputs, inputs, dtype=packed), SCB=new(outputs, dtype=torch.float32))


class _Linear4bit(nn.Linear):
    """The same of weights in NF4; nested: whether their scales are quantised too. first: the address of the weights."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, nested: bool, first: int = 0):
        super().__init__(inputs, outputs, device=META, dtype=dtype)
        weights = new(first + inputs * outputs // 2, 1, dtype=torch.uint8)[first:]
        self.weight = nn.Parameter(weights, False)
        scales, float32 = inputs * outputs // 64, {"dtype": torch.float32}
        second = SimpleNamespace(code=new(256, **float32), absmax=new(-(-scales // 256), **float32), blocksize=256)
        self.weight.quant_state = SimpleNamespace(
            quant_type="nf4",
            blocksize=64,
            shape=(outputs, inputs),
            nested=nested,
            absmax=new(scales, dtype=torch.uint8 if nested else torch.float32),
            code=new(16, **float32),
            state2=second,
            offset=new(**float32),
        )


for _layer in (_Linear8bitLt, _Linear4bit):  # by these names the launch code knows them
    _layer.__module__, _layer.__name__ = "bitsandbytes.nn", _layer.__name__.removeprefix("_")


def packed_products(shape: Shape, dtype: torch.dtype, quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """The products of one layer of each kind over packed weights, by the numbers of rows that have kernels."""
    kinds: dict[str, tuple] = {"int8": (_bytes(torch.int8, dtype), (1, 2, 4, 16, 64))}
    if float8_fits(properties(META)):
        kinds["float8"] = _bytes(torch.float8_e4m3fn, dtype), (1, 2, 4, 16, 64)
    if dtype in MATVEC_NF4_DTYPES:  # in others no step of ours reads them
        kinds["nf4"] = partial(_Linear4bit, dtype=dtype, nested=False), (1, 2, 4, 16, 64, 65)
        kinds["nf4, constants too"] = partial(_Linear4bit, dtype=dtype, nested=True), (1, 2, 4, 16, 64, 65)
        kinds["nf4, at an odd address"] = partial(_Linear4bit, dtype=dtype, nested=True, first=1), (1, 2, 4)
    tightest = {"nf4, constants too": (1, 64), "float8": (64,)}
    for name, (make, rows) in kinds.items():
        rows = rows if dtype in MATMUL_DTYPES else MATVEC_ROWS
        for number in tightest.get(name, ()) if quick else rows:
            yield f"decode {name}, {number} rows", partial(_products, shape, dtype, make, number)


def _bytes(packed: torch.dtype, dtype: torch.dtype) -> Callable:
    return partial(_Linear8bitLt, dtype=dtype, packed=packed)


def _products(shape: Shape, dtype: torch.dtype, make: Callable, rows: int) -> None:
    norm = GriffinRMSNorm(shape.width, 1e-6).to(META, dtype)
    ops = KernelOps(can_overlap(META), decode_gemm_fits(properties(META)))
    stream = Stream(new(rows, shape.width, dtype=dtype))
    ops.project(stream, norm, [make(shape.width, shape.lru) for _ in range(2)])
    queries, keys = make(shape.width, shape.heads * shape.head_dim), make(shape.width, shape.head_dim)
    queries.bias = keys.bias = None
    ops.project(stream, norm, [queries, keys, keys])
    ops.add_project(stream, new(rows, shape.lru, dtype=dtype), make(shape.lru, shape.width))
    inner = ops.gated_project(stream, norm, *(make(shape.width, shape.inner) for _ in range(2)))
    ops.add_project(stream, inner, make(shape.inner, shape.width))
