"""What becomes of a kernel that does not compile or start on a user's GPU: PyTorch takes over, with one warning.

A failure forward is caught where it happens. One backward would come too late, since the graph is made: so the first
call that needs gradients is tried, forward and back, on tensors that autograd does not keep.
"""

import functools
import subprocess
from collections.abc import Callable

import torch
from transformers.utils import logging

from ..gpu import properties


logger = logging.get_logger(__name__)
FAILED: dict[tuple, str] = {}  # (name, device): how a kernel failed there
_TRIED: set[tuple] = set()  # (name, device, dtype, size) whose way back is known to run, or which no kernel takes
COMPILER_WORDS = ("Triton", "PassManager", "C compiler", "ptxas", "LLVM")  # in plain RuntimeErrors of Triton's
LARGE = 20  # bits of a number of elements, from which on sizes are not told apart


def is_kernel_failure(error: Exception) -> bool:
    """Whether a kernel did not compile or start, or its compiler is missing: what another way of computing mends.

    Not so when memory ran out or a kernel was wrong: for both PyTorch has subclasses of RuntimeError.
    """
    own = type(error).__module__.partition(".")[0] == "triton"
    plain = type(error) is RuntimeError and any(word in str(error) for word in COMPILER_WORDS)
    return own or plain or isinstance(error, (OSError, subprocess.SubprocessError))


def or_definition(function: Callable) -> Callable:
    """Decorator of what fills a slot: returns None, so that the definition runs, once one of its kernels has failed."""
    name = function.__name__

    @functools.wraps(function)
    def choose(*args, **kwargs):
        first = next((x for x in args if isinstance(x, torch.Tensor)), None)
        if first is None or not first.is_cuda or _is_transformed():
            return function(*args, **kwargs)
        if FAILED and (name, first.device) in FAILED:
            return None
        try:
            _try_backward(name, first, function, args, kwargs)
            return function(*args, **kwargs)
        except Exception as error:
            give_up(name, first.device, error)

    return choose


def _is_transformed() -> bool:
    """By torch.compile or torch.func: then no kernel is called here."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def give_up(name: str, device: torch.device, error: Exception) -> None:
    """Remembers the failure and says so once; raises what no definition would mend."""
    if not is_kernel_failure(error):
        raise error
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    FAILED[name, device] = reason
    logger.warning(
        f"{name}: a Triton kernel failed on {device} ({properties(device).name}), PyTorch runs from now on, exact but "
        f"slower: {reason}"
    )


def _try_backward(name: str, first: torch.Tensor, function: Callable, args: tuple, kwargs: dict) -> None:
    """Once for each dtype and class of size (small tensors are PyTorch's): forward and backward, both dropped."""
    key = (name, first.device, first.dtype, min(first.numel().bit_length(), LARGE + 1))
    if key in _TRIED or not torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing():
        return
    copies = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in args]
    inputs = [x for x in copies if isinstance(x, torch.Tensor) and x.requires_grad]
    if not inputs:
        return
    # Hooks of the caller's (checkpointing counts what is saved) are not to see this call.
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        outputs = function(*copies, **kwargs)
    _TRIED.add(key)
    if outputs is None:
        return
    outputs = [x for x in (outputs if isinstance(outputs, (tuple, list)) else (outputs,)) if x.requires_grad]
    torch.autograd.grad(outputs, inputs, [torch.zeros_like(x) for x in outputs], allow_unused=True)
