"""Linear layers that read the same input and have LoRA adapters of PEFT, as one node of the graph on a GPU.

Called as modules, each casts the input to its adapter's dtype and keeps that for its backward pass, scales and adds in
passes over all of its outputs, and autograd adds up the gradients of the input, two a layer, in passes of their own:
a step of a few thousand tokens waits for the host, which starts all that. Here the input is cast once for all layers
and kept as it is, and sums are made where a product or an addition writes. What is computed in which dtype is PEFT's.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .hooks import is_plain


PLAIN = (torch.Tensor, nn.Parameter)


class Adapted(NamedTuple):
    """x W' + b + scaling * (x A') B' of a linear layer: weight W and bias b, frozen, down A (r, D) and up B (C, r)."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    down: torch.Tensor
    up: torch.Tensor
    scaling: float


def read_adapter(module: nn.Module) -> Adapted | None:
    """Of a linear layer with one plain LoRA adapter; None where the module has to be called.

    That is where PEFT does anything else: several adapters or none, merged ones, dropout, DoRA and other variants, a
    bias in the adapter, base weights that are trained, quantised or sharded, hooks.
    """
    layers = sys.modules.get("peft.tuners.lora.layer")  # not imported for this: without it nothing is adapted
    if layers is None or not is_plain(module, layers.Linear):
        return None
    if not all(_is_pefts(getattr(layers.Linear, name, None)) for name in ("forward", "_cast_input_dtype")):
        return None
    names, variants = module.active_adapters, getattr(module, "lora_variant", None)
    if variants is None or len(names) != 1 or module.disable_adapters or module.merged:
        return None
    name, parts = names[0], module._modules
    base = parts["base_layer"]
    down, up, dropout = (parts[kind]._modules.get(name) for kind in ("lora_A", "lora_B", "lora_dropout"))
    if name in variants or not module.cast_input_dtype_enabled or not is_plain(dropout, nn.Identity):
        return None
    if not (is_plain(base, nn.Linear) and is_plain(down, nn.Linear) and is_plain(up, nn.Linear)):
        return None
    adapted = Adapted(base.weight, base.bias, down.weight, up.weight, module.scaling[name])
    weight, bias, *_, scaling = adapted
    if down.bias is not None or up.bias is not None:
        return None
    if weight.requires_grad or bias is not None and bias.requires_grad:
        return None
    if type(scaling) not in (int, float):  # a tensor, where adapters are changed under a compiled model
        return None
    return adapted if all(type(each) in PLAIN for each in adapted[:4] if each is not None) else None


def _is_pefts(function: Any) -> bool:
    """Not where somebody has put another one in its place, as tools do that change what adapters compute."""
    return getattr(function, "__globals__", {}).get("__name__", "").startswith("peft.")


def adapted_outputs(x: torch.Tensor, layers: Sequence[Adapted]) -> tuple[torch.Tensor, ...]:
    """As `adapted_linears` without a graph: three operations a layer in one dtype, else four, and one cast for all."""
    rows = x.flatten(0, -2)
    wide = rows.to(layers[0].down.dtype)
    outputs = []
    for weight, bias, down, up, scaling in layers:
        y, low = linear(rows, weight, bias), linear(wide, down)
        if low.dtype == y.dtype:
            y.addmm_(low, up.T, alpha=scaling)
        else:
            y.add_(linear(low, up), alpha=scaling)  # summed in the wider dtype, rounded once
        outputs.append(y.view(*x.shape[:-1], -1))
    return tuple(outputs)


def adapted_linears(x: torch.Tensor, layers: Sequence[Adapted]) -> tuple[torch.Tensor, ...]:
    """Of each layer, in the dtype of x; adapters are all in one dtype. Second derivatives raise."""
    weights, biases, downs, ups, scalings = zip(*layers)
    return _AdaptedLinears.apply(x, scalings, *weights, *biases, *downs, *ups)


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scalings, *parameters):
        count = len(scalings)
        weights, biases, downs, ups = (parameters[i * count : (i + 1) * count] for i in range(4))
        rows = x.flatten(0, -2)
        wide = rows.to(downs[0].dtype)
        lows = [linear(wide, down) for down in downs]
        outputs = [linear(x, weight, bias) for weight, bias in zip(weights, biases)]
        for y, low, up, scaling in zip(outputs, lows, ups, scalings):
            y.view(len(rows), -1).add_(linear(low, up), alpha=scaling)  # summed in the wider dtype, rounded once
        ctx.save_for_backward(x, *weights, *downs, *ups, *lows)
        ctx.scalings = scalings
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs):
        scalings, needed = ctx.scalings, ctx.needs_input_grad
        count = len(scalings)
        x, *saved = ctx.saved_tensors
        rows = x.flatten(0, -2)
        wide = rows.to(saved[count].dtype)
        d_x, d_wide = None, None
        d_downs, d_ups = [None] * count, [None] * count
        for i, (d_y, scaling) in enumerate(zip(d_outputs, scalings)):
            weight, down, up, low = saved[i::count]
            d_y = d_y.flatten(0, -2)
            d_wide_y = d_y.to(up.dtype)
            # beta=0: what stands first only has the shape
            d_low = torch.addmm(low, d_wide_y, up, beta=0, alpha=scaling)
            if needed[2 + 3 * count + i]:
                d_ups[i] = torch.addmm(up, d_wide_y.mT, low, beta=0, alpha=scaling)
            if needed[2 + 2 * count + i]:
                d_downs[i] = d_low.mT @ wide
            if needed[0]:
                d_x = d_y @ weight if d_x is None else d_x.addmm_(d_y, weight)
                d_wide = d_low @ down if d_wide is None else d_wide.addmm_(d_low, down)
        if needed[0]:
            d_x = d_x.add_(d_wide).view(x.shape)
        return d_x, None, *[None] * (2 * count), *d_downs, *d_ups
