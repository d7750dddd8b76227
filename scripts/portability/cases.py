"""Every launch that the code can choose, made on meta tensors: what `check_portability.py` compiles.

Each case calls the package's own launch code, so that tiles and options are those that a user gets. A case is refused
where the code would refuse it on that GPU: then PyTorch runs, and nothing is compiled.

Legend: B rows, T time, D width, C RG-LRU channels, H heads, K head dimension, W attention window, V vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from modeling_griffin import GriffinConfig, GriffinForCausalLM, rg_lru_scan_triton
from modeling_griffin.decode.ops import KernelOps
from modeling_griffin.decode.speculative.verify import VerifyStep
from modeling_griffin.decode.state import DecodeStep
from modeling_griffin.gpu import properties, triton_refusal
from modeling_griffin.kernels import attention, convolution, convolution_varlen, elementwise, gates, loss
from modeling_griffin.kernels.device import can_overlap, decode_gemm_fits, decode_refusal
from modeling_griffin.parallel import chunk_summary

from .packed_cases import packed_products
from .shapes import META, Shape, new


Case = tuple[str, Callable[[], object]]


def cases(shape: Shape, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Names and launches of training and of decoding in this dtype."""
    if triton_refusal(properties(META)) is not None:
        return
    yield from _scan(shape, dtype, quick)
    yield from _sequences(shape, dtype, quick)
    yield from _elementwise(shape, dtype)
    yield from _one_token(shape, dtype, quick)
    if not quick:
        yield from _chunk_summary(shape, dtype)
    if dtype != torch.float32:
        yield from _tensor_cores(shape, dtype)
    if decode_refusal(properties(META)) is not None:
        return
    yield from _decode(shape, dtype, quick)
    if properties(META).vendor == "nvidia":
        yield from packed_products(shape, dtype, quick)


def _scan(shape: Shape, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Both shape classes of each pass; one step; with resets and states, with resets, and with neither."""
    lengths = [(1, 4096), (1, 4001), (16, 4096), (16, 4001), (8, 1)]
    chosen = [(*each, given) for each in lengths for given in ((True, True), (True, False), (False, False))]
    if quick:
        chosen = [(1, 4096, (True, True)), (16, 4096, (False, False)), (8, 1, (True, True))]
    for batch, length, (resets, states) in chosen:
        found = " and ".join(name for name, is_given in (("resets", resets), ("states", states)) if is_given)
        name = f"scan ({batch}, {length}){f' with {found}' if found else ''}"
        yield name, partial(_run_scan, shape, dtype, batch, length, resets, states)


def _run_scan(shape: Shape, dtype: torch.dtype, batch: int, length: int, resets: bool, states: bool) -> None:
    x = new(batch, length, shape.lru, dtype=dtype)
    state = new(batch, shape.lru, dtype=torch.float32) if states else None
    reset = new(batch, length, dtype=torch.bool) if resets else None
    inputs = (x, x, x, new(shape.lru, dtype=torch.float32), state, reset)
    hidden, _ = rg_lru_scan_triton._forward(*inputs)
    rg_lru_scan_triton._backward(hidden, state, *inputs, hidden)


def _sequences(shape: Shape, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Sequences end to end: long ones, off tiles too; all in one tile, without a chain; a token each, as served.

    With states, where some have resets besides, and without. quick: forward only.
    """
    for length, number, states, resets in [
        *((4001, 16, True, True), (64, 64, True, True)),
        *([] if quick else [(4096, 16, True, False), (4096, 16, False, False), (64, 64, False, False)]),
        *([] if quick else [(40, 16, True, False), (1, 1, True, False)]),
    ]:
        found = " and ".join(name for name, is_given in (("states", states), ("resets", resets)) if is_given)
        name = f"{number} sequences of {length} tokens{f' with {found}' if found else ''}"
        both_ways = not quick and (length > number or length == 1)
        yield name, partial(_run_sequences, shape, dtype, length, number, states, resets, both_ways)


def _run_sequences(
    shape: Shape, dtype: torch.dtype, length: int, number: int, states: bool, resets: bool, both_ways: bool
) -> None:
    x, channels = new(1, length, shape.lru, dtype=dtype), shape.lru
    state = new(number, channels, dtype=torch.float32) if states else None
    reset = new(1, length, dtype=torch.bool) if resets else None
    sequences = new(number + 1, dtype=torch.int32), new(number, dtype=torch.bool) if states else None
    inputs = (x, x, x, new(channels, dtype=torch.float32), state, reset)
    hidden, _ = rg_lru_scan_triton._forward(*inputs, *sequences)
    if both_ways:
        rg_lru_scan_triton._backward(hidden, state, *inputs, hidden, *sequences)
    past = new(number, channels, 4, dtype=dtype) if states else None
    taps = new(channels, 1, 4, dtype=dtype), new(channels, dtype=dtype)
    convolution_varlen.causal_conv1d_varlen_triton(x, past, *taps, *sequences)


def _chunk_summary(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """Both kernels of a row that several GPUs share, with resets and without."""

    def summarize(resets: bool) -> None:
        x, log_decay = new(1, 4001, shape.lru, dtype=dtype), new(shape.lru, dtype=torch.float32)
        reset = new(1, 4001, dtype=torch.bool) if resets else None
        chunk_summary._reduce_segments(chunk_summary.summary_kernel, (x, x, x), log_decay, reset)
        chunk_summary._reduce_segments(chunk_summary.backward_summary_kernel, (x, x), log_decay, reset)

    yield "chunk of a row", partial(summarize, False)
    yield "chunk of a row with resets", partial(summarize, True)


def _elementwise(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """Forward and backward by autograd, which launches on meta tensors as on others."""

    def leaf(*sizes):
        return new(*sizes, dtype=dtype).requires_grad_()

    def backward(outputs, *inputs):
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, inputs, [torch.empty_like(each) for each in outputs])

    x, weight = leaf(4, 512, shape.width), leaf(shape.width)
    yield "norm", lambda: backward(elementwise.triton_rms_norm(x, weight, 1e-6), x, weight)
    yield "norm of a sum", lambda: backward(elementwise.triton_add_rms_norm(x, x, weight, 1e-6), x, weight)
    gate = leaf(4, 512, shape.inner)
    yield "gated activation", lambda: backward(elementwise.triton_gelu_gated(gate, gate), gate)
    yield "gradients of biases", lambda: elementwise.gelu_gated_backward(gate, gate, gate, sums=True)
    q, angle = leaf(4, 512, shape.heads, shape.head_dim), new(4, 512, shape.head_dim // 2, dtype=dtype)
    yield "rotation", lambda: backward(elementwise.triton_rotate(q, angle, angle), q)
    u, taps, bias = leaf(4, 512, shape.lru), leaf(shape.lru, 1, 4), leaf(shape.lru)
    start = new(4, 512, dtype=torch.bool)

    def convolve(past: torch.Tensor | None) -> None:
        backward(convolution.causal_conv1d_triton(u, past, taps, bias, None if past is None else start), u, taps)

    yield "convolution", partial(convolve, None)
    yield "convolution with states", partial(convolve, leaf(4, shape.lru, 4))
    logits, targets = new(2048, shape.vocabulary, dtype=dtype), new(2048, dtype=torch.long)
    yield "loss", lambda: loss.row_losses(logits, targets, -100)
    row = new(2048, dtype=torch.float32)
    yield "loss, backward", lambda: loss.row_gradients(logits, targets, row, row)


def _one_token(shape: Shape, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """A recorded pass of the model's own layers over one token a row, where tensors of any size go to the kernels."""

    def run(rows: int) -> None:
        x, gate = new(rows, 1, shape.width, dtype=dtype), new(rows, 1, shape.inner, dtype=dtype)
        weight = new(shape.width, dtype=dtype)
        elementwise.triton_add_rms_norm(None, x, weight, 1e-6)
        elementwise.triton_add_rms_norm(x, x, weight, 1e-6)
        elementwise.triton_gelu_gated(gate, gate)
        angle = new(rows, 1, shape.head_dim // 2, dtype=dtype)
        elementwise.triton_rotate(new(rows, 1, shape.heads, shape.head_dim, dtype=dtype), angle, angle)
        u, taps, bias = (new(*size, dtype=dtype) for size in ((rows, 1, shape.lru), (shape.lru, 1, 4), (shape.lru,)))
        convolution.causal_conv1d_triton(u, new(rows, shape.lru, 4, dtype=dtype), taps, bias, None)
        w, b = _gate(shape, dtype)
        if gates.gates_unavailable_reason(u, w, b) is None:
            gates.rg_lru_gates(u, w, b, w, b)

    for rows in (1,) if quick else (1, 3, 64):
        yield f"one token of {rows} rows", partial(run, rows)


def _gate(shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    width = shape.lru // shape.blocks
    return new(shape.blocks, width, width, dtype=dtype), new(shape.blocks, width, dtype=dtype)


def _tensor_cores(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    x, w, b = (each.requires_grad_() for each in (new(4096, shape.lru, dtype=dtype), *_gate(shape, dtype)))
    if gates.gates_unavailable_reason(x, w, b) is None:

        def both_gates():
            outputs = gates.rg_lru_gates(x, w, b, w, b)
            torch.autograd.grad(outputs, x, [torch.empty_like(each) for each in outputs])

        yield "gates", both_gates
    if attention.triton_attention_unavailable_reason(shape.head_dim, dtype, META) is None:
        yield "local attention", lambda: _attention(shape, dtype)


def _attention(shape: Shape, dtype: torch.dtype, tokens: int = 4096) -> None:
    query = new(tokens, shape.heads, shape.head_dim, dtype=dtype).requires_grad_()
    key = new(tokens, 1, shape.head_dim, dtype=dtype).requires_grad_()
    each, blocks = new(tokens, dtype=torch.int32), new(tokens // attention.BLOCK, dtype=torch.int32)
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
