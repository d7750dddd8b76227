"""Products of a decoding step with packed weights against the same products with the numbers that they stand for."""

import pytest
import torch
from _decode_helpers import (
    DEVICE,
    DTYPES_OF_STEPS,
    LOGITS,
    make_linear,
    make_norm,
    multiply_matrices,
    needs_kernels,
    normal,
    poison_what_is_new,
)
from tolerances import assert_close
from torch import nn

from modeling_griffin.decode import linear as decode_linear
from modeling_griffin.decode import packed
from modeling_griffin.decode.ops import KernelOps, PlainOps, Stream


pytestmark = needs_kernels
KINDS = ["int8", "float8", "nf4", "nf4, constants too"]


class Packed(nn.Module):
    """A layer whose weights are `packed`: as a library's, without the library."""

    def __init__(self, held, bias):
        super().__init__()
        self.held, self.bias, self.weight = held, bias, None
        self.out_features = len(held.data) if isinstance(held, packed.Rows) else held.shape[0]


def make_packed(kind: str, inputs: int, outputs: int, dtype, bias=True) -> Packed:
    generator = torch.Generator().manual_seed(outputs)
    given = nn.Parameter(normal(outputs, dtype=dtype)) if bias else None

    def whole(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).to(DEVICE)

    scale = torch.rand(outputs, generator=generator).to(DEVICE) / 64 + 0.001
    if kind == "int8":
        return Packed(packed.Rows(whole(-127, 128, outputs, inputs).to(torch.int8), scale, 1 / 127), given)
    if kind == "float8":
        data = normal(outputs, inputs).to(torch.float8_e4m3fn)
        return Packed(packed.Rows(data, scale.to(dtype), 1.0), given)
    scales = outputs * inputs // packed.NF4_BLOCK
    code = torch.linspace(-1, 1, 16, device=DEVICE) ** 3
    absmax, nested = torch.rand(scales, generator=generator).to(DEVICE) / 8, (None, None, None)
    if kind != "nf4":
        absmax = whole(0, 256, scales).to(torch.uint8)
        blocks = -(-scales // packed.NESTED_BLOCK)
        nested = normal(256), torch.rand(blocks, generator=generator).to(DEVICE), torch.tensor(0.3, device=DEVICE)
    data = whole(0, 256, outputs * inputs // 2).to(torch.uint8)
    return Packed(packed.NF4(data, absmax, code, *nested, (outputs, inputs)), given)


@pytest.fixture(autouse=True)
def held_by_the_layer(monkeypatch):
    multiply_matrices(monkeypatch)
    unpack = packed.unpack
    for module in (packed, decode_linear):
        monkeypatch.setattr(module, "unpack", lambda layer: layer.held if isinstance(layer, Packed) else unpack(layer))


def both(call):
    return call(PlainOps()), call(KernelOps())


CASES = [
    (torch.float32, 1, 1088, 40),  # more than a tile, and not a whole number of them
    (torch.float32, 2, 64, 17),
    (DTYPES_OF_STEPS[1], 4, 64, 17),
    (DTYPES_OF_STEPS[1], 5, 64, 17),
    (torch.float32, 65, 64, 17),
]


@pytest.mark.parametrize("dtype, rows, inputs, width", CASES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_products(kind, dtype, rows, inputs, width, monkeypatch):
    """Through a layer of each role, and a plain head behind them."""
    x, norm = normal(rows, inputs, dtype=dtype), make_norm(inputs, dtype)
    first, second = (make_packed(kind, inputs, size, dtype, bias=False) for size in (width, 8))
    gate, up = (make_packed(kind, inputs, 64, dtype) for _ in range(2))
    up.bias = nn.Parameter(up.bias.float())  # bitsandbytes leaves it in the dtype in which it computes
    down, head = make_packed(kind, 64, inputs, dtype), make_linear(inputs, 9, dtype, bias=False)
    poison_what_is_new(monkeypatch)

    def block(ops):
        stream = Stream(x.clone())
        ys = ops.project(stream, norm, [first, second, head])
        inner = ops.gated_project(stream, norm, gate, up)
        stream = ops.add_project(stream, inner, down)
        logits = x.new_zeros(rows, 9)
        ops.head(stream, norm, head, logits)
        return [*ys, inner, logits]

    for expected, found in zip(*both(block), strict=True):
        assert found.isfinite().all()
        assert_close(LOGITS[dtype] if dtype != torch.float32 else "gradient", found, expected)


def test_gates_of_different_kinds():
    x, norm = normal(1, 64), make_norm(64, torch.float32)
    gate, up = make_packed("int8", 64, 32, torch.float32), make_packed("nf4", 64, 32, torch.float32)
    with torch.no_grad():
        expected, found = both(lambda ops: ops.gated_project(Stream(x), norm, gate, up))
    assert_close("gradient", found, expected)


def test_what_a_kernel_is_launched_for():
    dtype = decode_linear.MATMUL_DTYPES[-1]
    x = torch.empty(5, 64, dtype=dtype)
    rows, nf4 = make_packed("int8", 64, 32, dtype), make_packed("nf4", 64, 32, dtype)
    for matmul in (True, False):
        gemms = KernelOps(matmul=matmul).gemms
        assert gemms.takes(x[:1], nf4) and gemms.takes(x[:4], nf4) and gemms.takes(x, nf4) is matmul
        assert not gemms.takes(x[:1], rows, nf4, together=True)
