"""What a rank has to know of whole rows: its chunk, where documents start in it, and what lies in front of it.

Every rank is given the whole rows, of which only numbers are read, so that nothing about them has to be sent.

Legend: B batch, T tokens of the rows, L tokens of a chunk, N ranks, W attention window.
"""

from typing import Any

import torch
from torch.nn.functional import pad

from ..configuration_griffin import GriffinConfig
from ..documents import Documents, attention_mask_for_documents, read_rows
from .neighbours import Ranks


class ChunkLayout:
    """Handed to every layer in place of the attention mask.

    chunk: L. reach: the tokens of the rows that stand in front of the chunk, at most W - 1; they and the chunk are what
    `mask` is about, in the form that the model's attention wants. history (B,): real tokens in front of the chunk that
    belong to the document which the chunk goes on with; None where that is known: all. tails (B, N'): for each rank
    on the left its number of real tokens; None where there is no padding.
    """

    def __init__(self, chunk: int, reach: int, mask: Any, history: torch.Tensor | None, tails: torch.Tensor | None):
        self.chunk, self.reach, self.mask, self.history, self.tails = chunk, reach, mask, history, tails
        self.layers = {}  # the attention layer that has started, by its number


def chunk_length(length: int, ranks: int) -> int:
    """Tokens of each rank; the last ranks may hold fillers behind the end of the rows, which nothing sees."""
    return -(-length // ranks)


def take_chunk(tensor: torch.Tensor, ranks: Ranks, filler: float = 0) -> torch.Tensor:
    """This rank's part of (B, T, ...), filled up with `filler` behind the end: (B, L, ...)."""
    chunk = chunk_length(tensor.shape[1], ranks.size)
    part = tensor[:, ranks.rank * chunk : (ranks.rank + 1) * chunk]
    return pad(part, (0, 0) * (tensor.dim() - 2) + (0, chunk - part.shape[1]), value=filler)


def read_chunk(
    config: GriffinConfig, whole: torch.Tensor, like: torch.Tensor, ranks: Ranks, before: int, **arguments: Any
) -> tuple["ChunkLayout", torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(ChunkLayout, positions (B, L), document starts (B, L), real (B, L) or None) of this rank.

    Args:
        whole: (B, T, ...), of which the shape is read. like: (B, L, D), the chunk's embeddings: dtype and device.
        before: tokens that were read before the rows, in one document with them.
        arguments: `attention_mask`, `position_ids`, `cu_seq_lens_q`, `seq_idx` of the whole rows, or None.
    """
    batch, length = whole.shape[:2]
    rows = like.new_empty(batch, length, 0)
    _, positions, documents = read_rows(config, rows, past_key_values=None, **arguments)
    if before:
        positions, documents = positions + before, documents._replace(start=torch.zeros_like(documents.start))
    _check_gaps(config, documents)
    chunk = chunk_length(length, ranks.size)
    positions, documents = _filled(positions, documents, ranks.size * chunk - length)
    begin, end = ranks.rank * chunk, (ranks.rank + 1) * chunk
    history = tails = None
    if documents.packed or documents.real is not None:
        history = _history(documents, begin)
    if documents.real is not None:
        tails = documents.real[:, :begin].unflatten(1, (-1, chunk)).sum(-1) if begin else history[:, None][:, :0]
    reach = min(config.attention_window_size - 1, begin + before)
    mask = _mask(config, like, positions, documents, begin - reach, end)
    start = documents.start[:, begin:end]
    real = None if documents.real is None else documents.real[:, begin:end]
    return ChunkLayout(chunk, reach, mask, history, tails), positions[:, begin:end], start, real


def _check_gaps(config: GriffinConfig, documents: Documents) -> None:
    """Raises ValueError where a window of tokens is not one of slots: what is sent to the right is one of slots."""
    if documents.real is None or "sliding_attention" not in config.layer_types:
        return
    real, window = documents.real.bool(), config.attention_window_size
    slots = torch.arange(real.shape[1], device=real.device).expand_as(real)
    begin = torch.where(documents.start.bool(), slots, 0).cummax(1).values  # of each token's document
    skipped = (~real).cumsum(1)
    if bool((real & (slots - begin >= window) & (skipped > skipped.gather(1, begin))).any()):
        raise ValueError(
            "attention_mask has padding between the tokens of a document longer than attention_window_size = "
            f"{window}: allowed with rows shared over ranks is padding before and behind them"
        )


def _filled(positions: torch.Tensor, documents: Documents, fillers: int) -> tuple[torch.Tensor, Documents]:
    """Fillers go on with the last document: behind everything else, they change nothing and are no padding."""
    if not fillers:
        return positions, documents
    behind = torch.arange(1, fillers + 1, device=positions.device)
    positions = torch.cat([positions, positions[:, -1:] + behind], dim=1)
    start, real = pad(documents.start, (0, fillers)), documents.real
    return positions, documents._replace(start=start, real=None if real is None else pad(real, (0, fillers), value=1))


def _history(documents: Documents, begin: int) -> torch.Tensor:
    """(B,): real tokens from the last start of a document up to token `begin`."""
    start, real = documents.start[:, :begin], documents.real
    real = torch.ones_like(start) if real is None else real[:, :begin]
    started = start.flip(1).cumsum(1) - start.flip(1).long() == 0  # no start between the token and `begin`
    return (real.flip(1) & started).sum(1)


def _mask(config, like, positions, documents: Documents, first: int, end: int):
    """The attention mask of the tokens first to end, as if they were rows of their own; `first` may be below 0."""
    if "sliding_attention" not in config.layer_types:
        return None
    if first < 0:  # tokens read before the rows, of the same document and all real
        earlier = torch.arange(first, 0, device=positions.device) + positions[:, :1]
        positions = torch.cat([earlier, positions], dim=1)
        start, real = pad(documents.start, (-first, 0)), documents.real
        real = None if real is None else pad(real, (-first, 0), value=1)
        documents, first, end = documents._replace(start=start, real=real), 0, end - first
    positions, start = positions[:, first:end], documents.start[:, first:end]
    real = None if documents.real is None else documents.real[:, first:end]
    tokens = like.new_empty(*positions.shape, 0)
    mask = None if real is None else real.long()
    return attention_mask_for_documents(config, tokens, mask, None, positions, Documents(start, real, documents.packed))
