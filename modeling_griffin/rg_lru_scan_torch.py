"""The RG-LRU recurrence in plain PyTorch: any device, linear in time, with its own backward pass.

Legend: B batch, T time, C channels. dX stands for the gradient of the loss with respect to X.
"""  # SPDX-License-Identifier: Apache-2.0

import torch

from .rg_lru_scan_reference import MAX_SQRT_GRADIENT, BoundedSqrt


def linear_scan(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """h_t = a_t h_{t-1} + b_t along dim 1 with h_{-1} = 0, by odd-even reduction: 2T work in 2 log2(T) calls.

    Pairs of steps are themselves steps, (a', b') = (a2 a1, a2 b1 + b2), so the odd positions are a scan of half the
    length (Blelloch 1990); the even positions then need one step each. Only products of a's occur, never quotients.

    a, b: (B, T, C), T >= 1, same floating dtype.
    """
    length = a.shape[1]
    if length == 1:
        return b
    a_even, b_even = a[:, 0 : length - 1 : 2], b[:, 0 : length - 1 : 2]  # the first of each pair
    a_odd, b_odd = a[:, 1::2], b[:, 1::2]
    h_odd = linear_scan(a_even * a_odd, torch.addcmul(b_odd, a_odd, b_even))
    h = torch.empty_like(b)
    h[:, 0] = b[:, 0]
    h[:, 1::2] = h_odd
    h[:, 2::2] = torch.addcmul(b[:, 2::2], a[:, 2::2], h_odd[:, : (length - 1) // 2])
    return h


def _gates(recurrence_gate, input_gate, log_decay, reset, dtype, sqrt=torch.sqrt):
    """sigmoid of both gates, a (0 at a reset) and the input's multiplier (1 at a reset), all (B, T, C) in `dtype`."""
    r, i = torch.sigmoid(recurrence_gate.to(dtype)), torch.sigmoid(input_gate.to(dtype))
    log_a = log_decay.to(dtype) * r
    a, multiplier = torch.exp(log_a), sqrt(-torch.expm1(2 * log_a))
    if reset is not None:
        a, multiplier = a.masked_fill(reset[..., None], 0.0), multiplier.masked_fill(reset[..., None], 1.0)
    return r, i, a, multiplier


class RGLRUScan(torch.autograd.Function):
    """Keeps x, both gates and the hidden states for the backward pass; the rest is recomputed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor, recurrence_gate: torch.Tensor, input_gate: torch.Tensor, log_decay: torch.Tensor,
        initial_state: torch.Tensor | None, reset: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        dtype = torch.promote_types(x.dtype, torch.float32)
        _, i, a, multiplier = _gates(recurrence_gate, input_gate, log_decay, reset, dtype)
        b = multiplier * i * x.to(dtype)
        if initial_state is not None:
            b = torch.cat([b[:, :1] + (a[:, 0] * initial_state.to(dtype))[:, None], b[:, 1:]], dim=1)
        hidden = linear_scan(a, b)
        return hidden.to(x.dtype), hidden[:, -1].clone()

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs, output[0])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, d_hidden: torch.Tensor, d_last_state: torch.Tensor) -> tuple:
        x, recurrence_gate, input_gate, log_decay, initial_state, reset, hidden = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Where the backward pass is differentiated: the plain root's derivative is infinite at a = 1, as at padding.
        sqrt = torch.sqrt if torch.compiler.is_compiling() or not torch.is_grad_enabled() else BoundedSqrt.apply
        r, i, a, multiplier = _gates(recurrence_gate, input_gate, log_decay, reset, dtype, sqrt)

        # dh_t = d_hidden_t + a_{t+1} dh_{t+1}: the same scan, backwards in time. Its first a has no state to act on.
        length = x.shape[1]
        backwards = torch.arange(length, 0, -1, device=x.device) % length
        d_last = d_hidden[:, -1:].to(dtype) + d_last_state[:, None].to(dtype)
        d_hidden = torch.cat([d_last, d_hidden[:, :-1].to(dtype).flip(1)], dim=1)
        dh = linear_scan(a.index_select(1, backwards), d_hidden).flip(1)

        first = torch.zeros_like(a[:, 0]) if initial_state is None else initial_state.to(dtype)
        h_before = torch.cat([first[:, None], hidden[:, :-1].to(dtype)], dim=1)
        d_scaled_i = dh * x.to(dtype)  # with respect to multiplier * i
        d_i = d_scaled_i * multiplier
        # d multiplier / d log a = -a^2 / multiplier, bounded as `BoundedSqrt` is; 0 at a reset, where a is 0
        slope = a * a / multiplier.clamp(min=0.5 / MAX_SQRT_GRADIENT)
        d_log_a = torch.addcmul(dh * a * h_before, d_scaled_i * i, slope, value=-1)
        return (
            (dh * multiplier * i).to(x.dtype),
            torch.ops.aten.sigmoid_backward(d_log_a * log_decay.to(dtype), r).to(recurrence_gate.dtype),
            torch.ops.aten.sigmoid_backward(d_i, i).to(input_gate.dtype),
            (d_log_a * r).sum(dim=(0, 1)).to(log_decay.dtype),
            None if initial_state is None else (a[:, 0] * dh[:, 0]).to(initial_state.dtype),
            None,
        )


def rg_lru_scan_torch(
    x: torch.Tensor, recurrence_gate: torch.Tensor, input_gate: torch.Tensor, log_decay: torch.Tensor,
    initial_state: torch.Tensor | None, reset: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Arguments and results as in `rg_lru_scan`. Runs in float32, or in float64 where x is float64."""
    if x.shape[1] == 0:
        dtype = torch.promote_types(x.dtype, torch.float32)
        nothing = x.new_zeros(x.shape[0], x.shape[2], dtype=dtype)
        return x.clone(), nothing if initial_state is None else initial_state.to(dtype, copy=True)
    return RGLRUScan.apply(x, recurrence_gate, input_gate, log_decay, initial_state, reset)
