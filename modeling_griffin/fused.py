"""Chains of elementwise operations, as single Triton kernels on a GPU.

Eagerly each operation reads and writes all of its tensors, and autograd keeps what lies between: on a GPU a layer then
spends as long on them as on its matrix products. Small tensors stay eager, where launches cost more than the memory.
"""

import torch
from transformers.activations import ACT2FN

from .fused_triton import LARGEST_ROW, triton_add_rms_norm, triton_gelu_gated, triton_rms_norm, triton_rotate
from .rg_lru_scan_triton import triton_unavailable_reason


LEAST_ELEMENTS = 2**20  # of the first argument; below, a launch costs as much as the memory


def pays(first: torch.Tensor, *others) -> bool:
    """Whether to leave the eager operations: large plain tensors on a GPU, outside other transformations."""
    return (
        first.is_cuda
        and first.numel() >= LEAST_ELEMENTS
        and not torch.compiler.is_compiling()
        and triton_unavailable_reason(first) is None
        and all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in (first, *others) if isinstance(x, torch.Tensor))
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * (1 + weight) over the last axis, computed in float32, in the dtype of x."""
    if pays(x, weight) and x.shape[-1] <= LARGEST_ROW:
        return triton_rms_norm(x, weight, eps)
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * (1.0 + weight.float())).type_as(x)


def add_rms_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and that sum; without x, of the residual itself."""
    if pays(residual, x, weight) and residual.shape[-1] <= LARGEST_ROW:
        return triton_add_rms_norm(x, residual, weight, eps)
    total = residual if x is None else residual + x
    return rms_norm(total, weight, eps), total


def gated(act_fn: torch.nn.Module, gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """act_fn(gate) * x; one kernel for the activation of the paper's and DeepMind's models."""
    if isinstance(act_fn, GELU_TANH) and pays(gate, x):
        return triton_gelu_gated(gate, x)
    return act_fn(gate) * x


GELU_TANH = type(ACT2FN["gelu_pytorch_tanh"])


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first R dimensions of each head and leaves the others; x (B, T, H, K), cos and sin (B, T, R)."""
    if pays(x, cos, sin):
        return triton_rotate(x, cos, sin)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.type_as(x), kept), dim=-1)
