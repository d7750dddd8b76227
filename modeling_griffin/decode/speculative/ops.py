"""The operations of a step that reads N tokens of one row, of which it keeps only the first few.

They read the row's state as `ops.py` left it and write it nowhere: a ring has no slot to spare for a token that may
be rejected. What each token would leave goes to buffers of its own, and `keep_recurrent` and `keep_attention` put that
of the accepted tokens into the state. A GEMM does not care what its rows are: those of `ops.py` serve.

Legend: N tokens of a row, R rotated dimensions, C RG-LRU channels, H heads, K head dimension, W attention window, V
vocabulary. A clock's cos and sin are (N, R), its time is that of the first token, its padding (1,).
"""

import torch
from torch.nn.functional import gelu, scaled_dot_product_attention

from ...causal_conv1d import convolve
from ...kernels.device import BOOKKEEPING_WARPS, KEPT_CHANNELS, RECURRENT, draft_attention_split
from ...rg_lru_scan import rg_lru_scan
from ..ops import Clock, KernelOps, PlainOps, rotated, triton


if triton is not None:
    from ..kernels.verify import accept_kernel, draft_recurrent_kernel, keep_recurrent_kernel
    from ..kernels.verify_attention import draft_attention_kernel, keep_attention_kernel


class PlainVerifyOps(PlainOps):
    """As the layers compute, for N tokens of one row."""

    def recurrent(  # type: ignore[override]  # with buffers besides
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        block: torch.nn.Module,
        past: torch.Tensor,
        state: torch.Tensor,
        log_decay: torch.Tensor,
        new_x: torch.Tensor,
        new_h: torch.Tensor,
        clock: Clock,
    ) -> torch.Tensor:
        """Convolution, gates, recurrence and the product with gelu(y): x, y (N, C) -> (N, C).

        past (1, taps, C) and state (1, C) float32 are read. new_x (N, C) becomes x and new_h (N, C) float32 the state
        behind each token.
        """
        new_x.copy_(x)
        taps = past.shape[1]
        slots = (clock.time + torch.arange(1, taps, device=x.device)) % taps  # oldest first, without the oldest of all
        x = convolve(
            torch.cat([past.index_select(1, slots), x[None]], dim=1), block.conv_1d.weight, block.conv_1d.bias, None
        )
        gates = block.rg_lru.recurrence_gate(x), block.rg_lru.input_gate(x)
        hidden, _ = rg_lru_scan(x.float(), *gates, log_decay, initial_state=state)
        new_h.copy_(hidden[0])
        return gelu(y, approximate="tanh") * hidden[0].to(y.dtype)

    def attend(  # type: ignore[override]  # with buffers besides
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        new_keys: torch.Tensor,
        new_values: torch.Tensor,
        clock: Clock,
        scaling: float,
    ) -> torch.Tensor:
        """q (N, H * K), k and v (N, H_kv * K), before the rotation -> (N, H * K).

        keys, values (1, H_kv, W, K) are read. new_keys, new_values (H_kv, N, K) become those of these tokens.
        """
        number, (_, key_heads, window, head_dim) = len(q), keys.shape
        q, k, v = (x.view(number, -1, 1, head_dim) for x in (q, k, v))
        new_keys.copy_(rotated(k, clock)[:, :, 0].transpose(0, 1))
        new_values.copy_(v[:, :, 0].transpose(0, 1))
        new_times = clock.time + torch.arange(number, device=q.device)
        newest = clock.time - 1
        times = newest - (newest - torch.arange(window, device=q.device)) % window
        times = torch.cat([times, new_times])
        age = new_times[:, None] - times
        seen = (age >= 0) & (age < window) & (times >= clock.padding)
        groups = q.shape[1] // key_heads
        output = scaled_dot_product_attention(
            rotated(q, clock)[:, :, 0].transpose(0, 1),
            torch.cat([keys[0], new_keys], dim=1).repeat_interleave(groups, dim=0),
            torch.cat([values[0], new_values], dim=1).repeat_interleave(groups, dim=0),
            attn_mask=seen,
            scale=scaling,
        )
        return output.transpose(0, 1).reshape(number, -1)

    def accept(self, tokens: torch.Tensor, report: torch.Tensor, token: torch.Tensor, clock: Clock) -> None:
        """How many of tokens (N,) are right, into report[0]; the first is. Time goes on by as many.

        report[1:] (N,): the argmax behind each; a token is right where it is the argmax behind the one in front of it.
        token (1,) becomes the argmax behind the last that is right.
        """
        is_right = (report[1:-1] == tokens[1:]).long()
        report[:1] = is_right.cumprod(0).sum() + 1
        token.copy_(report.index_select(0, report[:1]))
        clock.time.add_(report[:1])

    def keep_recurrent(
        self,
        past: torch.Tensor,
        state: torch.Tensor,
        new_x: torch.Tensor,
        new_h: torch.Tensor,
        accepted: torch.Tensor,
        clock: Clock,
    ) -> None:
        """What the first accepted (1,) tokens leave in all L layers; the clock's time is already behind them.

        new_x, new_h (L, N, C) into past (L, 1, taps, C) and state (L, 1, C).
        """
        taps = past.shape[2]
        last = clock.time - 1
        source = accepted - 1 - (last - torch.arange(taps, device=past.device)) % taps  # of each slot's newest token
        is_new = (source >= 0)[:, None]
        past.copy_(torch.where(is_new, new_x.index_select(1, source.clamp(min=0)), past[:, 0])[:, None])
        state.copy_(new_h.index_select(1, accepted - 1))

    def keep_attention(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        new_keys: torch.Tensor,
        new_values: torch.Tensor,
        accepted: torch.Tensor,
        clock: Clock,
    ) -> None:
        """The same for rings of keys and values; slots of tokens that are not accepted keep what they have.

        new_keys, new_values (L, H_kv, N, K) into keys, values (L, 1, H_kv, W, K).
        """
        number, window = new_keys.shape[2], keys.shape[3]
        i_token = torch.arange(number, device=keys.device)
        slots, is_new = (clock.time - accepted + i_token) % window, (i_token < accepted)[:, None]
        for ring, new in ((keys, new_keys), (values, new_values)):
            ring.index_copy_(3, slots, torch.where(is_new, new[:, None], ring.index_select(3, slots)))


QUERIES = 16  # of a program; with more, their sums do not fit into its registers


class KernelVerifyOps(PlainVerifyOps, KernelOps):
    """The same in Triton kernels; `begin`, `end`, GEMV and GEMM are those of one token a row."""

    def recurrent(  # type: ignore[override]  # with buffers besides
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        block: torch.nn.Module,
        past: torch.Tensor,
        state: torch.Tensor,
        log_decay: torch.Tensor,
        new_x: torch.Tensor,
        new_h: torch.Tensor,
        clock: Clock,
    ) -> torch.Tensor:
        gates, out = block.rg_lru, torch.empty_like(x)
        blocks, width = gates.input_gate.weight.shape[:2]
        draft_recurrent_kernel[(blocks * triton.cdiv(width, RECURRENT["BLOCK_C"]),)](
            *(x, y, past, state, new_x, new_h, out, block.conv_1d.weight, block.conv_1d.bias),
            *(gates.recurrence_gate.weight, gates.recurrence_gate.bias, gates.input_gate.weight, gates.input_gate.bias),
            *(log_decay, clock.time, *x.shape),
            P=width,
            TAPS=past.shape[1],
            BLOCK_N=_block(len(x)),
            BLOCK_P=min(128, max(32, triton.next_power_of_2(width) // 8)),
            BLOCK_C=RECURRENT["BLOCK_C"],
            num_warps=RECURRENT["num_warps"],
            **self.launch,
        )
        return out

    def attend(  # type: ignore[override]  # with buffers besides
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        new_keys: torch.Tensor,
        new_values: torch.Tensor,
        clock: Clock,
        scaling: float,
    ) -> torch.Tensor:
        number, (_, key_heads, window, head_dim) = len(q), keys.shape
        heads = q.shape[1] // head_dim
        tiles = key_heads * triton.cdiv(number * heads // key_heads, QUERIES)
        tile = draft_attention_split(tiles, QUERIES, window, head_dim, q.element_size(), q.device)
        out = torch.empty_like(q)
        draft_attention_kernel[(tiles, tile["SPLITS"])](
            *(q, k, v, clock.cos, clock.sin, keys, values, new_keys, new_values, clock.time, clock.padding, out),
            *(*self._shared_attention(q, tiles, tile["SPLITS"], heads), scaling, number, window),
            K=head_dim,
            KEY_HEADS=key_heads,
            GROUP=heads // key_heads,
            ROTARY=clock.cos.shape[1],
            BLOCK_M=QUERIES,
            BLOCK_N=_block(number),
            **tile,
            **self.launch,
        )
        return out

    def accept(self, tokens: torch.Tensor, report: torch.Tensor, token: torch.Tensor, clock: Clock) -> None:
        block = triton.next_power_of_2(len(tokens))
        accept_kernel[(1,)](
            tokens, report, token, clock.time, len(tokens), BLOCK_N=block, num_warps=BOOKKEEPING_WARPS, **self.launch
        )

    def keep_recurrent(
        self,
        past: torch.Tensor,
        state: torch.Tensor,
        new_x: torch.Tensor,
        new_h: torch.Tensor,
        accepted: torch.Tensor,
        clock: Clock,
    ) -> None:
        layers, _, taps, channels = past.shape
        if layers > 0:
            keep_recurrent_kernel[(triton.cdiv(channels, KEPT_CHANNELS), layers)](
                *(past, state, new_x, new_h, accepted, clock.time, new_x.shape[1], channels),
                TAPS=taps,
                BLOCK_C=KEPT_CHANNELS,
                **self.launch,
            )

    def keep_attention(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        new_keys: torch.Tensor,
        new_values: torch.Tensor,
        accepted: torch.Tensor,
        clock: Clock,
    ) -> None:
        layers, key_heads, number, head_dim = new_keys.shape
        if layers > 0:
            keep_attention_kernel[(number, layers * key_heads)](
                *(keys, values, new_keys, new_values, accepted, clock.time, number, keys.shape[3]),
                K=head_dim,
                BLOCK_K=triton.next_power_of_2(head_dim),
                num_warps=BOOKKEEPING_WARPS,
                **self.launch,
            )


def _block(size: int) -> int:
    """A side of a GEMM's tile that holds so many."""
    return max(16, triton.next_power_of_2(size))
