"""The operations of one decoding step, twice: in plain PyTorch, which is their definition, and in Triton kernels.

Both read the layers' own parameters where they lie and write the states in place. Past inputs and keys lie in rings, at
the token's time modulo their size, so that no step moves what it keeps.

Legend: B rows, D width of the residual stream, C RG-LRU channels, P channels of a gate block, H heads, K head
dimension, W attention window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from .causal_conv1d import convolve
from .fused import rms_norm
from .rg_lru_scan import rg_lru_scan


try:
    import triton

    from .decode_attention_kernels import attention_kernel, combine_kernel
    from .decode_kernels import (
        add_norm_kernel,
        gate_kernel,
        gated_project_kernel,
        project_kernel,
        recurrent_kernel,
    )
except ImportError:
    triton = None


@dataclass
class Stream:
    """The residual stream (B, D) and what a layer has put out but not yet added to it, or None."""

    residual: torch.Tensor
    delta: torch.Tensor | None = None


@dataclass
class Clock:
    """time (1,) int64: tokens that each row has before this one, padding included. padding (B,) int64: of each row.

    cos, sin (B, R): of this token's position, for the rotary embedding; None where no layer has attention.
    """

    time: torch.Tensor
    padding: torch.Tensor
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None


class PlainOps:
    """As the layers compute, for one token a row."""

    def project(self, stream: Stream, norm, linears: Sequence[nn.Linear]) -> list[torch.Tensor]:
        """norm(stream) through each of the linears."""
        x = self._normed(stream, norm)
        return [linear(x, each.weight, each.bias) for each in linears]

    def gated_project(self, stream: Stream, norm, gate: nn.Linear, up: nn.Linear) -> torch.Tensor:
        """gelu(gate(norm(stream))) * up(norm(stream))."""
        gate_output, up_output = self.project(stream, norm, (gate, up))
        return gelu(gate_output, approximate="tanh") * up_output

    def add_project(self, stream: Stream, x: torch.Tensor, out: nn.Linear) -> Stream:
        """The stream with out(x) added."""
        return Stream(stream.residual + linear(x, out.weight, out.bias))

    def recurrent(self, x, y, block, past, state, log_decay, clock: Clock) -> torch.Tensor:
        """Convolution, gates, recurrence and the product with gelu(y): x, y (B, C) -> (B, C).

        past (B, taps, C) and state (B, C) float32 are updated.
        """
        taps = past.shape[1]
        past.index_copy_(1, clock.time % taps, x[:, None])
        slots = (clock.time + 1 + torch.arange(taps, device=x.device)) % taps  # oldest first
        x = convolve(past.index_select(1, slots), block.conv_1d.weight, block.conv_1d.bias, None)
        gates = block.rg_lru.recurrence_gate(x), block.rg_lru.input_gate(x)
        hidden, new_state = rg_lru_scan(x, *gates, log_decay, initial_state=state)
        state.copy_(new_state)
        return gelu(y, approximate="tanh") * hidden[:, 0]

    def attend(self, q, k, v, keys, values, clock: Clock, scaling: float) -> torch.Tensor:
        """q (B, H * K), k and v (B, H_kv * K), before the rotation -> (B, H * K).

        keys, values (B, H_kv, W, K) are updated.
        """
        batch, key_heads, window, head_dim = keys.shape
        q, k, v = (x.view(batch, -1, 1, head_dim) for x in (q, k, v))
        slot = clock.time % window
        keys.index_copy_(2, slot, _rotated(k, clock))
        values.index_copy_(2, slot, v)
        times = clock.time - (clock.time - torch.arange(window, device=q.device)) % window
        seen = times >= clock.padding[:, None]
        groups = q.shape[1] // key_heads
        output = scaled_dot_product_attention(
            _rotated(q, clock),
            keys.repeat_interleave(groups, dim=1),
            values.repeat_interleave(groups, dim=1),
            attn_mask=seen[:, None, None],
            scale=scaling,
        )
        return output.reshape(batch, -1)

    def _normed(self, stream: Stream, norm) -> torch.Tensor:
        return rms_norm(stream.residual, norm.weight, norm.eps)


def _rotated(x: torch.Tensor, clock: Clock) -> torch.Tensor:
    """x (B, H, 1, K), its first R dimensions rotated."""
    cos, sin = clock.cos[:, None, None], clock.sin[:, None, None]
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-second, first), dim=-1) * sin, kept), dim=-1)


# Rows up to which a product is done one row after the other on each tile of weights; beyond, by cuBLAS.
MATVEC_ROWS = (1, 2, 4)
# A thread loads 16 bytes of each of BLOCK_N rows: with 256 inputs a warp, nothing has to be exchanged between threads.
MATVEC = {"BLOCK_N": 8, "BLOCK_D": 512, "UNROLL": 1, "STAGES": 1, "num_warps": 2}
GATED_MATVEC = {"BLOCK_N": 4, "BLOCK_D": 512, "UNROLL": 1, "STAGES": 1, "num_warps": 2}
ATTENTION_PROGRAMS = 256  # about two for each multiprocessor


class KernelOps(PlainOps):
    """The same as few launches, each of which reads every weight and state once."""

    def project(self, stream, norm, linears):
        if stream.residual.shape[0] not in MATVEC_ROWS:
            return super().project(stream, norm, linears)
        return self._matvec(stream.residual, norm, linears)

    def gated_project(self, stream, norm, gate, up):
        x, width = stream.residual, gate.out_features
        y = x.new_empty(x.shape[0], width)
        if x.shape[0] not in MATVEC_ROWS:
            gate_output, up_output = super().project(stream, norm, (gate, up))
            gate_kernel[(triton.cdiv(y.numel(), 1024),)](gate_output, up_output, y, y.numel(), BLOCK=1024)
            return y
        tile = _tile(GATED_MATVEC, x)
        gated_project_kernel[(triton.cdiv(width, tile["BLOCK_N"]),)](
            *(x, norm.weight, gate.weight, gate.bias, up.weight, up.bias, y, norm.eps, width),
            D=x.shape[1],
            ROWS=x.shape[0],
            EVEN=_is_even(tile, x.shape[1], width),
            **tile,
        )
        return y

    def add_project(self, stream, x, out):
        if x.shape[0] in MATVEC_ROWS:
            return Stream(self._matvec(x, None, [out], stream.residual)[0])
        return Stream(stream.residual, linear(x, out.weight, out.bias))

    def recurrent(self, x, y, block, past, state, log_decay, clock):
        (batch, channels), gates = x.shape, block.rg_lru
        width = gates.input_gate.weight.shape[1]
        block_b = min(64, max(16, triton.next_power_of_2(batch)))
        block_c = 16
        grid = (gates.input_gate.weight.shape[0] * triton.cdiv(width, block_c), triton.cdiv(batch, block_b))
        out = torch.empty_like(x)
        recurrent_kernel[grid](
            *(x, y, past, state, out, block.conv_1d.weight, block.conv_1d.bias),
            *(gates.recurrence_gate.weight, gates.recurrence_gate.bias, gates.input_gate.weight, gates.input_gate.bias),
            *(log_decay, clock.time, batch, channels),
            P=width,
            TAPS=past.shape[1],
            BLOCK_B=block_b,
            BLOCK_P=32,
            BLOCK_C=block_c,
            num_warps=4,
        )
        return out

    def attend(self, q, k, v, keys, values, clock, scaling):
        batch, key_heads, window, head_dim = keys.shape
        heads, block_s = q.shape[1] // head_dim, 32 if head_dim > 128 else 64
        blocks = triton.next_power_of_2(triton.cdiv(window, block_s))
        splits = min(blocks, triton.next_power_of_2(triton.cdiv(ATTENTION_PROGRAMS, batch * key_heads)))
        block_k = max(16, triton.next_power_of_2(head_dim))
        sums = torch.empty(batch, heads, splits, head_dim, dtype=torch.float32, device=q.device)
        top, total = (torch.empty(batch, heads, splits, dtype=torch.float32, device=q.device) for _ in range(2))
        attention_kernel[(batch * key_heads, splits)](
            *(q, k, v, clock.cos, clock.sin, keys, values, clock.time, clock.padding, sums, top, total),
            *(scaling, window),
            SPLIT=blocks // splits * block_s,
            K=head_dim,
            KEY_HEADS=key_heads,
            GROUP=heads // key_heads,
            ROTARY=clock.cos.shape[1],
            BLOCK_G=max(16, triton.next_power_of_2(heads // key_heads)),
            BLOCK_K=block_k,
            BLOCK_S=block_s,
            num_warps=4,
        )
        out = torch.empty_like(q)
        combine_kernel[(batch * heads,)](sums, top, total, out, head_dim, SPLITS=splits, BLOCK_K=block_k, num_warps=2)
        return out

    def _normed(self, stream, norm):
        x, y = stream.residual, torch.empty_like(stream.residual)
        add_norm_kernel[(x.shape[0],)](
            *(x, x if stream.delta is None else stream.delta, norm.weight, y, norm.eps, x.shape[1]),
            ADD=stream.delta is not None,
            BLOCK_D=triton.next_power_of_2(x.shape[1]),
            num_warps=8,
        )
        stream.delta = None  # the kernel has added it
        return y

    def _matvec(self, x, norm, linears, residual=None):
        ys = [x.new_empty(x.shape[0], each.out_features) for each in linears]
        tile = _tile(MATVEC, x)
        matrices = [(each.weight, x if each.bias is None else each.bias, y) for each, y in zip(linears, ys)]
        padded = [*matrices, *[matrices[0]] * (3 - len(matrices))]
        sizes = [each.out_features for each in linears]
        project_kernel[(sum(triton.cdiv(size, tile["BLOCK_N"]) for size in sizes),)](
            *(x, x if norm is None else norm.weight, *(tensor for matrix in padded for tensor in matrix)),
            *(x if residual is None else residual, 1.0 if norm is None else norm.eps),
            *(*sizes, *[0] * (3 - len(sizes))),
            D=x.shape[1],
            ROWS=x.shape[0],
            MATRICES=len(linears),
            NORM=norm is not None,
            BIAS=linears[0].bias is not None,
            RESIDUAL=residual is not None,
            EVEN=_is_even(tile, x.shape[1], *sizes),
            **tile,
        )
        return ys


def _tile(tile: dict[str, int], x: torch.Tensor) -> dict[str, int]:
    """Fewer outputs a program where each has several rows to sum."""
    return {**tile, "BLOCK_N": max(1, tile["BLOCK_N"] // x.shape[0])}


def _is_even(tile: dict[str, int], inputs: int, *outputs: int) -> bool:
    """Whether tiles fill the matrices, so that nothing needs a mask."""
    return inputs % tile["BLOCK_D"] == 0 and all(size % tile["BLOCK_N"] == 0 for size in outputs)
