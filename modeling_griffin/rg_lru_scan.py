"""`rg_lru_scan`: the one entry to the recurrence, which chooses how it runs."""  # SPDX-License-Identifier: Apache-2.0

import torch
from transformers.utils import logging

from .rg_lru_scan_reference import rg_lru_scan_reference
from .rg_lru_scan_torch import rg_lru_scan_torch
from .rg_lru_scan_triton import rg_lru_scan_triton, triton_unavailable_reason
from .slots import require_slot, slot


logger = logging.get_logger(__name__)


@slot
def rg_lru_scan_by_torch(*inputs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The torch backend. The package's is one operator where a compiler traces, whatever the length."""
    return rg_lru_scan_torch(*inputs)


BACKENDS = {"reference": rg_lru_scan_reference, "torch": rg_lru_scan_by_torch, "triton": rg_lru_scan_triton}


def rg_lru_scan(
    x: torch.Tensor,
    recurrence_gate: torch.Tensor,
    input_gate: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The Real-Gated Linear Recurrent Unit over a sequence (De et al. 2024, arXiv 2402.19427, equations 3 to 6).

        log a_t = log_decay * sigmoid(recurrence_gate_t)
        h_t     = a_t * h_{t-1} + sqrt(1 - a_t^2) * sigmoid(input_gate_t) * x_t
        h_t     = sigmoid(input_gate_t) * x_t                                       where reset

    Shapes: B batch, T time (0 and 1 included), C channels, N sequences.

    Args:
        x: (B, T, C), any floating dtype.
        recurrence_gate, input_gate: (B, T, C), any floating dtype; pre-activations, the sigmoid is taken here.
        log_decay: (C,), <= 0, float32: -c * softplus(Λ), the log of a^c.
        initial_state: (B, C), h before the first step; None means zeros.
        reset: (B, T) bool, True where a document starts: the state is forgotten and the input not scaled.
        cu_seqlens: (N + 1,) int32 or int64, on the device of x. Then x is (1, T, C) and holds N sequences end to end,
            sequence n from token cu_seqlens[n] to before cu_seqlens[n + 1], of any lengths, 0 too; initial_state and
            last_state are (N, C), and an empty sequence hands its state on. Never read by the host on a GPU. What comes
            out behind the last sequence is finite and means nothing. One token each: x.view(N, 1, C) does the same.
        starts: (N,) bool, which sequences start at their first token, as at a reset, whatever their initial_state
            holds; the others go on from it. None means all. Only with cu_seqlens.
        backend: "reference" (a loop), "torch" (any device), "triton" (GPU), or None to choose.

    Returns:
        hidden (B, T, C) in the dtype of x, and last_state (B, C), or (N, C), in float32 (float64 where x is float64).

    Raises:
        ValueError: naming the argument, for a wrong shape, dtype or backend, or a log_decay above 0. The values of
            log_decay are read only on a CPU and outside `torch.compile`: on a GPU that would stall the stream at every
            layer. There, a channel whose log_decay is above 0 becomes NaN (the square root of a negative number).

    All arithmetic is in float32 (float64 where x is float64), whatever the dtype and autocast. Differentiable in x,
    both gates, log_decay and initial_state, through both results; the derivative of the square root is bounded at
    1000. A padding step is x = 0 with recurrence_gate = -inf: it carries h exactly, and gradients stay finite.
    Second derivatives: see the backends; "triton" raises. Forward-mode derivatives are those of "reference", which runs
    where they are taken.
    """
    _check(x, recurrence_gate, input_gate, log_decay, initial_state, reset, cu_seqlens, starts)
    if backend is None and _in_forward_mode():
        backend = "reference"
    elif backend is None:
        reason = triton_unavailable_reason(x)
        backend = "triton" if reason is None else "torch"
        if reason is not None and x.is_cuda and not torch.compiler.is_compiling():
            logger.warning_once(f"RG-LRU scan: the torch backend runs on {x.device}, not the Triton kernels: {reason}")
    elif backend not in list(BACKENDS):
        raise ValueError(f"backend = {backend!r}: allowed are {sorted(BACKENDS)} and None")
    elif backend == "triton" and (reason := triton_unavailable_reason(x)) is not None:
        raise ValueError(f"backend = 'triton' cannot run: {reason}; allowed here are 'reference', 'torch' and None")
    inputs = (x, recurrence_gate, input_gate, log_decay, initial_state, reset)
    if cu_seqlens is None:
        return BACKENDS[backend](*inputs)
    if backend == "triton":
        return rg_lru_scan_triton(*inputs, cu_seqlens, starts)
    return require_slot("scan_sequences")(BACKENDS[backend], *inputs, cu_seqlens, starts)


def describe_backend(device: torch.device | str) -> str:
    """One line for a person: which backend runs on `device`, and why."""
    reason = triton_unavailable_reason(torch.empty(0, device=device))
    if reason is None:
        return f"RG-LRU scan: triton on {device}, one fused kernel each way"
    return f"RG-LRU scan: torch on {device}, linear in time; the triton kernels do not run: {reason}"


def _check(x, recurrence_gate, input_gate, log_decay, initial_state, reset, cu_seqlens, starts) -> None:
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"x is a {type(x).__name__}: allowed is a tensor (batch, time, channels)")
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}: allowed is (batch, time, channels)")
    if cu_seqlens is not None:
        require_slot("check_sequences")(cu_seqlens, starts, x)
    elif starts is not None:
        raise ValueError("starts without cu_seqlens: allowed are both; rows of a batch start by `reset`")
    batch, length, channels = x.shape
    states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shapes = {
        "recurrence_gate": (recurrence_gate, (batch, length, channels)),
        "input_gate": (input_gate, (batch, length, channels)),
        "log_decay": (log_decay, (channels,)),
        "initial_state": (initial_state, (states, channels)),
        "reset": (reset, (batch, length)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None and name in ("initial_state", "reset"):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}: allowed is a tensor {shape}")
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: allowed is {shape} for x of {tuple(x.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}: allowed is the device of x, {x.device}")
        if name != "reset" and not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}: allowed are floating dtypes")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: allowed are floating dtypes")
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"reset has dtype {reset.dtype}: allowed is torch.bool")
    if log_decay.device.type == "cpu" and not torch.compiler.is_compiling() and _is_above_zero(log_decay):
        raise ValueError(f"log_decay has {log_decay.max().item()}: allowed are values <= 0, it is -c * softplus(Λ)")


def _in_forward_mode() -> bool:
    """Whether any forward-mode derivative is being taken: under `torch.func`, tensors do not show their tangents."""
    return not torch.compiler.is_compiling() and getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


@torch.no_grad()
def _is_above_zero(log_decay: torch.Tensor) -> bool:
    try:
        return bool((log_decay > 0).any())
    except RuntimeError:  # under torch.func.vmap and while tracing, a value cannot be read
        return False
