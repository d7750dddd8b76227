"""The Triton kernels of a decoding step against the same operations in plain PyTorch, which is their definition.

On a GPU everything runs. Without one, `TRITON_INTERPRET=1 pytest tests/test_decode_kernels.py` runs it in Triton's
interpreter.
"""

import copy
import os

import pytest
import torch
from tolerances import assert_close
from torch import nn

from modeling_griffin import decode_ops, decode_products, decode_tiles
from modeling_griffin.decode_ops import Clock, KernelOps, PlainOps, Stream
from modeling_griffin.decode_step import DecodeStep
from modeling_griffin.decode_tiles import matmul_tile, product_tile
from modeling_griffin.modeling_griffin import GriffinRMSNorm


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16]
# The interpreter multiplies matrices of bfloat16 as if they were whole numbers, and cuts float32 off to it.
DTYPES_OF_STEPS = [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]
LOGITS = {torch.float32: "logits", torch.float16: "float16 logits", torch.bfloat16: "bfloat16 logits"}
ROWS = [1, 2, 3, 4, 17, 65]  # one, two and four row by row, 65 by cuBLAS, the others as products of matrices

pytestmark = pytest.mark.skipif(
    decode_ops.triton is None or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs Triton and a GPU, or TRITON_INTERPRET=1",
)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def make_linear(inputs, outputs, dtype, bias=True):
    return nn.Linear(inputs, outputs, bias=bias).to(DEVICE, dtype)


def make_norm(width, dtype):
    norm = GriffinRMSNorm(width, 1e-6)
    norm.weight.data.normal_()
    return norm.to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def kernels_of_many_rows_in_the_interpreter(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(decode_products, "MATMUL_DTYPES", (torch.float32, torch.float16))


def not_numbers(*shape, dtype, device):
    return torch.full(shape, float("nan") if dtype.is_floating_point else 0, dtype=dtype, device=device)


def poison_what_is_new(monkeypatch):
    """What a product leaves unwritten is not a number."""

    def new_empty(x, *shape, device=None):
        return not_numbers(*shape, dtype=x.dtype, device=device or x.device)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(decode_products.torch, "empty", not_numbers)


def both(call):
    """The results of the plain operations and of the kernels, and what each left of the tensors that `call` changes."""
    return call(PlainOps()), call(KernelOps())


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


MATMUL_DTYPE = torch.float32 if INTERPRETED else torch.bfloat16


@pytest.fixture(params=[(32, 16, 3, 4, 1), (16, 64, 2, 4, 7), (64, 32, 4, 4, 40)])
def matmul_tiles(request, monkeypatch):
    """One program for all inputs, a few that share them unevenly, and as many as there are tiles."""
    for table in (decode_tiles.MATMUL, decode_tiles.MATMUL_GATED):
        for rows in table:
            monkeypatch.setitem(table, rows, {(0, 0): request.param})


@pytest.mark.parametrize("inputs, sizes", [(96, (64, 32, 16)), (200, (40, 7)), (33, (70,))])
@pytest.mark.parametrize("rows", [3, 5, 8, 16, 17, 33, 64])
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
    assert kernels.products.takes(x)
    expected, first, second = products(PlainOps()), products(kernels), products(kernels)
    for one, other, again in zip(expected, first, second, strict=True):
        assert_close(LOGITS[MATMUL_DTYPE], other, one)
        assert torch.equal(other, again)


def test_who_multiplies_matrices(monkeypatch):
    monkeypatch.setattr(decode_products, "MATMUL_DTYPES", decode_tiles.MATMUL_DTYPES)

    def takes(rows, dtype, matmul=True):
        return KernelOps(matmul=matmul).products.takes(torch.empty(rows, 8, dtype=dtype))

    assert all(takes(rows, torch.bfloat16) for rows in range(1, 65)) and not takes(65, torch.bfloat16)
    assert not takes(5, torch.float32) and not takes(5, torch.float16) and not takes(5, torch.bfloat16, matmul=False)
    assert all(takes(rows, dtype, matmul=False) for rows in (1, 2, 4) for dtype in DTYPES)


@pytest.mark.parametrize("table", ["MATMUL", "MATMUL_GATED"])
@pytest.mark.parametrize("sizes", [(1,), (2560,), (2560, 128, 128), (2560, 2560), (7680,), (32000,), (256000,)])
@pytest.mark.parametrize("inputs", [1, 2560, 7680])
@pytest.mark.parametrize("rows", [3, 16, 17, 64])
def test_a_tile_of_many_rows(rows, inputs, sizes, table):
    tile = matmul_tile(getattr(decode_tiles, table), list(sizes), inputs, rows)
    assert tile["BLOCK_M"] >= max(rows, 16) and tile["STAGES"] > 2
    assert all(size & (size - 1) == 0 for size in (tile["BLOCK_N"], tile["BLOCK_D"], tile["num_warps"]))
    tiles, matrices = sum(-(-size // tile["BLOCK_N"]) for size in sizes), 2 if table == "MATMUL_GATED" else 1
    assert 1 <= tile["SPLITS"] <= -(-inputs // tile["BLOCK_D"])  # each has some of the inputs
    assert tile["SPLITS"] == 1 or tiles <= decode_products.COUNTERS
    shared = (tile["STAGES"] * matrices * tile["BLOCK_N"] + tile["BLOCK_M"]) * tile["BLOCK_D"] * 2
    assert shared < 227 * 1024


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
        for expected, actual in zip(*both(lambda ops, x=x, p=(gate, up): ops.project(Stream(x), norm, p)), strict=True):
            assert_close("logits", actual, expected)
        expected, actual = both(lambda ops, x=x, gate=gate, up=up: ops.gated_project(Stream(x), norm, gate, up))
        assert_close("logits", actual, expected)


@pytest.mark.parametrize("table", ["PROJECT", "GATED"])
@pytest.mark.parametrize("outputs, inputs", [(1, 1), (2560, 7680), (5120, 2560), (32000, 2560), (256000, 2560)])
def test_a_product_s_tile(table, outputs, inputs):
    for rows in decode_tiles.MATVEC_ROWS:
        tile = product_tile(getattr(decode_tiles, table), outputs, inputs, rows)
        assert all(size & (size - 1) == 0 for size in (tile["BLOCK_N"], tile["BLOCK_D"], tile["num_warps"]))
        assert tile["BLOCK_D"] == tile["num_warps"] * decode_tiles.INPUTS_OF_A_WARP
        assert (tile["AHEAD"] - 1) * tile["BLOCK_D"] < inputs  # not all of a tile beyond the weights


@pytest.mark.parametrize("scale", [1.0, 50.5])
@pytest.mark.parametrize("time", [0, 100_000])
@pytest.mark.parametrize("dtype", DTYPES_OF_STEPS)
@torch.no_grad()
def test_the_beginning_of_a_step(dtype, time, scale):
    embedding = nn.Embedding(11, 24).to(DEVICE, dtype)
    token, padding = torch.tensor([10, 0, 3], device=DEVICE), torch.tensor([0, time // 2, time], device=DEVICE)
    clock = Clock(torch.tensor([time], device=DEVICE), padding)
    for frequencies in (None, 10000.0 ** -torch.rand(6, device=DEVICE)):
        (expected, plain), (actual, kernel) = both(
            lambda ops, f=frequencies: ops.begin(token, embedding, scale, clock, f)
        )
        assert_close("exact", actual.residual, expected.residual)
        if frequencies is None:
            assert kernel is clock
            continue
        for one, other in ((kernel.cos, plain.cos), (kernel.sin, plain.sin)):
            assert_close(LOGITS[dtype], one, other)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
    reason="kernels overlap from compute capability 9 on",
)
@pytest.mark.parametrize("kind", ["griffin", "hawk", "attention"])
@pytest.mark.parametrize("rows", [1, 4, 5, 64, 65])
def test_overlapping_kernels_change_nothing(rows, kind, small_model):
    """Recorded and replayed many times: a kernel that did not wait for the one before it would show."""
    model = small_model(kind).to(DEVICE, torch.bfloat16)
    ends = []
    for overlap in (0, 1, 2):
        step = DecodeStep(model.model, model.lm_head, rows)
        step.ops = KernelOps(overlap)
        step.record()
        for tensor in (step.clock.time, step.token, *(tensor for layer in step.layers for tensor in layer)):
            tensor.zero_()
        for _ in range(300):
            step.step()
            step.token.copy_(step.logits.argmax(-1))
        ends.append([step.logits.clone(), *(tensor.clone() for layer in step.layers for tensor in layer)])
    assert all(map(torch.equal, ends[0], ends[1])) and all(map(torch.equal, ends[0], ends[2]))


@pytest.mark.parametrize("kind", ["griffin", "hawk", "attention"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES_OF_STEPS)
def test_steps_past_the_window(dtype, rows, kind, small_model):
    """Logits and states after each of many steps; rows have started at different times."""
    model = small_model(kind).to(DEVICE, dtype)
    steps = [DecodeStep(model.model, model.lm_head, rows) for _ in range(2)]
    steps[0].ops, steps[1].ops = PlainOps(), KernelOps()
    for step in steps:
        step.clock.time.fill_(rows)
        step.clock.padding.copy_(torch.arange(rows))
        for layer, buffers in zip(model.model.layers, step.layers):
            if len(buffers) == 3:
                buffers[2].copy_(layer.temporal_block.rg_lru.decay().detach())
    for tokens in torch.randint(0, 29, (9, rows), device=DEVICE):
        for step in steps:
            step.token.copy_(tokens)
            step.step()
        assert_close(LOGITS[dtype], steps[1].logits, steps[0].logits)
        for one, other in zip(steps[1].layers, steps[0].layers):
            for actual, expected in zip(one[:2], other[:2]):
                assert_close(LOGITS[dtype], actual, expected)
                expected.copy_(actual)  # so that rounding does not pile up over the steps


@pytest.mark.parametrize("heads, key_heads, head_dim, window", [(20, 1, 128, 200), (4, 2, 24, 100), (3, 3, 256, 64)])
@pytest.mark.parametrize("time", [0, 63, 64, 1234])
@torch.no_grad()
def test_attention(time, heads, key_heads, head_dim, window):
    rows, rotary = 3, head_dim // 2
    q, k, v = (normal(rows, n * head_dim) for n in (heads, key_heads, key_heads))
    rings = [normal(rows, key_heads, window, head_dim) for _ in range(2)]
    angles = torch.rand(rows, rotary // 2, device=DEVICE).repeat(1, 2)
    padding = torch.tensor([0, max(0, time - 3), time], device=DEVICE)
    clock = Clock(torch.tensor([time], device=DEVICE), padding, angles.cos(), angles.sin())

    def attend(ops):
        keys, values = copy.deepcopy(rings)
        return [ops.attend(q, k, v, keys, values, clock, head_dim**-0.5), keys, values]

    for expected, actual in zip(*both(attend), strict=True):
        assert_close("logits", actual, expected)


@pytest.mark.parametrize("width, blocks, rows", [(48, 3, 2), (160, 2, 1), (70, 1, 65)])
@pytest.mark.parametrize("lambda_bias", [-9.0, -2.0, 3.0])
@torch.no_grad()
def test_recurrence(lambda_bias, width, blocks, rows, small_model):
    model = small_model("hawk", lru_width=width, num_gate_blocks=blocks).to(DEVICE)
    block = model.model.layers[0].temporal_block
    block.rg_lru.decay.lambda_bias.data.fill_(lambda_bias)
    x, y, past = normal(rows, width), normal(rows, width), normal(rows, 4, width)
    state, log_decay = normal(rows, width), block.rg_lru.decay()

    def recurrent(ops, clock):
        buffers = past.clone(), state.clone()
        return [ops.recurrent(x, y, block, *buffers, log_decay, clock), *buffers]

    for time in (0, 102):
        clock = Clock(torch.tensor([time], device=DEVICE), torch.zeros(rows, dtype=torch.long, device=DEVICE))
        for expected, actual in zip(*both(lambda ops, clock=clock: recurrent(ops, clock)), strict=True):
            assert_close("logits", actual, expected)
