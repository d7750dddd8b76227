"""Which hooks a module has: the one file that reads PyTorch's private dictionaries of them."""

from collections.abc import Callable

from torch import nn
from transformers.activations import ACT2FN

from ..rg_lru import BlockDiagonalLinear


# What PyTorch gives every module that no forward pass reads: other hooks, and marks of hooks.
OF_A_FORWARD = ("training", "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
UNREAD_BY_A_FORWARD = frozenset(vars(nn.Module())) - frozenset(OF_A_FORWARD)
# What kernels stand for: these classes' forwards, and the function that a linear layer's calls, as they were imported.
# Somebody may replace them for all modules.
STOOD_FOR = {
    cls: cls.forward for cls in (nn.Linear, nn.Identity, BlockDiagonalLinear, type(ACT2FN["gelu_pytorch_tanh"]))
}
LINEAR = nn.functional.linear


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs a hook, its own or one that every module has."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or has_global_hooks()
    )


def is_plain(module: nn.Module, cls: type) -> bool:
    """Whether calling the module does no more than the forward that its class was imported with.

    Not so for what PEFT and parametrizations put in its place, nor with hooks, which may bring the weights (ZeRO-3,
    offloading to the CPU, the latter by a `forward` of the instance) or want to see the result.
    """
    if type(module) is not cls or "forward" in vars(module) or has_hooks(module):
        return False
    if cls is nn.Linear and nn.functional.linear is not LINEAR:
        return False
    return STOOD_FOR.get(cls, cls.forward) is cls.forward


def has_global_hooks() -> bool:
    return nn.modules.module._has_any_global_hook()


def forward_hooks(module: nn.Module) -> list[Callable]:
    """Before and behind its forward."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def forward_pre_hooks(module: nn.Module) -> list[Callable]:
    return list(module._forward_pre_hooks.values())


def backward_hooks(module: nn.Module) -> list[Callable]:
    """Before and behind its backward."""
    return [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]


def global_forward_hooks() -> list[Callable]:
    """Of every module."""
    return [*nn.modules.module._global_forward_hooks.values(), *nn.modules.module._global_forward_pre_hooks.values()]


def hook_numbers(module: nn.Module) -> tuple[int, ...]:
    """One of each hook, which no other hook in this process has. Asked of every module at each recorded step."""
    return (
        *module._forward_hooks,
        *module._forward_pre_hooks,
        *module._backward_hooks,
        *module._backward_pre_hooks,
    )
