"""Local attention on a GPU from Ampere on: causal, over a window, within runs of tokens, forward and backward.

What a token sees is two numbers, the first and the last token: rows, packed documents and padding need no more, and
nothing of the kernels depends on how many runs there are. `attention_kernels` has the kernels; this file
launches and tells autograd; `device.training` has the tiles.

The gradients take two kernels and so seven products, not five: one that computes all at once holds keys and would add
to the queries' gradient of other programs, by atomics, whose order and so whose rounding changes from run to run, and
through nine times the memory at a window of 1024. Apart, both keep their sums in registers. Keys and values have a
gradient for each of their heads, summed over the query heads inside of the kernel.

Legend: N tokens of all rows, H query heads, H_kv key-value heads, K head dimension, W window.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..gpu import ceil_div, multiprocessors, properties, register_limit
from .device import training
from .device.training import ATTENTION_BLOCK as BLOCK
from .device.training import AttentionTile as Tile
from .device.training import attention_refusal, first_that_fits
from .launch import launch, power_of_2


try:
    import triton

    from .attention_kernels import (
        forward_kernel,
        key_gradients_kernel,
        query_gradient_kernel,
        sum_of_parts_kernel,
    )
except ImportError:
    triton = None

DTYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
LOG2_E = 1.4426950408889634


class Visible(NamedTuple):
    """What each of N tokens sees and is seen by, the same for all layers. Both vectors never fall.

    first, last (N,) int32: the first token that it sees, up to itself, and the last one that sees it. query_blocks,
    key_blocks: the numbers of all blocks of BLOCK tokens, those with most to do first, so that no multiprocessor starts
    a long one when the others are done.
    """

    first: torch.Tensor
    last: torch.Tensor
    query_blocks: torch.Tensor
    key_blocks: torch.Tensor


def visible_tokens(edge: torch.Tensor, window: int) -> Visible:
    """Of N tokens in runs, `edge` (N,) bool where one starts; the first token starts one. Reads no values."""
    count = edge.numel()
    token = torch.arange(count, dtype=torch.int32, device=edge.device)
    start_of_run = torch.where(edge, token, 0).cummax(0).values
    next_start = torch.where(edge, token, count).flip(0).cummin(0).values.flip(0)[1:]
    end_of_run = torch.cat([next_start, next_start.new_full((min(1, count),), count)]) - 1
    first = torch.maximum(start_of_run, token - (window - 1)).int()
    last = torch.minimum(end_of_run, token + (window - 1)).int()
    start = token[::BLOCK]
    stop = (start + (BLOCK - 1)).clamp(max=count - 1)
    return Visible(first, last, _most_first(stop - first[start]), _most_first(last[stop] - start))


def _most_first(work: torch.Tensor) -> torch.Tensor:
    return work.argsort(descending=True, stable=True).int()


def triton_attention_unavailable_reason(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """None where `local_attention_triton` can run, else why not."""
    if triton is None:
        return "Triton is not installed"
    if head_dim % 8 or head_dim > LARGEST_HEAD:
        return f"head_dim is {head_dim}, the kernels take multiples of 8 up to {LARGEST_HEAD}"
    if dtype not in DTYPES:
        return f"dtype is {dtype}, the kernels take float16 and bfloat16"
    return attention_refusal(head_dim, properties(device))


@torch.compiler.disable  # a compiled layer calls it as it is
def local_attention_triton(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: Visible, scaling: float
) -> torch.Tensor:
    """Softmax attention of each token over the tokens visible[0] to itself, with sums in float32, rounded once.

    Gradients are deterministic. Second derivatives raise.

    Args:
        query: (N, H, K), float16 or bfloat16; `triton_attention_unavailable_reason` must be None.
        key, value: (N, H_kv, K), in the dtype of query; H_kv divides H.
        visible: from `visible_tokens`.
        scaling: of the scores, above 0.

    Returns:
        (N, H, K) in the dtype of query.
    """
    if scaling <= 0:
        raise ValueError(f"scaling is {scaling}: allowed is a number above 0")
    return _LocalAttention.apply(query, key, value, *visible, scaling)


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, first, last, query_blocks, key_blocks, scaling):
        query, key, value = (x.contiguous() for x in (query, key, value))
        out, lse = attention_forward(query, key, value, first, query_blocks, scaling)
        ctx.save_for_backward(query, key, value, out, lse, first, last, query_blocks, key_blocks)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        query, key, value, out, lse, first, last, query_blocks, key_blocks = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_query, delta = query_gradient(query, key, value, out, d_out, lse, first, query_blocks, ctx.scaling)
        d_key = d_value = None
        if any(ctx.needs_input_grad[1:3]):
            d_key, d_value = key_gradients(query, key, value, d_out, lse, delta, first, last, key_blocks, ctx.scaling)
        return d_query, d_key, d_value, None, None, None, None, None


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: torch.Tensor,
    blocks: torch.Tensor,
    scaling: float,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and log2 of each softmax's denominator (H, N). All tensors of this and the next two contiguous."""
    tile = tile or _packed(_tile(training.ATTENTION_FORWARD, query), query, key)
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1::-1], dtype=torch.float32)
    arguments = (query, key, value, first, blocks, out, lse, len(query), scaling * LOG2_E)
    _launch_on_queries(forward_kernel, tile, arguments)
    return out, lse


def query_gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    d_out: torch.Tensor,
    lse: torch.Tensor,
    first: torch.Tensor,
    blocks: torch.Tensor,
    scaling: float,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """d_query, and delta (H, N): what each row of the scores' gradients has subtracted."""
    tile = tile or _packed(_tile(training.ATTENTION_QUERY_GRADIENT, query), query, key)
    d_query, delta = torch.empty_like(query), torch.empty_like(lse)
    arguments = (query, key, value, out, d_out, lse, first, blocks, d_query, delta, len(query))
    _launch_on_queries(query_gradient_kernel, tile, (*arguments, scaling * LOG2_E, scaling))
    return d_query, delta


def _launch_on_queries(kernel, tile: Tile, arguments) -> None:
    query, key = arguments[:2]
    tokens, heads, dim = query.shape
    programs = ceil_div(tokens, BLOCK) * (BLOCK // tile.held) * (heads // tile.pack)
    if not programs:
        return
    launch(
        kernel,
        (programs,),
        *arguments,
        *(heads, key.shape[1], dim, _padded(query), BLOCK, tile.pack, tile.held, tile.walked),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **register_limit(tile.max_registers, query.device),
    )


def key_gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    d_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    blocks: torch.Tensor,
    scaling: float,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """d_key and d_value."""
    tile = tile or _tile(training.ATTENTION_KEY_GRADIENTS, query)
    (tokens, heads, dim), key_heads = query.shape, key.shape[1]
    blocks_of_heads = ceil_div(tokens, BLOCK) * key_heads
    at_once = _heads_at_once(heads // key_heads, blocks_of_heads, query.device)
    parts = ceil_div(heads // key_heads, at_once)
    shape = (2, parts, *key.shape) if parts > 1 else (2, *key.shape)
    gradients = key.new_empty(shape, dtype=torch.float32 if parts > 1 else key.dtype)
    if blocks_of_heads:
        arguments = (query, key, value, d_out, lse, delta, first, last, blocks, *gradients, tokens, at_once, parts)
        launch(
            key_gradients_kernel,
            (blocks_of_heads * (BLOCK // tile.held) * parts,),
            *(*arguments, scaling * LOG2_E, scaling),
            *(heads, key_heads, dim, _padded(query), BLOCK, tile.held, tile.walked),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **register_limit(tile.max_registers, query.device),
        )
    return tuple(gradients.unbind(0)) if parts == 1 else tuple(_sum_of_parts(x, key) for x in gradients)


def _heads_at_once(group: int, blocks: int, device: torch.device) -> int:
    """How many query heads of a group one program adds up: all, if there are programs enough."""
    return min(group, max(1, ceil_div(group * blocks, training.ATTENTION_PROGRAMS * multiprocessors(device))))


def _sum_of_parts(parts: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    total = torch.empty_like(key)
    if total.numel():
        grid = (ceil_div(total.numel(), 1024),)
        launch(sum_of_parts_kernel, grid, parts, total, total.numel(), len(parts), 1024)
    return total


def _tile(table: dict[int, list[Tile]], query: torch.Tensor) -> Tile:
    return first_that_fits(table[_padded(query)], properties(query.device))


def _padded(query: torch.Tensor) -> int:
    return max(64, power_of_2(query.shape[-1]))


def _packed(tile: Tile, query: torch.Tensor, key: torch.Tensor) -> Tile:
    """`tile`, or with one head at a time where a group has an odd number of them."""
    group = query.shape[1] // key.shape[1]
    return tile if group % tile.pack == 0 else tile._replace(pack=1, held=tile.held * tile.pack)
