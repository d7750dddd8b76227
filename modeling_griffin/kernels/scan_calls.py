"""How the scan's kernels are called: as a node of autograd's own where nothing traces, else as PyTorch operators.

A registered operator costs the host several times as much a call. Where a kernel does not compile or start, the torch
backend takes over, with one warning.
"""

from collections.abc import Callable

import torch
from transformers.utils import logging

from ..gpu import properties
from ..rg_lru_scan_torch import rg_lru_scan_torch
from ..rg_lru_scan_triton import _OPERATORS, _backward, _forward
from .fallback import is_kernel_failure


logger = logging.get_logger(__name__)
FAILED: dict[torch.device, str] = {}  # devices on which a kernel of the scan failed, and how


PLAIN = (torch.Tensor, torch.nn.Parameter)


def scan_forward(operator: Callable, inputs: tuple, sequences: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden and last state; `operator` is what a compiler, a transformation or a mode is to see."""
    if _is_watched(*inputs):
        return forward_or_torch(operator, inputs, sequences)
    return _EagerScan.apply(*inputs, *sequences)


def _is_watched(*tensors: torch.Tensor | None) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or not all(x is None or (type(x) in PLAIN and not x.is_meta) for x in tensors)
    )


class _EagerScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        inputs, sequences = arguments[:6], arguments[6:]
        hidden, last_state = forward_or_torch(_forward, inputs, sequences)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, hidden, *sequences)
        return hidden, last_state

    @staticmethod
    def backward(ctx, d_hidden, d_last_state):
        saved = ctx.saved_tensors  # once: activation checkpointing computes them at each access
        d_hidden = torch.zeros_like(saved[6]) if d_hidden is None else d_hidden
        # With gradients of gradients the operator, which says that it has none.
        kernels = _OPERATORS.backward if torch.is_grad_enabled() else _backward
        *gradients, d_initial_state = backward_or_torch(kernels, d_hidden, d_last_state, *saved)
        return *gradients, None if saved[4] is None else d_initial_state, None, None, None


def forward_or_torch(kernels: Callable, inputs: tuple, sequences: tuple = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """kernels(*inputs, *sequences); after a failure `rg_lru_scan_torch` of the inputs, then and ever after.

    inputs: x, both gates, log_decay, initial_state, reset. sequences: further arguments, with which a failure raises.
    """
    device = inputs[0].device
    if torch.compiler.is_compiling():
        return kernels(*inputs, *sequences)
    if device not in FAILED:
        try:
            return kernels(*inputs, *sequences)
        except Exception as error:
            _remember(error, device, sequences)
    return rg_lru_scan_torch(*inputs)


def backward_or_torch(
    kernels: Callable, d_hidden: torch.Tensor, d_last_state: torch.Tensor, *saved: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """The gradients of x, both gates, log_decay and initial_state; saved: as `kernels` takes it, inputs first."""
    inputs, sequences = saved[:6], saved[7:]
    if inputs[0].device not in FAILED or any(each is not None for each in sequences):
        try:
            return kernels(d_hidden, d_last_state, *saved)
        except Exception as error:
            _remember(error, inputs[0].device, sequences)
    return _gradients(d_hidden, d_last_state, *inputs)


def _remember(error: Exception, device: torch.device, sequences: tuple) -> None:
    if not is_kernel_failure(error) or any(each is not None for each in sequences):
        raise error
    FAILED[device] = f"{type(error).__name__}: {error}"
    first_line = FAILED[device].splitlines()[0]
    logger.warning(
        f"RG-LRU scan: a Triton kernel failed on {device} ({properties(device).name}), the torch backend runs from now "
        f"on, exact but slower: {first_line}"
    )


def _gradients(d_hidden, d_last_state, *inputs) -> tuple[torch.Tensor, ...]:
    leaves = [None if x is None or x.dtype == torch.bool else x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        arguments = [*leaves[:5], inputs[5]]
        hidden, last_state = rg_lru_scan_torch(*arguments)
    d_last_state = torch.zeros_like(last_state) if d_last_state is None else d_last_state
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad((hidden, last_state), wanted, (d_hidden, d_last_state))
    return gradients if len(gradients) == 5 else (*gradients, torch.zeros_like(last_state))
