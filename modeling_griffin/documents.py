"""Where documents start and which tokens are padding: read once a forward pass, used by every layer.

A document starts at a token that is not padding and has position 0, or is the first real token of its row. Padding
starts nothing. The recurrence forgets its state there, the convolution does not look behind it, the attention neither.

Legend: B batch, T time (the tokens of this forward pass), S tokens that the cache has seen, W attention window.
"""  # SPDX-License-Identifier: Apache-2.0

from typing import NamedTuple

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.utils.import_utils import is_cuda_stream_capturing, is_tracing

from .cache_layers import attention_layer, cache_for_stock_masks, check_room, counts_tokens, is_static, tokens_in_cache
from .cache_name import takes_cache_by_either_name
from .configuration_griffin import GriffinConfig
from .local_attention import LocalMask, attention_runs, is_stock_sdpa
from .padding import Order, find_order, has_gap, in_order, read_mask


class Documents(NamedTuple):
    """start (B, T) bool: a document starts here. real (B, T) bool: not padding; None when no token is.

    packed: some document stands behind another one of its row. False spares the convolution and the attention their
    masks; while PyTorch traces, values cannot be read and it is True.
    order: for the attention, where padding stands among real tokens; None where it stands before them.
    """

    start: torch.Tensor
    real: torch.Tensor | None
    packed: bool
    order: Order | None = None


def read_layout(
    config: GriffinConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | dict | None,
    position_ids: torch.Tensor | None, past_key_values: Cache | None,
    cu_seq_lens_q: torch.Tensor | None = None, seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, Documents]:  # fmt: skip
    """From a user's arguments to the attention mask, the positions (B, T) and the documents that all layers share.

    Arguments as in `GriffinModel.forward`; attention_mask may also be what `masks_for_generate` returned.
    """
    attention_mask, position_ids, documents = read_rows(
        config, inputs_embeds, attention_mask, position_ids, past_key_values, cu_seq_lens_q, seq_idx
    )
    if isinstance(attention_mask, dict):  # from `masks_for_generate`
        return attention_mask.get("sliding_attention"), position_ids, documents
    seen = (config, inputs_embeds, attention_mask, past_key_values, position_ids, documents)
    if attention_mask is not None and "sliding_attention" in config.layer_types:
        seen = _with_padding_first(*seen)
        documents = documents._replace(order=seen[-1].order)
    return attention_mask_for_documents(*seen), position_ids, documents


def read_rows(
    config: GriffinConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | dict | None,
    position_ids: torch.Tensor | None, past_key_values: Cache | None,
    cu_seq_lens_q: torch.Tensor | None = None, seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor | dict | None, torch.Tensor, Documents]:  # fmt: skip
    """The same before attention: the user's mask, checked and on the device, the positions and the documents.

    inputs_embeds: only its shape (B, T, ...) and device are read.
    """
    shape, device = inputs_embeds.shape[:2], inputs_embeds.device
    attention_mask, position_ids, cu_seq_lens_q, seq_idx = (
        argument.to(device) if isinstance(argument, torch.Tensor) else argument
        for argument in (attention_mask, position_ids, cu_seq_lens_q, seq_idx)
    )
    past_length = tokens_in_cache(config, past_key_values)
    if past_key_values is not None and not is_tracing(inputs_embeds):
        check_room(config, past_key_values, past_length + shape[1])
    boundaries = packing_boundaries(cu_seq_lens_q, seq_idx, shape)
    if isinstance(attention_mask, dict):
        position_ids = read_position_ids(None, position_ids, boundaries, past_length, shape, device)
        packed = attention_mask.get("packed", True)
        documents = Documents(attention_mask["document_start"], attention_mask["linear_attention"], packed)
        return attention_mask, position_ids, documents
    if attention_mask is not None:
        attention_mask, known = read_mask(attention_mask), past_length == 0 or counts_tokens(config, past_key_values)
        _check_attention_mask(attention_mask, position_ids, past_length if known else None, shape)
    one_document = attention_mask is None and position_ids is None and boundaries is None
    position_ids = read_position_ids(attention_mask, position_ids, boundaries, past_length, shape, device)
    if one_document:  # known without reading values, which would stall a GPU
        documents = Documents(position_ids == 0, real=None, packed=False)
    else:
        documents = read_documents(attention_mask, position_ids, past_length, shape[1])
    return attention_mask, position_ids, documents


def _with_padding_first(config, inputs_embeds, attention_mask, past_key_values, position_ids, documents) -> tuple:
    """The same arguments as the attention sees them: with tokens where `documents.order` puts their keys."""
    length, num_keys = position_ids.shape[1], position_ids.shape[1]
    if past_key_values is not None:
        layer = attention_layer(past_key_values)
        if is_static(past_key_values):
            _check_gaps(config, attention_mask)
            return config, inputs_embeds, attention_mask, past_key_values, position_ids, documents
        num_keys, _ = past_key_values.get_mask_sizes(length, layer)
        attention_mask = in_order(attention_mask, attention_mask.shape[1] - length)
    if documents.real is not None and (order := find_order(attention_mask, length, num_keys)) is not None:
        documents = documents._replace(order=order)
        if order.queries is not None:
            attention_mask = in_order(attention_mask, attention_mask.shape[1])
            position_ids = position_ids.gather(1, order.queries)
            start, real = (tensor.gather(1, order.queries) for tensor in (documents.start, documents.real))
            documents = Documents(start, real, documents.packed, order)
    return config, inputs_embeds, attention_mask, past_key_values, position_ids, documents


def _check_gaps(config, attention_mask) -> None:
    """Static caches count slots: padding between real tokens takes some of the window."""
    if attention_mask.shape[1] <= config.attention_window_size or is_tracing(attention_mask):
        return
    if has_gap(attention_mask):
        raise ValueError(
            "attention_mask has padding between real tokens, in a static cache and beyond the window of "
            f"{config.attention_window_size}: allowed is padding before the real tokens, or a DynamicCache"
        )


@takes_cache_by_either_name
def masks_for_generate(
    config: GriffinConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | dict | None,
    past_key_values: Cache | None, position_ids: torch.Tensor | None = None, **kwargs: object,
) -> dict[str, torch.Tensor | None]:  # fmt: skip
    """What `generate` prepares outside a compiled forward pass: the masks, and where documents start."""
    mask, _, documents = read_layout(config, inputs_embeds, attention_mask, position_ids, past_key_values)
    return {"sliding_attention": mask, "linear_attention": documents.real, "document_start": documents.start}


def read_documents(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor, past_length: int, length: int
) -> Documents:
    """Finds starts and padding of the current T tokens.

    attention_mask: (B, S + T), 0 for padding; or None. position_ids: (B, T), positions within the document.
    past_length: S; of a Hawk's cache only whether it is above 0 counts. length: T.
    """
    if attention_mask is None:
        real = None
        seen = past_length + 1 + torch.arange(length, device=position_ids.device)
        seen = seen.expand(position_ids.shape[0], -1)
    else:
        mask = attention_mask.bool()
        real = mask[:, mask.shape[1] - length :]
        seen = mask.cumsum(-1)[:, mask.shape[1] - length :]
    first_of_row = seen == 1  # `seen` counts the real tokens of the row up to each token, itself included
    start = (position_ids == 0) | first_of_row
    start = start if real is None else start & real
    if is_tracing(start):
        return Documents(start, real, packed=True)
    if real is not None and bool(real.all()):
        real = None
    behind_another = position_ids < seen - 1  # fewer real tokens in its document so far than in its row
    if past_length:  # what starts anew has the cache's tokens before it, also where the mask leaves them out
        behind_another = behind_another | start
    behind_another = behind_another if real is None else behind_another & real
    return Documents(start, real, packed=bool(behind_another.any()))


def read_position_ids(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, boundaries: torch.Tensor | None,
    past_length: int, shape: tuple[int, int], device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """(B, T) positions within each document: as given, else from the packing, the padding, or the cache's length.

    Raises ValueError when `position_ids` contradict `boundaries`, see `packing_boundaries`.
    """
    batch, length = shape
    packed_ids = None if boundaries is None else _positions_in_packing(boundaries, attention_mask)
    if position_ids is not None:
        if position_ids.shape not in ((batch, length), (1, length), (length,)):
            raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}: allowed is {tuple(shape)}")
        position_ids = position_ids.expand(batch, -1)
        if packed_ids is not None and not is_tracing(position_ids):
            _check_packing(position_ids, packed_ids, attention_mask, past_length)
        return position_ids
    if packed_ids is not None:
        if past_length:
            raise ValueError("cu_seq_lens_q or seq_idx with tokens in the cache: allowed is only with position_ids too")
        return packed_ids
    if attention_mask is not None:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, attention_mask.shape[1] - length :]
    return torch.arange(length, device=device).expand(batch, -1) + past_length


def _positions_in_packing(boundaries: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, T): real tokens between each token and the boundary before it."""
    real = torch.ones_like(boundaries) if attention_mask is None else attention_mask[:, -boundaries.shape[1] :]
    before = real.long().cumsum(-1) - real.long()
    return before - torch.where(boundaries, before, 0).cummax(dim=1).values


def _check_packing(position_ids, packed_ids, attention_mask, past_length: int) -> None:
    contradicts = (position_ids == 0) != (packed_ids == 0)
    if attention_mask is not None:
        contradicts = contradicts & attention_mask[:, -contradicts.shape[1] :].bool()
    if contradicts[:, min(past_length, 1) :].any():  # behind a filled cache the first token may go on with a document
        raise ValueError(
            "position_ids contradict cu_seq_lens_q or seq_idx: allowed are positions that are 0 exactly where a "
            "document starts, or no position_ids"
        )


def packing_boundaries(
    cu_seq_lens_q: torch.Tensor | None, seq_idx: torch.Tensor | None, shape: tuple[int, int]
) -> torch.Tensor | None:
    """(B, T) bool, True at the first token of each packed document; None when neither argument is given.

    cu_seq_lens_q: (documents + 1,) int, where each document of the one row starts, and the end. seq_idx: (B, T) int,
    the number of the document each token belongs to.
    """
    if seq_idx is not None:
        if seq_idx.shape != shape:
            raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}: allowed is that of the tokens, {tuple(shape)}")
        return torch.cat([torch.ones_like(seq_idx[:, :1], dtype=torch.bool), seq_idx[:, 1:] != seq_idx[:, :-1]], dim=1)
    if cu_seq_lens_q is not None:
        if shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q comes with a batch of {shape[0]} rows: allowed is one flattened row")
        _check_offsets(cu_seq_lens_q, shape[1])
        starts = torch.zeros(shape[1] + 1, dtype=torch.bool, device=cu_seq_lens_q.device)
        return starts.index_fill(0, cu_seq_lens_q.long(), True)[None, :-1]  # the last entry is the row's end
    return None


def _check_offsets(cu_seq_lens_q: torch.Tensor, length: int) -> None:
    if cu_seq_lens_q.dim() != 1:
        raise ValueError(f"cu_seq_lens_q has shape {tuple(cu_seq_lens_q.shape)}: allowed is (documents + 1,)")
    if is_tracing(cu_seq_lens_q):
        return
    offsets = cu_seq_lens_q.tolist()
    if offsets[:1] != [0] or offsets[-1] != length or offsets != sorted(offsets):
        raise ValueError(f"cu_seq_lens_q = {offsets}: allowed are offsets from 0 up to the row's {length} tokens")


def attention_mask_for_documents(
    config: GriffinConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None,
    past_key_values: Cache | None, position_ids: torch.Tensor, documents: Documents,
) -> torch.Tensor | LocalMask | tuple | None:  # fmt: skip
    """The sliding-window mask in the form the chosen attention wants, with documents kept apart, cache or not.

    Stock masks see packing only without a cache and without a 2-D mask, hence the own mask function. Position_ids are
    not handed over: they would make the stock function renumber the tokens that ours counts.

    The window counts slots, so that padding has to stand before the real tokens. None for a Hawk; what
    `attention_runs` makes of runs of tokens, where flash attention can take them; a `LocalMask` where SDPA runs over
    more than two windows.
    """
    if "sliding_attention" not in config.layer_types:
        return None
    length = position_ids.shape[1]
    if (runs := attention_runs(config, inputs_embeds, attention_mask, past_key_values, documents)) is not None:
        return runs
    first_key, num_keys, first_query = 0, length, 0
    if past_key_values is not None:
        layer = attention_layer(past_key_values)
        num_keys, first_key = past_key_values.get_mask_sizes(length, layer)
        first_query = past_key_values.get_query_offset(layer)
    number = first = None
    if documents.packed:
        slots = max(first_key + num_keys, first_query + length)
        number, first = _numbers(attention_mask, position_ids, documents, slots, first_query)
    if _reaches_beyond_two_windows(config, length, past_key_values, position_ids):
        keys = slice(first_key, first_key + num_keys)
        number, real = (None if x is None else x[:, keys] for x in (number, attention_mask))
        return LocalMask(config.attention_window_size, number, first, None if real is None else real.bool())

    def same_document(batch_idx, head_idx, q_idx, kv_idx):
        return number[batch_idx, kv_idx] >= first[batch_idx, q_idx - first_query]

    return create_sliding_window_causal_mask(
        config,
        inputs_embeds,
        attention_mask,
        cache_for_stock_masks(past_key_values),  # by position: its name depends on the version of Transformers
        and_mask_function=same_document if documents.packed else None,
        allow_is_causal_skip=not (is_static(past_key_values) and length == 1),  # one token sees no empty slots
    )


def _reaches_beyond_two_windows(config, length: int, past_key_values, position_ids) -> bool:
    """Whether a mask of pairs would be the larger part of SDPA's work, where nothing asks for it.

    Where `torch.jit` traces, too: stock masks with a function of their own are built by vmap, which it cannot trace.
    Static caches hand over keys in an order of their own, and a traced loop over blocks would fix their number; what a
    CUDA graph records is fixed anyway.
    """
    if torch.jit.is_tracing():
        return is_stock_sdpa(config) and not is_static(past_key_values)
    return (
        not torch.compiler.is_compiling()  # it cannot trace the question whether a stream records, either
        and is_stock_sdpa(config)
        and length > 2 * config.attention_window_size  # a guard on the length where a compiler traces
        and not is_static(past_key_values)
        and not (is_tracing(position_ids) and not is_cuda_stream_capturing())
    )


def _numbers(attention_mask, position_ids, documents, slots: int, first_query: int):
    """The number among its row's real tokens (B, slots) of each slot, and (B, T) of the first of each query's document.

    A query sees the keys whose number is not below that of its document's first token.
    """
    if attention_mask is None:
        number = torch.arange(slots, device=position_ids.device).expand(position_ids.shape[0], -1)
    else:
        number = attention_mask.long().cumsum(-1) - 1
        number = torch.nn.functional.pad(number, (0, max(0, slots - number.shape[1])))
    query_number = number[:, first_query : first_query + position_ids.shape[1]]
    started = torch.where(documents.start, query_number, -1).cummax(dim=1).values
    # A document that started before this forward pass did so `position` real tokens ago.
    return number, torch.where(started >= 0, started, query_number - position_ids)


def _check_attention_mask(attention_mask, position_ids, past_length: int | None, shape: tuple[int, int]) -> None:
    """past_length: tokens in the cache; None for some that it does not count."""
    width, past = attention_mask.shape[1], "the" if past_length is None else past_length
    if past_length is None:
        fits = width > shape[1] or width == shape[1] and _begins_anew(attention_mask, position_ids)
    else:
        fits = width == past_length + shape[1]
    if attention_mask.shape[0] != shape[0] or not fits:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: allowed is ({shape[0]}, past + current tokens) "
            f"with {past} past and {shape[1]} current tokens"
        )


def _begins_anew(attention_mask, position_ids) -> bool:
    """Whether each row's first real token has position 0, as where `generate` reads a Hawk's conversation again."""
    if position_ids is None or is_tracing(position_ids):
        return position_ids is not None
    first = attention_mask.argmax(dim=1, keepdim=True)
    return not bool(position_ids.expand(attention_mask.shape[0], -1).gather(1, first).any())
