"""Which kernel takes which call: the functions that fill the slots of the layers.

Each has the arguments of its definition in the flat file and returns None where the definition is to run: on a CPU,
where tensors are small, where modules do more than their class, where something traces or transforms the call. Eager
operations read and write all of their tensors, and autograd keeps what lies between: on a GPU a layer would spend as
long on them as on its GEMMs. Small tensors stay eager, where launches cost more than the memory.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn
from transformers.activations import ACT2FN

from .. import elementwise as definitions
from ..rg_lru import BlockDiagonalLinear
from ..rg_lru_scan_triton import triton_unavailable_reason
from .adapters import adapted_linears, adapted_outputs, read_adapter
from .block_diagonal import BlockDiagonalProduct
from .convolution import convolve_on_gpu
from .elementwise import LARGEST_ROW, triton_add_rms_norm, triton_gelu_gated, triton_rms_norm, triton_rotate
from .fallback import or_definition
from .flash_attention import attention_runs
from .gates import gates_unavailable_reason, rg_lru_gates
from .hooks import is_plain
from .linears import gelu_gated_linears, joined_linears
from .loss import KernelRowLosses


LEAST_ELEMENTS = 2**20  # of the first argument; below, a launch costs as much as the memory
GELU_TANH = type(ACT2FN["gelu_pytorch_tanh"])
_HERE = threading.local()


@contextlib.contextmanager
def small_tensors_pay() -> Iterator[None]:
    """In this thread, inside: tensors of any size leave the eager operations, as in a pass that is recorded.

    The host then starts no launches, and each one less is time of the GPU. Not for what is to have gradients.
    """
    before, _HERE.small = _small_pays(), True
    try:
        yield
    finally:
        _HERE.small = before


def _small_pays() -> bool:
    return getattr(_HERE, "small", False)


def pays(first: torch.Tensor, *others: object, least: int | None = None) -> bool:
    """Whether to leave the eager operations: large plain tensors on a GPU, outside other transformations.

    least: elements of a large one; None: LEAST_ELEMENTS, or 1 in `small_tensors_pay`.
    """
    if least is None:
        least = 1 if _small_pays() else LEAST_ELEMENTS
    return (
        first.is_cuda
        and first.numel() >= least
        and not torch.compiler.is_compiling()
        and triton_unavailable_reason(first) is None
        and all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in (first, *others) if isinstance(x, torch.Tensor))
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def as_autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """In the dtype that autocast gives to GEMMs."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    return triton_rms_norm(x, weight, eps) if pays(x, weight) and x.shape[-1] <= LARGEST_ROW else None


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not pays(residual, x, weight) or residual.shape[-1] > LARGEST_ROW:
        return None
    if x is not None and x.shape != residual.shape:
        return None  # a hook may return one mean for all tokens; kernels broadcast nothing
    return triton_add_rms_norm(x, residual, weight, eps)


def gated(act_fn: nn.Module, gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """One kernel for the activation of the paper's and DeepMind's models."""
    if not pays(gate, x) or not _is_plain_gelu(act_fn):
        return None
    alike = gate.shape == x.shape and torch.promote_types(gate.dtype, x.dtype) == x.dtype
    return triton_gelu_gated(gate, x) if alike else None


def _is_plain_gelu(act_fn: nn.Module) -> bool:
    return is_plain(act_fn, GELU_TANH) and is_gelu_tanh(act_fn)


def is_gelu_tanh(module: nn.Module) -> bool:
    """Whether it is the activation of the paper's and DeepMind's models, as Transformers makes it."""
    act = vars(module).get("act")
    return (
        type(module) is GELU_TANH
        and type(act) is partial
        and act.func is nn.functional.gelu
        and act.keywords == {"approximate": "tanh"}
    )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor | None:
    if not pays(x, cos, sin) or not x.shape[:2] == cos.shape[:2] == sin.shape[:2]:
        return None
    return triton_rotate(x, cos, sin)


def linears(x: torch.Tensor, *modules: nn.Module) -> tuple[torch.Tensor, ...] | None:
    if type(modules[0]) is not nn.Linear:
        return _with_adapters(x, modules)
    inputs = _plain_inputs(x, modules) if len(modules) > 1 else None  # alone, its own call is the fastest
    return None if inputs is None else joined_linears(*inputs)


def _with_adapters(x: torch.Tensor, modules: Sequence[nn.Module]) -> tuple[torch.Tensor, ...] | None:
    """Of layers that PEFT has put adapters of one dtype on; autocast would choose others for their products."""
    small = _small_pays()  # there on a CPU too: it is PyTorch's operations, only fewer
    if not (small or pays(x)) or torch.is_autocast_enabled(x.device.type):
        return None
    layers = []
    for module in modules:
        layer = read_adapter(module)
        if layer is None or layers and layer.down.dtype != layers[0].down.dtype:
            return None
        layers.append(layer)
    return adapted_outputs(x, layers) if small else adapted_linears(x, layers)


def gated_linears(act_fn: nn.Module, x: torch.Tensor, gate: nn.Module, up: nn.Module) -> torch.Tensor | None:
    if type(gate) is not nn.Linear:
        pair = _with_adapters(x, (gate, up))
        return None if pair is None else definitions.gated(act_fn, *pair)
    inputs = _plain_inputs(x, (gate, up)) if _is_plain_gelu(act_fn) else None
    if inputs is None or gate.bias is None or up.bias is None:
        return None
    return gelu_gated_linears(*inputs)


def _plain_inputs(x: torch.Tensor, modules: Sequence[nn.Module]) -> list[torch.Tensor | None] | None:
    """x, weights and biases in the GEMMs' dtype; None where the modules have to be called, or nothing is won."""
    if _small_pays() or not all(is_plain(module, nn.Linear) for module in modules):
        return None  # small: what joins narrow layers copies their weights
    inputs = [x, *(module.weight for module in modules), *(module.bias for module in modules)]
    return as_autocast(*inputs) if pays(*inputs) else None


def block_diagonal(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor | None:
    return BlockDiagonalProduct.apply(*as_autocast(x, weight, bias)) if pays(x, weight, bias) else None


def gates(
    x: torch.Tensor, recurrence_gate: nn.Module, input_gate: nn.Module
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    both = (recurrence_gate, input_gate)
    if not all(is_plain(gate, BlockDiagonalLinear) for gate in both):
        return None
    inputs = (x, *(parameter for gate in both for parameter in (gate.weight, gate.bias)))
    if not pays(*inputs):
        return None
    inputs = as_autocast(*inputs)
    if gates_unavailable_reason(*inputs) is not None:
        return None
    r, i, same = rg_lru_gates(*inputs)
    return r, i, same if same.dtype == x.dtype else x


def convolve_with_states(
    x: torch.Tensor,
    state: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    document_start: torch.Tensor | None,
    real: torch.Tensor | None,
    number: int,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    if not pays(x, state, weight, bias, document_start):
        return None
    return convolve_on_gpu(x, state, weight, bias, document_start, real, number)


def row_losses(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
    return KernelRowLosses.apply(logits, targets, ignore_index) if pays(logits) else None


SLOTS = {
    function.__name__: or_definition(function)
    for function in (
        *(rms_norm, add_rms_norm, gated, rotate, linears, gated_linears, block_diagonal, gates),
        *(convolve_with_states, row_losses),
    )
} | {"attention_runs": attention_runs}
