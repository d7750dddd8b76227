"""The RG-LRU recurrence by definition, step by step: the judge of the others."""  # SPDX-License-Identifier: Apache-2.0

import torch


MAX_SQRT_GRADIENT = 1000.0  # DeepMind's recurrentgemma, `_MAX_SQRT_GRADIENT`


class BoundedSqrt(torch.autograd.Function):
    """sqrt(y) whose derivative is min(1 / (2 sqrt(y)), 1000).

    Differs: from the paper, which has the plain square root; near a = 1 its derivative overflows. Source: the
    RecurrentGemma report (arXiv 2404.07839) and DeepMind's `SqrtBoundDerivative`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(y)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
        (root,) = ctx.saved_tensors
        return grad * (0.5 / root.clamp(min=0.5 / MAX_SQRT_GRADIENT))

    jvp = backward  # the derivative is diagonal: forward mode multiplies by the same


def rg_lru_scan_reference(
    x: torch.Tensor, recurrence_gate: torch.Tensor, input_gate: torch.Tensor, log_decay: torch.Tensor,
    initial_state: torch.Tensor | None, reset: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Arguments and results as in `rg_lru_scan`. Runs in float32, or in float64 where x is float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, length, channels = x.shape
    x_, r, i = x.to(dtype), torch.sigmoid(recurrence_gate.to(dtype)), torch.sigmoid(input_gate.to(dtype))

    log_a = log_decay.to(dtype) * r  # equation 6, in log space: log_decay = -c softplus(Λ)
    a = torch.exp(log_a)
    # 1 - a^2 as -expm1(2 log a): near a = 1 the difference of float32 numbers loses its digits
    multiplier = BoundedSqrt.apply(-torch.expm1(2 * log_a))
    if reset is not None:
        # Differs: the paper has no documents. At the start of one the state is forgotten and the input is not scaled
        # (DeepMind's code).
        a = a.masked_fill(reset[..., None], 0.0)
        multiplier = multiplier.masked_fill(reset[..., None], 1.0)
    scaled_input = multiplier * i * x_

    state = x_.new_zeros(batch, channels) if initial_state is None else initial_state.to(dtype)
    states = []
    for a_t, input_t in zip(a.unbind(1), scaled_input.unbind(1)):
        state = a_t * state + input_t  # equation 4
        states.append(state)
    hidden = torch.stack(states, dim=1) if length else x_
    return hidden.to(x.dtype), state
