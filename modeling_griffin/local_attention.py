"""Attention over a window in O(T W): blocks of W queries against the at most 2 W keys that they can see.

Stock attention builds a mask of T x S pairs, 16 GiB at T = 131072, and most of its products are masked away.

Legend: B batch, H heads, H_kv key-value heads, T queries, S keys (the last T of them are the queries' own), K head
dimension, W window.
"""  # SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .slots import slot


class LocalMask(NamedTuple):
    """Which keys a query sees, as vectors: itself, and of the W - 1 keys before it the real ones of its document.

    window: W. number (B, S): of each key among the real tokens of its row. first (B, T): the number of the first token
    of each query's document. real (B, S) bool: not padding. None where there is one document, or no padding.
    """

    window: int
    number: torch.Tensor | None
    first: torch.Tensor | None
    real: torch.Tensor | None

    def block(self, queries: slice, keys: slice, device: torch.device) -> torch.Tensor:
        """(B or 1, 1, queries, keys) bool, True where a query sees a key; the last key is the last query's own."""
        num_queries, num_keys = queries.stop - queries.start, keys.stop - keys.start
        own = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        distance = own - torch.arange(num_keys, device=device)
        visible = ((distance >= 0) & (distance < self.window))[None]
        if self.first is not None:
            visible = visible & (self.number[:, None, keys] >= self.first[:, queries, None])
        if self.real is not None:
            visible = visible & self.real[:, None, keys]
        return (visible | (distance == 0))[:, None]  # padding sees itself, so that its softmax is a number


def local_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: LocalMask, scaling: float, dropout: float = 0.0, **kwargs: object,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """query (B, H, T, K), key and value (B, H_kv, S, K) with S - T < W -> (B, T, H, K), and no weights."""
    past, block = key.shape[2] - query.shape[2], attention_mask.window
    sizes = [min(block, query.shape[2] - start) for start in range(0, query.shape[2], block)]
    # Split, not sliced: the gradient of each slice would be a whole tensor, which makes the backward pass O(T^2).
    keys, values = (tensor.split([past, *sizes], dim=2) for tensor in (key, value))
    outputs, start = [], 0
    for i, queries in enumerate(query.split(sizes, dim=2)):
        end = start + sizes[i]
        seen = slice(past + start - keys[i].shape[2], past + end)
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                queries,
                *(_to_heads(torch.cat(pair[i : i + 2], dim=2), query.shape[1]) for pair in (keys, values)),
                attn_mask=attention_mask.block(slice(start, end), seen, query.device),
                dropout_p=dropout,
                scale=scaling,
            )
        )
        start = end
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _to_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, H_kv, S, K) -> (B, H, S, K); one key-value head is expanded without a copy."""
    if x.shape[1] == 1:
        return x.expand(-1, num_heads, -1, -1)
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def is_stock_sdpa(config: PreTrainedConfig) -> bool:
    """Whether attention is Transformers' SDPA, and not a function that somebody has registered under its name."""
    return config._attn_implementation == "sdpa" and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


@slot
def attention_runs(*arguments: object) -> tuple | None:
    """What the installed package's flash attention reads in place of a mask; None where there is none, as here."""
    return None


# What `read_layout` hands over in place of a mask says which attention can read it. The package adds its own.
OWN_ATTENTION: dict[type, Callable] = {LocalMask: local_attention}
