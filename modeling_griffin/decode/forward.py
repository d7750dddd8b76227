"""The model's own forward pass of one token over fixed buffers: any modules, one recorded CUDA graph on a GPU.

The buffers are a cache to the model. Keys lie in rings, as those of the fused step, and the model gets the mask and the
positions that belong to them: so that no shape and no address changes, and the host decides nothing.

Legend: B rows, T tokens read so far, C RG-LRU channels, S slots of a ring, K head dimension, V vocabulary, D width.
"""

import contextlib
import weakref
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from ..cache_name import CACHE_NAME
from ..kernels.dispatch import small_tensors_pay
from ..modeling_griffin import config_of_masks
from .host_effects import watching_mode
from .lease import Lease
from .network import Recording
from .ops import Clock
from .original import CLASSES, patched_class, patched_function
from .state import put_ring


class Ring:
    """Keys and values (B, H_kv, S, K) of a layer that attends."""

    is_sliding, is_compileable, is_initialized = True, False, True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.keys, self.values = keys, values


class Memory:
    """The last inputs (B, C, taps) of a layer that recurs, and its state (B, C) float32. By number, as in a cache."""

    is_sliding, is_compileable = False, False

    def __init__(self, conv_state: torch.Tensor, state: torch.Tensor):
        self.conv_states, self.recurrent_states = {0: conv_state}, {0: state}


class Nothing:
    """Of a place that no layer uses."""

    is_compileable = is_initialized = False

    def __init__(self, is_sliding: bool):
        self.is_sliding = is_sliding


class FixedCache(Cache):
    """Rings and memories as a cache; it is never empty. slot (1,) int64: where in a ring the token goes."""

    def __init__(self, layers: list, slot: torch.Tensor):
        super().__init__(layers=layers)
        self.slot = slot

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ring = self.layers[layer_idx]
        ring.keys.index_copy_(2, self.slot, key_states.to(ring.keys.dtype))
        ring.values.index_copy_(2, self.slot, value_states.to(ring.values.dtype))
        return ring.keys, ring.values

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.layers[layer_idx].conv_states[0].copy_(conv_states)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        return self.layers[layer_idx].recurrent_states[0].copy_(recurrent_states)

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 1


class ForwardStep(Recording, Lease):
    """As `DecodeStep`: the state of B rows, and the step that reads one more token of each.

    slots: S, of each ring. hidden: whether `hidden_states` (L + 1, B, 1, D) are left too.
    """

    def __init__(self, model: torch.nn.Module, batch: int, slots: int, hidden: bool):
        Recording.__init__(self, model.device)
        Lease.__init__(self, model.device)
        self.model, self.config = weakref.ref(model), model.config
        self.slots, self.hidden, self.checked = slots, hidden, False
        self.patched = bool(patched_function() or any(patched_class(cls, cls) for cls in CLASSES))
        self.hidden_states: torch.Tensor | None = None
        self.cache: FixedCache | None = None  # made when there is a cache whose shapes it can take
        with torch.inference_mode(False):
            new = {"dtype": torch.long, "device": self.device}
            self.token, self.number = torch.zeros(batch, **new), torch.arange(slots, device=self.device)
            self.clock = Clock(torch.zeros(1, **new), torch.zeros(batch, **new))
            self.slot = torch.zeros(1, **new)
            self.new_document = torch.zeros(batch, 1, dtype=torch.bool, device=self.device)

    @torch.no_grad()
    def prepare(self, model: torch.nn.Module, like: tuple | None = None) -> None:
        """Makes the buffers and records the step on a GPU. like: a cache of as many rows, and logits (B, V).

        Without them the model is called once, which runs what the user has put into it.
        """
        if like is None:
            cache = DynamicCache(config=self.config)
            output = model(self.token[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
            like = cache, output.logits[:, -1]
        cache, logits = like
        with torch.inference_mode(False):
            self.logits = torch.zeros(logits.shape, dtype=logits.dtype, device=self.device)
            self._make_buffers(cache)
        if self.on_gpu:
            self.record()

    def _make_buffers(self, cache: DynamicCache) -> None:
        like = [_state_of(layer) for layer in cache.layers]
        like = [
            tuple(_with_slots(x, self.slots) for x in pair) if _attends(layer) else pair
            for layer, pair in zip(cache.layers, like)
        ]
        self.buffers = {}
        for shape, dtype in {(tuple(x.shape), x.dtype) for pair in like for x in pair}:
            number = sum((tuple(x.shape), x.dtype) == (shape, dtype) for pair in like for x in pair)
            self.buffers[shape, dtype] = torch.zeros(number, *shape, dtype=dtype, device=self.device)
        views = {key: iter(buffer) for key, buffer in self.buffers.items()}
        pairs = [[next(views[tuple(x.shape), x.dtype]) for x in pair] for pair in like]
        layers = [
            (Ring if _attends(layer) else Memory)(*pair) if pair else Nothing(_attends(layer))
            for layer, pair in zip(cache.layers, pairs)
        ]
        self.cache = FixedCache(layers, self.slot)

    def load(self, cache: Cache, length: int, padding: torch.Tensor | None) -> None:
        """As `DecodeStep.load`."""
        self.start(length)
        self.load_rows(torch.arange(len(self.token), device=self.device), cache, length, padding)

    def start(self, time: int) -> None:
        self.clock.time.fill_(time)

    @torch.no_grad()
    def load_rows(self, rows: torch.Tensor, cache: Cache, length: int, padding: torch.Tensor | None) -> None:
        """As `DecodeStep.load_rows`."""
        time = self.clock.time
        self.clock.padding[rows] = time - length + (0 if padding is None else padding)
        for layer, buffer in zip(cache.layers, self.cache.layers):
            if isinstance(buffer, Ring):
                for ring in (buffer.keys, buffer.values):
                    ring.index_fill_(0, rows, 0)  # a masked slot counts 0 times its value, which of NaN is NaN
                kept = layer.keys.shape[2]
                slots = (time - kept + torch.arange(kept, device=self.device)) % self.slots
                buffer.keys[rows[:, None], :, slots] = layer.keys.transpose(1, 2)
                buffer.values[rows[:, None], :, slots] = layer.values.transpose(1, 2)
            elif isinstance(buffer, Memory):
                buffer.conv_states[0][rows] = layer.conv_states[0]
                buffer.recurrent_states[0][rows] = layer.recurrent_states[0]

    @torch.no_grad()
    def reorder(self, rows: torch.Tensor) -> None:
        """As `DecodeStep.reorder`."""
        for buffer in self.buffers.values():
            buffer.copy_(buffer.index_select(1, rows))
        self.clock.padding.copy_(self.clock.padding[rows])

    @torch.no_grad()
    def to_cache(self, length: int) -> DynamicCache:
        """As `DecodeStep.to_cache`."""
        cache = DynamicCache(config=self.config)
        for index, buffer in enumerate(self.cache.layers):
            if isinstance(buffer, Ring):
                put_ring(cache, index, buffer.keys, buffer.values, length)
            elif isinstance(buffer, Memory):
                cache.update_conv_state(buffer.conv_states[0], index)
                cache.update_recurrent_state(buffer.recurrent_states[0], index)
        return cache

    @torch.no_grad()
    def _compute(self) -> None:
        time, padding = self.clock.time, self.clock.padding
        self.slot.copy_(time % self.slots)
        kind = self.device.type
        # Weights that autocast has cast would be freed with its cache, and a recording read them still.
        precision = torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=not self.on_gpu
        )
        with precision, self._merging():
            model = self.model()
            output = model(
                self.token[:, None],
                attention_mask=self._masks(model),
                position_ids=(time - padding)[:, None],
                use_cache=True,
                logits_to_keep=1,
                **{CACHE_NAME: self.cache},
                **({"output_hidden_states": True} if self.hidden else {}),
            )
        self.logits.copy_(output.logits[:, -1])
        if self.hidden:
            self.hidden_states = torch.stack(output.hidden_states)
        self.token.copy_(self.logits.argmax(-1))
        time.add_(1)

    def _merging(self) -> contextlib.AbstractContextManager:
        """Kernels and merged operations stand for functions as they were imported, and for what no mode looks at."""
        plain = not self.patched and watching_mode() is None
        return small_tensors_pay() if plain else contextlib.nullcontext()

    def _masks(self, model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
        """As `masks_for_generate` makes them: a slot is seen if it holds a token of its row, and no document starts."""
        time = self.clock.time
        times = time - (time - self.number) % self.slots
        seen = (times >= self.clock.padding[:, None])[:, None, None]
        seen = mask_of_slots(seen, config_of_masks(self.config, [model])._attn_implementation, self.logits.dtype)
        starts = {"document_start": self.new_document, "packed": False}
        return {"sliding_attention": seen, "linear_attention": None, **starts}


def mask_of_slots(seen: torch.Tensor, attention: str, dtype: torch.dtype) -> torch.Tensor:
    """seen (B, 1, T, S) bool, as the "sdpa" or "eager" attention wants it."""
    if attention != "eager":
        return seen
    zero, hidden = (torch.full((), x, dtype=dtype, device=seen.device) for x in (0.0, torch.finfo(dtype).min))
    return torch.where(seen, zero, hidden)  # which is added to the scores


def _attends(layer) -> bool:
    return hasattr(layer, "keys")


def _state_of(layer) -> tuple[torch.Tensor, ...]:
    """Empty for the layer of a block that keeps nothing: the user's own."""
    if _attends(layer):
        return (layer.keys, layer.values) if layer.keys is not None else ()
    return (layer.conv_states[0], layer.recurrent_states[0]) if layer.has_previous_state[0] else ()


def _with_slots(x: torch.Tensor, slots: int) -> torch.Tensor:
    """A tensor (B, H_kv, slots, K) like x (B, H_kv, 1, K), without memory of its own."""
    return x[:, :, :1].expand(-1, -1, slots, -1)
