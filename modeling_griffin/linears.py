"""Linear layers that read the same input: called one by one here, as one node of the graph by the kernels."""

import torch
from torch import nn

from .elementwise import gated
from .slots import slot


@slot
def linears(x: torch.Tensor, *modules: nn.Module) -> tuple[torch.Tensor, ...]:
    """module(x) of each."""
    return tuple(module(x) for module in modules)


@slot
def gated_linears(act_fn: nn.Module, x: torch.Tensor, gate: nn.Module, up: nn.Module) -> torch.Tensor:
    """act_fn(gate(x)) * up(x)."""
    return gated(act_fn, gate(x), up(x))
