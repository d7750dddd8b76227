"""The RG-LRU recurrence on a GPU: one fused Triton kernel forward, one backward, both at the speed of memory.

Forward moves 4 tensors of (B, T, C), backward 8: each is read or written once, and gates, decay, input scaling and
recurrence happen in registers. Kept for the backward pass: x, both gates and hidden. How they work is said in
`rg_lru_scan_triton_kernels`; a single step has a kernel of its own, in `rg_lru_scan_triton_around`. This file chooses
tiles, launches, and registers forward and backward as PyTorch operators.
"""  # SPDX-License-Identifier: Apache-2.0

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from .gpu import can_overlap, ceil_div, launch, no_kernels_reason, register_limit
from .slots import require_slot, slot


try:
    import triton

    from .rg_lru_scan_triton_around import clear_kernel, step_kernel, sum_rows_kernel
    from .rg_lru_scan_triton_kernels import backward_kernel, forward_kernel
    from .rg_lru_scan_triton_math import PTX
except ImportError:
    triton = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tile(NamedTuple):
    """A program's share: segments * rows steps of `channels` channels, each thread two channels of `rows` steps."""

    segments: int
    rows: int
    channels: int
    max_registers: int | None = None  # of a thread

    @property
    def steps(self) -> int:
        return self.segments * self.rows

    @property
    def num_warps(self) -> int:
        return self.segments * self.channels // 64


# Chosen by shape class on an H100, see docs/designs/scan.md. Few chains (batch * channels) make long waits: there
# forward tiles have half the channels and twice the steps, and the backward pass takes taller ones, whose carries are
# fewer; else smaller ones, of which more fit.
ONE_STEP = Tile(1, 1, 256)  # backward; forward has a kernel of its own
FORWARD, FORWARD_NARROW, FORWARD_FLOAT32 = Tile(4, 16, 64, 96), Tile(8, 16, 32, 96), Tile(4, 8, 64, 96)
BACKWARD, BACKWARD_TALL, BACKWARD_FLOAT32 = Tile(4, 8, 64, 96), Tile(4, 16, 64, 168), Tile(4, 4, 64, 96)


def _forward_tile(batch: int, channels: int, exact: bool) -> Tile:
    if exact:
        return FORWARD_FLOAT32
    return FORWARD if batch * channels > 64 * 128 else FORWARD_NARROW


def _backward_tile(batch: int, length: int, channels: int, exact: bool) -> Tile:
    if length == 1:
        return ONE_STEP
    if exact:
        return BACKWARD_FLOAT32
    return BACKWARD if batch * channels > 64 * 256 else BACKWARD_TALL


def triton_unavailable_reason(x: torch.Tensor) -> str | None:
    """None where the kernels can run on `x`, else why not."""
    if triton is None:
        return "Triton is not installed"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, the kernels compute in float32"
    if not x.is_cuda and PTX.value:  # under Triton's interpreter they run on a CPU
        return f"x is on {x.device.type}"
    # A traced model cannot read a GPU's properties; the operator asks again when it runs.
    return None if torch.compiler.is_compiling() else no_kernels_reason(x.device)


def rg_lru_scan_triton(
    x: torch.Tensor, recurrence_gate: torch.Tensor, input_gate: torch.Tensor, log_decay: torch.Tensor,
    initial_state: torch.Tensor | None, reset: torch.Tensor | None, cu_seqlens: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Arguments and results as in `rg_lru_scan`. Runs in float32; `triton_unavailable_reason(x)` must be None.

    Gradients are deterministic. Second derivatives raise.
    """
    state = None if initial_state is None else initial_state.float()
    inputs = (x, recurrence_gate, input_gate, log_decay.float(), state, reset)
    return run_forward(_OPERATORS.forward, inputs, (cu_seqlens, starts))


@slot
def run_forward(kernels: Callable, inputs: tuple, sequences: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """kernels(*inputs, *sequences). The package's goes on by the torch backend where a kernel does not compile."""
    return kernels(*inputs, *sequences)


@slot
def run_backward(kernels: Callable, *gradients_and_saved: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The same of the gradients."""
    return kernels(*gradients_and_saved)


def _forward(x, recurrence_gate, input_gate, log_decay, initial_state, reset, cu_seqlens=None, starts=None):
    hidden, last_state = _forward_shapes(
        x, recurrence_gate, input_gate, log_decay, initial_state, reset, cu_seqlens, starts
    )
    if hidden.numel() == 0:
        return hidden, last_state.zero_() if initial_state is None else last_state.copy_(initial_state)
    inputs = _contiguous(x, recurrence_gate, input_gate, log_decay, initial_state, reset)
    exact = _is_exact(x, recurrence_gate, input_gate)
    sequences = _contiguous(cu_seqlens, starts)
    if cu_seqlens is None and x.shape[1] == 1:
        _launch_step(exact, inputs, (hidden, last_state))
    elif cu_seqlens is not None and x.shape[1] < cu_seqlens.shape[0]:  # about one token each
        require_slot("launch_walk")(exact, inputs, sequences, (hidden, last_state))
    else:
        tile = _forward_tile(x.shape[0], x.shape[2], exact)
        layout = _Layout(*sequences, inputs[4], last_state)
        _launch(forward_kernel, tile, exact, inputs, (hidden, last_state), layout)
    return hidden, last_state


def _forward_shapes(x, recurrence_gate, input_gate, log_decay, initial_state, reset, cu_seqlens=None, starts=None):
    states = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), log_decay.new_empty(states, x.shape[2])


def _backward(
    d_hidden, d_last_state, x, recurrence_gate, input_gate, log_decay, initial_state, reset, hidden,
    cu_seqlens=None, starts=None,
):  # fmt: skip
    outputs = _backward_shapes(
        d_hidden, d_last_state, x, recurrence_gate, input_gate, log_decay, None, None, hidden, cu_seqlens
    )
    d_x, d_recurrence_gate, d_input_gate, d_log_decay, d_initial_state = outputs
    batch, length, channels = x.shape
    if x.numel() == 0:
        d_initial_state.zero_() if d_last_state is None else d_initial_state.copy_(d_last_state)
        return d_x, d_recurrence_gate, d_input_gate, d_log_decay.zero_(), d_initial_state
    arguments = (x, recurrence_gate, input_gate, log_decay, initial_state, reset, hidden, d_hidden, d_last_state)
    inputs = _contiguous(*arguments)
    exact = _is_exact(x, recurrence_gate, input_gate)
    tile = _backward_tile(batch, length, channels, exact)
    # Sums over each tile, then over the tiles in a fixed order: no atomics, the same result every time.
    partial = log_decay.new_empty(batch * ceil_div(length, tile.steps), channels)
    outputs = (d_x, d_recurrence_gate, d_input_gate, partial, d_initial_state)
    layout = _Layout(*_contiguous(cu_seqlens, starts), inputs[8], d_initial_state)
    _launch(backward_kernel, tile, exact, inputs, outputs, layout, HAS_D_LAST=d_last_state is not None)
    sum_rows(partial, d_log_decay)
    return d_x, d_recurrence_gate, d_input_gate, d_log_decay, d_initial_state


def _backward_shapes(
    d_hidden, d_last_state, x, recurrence_gate, input_gate, log_decay, initial_state, reset, hidden,
    cu_seqlens=None, starts=None,
):  # fmt: skip
    channels, states = x.shape[2], x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gates = (recurrence_gate.new_empty(x.shape), input_gate.new_empty(x.shape))
    return x.new_empty(x.shape), *gates, log_decay.new_empty(channels), log_decay.new_empty(states, channels)


def _contiguous(*tensors):
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _is_exact(*tensors) -> bool:
    """float32 in or out: correctly rounded functions; else the hardware's, whose error 16 bits do not show."""
    return any(tensor.dtype not in (torch.float16, torch.bfloat16) for tensor in tensors)


def _launch_step(exact: bool, inputs, outputs, channels_each: int = 256) -> None:
    x = inputs[0]
    batch, _, channels = x.shape
    launch(
        *(step_kernel, (batch, ceil_div(channels, channels_each))),
        *(*inputs, *outputs, channels),
        HAS_INITIAL=inputs[4] is not None,
        HAS_RESET=inputs[5] is not None,
        MASKED=channels % channels_each != 0,
        EXACT=exact,
        CHANNELS=channels_each,
        num_warps=channels_each // 64,
    )


def overlap_options(x: torch.Tensor) -> dict[str, bool]:
    """Launch options of a kernel that may start while the one in front of it ends."""
    overlap = can_overlap(x.device)
    return {"PDL": overlap, **({"launch_pdl": True} if overlap else {})}


def sum_rows(rows: torch.Tensor, total: torch.Tensor) -> None:
    grid, options = (ceil_div(rows.shape[1], 16),), overlap_options(rows)
    launch(sum_rows_kernel, grid, rows, total, *rows.shape, ROWS=256, CHANNELS=16, num_warps=8, **options)


def _cleared_words(x: torch.Tensor, count: int) -> torch.Tensor:
    words, overlap = x.new_empty(count, dtype=torch.int64), overlap_options(x)["PDL"]
    launch(clear_kernel, (ceil_div(count, 4096),), words, count, PDL=overlap, BLOCK=4096, num_warps=4)
    return words


class _Layout(NamedTuple):
    """Sequences end to end, or a plain batch where cu_seqlens is None; and the states (N, C) at both their ends."""

    cu_seqlens: torch.Tensor | None
    starts: torch.Tensor | None
    entering: torch.Tensor | None  # in the direction of the pass
    leaving: torch.Tensor


def _launch(kernel, tile: Tile, exact: bool, inputs, outputs, layout: _Layout, **flags) -> None:
    """inputs: x, both gates, log_decay, initial_state, reset, ... ; each kernel takes inputs, outputs, words, sizes."""
    x = inputs[0]
    batch, length, channels = x.shape
    steps, blocks = ceil_div(length, tile.steps), ceil_div(channels, tile.channels)
    tiles = steps * blocks * batch
    # Tiles pass the state on through words that start as 0, with the ticket counter behind them. They are this call's
    # own: other streams have theirs, and a CUDA graph clears them at each replay.
    chained, varlen = steps > 1, layout.cu_seqlens is not None
    count = tiles * tile.channels + 1 if chained else 0
    words = marks = sequence = None
    if varlen:
        words, marks, sequence = require_slot("lay_out_sequences")(layout, x, inputs[5], tile, count)
    elif chained:
        words = _cleared_words(x, count)
    launch(
        *(kernel, (tiles,)),
        *(*inputs, *outputs, words, marks, sequence, batch, length, channels),
        HAS_INITIAL=inputs[4] is not None,
        HAS_RESET=inputs[5] is not None and not varlen,
        VARLEN=varlen,
        CHAINED=chained,
        MASKED=length % tile.steps != 0 or channels % tile.channels != 0,
        EXACT=exact,
        SEGMENTS=tile.segments,
        ROWS=tile.rows,
        CHANNELS=tile.channels,
        num_warps=tile.num_warps,
        **register_limit(tile.max_registers, x.device),
        **(overlap_options(x) if chained or varlen else {"PDL": False}),
        **flags,
    )


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], output[0], *inputs[6:])


def _differentiate(ctx, d_hidden, d_last_state):
    saved = ctx.saved_tensors  # once: activation checkpointing computes them at each access
    d_hidden = torch.zeros_like(saved[6]) if d_hidden is None else d_hidden
    *gradients, d_initial_state = run_backward(_OPERATORS.backward, d_hidden, d_last_state, *saved)
    return *gradients, None if saved[4] is None else d_initial_state, None, None, None


def _save_nothing(ctx, inputs, output) -> None:
    pass


def _refuse(ctx, *gradients):
    raise NotImplementedError("the Triton backend has no second derivatives; use backend='torch' or 'reference'")


def _register():
    """Both kernels as operators, so that `torch.compile` and autograd see one opaque node each way.

    A namespace of its own for each execution of this file: a process may hold several copies (installed, from the Hub),
    and may execute one twice.
    """
    base = "griffin_" + hashlib.sha256(__name__.encode()).hexdigest()[:8]
    count = 0
    while hasattr(getattr(torch.ops, f"{base}_{count}"), "forward"):
        count += 1
    name = f"{base}_{count}"
    gates = "Tensor recurrence_gate, Tensor input_gate, Tensor log_decay"
    inputs = f"Tensor x, {gates}, Tensor? initial_state, Tensor? reset"
    sequences = "Tensor? cu_seqlens=None, Tensor? starts=None"
    more = f"Tensor d_hidden, Tensor? d_last_state, {inputs}, Tensor hidden, {sequences}"
    library = torch.library.Library(name, "FRAGMENT")
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define(f"forward({inputs}, {sequences}) -> (Tensor, Tensor)", tags=tags)
    library.define(f"backward({more}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", tags=tags)
    library.impl("forward", _forward, "CompositeExplicitAutograd")
    library.impl("backward", _backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{name}::forward", _forward_shapes, lib=library)
    torch.library.register_fake(f"{name}::backward", _backward_shapes, lib=library)
    torch.library.register_autograd(f"{name}::forward", _differentiate, setup_context=_save, lib=library)
    torch.library.register_autograd(f"{name}::backward", _refuse, setup_context=_save_nothing, lib=library)
    return library, getattr(torch.ops, name)


_LIBRARY, _OPERATORS = _register()  # the library must live as long as its operators
