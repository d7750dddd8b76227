"""The operations of one decoding step, twice: in plain PyTorch, which is their definition, and in Triton kernels.

Both read the layers' own parameters where they lie and write the states in place. Past inputs and keys lie in rings, at
the token's time modulo their size, so that no step moves what it keeps.

Legend: B rows, D width of the residual stream, C RG-LRU channels, P channels of a gate block, H heads, K head
dimension, W attention window, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from ..causal_conv1d import convolve
from ..elementwise import rms_norm
from ..kernels.device import (
    BEGIN_WARPS,
    END_WARPS,
    MATVEC_ROWS,
    NORM_WARPS,
    attention_split,
    largest_logits_block,
    recurrent_tile,
)
from ..rg_lru_scan import rg_lru_scan
from .linear import Gemms
from .packed import bias_of, weight_of


try:
    import triton

    from .kernels.attention import attention_kernel
    from .kernels.gemv import add_norm_kernel, begin_kernel, end_kernel, gate_kernel
    from .kernels.recurrence import recurrent_kernel, recurrent_row_kernel
except ImportError:
    triton = None


@dataclass
class Stream:
    """The residual stream (B, D) and what a layer has put out but not yet added to it, or None.

    kept: the tensor has to stay as it is, so that nothing is added in place.
    """

    residual: torch.Tensor
    delta: torch.Tensor | None = None
    kept: bool = False


@dataclass
class Clock:
    """time (1,) int64: tokens that each row has before this one, padding included. padding (B,) int64: of each row.

    cos, sin (B, R): of this token's position, for the rotary embedding; None where no layer has attention.
    """

    time: torch.Tensor
    padding: torch.Tensor
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None


@dataclass
class Ends:
    """Where rows end. going_on (B,) bool: those that have not; tokens (MOST_ENDS,): what ends one, -1 for nothing;
    pad (1,): the token of those that have ended."""

    going_on: torch.Tensor
    tokens: torch.Tensor
    pad: torch.Tensor


class PlainOps:
    """As the layers compute, for one token a row.

    into (B, D): where an operation writes the residual stream, for who wants to keep it; None: into memory of its own.
    """

    def begin(
        self,
        token: torch.Tensor,
        embedding: nn.Embedding,
        scale: float,
        clock: Clock,
        frequencies: torch.Tensor | None,
        into: torch.Tensor | None = None,
    ) -> tuple[Stream, Clock]:
        """The embeddings of token (B,) times scale, and the clock with cos and sin of frequencies (R,) or None."""
        embedded = torch.mul(embedding.weight.index_select(0, token), scale, out=into)
        stream = Stream(embedded, kept=into is not None)
        if frequencies is None:
            return stream, clock
        angles = (clock.time - clock.padding)[:, None].float() * frequencies
        dtype = embedding.weight.dtype
        return stream, Clock(clock.time, clock.padding, angles.cos().to(dtype), angles.sin().to(dtype))

    def head(
        self,
        stream: Stream,
        norm: nn.Module,
        linear: nn.Linear,
        logits: torch.Tensor,
        normed: torch.Tensor | None = None,
    ) -> None:
        """norm(stream) through linear, into logits (B, V). normed (B, D): where norm(stream) goes too, or None."""
        if normed is not None:
            normed.copy_(self._normed(stream, norm))
        logits.copy_(self.project(stream, norm, [linear])[0])

    def end(self, logits: torch.Tensor, token: torch.Tensor, clock: Clock, ends: Ends | None = None) -> None:
        """The argmax of logits (B, V) into token (B,), padding where a row has ended; then the next time begins."""
        best = logits.argmax(-1)
        if ends is not None:
            best = torch.where(ends.going_on, best, ends.pad)
            ends.going_on.logical_and_((best[:, None] != ends.tokens).all(-1))
        token.copy_(best)
        clock.time.add_(1)

    def project(self, stream: Stream, norm: nn.Module, linears: Sequence[nn.Linear]) -> list[torch.Tensor]:
        """norm(stream) through each of the linears."""
        x = self._normed(stream, norm)
        return [self._product(x, each) for each in linears]

    def gated_project(self, stream: Stream, norm: nn.Module, gate: nn.Linear, up: nn.Linear) -> torch.Tensor:
        """gelu(gate(norm(stream))) * up(norm(stream))."""
        gate_output, up_output = self.project(stream, norm, (gate, up))
        return gelu(gate_output, approximate="tanh") * up_output

    def add_project(self, stream: Stream, x: torch.Tensor, out: nn.Linear, into: torch.Tensor | None = None) -> Stream:
        """The stream with out(x) added."""
        return Stream(torch.add(stream.residual, self._product(x, out), out=into), kept=into is not None)

    def recurrent(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        block: nn.Module,
        past: torch.Tensor,
        state: torch.Tensor,
        log_decay: torch.Tensor,
        clock: Clock,
    ) -> torch.Tensor:
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

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        clock: Clock,
        scaling: float,
    ) -> torch.Tensor:
        """q (B, H * K), k and v (B, H_kv * K), before the rotation -> (B, H * K).

        keys, values (B, H_kv, W, K) are updated.
        """
        batch, key_heads, window, head_dim = keys.shape
        q, k, v = (x.view(batch, -1, 1, head_dim) for x in (q, k, v))
        slot = clock.time % window
        keys.index_copy_(2, slot, rotated(k, clock))
        values.index_copy_(2, slot, v)
        times = clock.time - (clock.time - torch.arange(window, device=q.device)) % window
        seen = times >= clock.padding[:, None]
        # Heads that share keys are queries of one head: keys need not be repeated.
        queries = rotated(q, clock).view(batch, key_heads, -1, head_dim)
        output = scaled_dot_product_attention(queries, keys, values, attn_mask=seen[:, None, None], scale=scaling)
        return output.reshape(batch, -1)

    def _product(self, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        return linear(x, weight_of(layer, x.dtype), bias_of(layer, x.dtype))

    def _normed(self, stream: Stream, norm) -> torch.Tensor:
        return rms_norm(stream.residual, norm.weight, norm.eps)


def rotated(x: torch.Tensor, clock: Clock) -> torch.Tensor:
    """x (B, H, 1, K), its first R dimensions rotated."""
    cos, sin = clock.cos[:, None, None], clock.sin[:, None, None]
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-second, first), dim=-1) * sin, kept), dim=-1)


class KernelOps(PlainOps):
    """The same as few launches, each of which reads every weight and state once.

    overlap: whether a kernel starts while the one before it runs; the first of a step waits for all before it.
    matmul: whether GEMMs of up to MATMUL_ROWS rows have kernels too, or only GEMVs of MATVEC_ROWS.
    """

    def __init__(self, overlap: bool = False, matmul: bool = True):
        self.launch = {"PDL": overlap, **({"launch_pdl": True} if overlap else {})}
        self.gemms = Gemms(self.launch, matmul)
        self.counters: torch.Tensor | None = None  # heads that are shared are fewer than programs to aim at

    def begin(
        self,
        token: torch.Tensor,
        embedding: nn.Embedding,
        scale: float,
        clock: Clock,
        frequencies: torch.Tensor | None,
        into: torch.Tensor | None = None,
    ) -> tuple[Stream, Clock]:
        width, rotary = embedding.weight.shape[1], 0 if frequencies is None else len(frequencies)
        x = embedding.weight.new_empty(len(token), width) if into is None else into
        cos, sin = x.new_empty(len(token), rotary), x.new_empty(len(token), rotary)
        begin_kernel[(len(token),)](
            *(token, embedding.weight, clock.time, clock.padding, x if frequencies is None else frequencies),
            *(x, cos if rotary else x, sin if rotary else x, scale, width, rotary),
            SCALE=scale != 1,
            ROTARY=rotary > 0,
            PDL=self.launch["PDL"],
            BLOCK_D=triton.next_power_of_2(width),
            BLOCK_R=triton.next_power_of_2(max(1, rotary)),
            num_warps=BEGIN_WARPS,
        )
        stream = Stream(x, kept=into is not None)
        return stream, Clock(clock.time, clock.padding, cos, sin) if rotary else clock

    def head(
        self,
        stream: Stream,
        norm: nn.Module,
        linear: nn.Linear,
        logits: torch.Tensor,
        normed: torch.Tensor | None = None,
    ) -> None:
        if stream.delta is None and self.gemms.takes(stream.residual):
            if normed is not None:
                self._normed(stream, norm, normed)
            self.gemms.project(stream.residual, norm, [linear], outputs=[logits])
        else:
            torch.mm(self._normed(stream, norm, normed), linear.weight.T, out=logits)

    def end(self, logits: torch.Tensor, token: torch.Tensor, clock: Clock, ends: Ends | None = None) -> None:
        given = (token, token, token) if ends is None else (ends.going_on, ends.tokens, ends.pad)
        end_kernel[(logits.shape[0],)](
            *(logits, token, clock.time, *given),
            V=logits.shape[1],
            ENDS=0 if ends is None else len(ends.tokens),
            BLOCK=largest_logits_block(logits.shape[1]),
            num_warps=END_WARPS,
            **self.launch,
        )

    def project(self, stream: Stream, norm: nn.Module, linears: Sequence[nn.Linear]) -> list[torch.Tensor]:
        if stream.delta is None and self.gemms.takes(stream.residual, *linears):
            return self.gemms.project(stream.residual, norm, linears)
        return super().project(stream, norm, linears)

    def gated_project(self, stream: Stream, norm: nn.Module, gate: nn.Linear, up: nn.Linear) -> torch.Tensor:
        if stream.delta is None and self.gemms.takes(stream.residual, gate, up, together=True):
            return self.gemms.gated(stream.residual, norm, gate, up)
        gate_output, up_output = self.project(stream, norm, (gate, up))
        y = torch.empty_like(gate_output)
        grid = (triton.cdiv(y.numel(), 1024),)
        gate_kernel[grid](gate_output, up_output, y, y.numel(), **self.launch, BLOCK=1024)
        return y

    def add_project(self, stream: Stream, x: torch.Tensor, out: nn.Linear, into: torch.Tensor | None = None) -> Stream:
        if self.gemms.takes(x, out):
            outputs = None if into is None else [into]
            return Stream(self.gemms.project(x, None, [out], stream.residual, outputs)[0], kept=into is not None)
        if into is None and not stream.kept:
            return Stream(stream.residual, self._product(x, out))  # the norm behind it adds it in place
        return super().add_project(stream, x, out, into)

    def recurrent(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        block: nn.Module,
        past: torch.Tensor,
        state: torch.Tensor,
        log_decay: torch.Tensor,
        clock: Clock,
    ) -> torch.Tensor:
        gates, out = block.rg_lru, torch.empty_like(x)
        blocks, width = gates.input_gate.weight.shape[:2]
        tensors = (
            *(x, y, past, state, out, block.conv_1d.weight, block.conv_1d.bias),
            *(gates.recurrence_gate.weight, gates.recurrence_gate.bias, gates.input_gate.weight, gates.input_gate.bias),
            *(log_decay, clock.time, *x.shape),
        )
        tile = recurrent_tile(x.shape[0], width)
        options = {"P": width, "TAPS": past.shape[1], **self.launch, **tile}
        tiles = blocks * triton.cdiv(width, tile["BLOCK_C"])
        if x.shape[0] in MATVEC_ROWS:
            recurrent_row_kernel[(tiles, x.shape[0])](*tensors, **options)
        else:
            recurrent_kernel[(tiles, triton.cdiv(x.shape[0], tile["BLOCK_B"]))](*tensors, **options)
        return out

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        clock: Clock,
        scaling: float,
    ) -> torch.Tensor:
        batch, key_heads, window, head_dim = keys.shape
        heads, rings = q.shape[1] // head_dim, batch * key_heads
        tile = attention_split(rings, heads // key_heads, window, head_dim, q.element_size(), q.device)
        out = torch.empty_like(q)
        attention_kernel[(rings, tile["SPLITS"])](
            *(q, k, v, clock.cos, clock.sin, keys, values, clock.time, clock.padding, out),
            *(*self._shared_attention(q, rings, tile["SPLITS"], heads), scaling, window),
            K=head_dim,
            KEY_HEADS=key_heads,
            GROUP=heads // key_heads,
            ROTARY=clock.cos.shape[1],
            BLOCK_G=max(16, triton.next_power_of_2(heads // key_heads)),
            **tile,
            **self.launch,
        )
        return out

    def _product(self, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        return linear(x, self.gemms.weight(layer, x.dtype), bias_of(layer, x.dtype))

    def _shared_attention(self, q: torch.Tensor, tiles: int, splits: int, heads: int) -> tuple[torch.Tensor, ...]:
        """Where splits leave their sums, largest scores and totals, and for each of `tiles` how many have done so."""
        if splits == 1:
            return q, q, q, q
        if self.counters is None or len(self.counters) < tiles:
            self.counters = torch.zeros(tiles, dtype=torch.int32, device=q.device)
        new, parts = {"dtype": torch.float32, "device": q.device}, q.shape[0] * heads * splits
        sums = torch.empty(parts * (q.shape[1] // heads), **new)
        return sums, torch.empty(parts, **new), torch.empty(parts, **new), self.counters

    def _normed(self, stream, norm, into: torch.Tensor | None = None):
        x, y = stream.residual, torch.empty_like(stream.residual) if into is None else into
        add_norm_kernel[(x.shape[0],)](
            *(x, x if stream.delta is None else stream.delta, norm.weight, y, norm.eps, x.shape[1]),
            ADD=stream.delta is not None,
            BLOCK_D=triton.next_power_of_2(x.shape[1]),
            num_warps=NORM_WARPS,
            **self.launch,
        )
        stream.delta = None  # the kernel has added it
        return y
