"""The Triton kernels of a decoding step's products against plain PyTorch, which is their definition."""

import pytest
import torch
from _decode_helpers import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    LOGITS,
    both,
    make_linear,
    make_norm,
    multiply_matrices,
    needs_kernels,
    normal,
    poison_what_is_new,
)
from tolerances import assert_close

import modeling_griffin.decode.linear as decode_linear
import modeling_griffin.kernels.device.decode as decode_tiles
from modeling_griffin.decode.ops import KernelOps, PlainOps, Stream
from modeling_griffin.kernels.device import product_tile


ROWS = [1, 2, 3, 4, 17, 65]  # one, two and four row by row, 65 by cuBLAS, the others as GEMMs
MATMUL_DTYPE = torch.float32 if INTERPRETED else torch.bfloat16

pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def kernels_of_many_rows(monkeypatch):
    multiply_matrices(monkeypatch)


@pytest.mark.parametrize("inputs, sizes", [(24, (17, 40, 8)), (512, (16, 8)), (1024, (3,)), (600, (5, 32))])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_projections(dtype, rows, inputs, sizes):
    x, norm = normal(rows, inputs, dtype=dtype), make_norm(inputs, dtype)
    for bias in (True, False):
        linears = [make_linear(inputs, size, dtype, bias) for size in sizes]
        expected, actual = both(lambda ops, linears=linears: ops.project(Stream(x), norm, linears))
        for one, other in zip(actual, expected, strict=True):
            assert_close(LOGITS[dtype], one, other)


@pytest.mark.parametrize("inputs, width", [(24, 17), (512, 64), (600, 40)])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_gated_mlp_and_what_is_added_to_the_stream(dtype, rows, inputs, width):
    x, norm, after = normal(rows, inputs, dtype=dtype), make_norm(inputs, dtype), make_norm(inputs, dtype)
    gate, up, down = (make_linear(*shape, dtype) for shape in ((inputs, width), (inputs, width), (width, inputs)))
    head = make_linear(inputs, 9, dtype, bias=False)

    def mlp(ops):
        stream = Stream(x.clone())
        inner = ops.gated_project(stream, norm, gate, up)
        stream = ops.add_project(stream, inner, down)
        return [inner, ops.project(stream, after, [head])[0], stream.residual]

    for expected, actual in zip(*both(mlp), strict=True):
        assert_close(LOGITS[dtype], actual, expected)


@pytest.fixture(params=[(32, 16, 3, 4, 1), (16, 64, 2, 4, 7), (64, 32, 4, 4, 40)])
def matmul_tiles(request, monkeypatch):
    """One program for all inputs, a few that share them unevenly, and as many as there are tiles."""
    for table in (decode_tiles.MATMUL, decode_tiles.MATMUL_GATED):
        for rows in table:
            monkeypatch.setitem(table, rows, {(0, 0): request.param})


@pytest.mark.parametrize("inputs, sizes", [(96, (64, 32, 16)), (200, (40, 7)), (33, (70,))])
@pytest.mark.parametrize("rows", [2, 3, 4, 8, 16, 17, 33, 64])
@torch.no_grad()
def test_products_of_many_rows(rows, inputs, sizes, matmul_tiles, monkeypatch):
    """Twice by the same kernels: what the first launch has counted is forgotten, and sums have one order."""
    x, norm = normal(rows, inputs, dtype=MATMUL_DTYPE), make_norm(inputs, MATMUL_DTYPE)
    linears = [make_linear(inputs, size, MATMUL_DTYPE) for size in sizes]
    residual = normal(rows, sizes[0], dtype=MATMUL_DTYPE)
    gate, up = (make_linear(inputs, sizes[0], MATMUL_DTYPE) for _ in range(2))
    poison_what_is_new(monkeypatch)

    def products(ops):
        ys = [*ops.project(Stream(x), norm, linears), ops.gated_project(Stream(x), norm, gate, up)]
        return [*ys, ops.add_project(Stream(residual), x, linears[0]).residual]

    kernels = KernelOps()
    assert kernels.gemms.takes(x)
    expected, first, second = products(PlainOps()), products(kernels), products(kernels)
    for one, other, again in zip(expected, first, second, strict=True):
        assert_close(LOGITS[MATMUL_DTYPE], other, one)
        assert torch.equal(other, again)


def test_who_multiplies_matrices(monkeypatch):
    monkeypatch.setattr(decode_linear, "MATMUL_DTYPES", decode_tiles.MATMUL_DTYPES)

    def takes(rows, dtype, matmul=True):
        return KernelOps(matmul=matmul).gemms.takes(torch.empty(rows, 8, dtype=dtype))

    assert all(takes(rows, torch.bfloat16) for rows in range(1, 65)) and not takes(65, torch.bfloat16)
    assert not takes(5, torch.float32) and not takes(5, torch.float16) and not takes(5, torch.bfloat16, matmul=False)
    assert all(takes(rows, dtype, matmul=False) for rows in (1, 2, 4) for dtype in DTYPES)
    assert not any(KernelOps().gemms._as_matrices(torch.empty(1, 8, dtype=dtype)) for dtype in DTYPES)
    assert all(KernelOps().gemms._as_matrices(torch.empty(rows, 8, dtype=torch.bfloat16)) for rows in (2, 4, 64))
    new = {"dtype": torch.bfloat16, "device": DEVICE}
    weights, gemms, x = torch.empty(16, **new), KernelOps().gemms, torch.empty(5, 8, **new)
    first, same, other = (make_linear(8, 1, torch.bfloat16) for _ in range(3))
    for each, start in ((first, 0), (same, 8), (other, 4)):
        each.weight.data = weights[start : start + 8].view(1, 8)
    assert gemms.takes(x, first, same, together=True)
    assert not gemms.takes(x, first, other, together=True)  # not 16 bytes apart


@pytest.mark.parametrize("tile", [(4, 1, 1), (2, 1, 2), (8, 2, 3), (1, 4, 4)])
@pytest.mark.parametrize("inputs", [256, 600, 1536])
@torch.no_grad()
def test_weights_in_more_tiles_than_are_asked_for_at_a_time(inputs, tile, monkeypatch):
    """Inputs that fill the last tile and inputs that do not; outputs that fill it (4) and that do not (7)."""
    for table in (decode_tiles.PROJECT, decode_tiles.GATED):
        monkeypatch.setitem(table, next(iter(table)), tile)
        for other in list(table)[1:]:
            monkeypatch.delitem(table, other)
        monkeypatch.setitem(table, (0, 0), tile)
    norm = make_norm(inputs, torch.float32)
    for rows, width in ((1, 4), (2, 7)):
        x = normal(rows, inputs)
        gate, up = (make_linear(inputs, width, torch.float32) for _ in range(2))
        for expected, actual in zip(
            *both(lambda ops, x=x, p=(gate, up): ops.project(Stream(x), norm, p), matmul=False), strict=True
        ):
            assert_close("logits", actual, expected)
        expected, actual = both(
            lambda ops, x=x, gate=gate, up=up: ops.gated_project(Stream(x), norm, gate, up), matmul=False
        )
        assert_close("logits", actual, expected)


@pytest.mark.parametrize("table", ["PROJECT", "GATED"])
@pytest.mark.parametrize("outputs, inputs", [(1, 1), (2560, 7680), (5120, 2560), (32000, 2560), (256000, 2560)])
def test_a_product_s_tile(table, outputs, inputs):
    for rows in decode_tiles.MATVEC_ROWS:
        tile = product_tile(getattr(decode_tiles, table), outputs, inputs, rows)
        assert all(size & (size - 1) == 0 for size in (tile["BLOCK_N"], tile["BLOCK_D"], tile["num_warps"]))
        assert tile["BLOCK_D"] == tile["num_warps"] * decode_tiles.INPUTS_OF_A_WARP
        assert (tile["AHEAD"] - 1) * tile["BLOCK_D"] < inputs  # not all of a tile beyond the weights
