"""What a layer of a chunk needs from the ranks on the left, brought in by hooks while the layer projects its own.

before: what a `GenerationState` holds of the layer, of tokens that were read before the rows; None: nothing was.
collect: keep the same of the tokens up to the end of the chunk in `collected`, for a `GenerationState` of them.

Legend: B batch, L tokens of a chunk, D hidden size, C RG-LRU channels, W attention window, H heads, H_kv key heads, K
head dimension.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..elementwise import linears, rotate
from ..local_attention import OWN_ATTENTION
from ..modeling_griffin import eager_attention_forward
from .chunk_layout import ChunkLayout
from .neighbours import Pending, Ranks, exchange_positions, exchange_tails
from .sequence_scan import SequenceScan


class RecurrentLayer:
    """A recurrent block: the state of its convolution and of its recurrence are those of the ranks on the left."""

    def __init__(self, ranks: Ranks, block: nn.Module):
        self.ranks, self.block = ranks, block
        self.taps = block.conv_1d.weight.shape[-1]
        self.before, self.collect, self.collected = None, False, None
        self._inputs: Pending | None = None
        self._layout: ChunkLayout | None = None
        self._scan = block.rg_lru.scan = SequenceScan(ranks)
        self._hooks = [
            block.register_forward_pre_hook(self._start, with_kwargs=True),
            block.conv_1d.register_forward_pre_hook(self._finish),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        vars(self.block.rg_lru).pop("scan", None)  # of a layer that stands twice in the model, gone already

    @torch.compiler.disable
    def _start(self, block: nn.Module, args, kwargs) -> None:
        """Sends the chunk's last inputs, which the ranks on the right project like their own."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self._layout, real = kwargs["attention_mask"], kwargs["documents"].real
        entries = min(self.taps - 1, hidden.shape[1])
        if real is None:
            tail = hidden[:, hidden.shape[1] - entries :]
            exchange = exchange_positions(self.ranks, hidden.shape[1], self.taps - 1)
        else:  # the last real ones, and how far left they stand only values tell
            tail = _last(hidden, real, entries)
            exchange = exchange_tails(self.ranks, entries)
        self._inputs = exchange.start(tail.transpose(0, 1).contiguous())

    @torch.compiler.disable
    def _finish(self, convolution: nn.Module, args):
        x, _, *rest = args
        state = self._state_of_convolution(x).transpose(1, 2)
        self._scan.before = None if self.before is None else self.before[1]
        if self.collect:
            inputs = torch.cat([state, x.transpose(1, 2)], dim=2)[:, :, -self.taps :].clone()
            self._scan.collect = lambda state: setattr(self, "collected", (inputs, state))
        return x, state, *rest

    def _state_of_convolution(self, x: torch.Tensor) -> torch.Tensor:
        """(B, taps, C): the last real inputs of the document that the chunk goes on with, zeros where none are."""
        inputs, layout = self._inputs, self._layout
        self._inputs = self._layout = None  # held no longer than they are needed
        hidden = inputs.wait().transpose(0, 1)  # (B, entries, D)
        if self.before is not None and self.ranks.rank == 0:
            return self.before[0].to(x.dtype).transpose(1, 2)
        if layout.tails is not None:
            hidden = _last(hidden, _real_slots(hidden, layout.tails), self.taps - 1)
        state = self.block.linear_x(hidden)
        if layout.history is not None:
            back = torch.arange(state.shape[1], 0, -1, device=x.device)  # how far in front of the chunk each stands
            state = state.masked_fill((back > layout.history[:, None])[..., None], 0.0)
        return pad(state, (0, 0, self.taps - state.shape[1], 0))


def _last(x: torch.Tensor, real: torch.Tensor, number: int) -> torch.Tensor:
    """The last `number` real entries of x (B, T, D), padding in front of them where there are fewer."""
    last = torch.argsort(real.long(), dim=1, stable=True)[:, max(0, x.shape[1] - number) :]
    return x.gather(1, last[..., None].expand(-1, -1, x.shape[-1]))


def _real_slots(tails: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Which of (B, ranks * entries, D) are real: the last of each rank, as many as `counts` (B, ranks) says."""
    entries = tails.shape[1] // max(1, counts.shape[1])
    return (torch.arange(entries, 0, -1, device=tails.device) <= counts[..., None]).flatten(1)


class AttentionLayer:
    """An attention block: in front of its keys stand those of the window's tokens on the ranks on the left."""

    def __init__(self, ranks: Ranks, block: nn.Module):
        self.ranks, self.reach = ranks, block.sliding_window - 1
        self.before, self.collect = None, False
        self.collected: tuple[torch.Tensor, ...] | None = None
        self._keys: Pending | None = None
        _attentions_of(block)[ChunkLayout] = _attention
        self._hook = block.register_forward_pre_hook(self._start, with_kwargs=True)

    def remove(self) -> None:
        self._hook.remove()

    @torch.compiler.disable
    def _start(self, block: nn.Module, args, kwargs) -> None:
        """Projects and sends the chunk's last keys and values before the others are projected."""
        hidden = args[0] if args else kwargs["hidden_states"]
        chunk = hidden.shape[1]
        tail = slice(chunk - min(self.reach, chunk), None)
        key, value = linears(hidden[:, tail], block.k_proj, block.v_proj)
        key, value = (x.unflatten(-1, (-1, block.head_dim)) for x in (key, value))
        key = rotate(key, *(x[:, tail] for x in kwargs["position_embeddings"]))
        both = torch.stack((key, value)).permute(2, 0, 1, 3, 4)  # (entries, 2, B, H_kv, K)
        self._keys = exchange_positions(self.ranks, chunk, self.reach).start(both.contiguous())
        kwargs["attention_mask"].layers[block.layer_idx] = self

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: ChunkLayout,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The model's own attention over the chunk and what it sees in front; the first queries are nobody's.

        query (B, H, L, K), key and value (B, H_kv, L, K) -> (B, L, H, K), and the weights, where attention has them.
        """
        keys, self._keys = self._keys, None
        parts = [keys.wait().permute(1, 2, 3, 0, 4).unbind(), (key, value)]
        if self.before is not None:
            parts.insert(0, self.before)
        slots = layout.reach + key.shape[2]
        key, value = (torch.cat(each, dim=2)[:, :, -slots:] for each in zip(*parts))
        if self.collect:
            self.collected = tuple(x[:, :, -self.reach :].clone() for x in (key, value))
        attention = OWN_ATTENTION.get(type(layout.mask)) or ALL_ATTENTION_FUNCTIONS.get_interface(
            module.config._attn_implementation, eager_attention_forward
        )
        query = pad(query, (0, 0, layout.reach, 0))
        output, weights = attention(module, query, key, value, layout.mask, scaling=scaling, **kwargs)
        return output[:, layout.reach :], None if weights is None else weights[:, :, layout.reach :]


@torch.compiler.disable
def _attention(module: nn.Module, query, key, value, layout: ChunkLayout, scaling: float, **kwargs):
    return layout.layers.pop(module.layer_idx).attend(module, query, key, value, layout, scaling, **kwargs)


def _attentions_of(block: nn.Module) -> dict[type, Callable]:
    """Where the block looks for what reads its mask: code of a repository has a table of its own."""
    files = (vars(sys.modules[cls.__module__]) for cls in type(block).__mro__)
    return next(file["OWN_ATTENTION"] for file in files if "OWN_ATTENTION" in file)
