"""Local attention on a GPU: flash attention over runs of tokens, each with a window of its own.

A batch of documents, packed or padded, is a list of runs that attend to themselves only. Two kernels take them: ours in
Triton, the faster one where there are many tokens and every key has a query; and PyTorch's,
`torch.nn.attention.varlen`. No mask is built, nothing of size T x T or T x W is computed outside the kernels, and
nothing is compiled for a length.

Legend: B batch, H heads, H_kv key-value heads, T queries, S keys, K head dimension, W window, N runs.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from ..cache_layers import attention_layer, is_static, tokens_in_cache
from ..configuration_griffin import GriffinConfig
from ..documents import Documents
from ..gpu import properties
from ..local_attention import is_stock_sdpa
from .attention import Visible, local_attention_triton, triton_attention_unavailable_reason, visible_tokens
from .device.training import flash_refusal
from .fallback import FAILED, give_up


try:
    from torch.nn.attention.varlen import varlen_attn

    PARAMETERS = inspect.signature(varlen_attn).parameters
except ImportError:
    PARAMETERS = {}

logger = logging.get_logger(__name__)
LEAST_TOKENS = 2048  # below, launches cost as much as the attention, and PyTorch's kernel has fewer
TRIED_TOKENS = 256
DTYPES = (torch.float16, torch.bfloat16)
ENABLE_GQA = {"enable_gqa": True} if "enable_gqa" in PARAMETERS else {}  # before, the kernel was simply asked


class Runs(NamedTuple):
    """N runs of tokens that attend to themselves only, in the order of the flattened (B * T) tokens.

    window: W. queries, keys (N + 1,) int32: where each run starts, and the end. longest_queries, longest_keys: at least
    the length of the longest run; it is the number of blocks that are started, not of what is computed.
    """

    window: int
    queries: torch.Tensor
    keys: torch.Tensor
    longest_queries: int
    longest_keys: int


def flash_unavailable_reason(config: GriffinConfig, inputs_embeds: torch.Tensor, more_keys: bool = False) -> str | None:
    """None where local attention of this model can run as flash attention, else why not.

    more_keys: there are keys without a query, in front.
    """
    if not is_stock_sdpa(config):
        return f"attn_implementation is {config._attn_implementation!r}, not Transformers' own 'sdpa'"
    if torch.compiler.is_compiling():
        return "torch.compile traces the model, which cannot read the GPU's abilities"
    if not inputs_embeds.is_cuda or torch.version.hip is not None:
        return f"tokens are on {inputs_embeds.device.type}, not on an NVIDIA GPU"
    if (dtype := computed_in(inputs_embeds)) not in DTYPES:
        return f"attention is computed in {dtype}, flash attention in float16 and bfloat16"
    if config.attention_dropout:
        return f"attention_dropout is {config.attention_dropout}"
    if type(inputs_embeds) not in (torch.Tensor, torch.nn.Parameter):
        return f"tokens are {type(inputs_embeds).__name__}s"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms the model"
    if not more_keys and kernel_layout(config, inputs_embeds) is not None:
        return None
    return _varlen_unavailable_reason(config.head_dim, inputs_embeds.device)


def _varlen_unavailable_reason(head_dim: int, device: torch.device) -> str | None:
    if "window_size" not in PARAMETERS:
        return f"PyTorch {torch.__version__} has no torch.nn.attention.varlen with a window, 2.11 has"
    return flash_refusal(properties(device), head_dim)


def computed_in(x: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def runs_of_rows(shape: tuple[int, int], num_keys: int, window: int, device: torch.device) -> Runs:
    """Of B rows of one document each: T queries, the last of `num_keys` keys. Reads nothing from the GPU."""
    rows, length = shape
    queries = torch.arange(rows + 1, dtype=torch.int32, device=device)
    return Runs(window, queries * length, queries * num_keys, length, num_keys)


def edges_of_runs(start: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor | None:
    """(B, T), where runs start, of rows with several documents or padding, without a cache; padding has its own.

    start, real: (B, T), see `Documents`. None where padding stands inside a document: then it is no run. That is a
    question to the GPU; without padding there is none.
    """
    edge = start.clone()
    edge[:, 0] = True
    if real is not None:
        turns = real[:, 1:] != real[:, :-1]
        if bool((turns & real[:, 1:] & ~start[:, 1:]).any()):
            return None
        edge[:, 1:] |= turns
    return edge


def runs_of_edges(edge: torch.Tensor, window: int) -> Runs:
    """Waits for the GPU, since the number of runs is a size."""
    starts = edge.flatten().nonzero()[:, 0].int()
    starts = torch.cat([starts, starts.new_tensor([edge.numel()])])
    return Runs(window, starts, starts, edge.shape[1], edge.shape[1])


def flash_local_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: Runs,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query (B, H, T, K), key and value (B, H_kv, S, K) -> (B, T, H, K), and no weights."""
    output = varlen_attn(
        *_flat(query, key, value),
        runs.queries,
        runs.keys,
        runs.longest_queries,
        runs.longest_keys,
        scale=scaling,
        window_size=(runs.window - 1, 0),  # keys before the query's own, and after it
        **ENABLE_GQA,
    )
    return output.unflatten(0, (query.shape[0], query.shape[2])), None


def _flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """(B, H, T, K) -> (B * T, H, K)."""
    return [x.transpose(1, 2).flatten(0, 1) for x in tensors]


def attention_runs(
    config: GriffinConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    documents: Documents,
) -> Runs | Visible | None:
    """What flash attention takes in place of a mask; None where it cannot run, or for one token, which needs no mask.

    Behind a cache only rows of one document without padding are runs: how many of the cached keys belong to another
    document would have to be read from the GPU. Static caches hand over keys in an order of their own.
    """
    shape, window = inputs_embeds.shape[:2], config.attention_window_size
    if shape[1] == 1:
        return None
    past = tokens_in_cache(config, past_key_values)
    if (reason := flash_unavailable_reason(config, inputs_embeds, past > 0)) is not None:
        if inputs_embeds.is_cuda and is_stock_sdpa(config) and not is_tracing(documents.start):
            logger.warning_once(f"Local attention: a mask of all pairs in SDPA, not flash attention: {reason}")
        return None
    if is_static(past_key_values):
        return None
    simple = not documents.packed and documents.real is None
    if past and (not simple or (attention_mask is not None and not bool(attention_mask.all()))):
        return None
    layout = None if past else kernel_layout(config, inputs_embeds)
    if simple and layout is None:
        num_keys = shape[1]
        if past_key_values is not None:
            num_keys, _ = past_key_values.get_mask_sizes(shape[1], attention_layer(past_key_values))
        return runs_of_rows(shape, num_keys, window, inputs_embeds.device)
    if is_tracing(documents.start) and (documents.real is not None or layout is None):
        return None  # values would have to be read
    edge = edges_of_runs(documents.start, documents.real)
    if edge is None:
        return None
    return runs_of_edges(edge, window) if layout is None else layout(edge.flatten(), window)


def kernel_layout(config: GriffinConfig, inputs_embeds: torch.Tensor) -> Callable | None:
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


def visible_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: Visible,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value (B, H or H_kv, T, K) -> (B, T, H, K), and no weights; visible from `visible_tokens`."""
    tensors = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B * T, H, K)
    output = local_attention_triton(*tensors, visible, scaling)
    return output.unflatten(0, (query.shape[0], query.shape[2])), None
