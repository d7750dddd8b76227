"""Which kernel takes which call: the functions that fill the slots of the layers.

Each has the arguments of its definition in the flat file and returns None where the definition is to run: on a CPU,
where tensors are small, where modules do more than their class, where something traces or transforms the call. Eager
operations read and write all of their tensors, and autograd keeps what lies between: on a GPU a layer would spend as
long on them as on its GEMMs. Small tensors stay eager, where launches cost more than the memory.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..flash_local_attention import computed_in
from ..rg_lru import BlockDiagonalLinear
from ..rg_lru_scan_triton import triton_unavailable_reason
from .attention import local_attention_triton, triton_attention_unavailable_reason, visible_tokens
from .block_diagonal import BlockDiagonalProduct
from .convolution import convolve_on_gpu
from .elementwise import LARGEST_ROW, triton_add_rms_norm, triton_gelu_gated, triton_rms_norm, triton_rotate
from .fallback import FAILED, give_up, or_definition
from .gates import gates_unavailable_reason, rg_lru_gates
from .linears import gelu_gated_linears, joined_linears
from .loss import KernelRowLosses


LEAST_ELEMENTS = 2**20  # of the first argument; below, a launch costs as much as the memory
LEAST_TOKENS = 2048  # of attention; below, launches cost as much as the attention, and PyTorch's kernel has fewer
TRIED_TOKENS = 256
GELU_TANH = type(ACT2FN["gelu_pytorch_tanh"])


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


def is_plain(module: nn.Module, cls: type) -> bool:
    """Whether calling the module does no more than the forward of its class.

    Not so for what PEFT and parametrizations put in its place, nor with hooks, which may bring the weights (ZeRO-3,
    offloading to the CPU, the latter by a `forward` of the instance) or want to see the result.
    """
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return (
        type(module) is cls
        and "forward" not in vars(module)
        and not any(hooks)
        and not nn.modules.module._has_any_global_hook()
    )


def as_autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """In the dtype that autocast gives to GEMMs."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def rms_norm(x, weight, eps):
    if pays(x, weight) and x.shape[-1] <= LARGEST_ROW:
        return triton_rms_norm(x, weight, eps)


def add_rms_norm(x, residual, weight, eps):
    if pays(residual, x, weight) and residual.shape[-1] <= LARGEST_ROW:
        return triton_add_rms_norm(x, residual, weight, eps)


def gated(act_fn, gate, x):
    """One kernel for the activation of the paper's and DeepMind's models."""
    if isinstance(act_fn, GELU_TANH) and pays(gate, x):
        return triton_gelu_gated(gate, x)


def rotate(x, cos, sin):
    if pays(x, cos, sin):
        return triton_rotate(x, cos, sin)


def linears(x, *modules):
    inputs = _plain_inputs(x, modules)
    return None if inputs is None else joined_linears(*inputs)


def gated_linears(act_fn, x, gate, up):
    inputs = _plain_inputs(x, (gate, up)) if isinstance(act_fn, GELU_TANH) else None
    if inputs is not None and gate.bias is not None and up.bias is not None:
        return gelu_gated_linears(*inputs)


def _plain_inputs(x: torch.Tensor, modules: Sequence[nn.Module]) -> list[torch.Tensor | None] | None:
    """x, weights and biases in the GEMMs' dtype; None where the modules have to be called, or nothing is won."""
    if not all(is_plain(module, nn.Linear) for module in modules):
        return None
    inputs = [x, *(module.weight for module in modules), *(module.bias for module in modules)]
    return as_autocast(*inputs) if pays(*inputs) else None


def block_diagonal(x, weight, bias):
    if pays(x, weight, bias):
        return BlockDiagonalProduct.apply(*as_autocast(x, weight, bias))


def gates(x, recurrence_gate, input_gate):
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


def convolve_with_states(x, state, weight, bias, document_start, real, number):
    if pays(x, state, weight, bias, document_start):
        return convolve_on_gpu(x, state, weight, bias, document_start, real, number)


def row_losses(logits, targets, ignore_index):
    if pays(logits):
        return KernelRowLosses.apply(logits, targets, ignore_index)


def kernel_layout(config, inputs_embeds) -> Callable | None:
    """Of a model that flash attention can run: runs without further keys are the Triton kernels'."""
    dtype, device = computed_in(inputs_embeds), inputs_embeds.device
    if inputs_embeds.shape[:2].numel() < LEAST_TOKENS:
        return None
    if triton_attention_unavailable_reason(config.head_dim, dtype, device) is not None:
        return None
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    return visible_tokens if device.type != "cuda" or _attention_runs(heads, dtype, device) else None


@functools.cache
def _attention_runs(heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> bool:
    """Tried on a few tokens, forward and back: the layout is chosen long before the kernels are called."""
    heads, key_heads, head_dim = heads
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)  # the caller's are not to see this
    try:
        with torch.inference_mode(False), torch.enable_grad(), hooks:
            new = {"dtype": dtype, "device": device, "requires_grad": True}
            query = torch.zeros(TRIED_TOKENS, heads, head_dim, **new)
            key = torch.zeros(TRIED_TOKENS, key_heads, head_dim, **new)
            edge = torch.zeros(TRIED_TOKENS, dtype=torch.bool, device=device)
            visible = visible_tokens(edge, TRIED_TOKENS)
            out = local_attention_triton(query, key, key, visible, head_dim**-0.5)
            torch.autograd.grad(out, (query, key), torch.zeros_like(out))
    except Exception as error:
        give_up("local_attention", device, error)
    return ("local_attention", device) not in FAILED


def visible_attention(module, query, key, value, visible, scaling: float, **kwargs) -> tuple[torch.Tensor, None]:
    """query, key, value (B, H or H_kv, T, K) -> (B, T, H, K), and no weights; visible from `visible_tokens`."""
    tensors = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B * T, H, K)
    output = local_attention_triton(*tensors, visible, scaling)
    return output.unflatten(0, (query.shape[0], query.shape[2])), None


SLOTS = {
    function.__name__: or_definition(function)
    for function in (
        *(rms_norm, add_rms_norm, gated, rotate, linears, gated_linears, block_diagonal, gates),
        *(convolve_with_states, row_losses),
    )
} | {"kernel_layout": kernel_layout}
