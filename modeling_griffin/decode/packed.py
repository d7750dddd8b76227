"""Weights as a quantisation library has packed them: where a product finds the numbers, and what they mean.

Nothing is copied: kernels read what the library's layer holds, and PyTorch's operations get it dequantised. Inputs and
sums are not rounded to the weights' precision. Differs: bitsandbytes' int8 (LLM.int8(), Dettmers et al. 2022) rounds
the inputs to 8 bits as well, but for outliers.

Legend: D inputs of a product, N outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


ON: tuple[str, ...] = ("cuda",)  # devices on which packed weights are read by kernels of our own
NF4_BLOCK = 64  # weights of a row that share a scale
NESTED_BLOCK = 256  # of these scales, that share one of their own


class Rows(NamedTuple):
    """w[n, d] = data[n, d] * scale[n] * unit. data (N, D) int8 or float8; scale (N,)."""

    data: torch.Tensor
    scale: torch.Tensor
    unit: float

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.data.float() * (self.scale.float() * self.unit)[:, None]).to(dtype)


class NF4(NamedTuple):
    """w[n, d] = code[index] * scale of 64 weights; two indices a byte, the first in its upper half (QLoRA, 2023).

    data (N * D / 2,) uint8; code (16,) float32. scale (N * D / 64,) is float32, or uint8 with
    scale = nested_code[scale] * nested_scale + offset: nested_code (256,), nested_scale (N * D / 64 / 256,), offset ().
    """

    data: torch.Tensor
    scale: torch.Tensor
    code: torch.Tensor
    nested_code: torch.Tensor | None
    nested_scale: torch.Tensor | None
    offset: torch.Tensor | None
    shape: tuple[int, int]

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        scale = self.scale
        if self.nested_code is not None:
            nested = self.nested_scale.repeat_interleave(NESTED_BLOCK)[: len(scale)]
            scale = self.nested_code[scale.long()] * nested + self.offset
        index = torch.stack((self.data >> 4, self.data & 15), 1).flatten()
        return (self.code[index.long()].view(-1, NF4_BLOCK) * scale[:, None]).view(self.shape).to(dtype)


def unpack(linear: nn.Module) -> Rows | NF4 | None:
    """What the layer's weights are; None for plain ones, and for what is packed in a way not known here."""
    kind, weight = type(linear).__name__, linear._parameters.get("weight")
    if type(linear) is nn.Linear:
        return _of_torchao(weight) if hasattr(weight, "qdata") else None
    if not type(linear).__module__.startswith("bitsandbytes."):
        return None
    if kind == "Linear8bitLt" and weight.dtype == torch.int8:
        holder = linear.state if linear.state.CB is not None else weight  # which of them: before the first call, behind
        return None if holder.CB is None else Rows(holder.CB, holder.SCB, 1 / 127)
    state = getattr(weight, "quant_state", None)
    return _of_nf4(weight, state) if kind == "Linear4bit" and state is not None else None


def _of_torchao(weight) -> Rows | None:
    """Weights alone are quantised, a scale a row.

    Their zero points are 0 in all that torchao's configurations make. They are not looked at, which would wait for the
    GPU: of weights with others the comparison of a new step with the model would say that it differs.
    """
    alone = all(getattr(weight, name, None) is None for name in ("act_quant_kwargs", "act_pre_scale"))
    known = type(weight).__name__ in ("Int8Tensor", "Float8Tensor") and weight.qdata.is_contiguous()
    if alone and known and tuple(weight.block_size) == (1, weight.shape[1]):
        return Rows(weight.qdata, weight.scale.view(-1), 1.0)
    return None


def _of_nf4(weight, state) -> NF4 | None:
    nested = state.state2 if state.nested else None
    if state.quant_type != "nf4" or state.blocksize != NF4_BLOCK or state.shape[1] % NF4_BLOCK:
        return None
    if weight.dtype != torch.uint8 or getattr(state, "packing_format_for_cpu", False):
        return None
    if nested is None:
        return NF4(weight.data.view(-1), state.absmax, state.code, None, None, None, tuple(state.shape))
    if nested.blocksize != NESTED_BLOCK:
        return None
    scales = state.absmax, state.code, nested.code, nested.absmax, state.offset
    return NF4(weight.data.view(-1), *scales, tuple(state.shape))


def weight_of(linear: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """(N, D), for PyTorch's own products."""
    packed = unpack(linear)
    return linear.weight if packed is None else packed.dequantised(dtype)


@contextmanager
def exact_inputs(model: nn.Module) -> Iterator[None]:
    """Inside, layers of LLM.int8() multiply their inputs as they are by the packed numbers, as the kernels here do."""
    rounding = [each for each in model.modules() if type(each).__name__ == "Linear8bitLt" and unpack(each) is not None]
    before = [each.__dict__.get("forward") for each in rounding]
    for each in rounding:
        each.forward = lambda x, each=each: F.linear(x, weight_of(each, x.dtype), bias_of(each, x.dtype))
    try:
        yield
    finally:
        for each, forward in zip(rounding, before):
            del each.forward
            if forward is not None:
                each.forward = forward


def bias_of(linear: nn.Module, dtype: torch.dtype) -> torch.Tensor | None:
    """bitsandbytes casts a bias to the dtype in which its layer computes."""
    return None if linear.bias is None else linear.bias.to(dtype)


def tensors_of(linear: nn.Module) -> tuple[torch.Tensor, ...]:
    """All that a product reads of packed weights; empty for plain ones."""
    return tuple(each for each in unpack(linear) or () if isinstance(each, torch.Tensor))
