"""Operations of the layers that kernels can take over: their definitions in plain PyTorch.

Legend: B batch, T time, D width, H heads, K head dimension, R rotated dimensions.
"""  # SPDX-License-Identifier: Apache-2.0

import torch

from .slots import slot


@slot
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * (1 + weight) over the last axis, computed in float32, in the dtype of x."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * (1.0 + weight.float())).type_as(x)


@slot
def add_rms_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and that sum; without x, of the residual itself."""
    total = residual if x is None else residual + x
    return rms_norm(total, weight, eps), total


@slot
def gated(act_fn: torch.nn.Module, gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """act_fn(gate) * x."""
    return act_fn(gate) * x


@slot
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first R dimensions of each head and leaves the others; x (B, T, H, K), cos and sin (B, T, R)."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.type_as(x), kept), dim=-1)


@slot
def linears(x: torch.Tensor, *modules: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """module(x) of each."""
    return tuple(module(x) for module in modules)


@slot
def gated_linears(act_fn: torch.nn.Module, x: torch.Tensor, gate: torch.nn.Module, up: torch.nn.Module) -> torch.Tensor:
    """act_fn(gate(x)) * up(x)."""
    return gated(act_fn, gate(x), up(x))
