"""Linear layers that read the same input, as one node of the graph on a GPU.

Alone, each layer makes a gradient of the input, and autograd adds them up in a pass of its own; here the second product
adds to the first one's result. In front of a gated activation, the gradients of the biases come with its own.
Products of few outputs, as for a single key-value head, leave much of a GPU idle and read all of x for little: they
are made as one.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .elementwise import gelu_gated_backward, gelu_gated_forward


NARROW = 512  # outputs, up to which a layer shares its product with others


def joined_linears(x: torch.Tensor, *parameters: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Of plain layers: all weights, then all biases. Outputs of narrow layers without a bias may be views of one."""
    weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
    narrow = [i for i, weight in enumerate(weights) if biases[i] is None and len(weight) <= NARROW]
    return _Linears.apply(x, *parameters) if len(narrow) < 2 else _narrow_as_one(x, weights, biases, narrow)


def _narrow_as_one(x, weights, biases, narrow: list[int]) -> tuple[torch.Tensor, ...]:
    """The layers at `narrow` as one product each way; autograd joins and splits the small tensors around it."""
    wide = [i for i in range(len(weights)) if i not in narrow]
    joined = torch.cat([weights[i] for i in narrow])
    *outputs, several = _Linears.apply(x, *(weights[i] for i in wide), joined, *(biases[i] for i in wide), None)
    outputs += several.split([len(weights[i]) for i in narrow], dim=-1)
    return tuple(output for _, output in sorted(zip((*wide, *narrow), outputs), key=lambda pair: pair[0]))


def gelu_gated_linears(
    x: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor, gate_bias: torch.Tensor, up_bias: torch.Tensor
) -> torch.Tensor:
    """gelu(x W_gate + b_gate) * (x W_up + b_up), the tanh form."""
    return _GeluGatedLinears.apply(x, gate_weight, up_weight, gate_bias, up_bias)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        ctx.save_for_backward(x, *weights)
        return tuple(linear(x, weight, bias) for weight, bias in zip(weights, biases))

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs):
        x, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        d_outputs = [d.flatten(0, -2) for d in d_outputs]
        d_biases = [d.sum(0) if need else None for d, need in zip(d_outputs, needed[1 + len(weights) :])]
        return *_gradients(x, weights, d_outputs, needed), *d_biases


class _GeluGatedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        gate_weight, up_weight, gate_bias, up_bias = parameters
        gate, up = linear(x, gate_weight, gate_bias), linear(x, up_weight, up_bias)
        ctx.save_for_backward(x, gate_weight, up_weight, gate, up)
        return gelu_gated_forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, *weights, gate, up = ctx.saved_tensors
        needed = ctx.needs_input_grad
        *d_outputs, sums = gelu_gated_backward(d_y, gate, up, sums=any(needed[3:]))
        d_biases = (None, None) if sums is None else [each.to(gate.dtype) for each in sums]
        return *_gradients(x, weights, [d.flatten(0, -2) for d in d_outputs], needed), *d_biases


def _gradients(x, weights, d_outputs, needed) -> list[torch.Tensor | None]:
    """Of x and of each weight, where needed; d_outputs (rows, features)."""
    d_x = None
    if needed[0]:
        d_x = d_outputs[0] @ weights[0]
        for d, weight in zip(d_outputs[1:], weights[1:]):
            d_x.addmm_(d, weight)
        d_x = d_x.view(x.shape)
    rows = x.flatten(0, -2)
    return [d_x, *(d.mT @ rows if need else None for d, need in zip(d_outputs, needed[1:]))]
