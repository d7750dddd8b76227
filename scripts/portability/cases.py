"""Every launch that the code can choose, made on meta tensors: what `check_portability.py` compiles.

Each case calls the package's own launch code, so that tiles and options are those that a user gets. A case is refused
where the code would refuse it on that GPU: then PyTorch runs, and nothing is compiled.

Legend: B rows, T time, D width, C RG-LRU channels, H heads, K head dimension, W attention window, V vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

from modeling_griffin import GriffinConfig, GriffinForCausalLM, rg_lru_scan_triton
from modeling_griffin.decode.ops import KernelOps, Stream
from modeling_griffin.decode.speculative.verify import VerifyStep
from modeling_griffin.decode.state import DecodeStep
from modeling_griffin.gpu import properties, triton_refusal
from modeling_griffin.kernels import attention, convolution, convolution_varlen, elementwise, gates, loss
from modeling_griffin.kernels.device import can_overlap, decode_gemm_fits, decode_refusal, float8_fits
from modeling_griffin.modeling_griffin import GriffinRMSNorm


META = torch.device("meta")


class Shape(NamedTuple):
    """A model as far as its kernels see it; blocks: of each gate."""

    width: int
    lru: int
    inner: int
    heads: int
    head_dim: int
    window: int
    vocabulary: int
    blocks: int


SHAPES = {
    "2B": Shape(2560, 2560, 7680, 10, 256, 2049, 256000, 10),
    "9B": Shape(4096, 4096, 12288, 16, 256, 2049, 256000, 16),
    "test 2B": Shape(2560, 2560, 7680, 20, 128, 1024, 32000, 16),
    "100M": Shape(768, 1024, 2304, 6, 128, 1024, 32000, 16),
    "heads of 64": Shape(1024, 1024, 3072, 16, 64, 1024, 32000, 16),
}
Case = tuple[str, Callable[[], object]]


def cases(shape: Shape, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Names and launches of training and of decoding in this dtype."""
    if triton_refusal(properties(META)) is not None:
        return
    yield from _scan(shape, dtype, quick)
    yield from _sequences(shape, dtype, quick)
    yield from _elementwise(shape, dtype, quick)
    if dtype != torch.float32:
        yield from _tensor_cores(shape, dtype)
    if decode_refusal(properties(META)) is not None:
        return
    yield from _decode(shape, dtype, quick)
    if dtype == torch.bfloat16 and properties(META).vendor == "nvidia":
        yield from _decode_packed(shape, quick)


def _new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _scan(shape: Shape, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Both shape classes of each pass; one step; with resets and states, and without."""
    lengths = [(1, 4096), (1, 4001), (16, 4096), (16, 4001), (8, 1)]
    chosen = [(*each, whole) for each in lengths for whole in (True, False)]
    if quick:
        chosen = [(1, 4096, True), (16, 4096, False)]
    for batch, length, whole in chosen:
        name = f"scan ({batch}, {length}){' with resets and states' if whole else ''}"
        yield name, _scan_case(shape, dtype, batch, length, whole)


def _scan_case(shape: Shape, dtype: torch.dtype, batch: int, length: int, whole: bool) -> Callable:
    def launch():
        x = _new(batch, length, shape.lru, dtype=dtype)
        state = _new(batch, shape.lru, dtype=torch.float32) if whole else None
        reset = _new(batch, length, dtype=torch.bool) if whole else None
        inputs = (x, x, x, _new(shape.lru, dtype=torch.float32), state, reset)
        hidden, _ = rg_lru_scan_triton._forward(*inputs)
        rg_lru_scan_triton._backward(hidden, state, *inputs, hidden)

    return launch


def _sequences(shape: Shape, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Sequences end to end: long ones, and a token each, as served; with states, and without. quick: forward only."""
    for length, number, whole in [(4096, 16, True), (64, 64, True), *([] if quick else [(4096, 16, False)])]:
        name = f"{number} sequences of {length} tokens{' with states' if whole else ''}"
        yield name, _sequences_case(shape, dtype, length, number, whole, both_ways=length > number and not quick)


def _sequences_case(
    shape: Shape, dtype: torch.dtype, length: int, number: int, whole: bool, both_ways: bool
) -> Callable:
    def launch():
        x, channels = _new(1, length, shape.lru, dtype=dtype), shape.lru
        state = _new(number, channels, dtype=torch.float32) if whole else None
        sequences = _new(number + 1, dtype=torch.int32), _new(number, dtype=torch.bool) if whole else None
        inputs = (x, x, x, _new(channels, dtype=torch.float32), state, None)
        hidden, _ = rg_lru_scan_triton._forward(*inputs, *sequences)
        if both_ways:
            rg_lru_scan_triton._backward(hidden, state, *inputs, hidden, *sequences)
        past = _new(number, channels, 4, dtype=dtype) if whole else None
        taps = _new(channels, 1, 4, dtype=dtype), _new(channels, dtype=dtype)
        convolution_varlen.causal_conv1d_varlen_triton(x, past, *taps, *sequences)

    return launch


def _elementwise(shape: Shape, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Forward and backward by autograd, which launches on meta tensors as on others."""

    def leaf(*sizes):
        return _new(*sizes, dtype=dtype).requires_grad_()

    def backward(outputs, *inputs):
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, inputs, [torch.empty_like(each) for each in outputs])

    x, weight = leaf(4, 512, shape.width), leaf(shape.width)
    yield "norm", lambda: backward(elementwise.triton_rms_norm(x, weight, 1e-6), x, weight)
    yield "norm of a sum", lambda: backward(elementwise.triton_add_rms_norm(x, x, weight, 1e-6), x, weight)
    gate = leaf(4, 512, shape.inner)
    yield "gated activation", lambda: backward(elementwise.triton_gelu_gated(gate, gate), gate)
    q, angle = leaf(4, 512, shape.heads, shape.head_dim), _new(4, 512, shape.head_dim // 2, dtype=dtype)
    yield "rotation", lambda: backward(elementwise.triton_rotate(q, angle, angle), q)
    u, taps, bias = leaf(4, 512, shape.lru), leaf(shape.lru, 1, 4), leaf(shape.lru)
    start = _new(4, 512, dtype=torch.bool)

    def convolve(past: torch.Tensor | None) -> None:
        backward(convolution.causal_conv1d_triton(u, past, taps, bias, None if past is None else start), u, taps)

    yield "convolution", partial(convolve, None)
    yield "convolution with states", partial(convolve, leaf(4, shape.lru, 4))
    logits, targets = _new(2048, shape.vocabulary, dtype=dtype), _new(2048, dtype=torch.long)
    yield "loss", lambda: loss.row_losses(logits, targets, -100)
    row = _new(2048, dtype=torch.float32)
    yield "loss, backward", lambda: loss.row_gradients(logits, targets, row, row)


def _tensor_cores(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    width = shape.lru // shape.blocks
    sizes = (4096, shape.lru), (shape.blocks, width, width), (shape.blocks, width)
    x, w, b = (_new(*size, dtype=dtype).requires_grad_() for size in sizes)
    if gates.gates_unavailable_reason(x, w, b) is None:

        def both_gates():
            outputs = gates.rg_lru_gates(x, w, b, w, b)
            torch.autograd.grad(outputs, x, [torch.empty_like(each) for each in outputs])

        yield "gates", both_gates
    if attention.triton_attention_unavailable_reason(shape.head_dim, dtype, META) is None:
        yield "local attention", lambda: _attention(shape, dtype)


def _attention(shape: Shape, dtype: torch.dtype, tokens: int = 4096) -> None:
    query = _new(tokens, shape.heads, shape.head_dim, dtype=dtype).requires_grad_()
    key = _new(tokens, 1, shape.head_dim, dtype=dtype).requires_grad_()
    each, blocks = _new(tokens, dtype=torch.int32), _new(tokens // attention.BLOCK, dtype=torch.int32)
    out = attention.local_attention_triton(query, key, key, attention.Visible(each, each, blocks, blocks), 0.1)
    torch.autograd.grad(out, (query, key), torch.empty_like(out))


def _decode(shape: Shape, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Whole steps of a model of one recurrent and one attention layer, and passes over drafts."""
    config = GriffinConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=2,
        layer_types=["linear_attention", "sliding_attention"],
        num_attention_heads=shape.heads,
        num_key_value_heads=1,
        head_dim=shape.head_dim,
        attention_window_size=shape.window,
        num_gate_blocks=shape.blocks,
        lru_width=shape.lru,
    )
    with META:
        model = GriffinForCausalLM._from_config(config, dtype=dtype)

    def step(rows: int) -> DecodeStep:
        made = DecodeStep(model.model, model.lm_head, rows)
        made.ops = KernelOps(can_overlap(META), decode_gemm_fits(properties(META)))
        return made

    def decode(rows: int) -> None:
        step(rows)._compute()

    for rows in (1, 64) if quick else (1, 2, 4, 16, 32, 64, 65):
        yield f"decode, {rows} rows", partial(decode, rows)

    def verify(tokens: int) -> None:
        made = VerifyStep(step(1), tokens)
        made.tokens, made.on_host = (torch.empty_like(each, device=META) for each in (made.tokens, made.on_host))
        made._compute()

    for tokens in (8,) if quick else (4, 16, 64):
        yield f"drafts, {tokens} tokens", partial(verify, tokens)


class _Linear8bitLt(nn.Linear):
    """As bitsandbytes' layer of this name holds its weights, or with such rows of float8, as torchao's do."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype):
        super().__init__(inputs, outputs, device=META, dtype=torch.bfloat16)
        self.weight = nn.Parameter(_new(outputs, inputs, dtype=torch.int8), False)
        self.state = SimpleNamespace(CB=_new(outputs, inputs, dtype=dtype), SCB=_new(outputs, dtype=torch.float32))


class _Linear4bit(nn.Linear):
    """The same of weights in NF4; nested: whether their scales are quantised too."""

    def __init__(self, inputs: int, outputs: int, nested: bool):
        super().__init__(inputs, outputs, device=META, dtype=torch.bfloat16)
        self.weight = nn.Parameter(_new(inputs * outputs // 2, 1, dtype=torch.uint8), False)
        scales, float32 = inputs * outputs // 64, {"dtype": torch.float32}
        second = SimpleNamespace(code=_new(256, **float32), absmax=_new(-(-scales // 256), **float32), blocksize=256)
        self.weight.quant_state = SimpleNamespace(
            quant_type="nf4",
            blocksize=64,
            shape=(outputs, inputs),
            nested=nested,
            absmax=_new(scales, dtype=torch.uint8 if nested else torch.float32),
            code=_new(16, **float32),
            state2=second,
            offset=_new(**float32),
        )


for _layer in (_Linear8bitLt, _Linear4bit):  # by these names the launch code knows them
    _layer.__module__, _layer.__name__ = "bitsandbytes.nn", _layer.__name__.removeprefix("_")


def _decode_packed(shape: Shape, quick: bool) -> Iterator[Case]:
    """The products of one layer of each kind over packed weights."""
    kinds = {
        "int8": partial(_Linear8bitLt, dtype=torch.int8),
        "float8": partial(_Linear8bitLt, dtype=torch.float8_e4m3fn),
        "nf4": partial(_Linear4bit, nested=False),
        "nf4, constants too": partial(_Linear4bit, nested=True),
    }
    if not float8_fits(properties(META)):
        del kinds["float8"]
    norm = GriffinRMSNorm(shape.width, 1e-6).to(META, torch.bfloat16)

    def products(make: Callable, rows: int) -> None:
        ops = KernelOps(can_overlap(META), decode_gemm_fits(properties(META)))
        stream = Stream(_new(rows, shape.width, dtype=torch.bfloat16))
        ops.project(stream, norm, [make(shape.width, shape.lru) for _ in range(2)])
        queries, keys = make(shape.width, shape.heads * shape.head_dim), make(shape.width, shape.head_dim)
        queries.bias = keys.bias = None
        ops.project(stream, norm, [queries, keys, keys])
        inner = ops.gated_project(stream, norm, *(make(shape.width, shape.inner) for _ in range(2)))
        ops.add_project(stream, inner, make(shape.inner, shape.width))

    for name, make in kinds.items():
        tightest = {"nf4, constants too": (1,), "float8": (64,)}
        for rows in tightest.get(name, ()) if quick else (1, 2, 4, 16, 64):
            yield f"decode {name}, {rows} rows", partial(products, make, rows)
