"""Products of rows of 16 bits with NF4 weights by matrix units, beside float64 over what the weights stand for."""

import numpy as np
import pytest
import torch
from _decode_helpers import (
    DEVICE,
    INTERPRETED,
    make_norm,
    multiply_matrices,
    needs_kernels,
    normal,
    poison_what_is_new,
)
from ptx_warp import Warp
from test_packed import Packed, make_packed
from torch import nn

from modeling_griffin.decode import linear as decode_linear
from modeling_griffin.decode import packed
from modeling_griffin.decode.linear import Gemms
from modeling_griffin.kernels.device import decode as tables


pytest.importorskip("triton")
from modeling_griffin.decode.kernels import matvec_nf4 as kernels  # noqa: E402
from modeling_griffin.decode.kernels.gemv import TO_FLOAT32  # noqa: E402


pytestmark = needs_kernels
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
EPS = torch.finfo(DTYPE).eps


@pytest.fixture(autouse=True)
def held_by_the_layer(monkeypatch):
    unpack = packed.unpack
    for module in (packed, decode_linear):
        monkeypatch.setattr(module, "unpack", lambda layer: layer.held if isinstance(layer, Packed) else unpack(layer))
    monkeypatch.setattr(decode_linear, "MATVEC_NF4_DTYPES", (DTYPE,))
    multiply_matrices(monkeypatch)

    def refused(*given):
        raise AssertionError("the other kernel")

    monkeypatch.setattr(Gemms, "_nf4_options", refused)


def product(x, norm, layer) -> torch.Tensor:
    """float64, of a row times the numbers that the weights stand for; and what its terms are in size."""
    x, held = x.double(), layer.held
    if norm is not None:
        x = x / (x.square().mean(1, keepdim=True) + norm.eps).sqrt() * (1 + norm.weight.double())
    scale = held.scale.double()
    if held.nested_code is not None:
        shared = held.nested_scale.double().repeat_interleave(packed.NESTED_BLOCK)[: len(scale)]
        scale = held.nested_code.double()[held.scale.long()] * shared + held.offset.double()
    index = torch.stack((held.data >> 4, held.data & 15), 1).flatten().long()
    w = (held.code.double()[index].view(-1, packed.NF4_BLOCK) * scale[:, None]).view(held.shape)
    return x @ w.T + (0 if layer.bias is None else layer.bias.double()), x.abs() @ w.abs().T


def assert_near(found, expected, terms):
    """Each term is off by the rounding of the code and of x (1 + norm), a result by its own."""
    assert found.isfinite().all()
    allowed = EPS * (0.25 * terms + expected.abs()) + 1e-6
    assert ((found.double() - expected).abs() <= allowed).all()


CASES = [  # rows, inputs, outputs
    (1, 64, 5),  # half a tile, less than a block of outputs
    (2, 192, 17),
    (4, 192, 17),
    (1, 832, 33),  # not as many tiles for each warp, and two steps
    (5, 192, 17),  # more rows: the products of gemm_nf4
]
if not INTERPRETED:  # which is too slow for them
    CASES += [(rows, inputs, 300) for rows in (1, 2, 4, 16, 64) for inputs in (2560, 2624, 7680)]


@pytest.mark.parametrize("rows, inputs, outputs", CASES)
@pytest.mark.parametrize("kind", ["nf4", "nf4, constants too"])
def test_values(kind, rows, inputs, outputs, monkeypatch):
    poison_what_is_new(monkeypatch)
    assert_values(kind, rows, inputs, outputs)


@pytest.mark.parametrize("rows", [1, 2])
def test_values_of_tiles_asked_for_as_they_are_used(rows, monkeypatch):
    """Weights of the tile behind the next, and of two rows the inputs of a second step."""
    for table in (tables.MATVEC_NF4, tables.MATVEC_GATED_NF4):
        monkeypatch.setitem(table, rows, {(0, 0): (2, 1, 0)})
    poison_what_is_new(monkeypatch)
    assert_values("nf4, constants too", rows, 832, 17)


@torch.no_grad()
def assert_values(kind, rows, inputs, outputs):
    x, norm = normal(rows, inputs, dtype=DTYPE), make_norm(inputs, DTYPE)
    layers = [make_packed(kind, inputs, size, DTYPE, bias=False) for size in (outputs, 16, 3)]
    gate, up = (make_packed(kind, inputs, outputs, DTYPE) for _ in range(2))
    up.bias = nn.Parameter(up.bias.float())
    residual = normal(rows, outputs, dtype=DTYPE)
    gemms = Gemms({"PDL": False}, True)

    for some in (layers, layers[:2], layers[:1]):
        for layer, found in zip(some, gemms.project(x, norm, some), strict=True):
            assert_near(found, *product(x, norm, layer))
    (found,) = gemms.project(x, None, [gate], residual)
    expected, terms = product(x, None, gate)
    assert_near(found, expected + residual.double(), terms)

    found = gemms.gated(x, norm, gate, up)
    (first, of_first), (second, of_second) = product(x, norm, gate), product(x, norm, up)
    gelu = nn.functional.gelu(first, approximate="tanh")
    assert_near(found, gelu * second, 1.2 * of_first * second.abs() + gelu.abs() * of_second)


def test_what_does_not_begin_at_16_bytes_goes_the_other_way(monkeypatch):
    layer = make_packed("nf4", 64, 4, DTYPE)
    layer.held = layer.held._replace(data=torch.cat((layer.held.data[:1], layer.held.data))[1:])
    with torch.no_grad(), pytest.raises(AssertionError, match="the other kernel"):
        Gemms({"PDL": False}, True).project(torch.zeros(1, 64, dtype=DTYPE, device=DEVICE), None, [layer])


def in_words(numbers: torch.Tensor) -> np.ndarray:
    """Pairs of bfloat16, the first in the lower half. (..., 2 n) -> (n, ...)."""
    return numbers.bfloat16().contiguous().view(torch.int32).movedim(-1, 0).numpy().view(np.uint32)


def filled_table(code: torch.Tensor, start: int) -> np.ndarray:
    shared = np.zeros(start // 4 + 8192, np.uint32)
    for first in range(0, 256, 32):
        entry = first + np.arange(32)
        (words,) = in_words(torch.stack((code[entry >> 4], code[entry & 15]), -1))
        operands = {1: start + 128 * entry, 2: words, 3: entry}
        Warp({i: np.asarray(each, np.uint32) for i, each in operands.items()}, shared).run(kernels.STORE_ENTRY.value)
    return shared


def test_assembly_of_a_tile():
    """16 outputs times 128 inputs, and the sums of squares, as the kernel takes them from a warp's threads."""
    code, start, lane = torch.linspace(-1, 1, 16) ** 3, 1024, np.arange(32)
    index, x, before = torch.randint(0, 16, (16, 128)), torch.randn(8, 128).bfloat16(), torch.randn(4, 32)
    packed_rows = (index[:, ::2] << 4 | index[:, 1::2]).to(torch.uint8)
    words = packed_rows.view(16, 4, 16).view(torch.int32).numpy().view(np.uint32)  # output, quarter, word
    of_x = in_words(x.view(8, 4, 32)).reshape(16, 32)  # word, thread: column and quarter
    sums = before.numpy().view(np.uint32)
    operands = {4: start + 4 * lane}
    for i in range(4):
        operands |= {5 + i: words[:8, :, i].reshape(32), 9 + i: words[8:, :, i].reshape(32)}
    operands |= {13 + i: of_x[i] for i in range(16)}
    warp = Warp(operands, filled_table(code, start))
    warp.run(kernels.TILE_PRODUCT.value)
    expected = code[index].bfloat16().double() @ x.double().T
    for i in range(4):
        found = torch.from_numpy(warp.value(f"${i}").view(np.float32)).double()
        assert_near_float32(found, expected[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2])

    operands = {4 + i: of_x[i] for i in range(16)} | {20 + i: sums[i] for i in range(4)}
    warp = Warp(operands, np.zeros(0, np.uint32))
    warp.run(kernels.SQUARES.value)
    expected = x.double() @ x.double().T
    for i in range(2):
        found = torch.from_numpy(warp.value(f"${i}").view(np.float32)).double() - before[i].double()
        assert_near_float32(found, expected[lane // 4, 2 * (lane % 4) + i])


def test_assembly_of_whole_numbers():
    """All 256, four in a word, two words a thread."""
    numbers = torch.arange(-128, 128).to(torch.int8)
    for words in numbers.view(2, 128):
        warp = Warp({4: words.view(torch.int32).numpy().view(np.uint32)}, np.zeros(0, np.uint32))
        warp.run(TO_FLOAT32.value)
        found = np.stack([warp.value(f"${i}").view(np.float32) for i in range(4)], 1).reshape(-1)
        assert (found == words.numpy()).all()


def assert_near_float32(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
