"""Padding: which tokens are real, and an attention window that counts them and not the slots between them.

In slots, padding between real tokens would take up the window, and push keys out of the cache that a later token still
sees. So keys are put in order, padding first and real tokens behind it: then W slots are W real tokens. What a cache of
growing layers keeps is always in this order; static caches have an order of their own and stay as they are.

Legend: B batch, H heads, T tokens of this forward pass, S tokens that the cache has seen, n keys, K head dimension.
"""  # SPDX-License-Identifier: Apache-2.0

from typing import Any, NamedTuple

import torch
from transformers.utils.import_utils import is_tracing


MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MASK_DTYPES += (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # others have no maximum in PyTorch


class Order(NamedTuple):
    """Where keys come from so that padding stands first: (B, n), the last T of them this forward pass's own.

    queries: (B, T), the same for queries, where a real token stands behind padding behind a real one. None where
    queries see right without it, and only what the cache keeps has to be put in order.
    """

    keys: torch.Tensor
    queries: torch.Tensor | None

    def of_states(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """query (B, H, T, K), key and value (B, H_kv, n, K) in order; `layer` of the cache, or None, keeps them so."""
        ordered = _take(key, self.keys), _take(value, self.keys)
        if layer is not None:
            layer.keys, layer.values = _last(layer.keys, ordered[0]), _last(layer.values, ordered[1])
        if self.queries is None:
            return query, key, value
        return _take(query, self.queries), *ordered

    def back(self, output: torch.Tensor) -> torch.Tensor:
        """(B, T, H, K) of ordered queries -> of the tokens as they were."""
        if self.queries is None:
            return output
        return _take(output.transpose(1, 2), inverse_of(self.queries)).transpose(1, 2)


def read_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, S + T) int64, 0 for padding and 1 for real tokens, of a mask that has any one number above 0 for these.

    Raises ValueError for what is no tensor of MASK_DTYPES in two dimensions; for several numbers in one mask: some
    packing tools number documents so, and Transformers' models would silently see across them; and for negative
    numbers, 0 for real in some masks. While PyTorch traces, values cannot be read, and what is not 0 is real.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dtype not in MASK_DTYPES:
        found = f"attention_mask is a {type(attention_mask).__name__} of {getattr(attention_mask, 'dtype', 'no dtype')}"
        raise ValueError(f"{found}: allowed are tensors of bool, uint8, int8 to int64, or floats from 16 bits")
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: allowed is (batch, past + current tokens); a "
            "recurrence cannot follow a mask of query-key pairs. For packed documents pass position_ids"
        )
    real = attention_mask != 0
    if attention_mask.dtype != torch.bool and attention_mask.numel() and not is_tracing(attention_mask):
        largest = attention_mask.max()
        if not bool(((attention_mask == largest) | ~real).all() & (largest >= 0)):
            raise ValueError(
                f"attention_mask has the values {attention_mask.unique()[:5].tolist()}: allowed are 0 for padding and "
                "one number above it; for packed documents pass position_ids or seq_idx"
            )
    return real.long()


def in_order(attention_mask: torch.Tensor, past_length: int) -> torch.Tensor:
    """The mask (B, S + T) with the past as caches keep it, padding first."""
    past, current = attention_mask.split([past_length, attention_mask.shape[1] - past_length], dim=1)
    empty = past_length - past.sum(1, keepdim=True)
    past = (torch.arange(past_length, device=past.device) >= empty).to(current.dtype)
    return torch.cat([past, current], dim=1)


def find_order(attention_mask: torch.Tensor, length: int, num_keys: int) -> Order | None:
    """How to put the last `num_keys` slots of an `in_order` mask in order; None where they are.

    length: T. While PyTorch traces, values cannot be read and there is always an order.
    """
    real = attention_mask[:, attention_mask.shape[1] - num_keys :]
    queries, keys = zeros_first(real[:, num_keys - length :]), zeros_first(real)
    if not is_tracing(attention_mask):
        begins = (real[:, 1:] > real[:, :-1]).sum(1) + real[:, 0]
        ends = (real[:, 1:] < real[:, :-1]).any()
        has_gap, is_out_of_order = torch.stack([(begins > 1).any(), ends]).tolist()
        if not is_out_of_order:
            return None
        queries = queries if has_gap else None
    return Order(keys, queries)


def zeros_first(number: torch.Tensor) -> torch.Tensor:
    """(B, T) of zeros and ones -> the order that puts zeros first, each kind as it was: (B, T), where each comes from.

    By counting: a stable sort does the same, but not every runtime of exported models has one.
    """
    zero = 1 - number
    place = torch.where(number == 0, zero.cumsum(1), zero.sum(1, keepdim=True) + number.cumsum(1)) - 1
    return inverse_of(place)


def inverse_of(order: torch.Tensor) -> torch.Tensor:
    """(B, T): where each place of an order has gone to."""
    place = torch.arange(order.shape[1], device=order.device)
    return torch.zeros_like(order).scatter(1, order, place.expand_as(order))


def has_gap(attention_mask: torch.Tensor) -> bool:
    """Whether a real token of some row stands behind padding behind a real one."""
    begins = (attention_mask[:, 1:] > attention_mask[:, :-1]).sum(1) + attention_mask[:, 0]
    return bool((begins > 1).any())


def _take(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x[b, h, order[b, i]] for x (B, H, n, K) and order (B, n)."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _last(kept: torch.Tensor, ordered: torch.Tensor) -> torch.Tensor:
    """What a cache layer keeps, with its last n slots in order; while it records its past it keeps more than n."""
    older = kept.shape[2] - ordered.shape[2]
    return torch.cat([kept[:, :, :older], ordered], dim=2) if older > 0 else ordered[:, :, -kept.shape[2] :]
