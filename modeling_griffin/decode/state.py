"""One decoding step over a state in fixed buffers: on a GPU recorded once as a CUDA graph and then replayed.

Every tensor of a step has its place for good, and where in it to write is computed on the device from the time. So the
host has nothing to decide, and a step is one call. Parameters are read where they lie: nothing is copied or packed.

Legend: B rows, T tokens read so far, C RG-LRU channels, W attention window, K head dimension, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from ..kernels.device import MOST_ENDS, can_overlap, decode_gemm_fits, properties
from .lease import Lease
from .network import RecordedStep, in_order
from .ops import Clock, Ends, KernelOps, PlainOps
from .upload import upload


class DecodeStep(RecordedStep, Lease):
    """The state of B rows and the step that reads one more token of each.

    rings: keys and values (L, B, H_kv, S, K) of the L layers that attend, S <= W slots; memories: past inputs
    (L, B, taps, C) and states (L, B, C) float32 of those that recur. layers: for each layer its part of these.
    token (B,) int64: what the next `step` reads; it leaves the argmax of its own logits there, so that a host that
    chooses no other has nothing to write, and behind `end_at` padding for rows that have ended. logits (B, V): what a
    step leaves, in the model's dtype.
    slots: S; None for W. With fewer, no row may hold more tokens. hidden: whether `hidden_states` are left too.
    """

    def __init__(self, base: nn.Module, head: nn.Linear, batch: int, slots: int | None = None, hidden: bool = False):
        ops, device = PlainOps(), head.weight.device
        if device.type == "cuda":
            ops = KernelOps(overlap=can_overlap(device), matmul=decode_gemm_fits(properties(device)))
        self.slots, self.checked = slots or base.config.attention_window_size, False
        self.drafts: dict[int, Any] = {}  # passes over as many tokens of the one row, which share its state
        with torch.inference_mode(False), torch.no_grad():
            RecordedStep.__init__(self, base, head, ops)
            Lease.__init__(self, device)
            self._make_buffers(batch)
            if hidden:
                shape = len(self.layers) + 1, batch, 1, self.config.hidden_size
                self.hidden_states = torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _make_buffers(self, batch: int) -> None:
        config, new = self.config, {"dtype": self.dtype, "device": self.device}
        self.token = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.logits = torch.zeros(batch, self.head.weight.shape[0], **new)
        self.clock = Clock(torch.zeros(1, dtype=torch.long, device=self.device), torch.zeros_like(self.token))
        going_on, pad = torch.ones_like(self.token, dtype=torch.bool), torch.zeros_like(self.clock.time)
        self.ends = Ends(going_on, torch.full((MOST_ENDS,), -1, device=self.device), pad)
        attending = config.layer_types.count("sliding_attention")
        ring = (attending, batch, config.num_key_value_heads, self.slots, config.head_dim)
        self.rings = torch.zeros(ring, **new), torch.zeros(ring, **new)
        recurring = len(config.layer_types) - attending
        past = torch.zeros(recurring, batch, config.conv1d_width, config.lru_width, **new)
        float32 = {"dtype": torch.float32, "device": self.device}
        self.memories = past, torch.zeros(recurring, batch, config.lru_width, **float32)
        decays = torch.zeros(recurring, config.lru_width, **float32)
        self.layers = in_order(config.layer_types, self.rings, (*self.memories, decays))

    def prepare(self, model: nn.Module, like: tuple | None = None) -> None:
        """Records the step on a GPU. Overwrites the state. model and like are as of a `ForwardStep`."""
        if self.on_gpu:
            self.record()

    def end_at(self, tokens: torch.Tensor, pad: torch.Tensor, going_on: torch.Tensor) -> bool:
        """From here on rows end at these tokens (E,), and have ended but for those going_on (B,); False: too many."""
        if len(tokens) > MOST_ENDS:
            return False
        self.ends.going_on.copy_(going_on)
        self.ends.tokens[: len(tokens)] = tokens
        self.ends.pad.copy_(pad)
        return True

    def load(self, cache: Cache, length: int, padding: torch.Tensor | None) -> None:
        """Copies what a cache knows of `length` tokens a row, of which the first `padding` (B,) are none."""
        self.start(length)
        self.load_rows(torch.arange(len(self.token), device=self.device), cache, length, padding)

    @torch.no_grad()
    def start(self, time: int) -> None:
        """Makes `time` the time of the next token; what the rows hold is to be loaded afterwards. No token ends one."""
        self.clock.time.fill_(time)
        self.ends.going_on.fill_(True)
        self.ends.tokens.fill_(-1)
        for buffers, block in zip(self.layers, self.base.layers):
            if len(buffers) == 3:
                buffers[2].copy_(block.temporal_block.rg_lru.decay())

    @torch.no_grad()
    def load_rows(self, rows: torch.Tensor, cache: Cache, length: int, padding: torch.Tensor | None) -> None:
        """As `load`, into these rows (N,) only, as if their last token had been read just now. Others go on."""
        time = self.clock.time
        self._forget(rows)
        self.clock.padding[rows] = time - length + (0 if padding is None else padding)
        for layer, buffers in zip(cache.layers, self.layers):
            if len(buffers) == 2:
                window, kept = buffers[0].shape[2], layer.keys.shape[2]
                slots = (time - kept + torch.arange(kept, device=self.device)) % window
                buffers[0][rows[:, None], :, slots] = layer.keys.transpose(1, 2)
                buffers[1][rows[:, None], :, slots] = layer.values.transpose(1, 2)
            else:
                past, state, _ = buffers
                taps = past.shape[1]
                slots = (time + torch.arange(taps, device=self.device)) % taps
                past[rows[:, None], slots] = layer.conv_states[0].transpose(1, 2)
                state[rows] = layer.recurrent_states[0]

    @torch.no_grad()
    def load_packed(self, rows: Sequence[int], prompts: Sequence[int], packed: Any) -> None:
        """As `load_rows`, from `PackedPrompts`: row rows[i] gets prompt prompts[i], which several rows may get."""
        time, window = self.clock.time, self.config.attention_window_size
        rows, prompts = torch.tensor(rows), torch.tensor(prompts)
        lengths, ends = (x[prompts] for x in (torch.tensor(packed.lengths), torch.tensor(packed.lengths).cumsum(0)))
        kept = lengths.clamp(max=window - 1)  # keys of each row
        row = torch.arange(len(rows)).repeat_interleave(kept)
        ago = kept.cumsum(0)[row] - torch.arange(len(row))  # 1: the last token
        rows, prompts, lengths, ago, key_rows, tokens = (
            upload(x, self.device) for x in (rows, prompts, lengths, ago, rows[row], ends[row] - ago)
        )
        self._forget(rows)
        self.clock.padding[rows] = time - lengths
        for pair, buffers in zip(packed.layers, self.layers):
            if len(buffers) == 2:
                slots = (time - ago) % buffers[0].shape[2]
                for ring, of_tokens in zip(buffers, pair):
                    ring[key_rows, :, slots] = of_tokens[0, :, tokens].transpose(0, 1)
            else:
                past, state, _ = buffers
                taps = past.shape[1]
                slots = (time + torch.arange(taps, device=self.device)) % taps
                past[rows[:, None], slots] = pair[0][prompts].transpose(1, 2)
                state[rows] = pair[1][prompts]

    def _forget(self, rows: torch.Tensor) -> None:
        """What others left in the rings of these rows: a masked slot counts 0 times its value, which of NaN is NaN."""
        for ring in self.rings:
            ring.index_fill_(1, rows, 0)

    @torch.no_grad()
    def take_rows(self, other: "DecodeStep", rows: Sequence[int], into: Sequence[int]) -> None:
        """Row into[i] becomes row rows[i] of another step with as many slots, whose time becomes this one's."""
        self.start(0)
        self.clock.time.copy_(other.clock.time)
        rows, into = upload(rows, self.device), upload(into, self.device)
        for mine, others in zip((*self.rings, *self.memories), (*other.rings, *other.memories)):
            mine[:, into] = others[:, rows]
        self.token[into], self.clock.padding[into] = other.token[rows], other.clock.padding[rows]

    @torch.no_grad()
    def reorder(self, rows: torch.Tensor) -> None:
        """Row b becomes what row rows[b] (B,) is, as beams ask for."""
        for tensor in (*self.rings, *self.memories):
            tensor.copy_(tensor.index_select(1, rows))
        self.clock.padding.copy_(self.clock.padding[rows])

    @torch.no_grad()
    def to_cache(self, length: int) -> DynamicCache:
        """A cache of its own that holds what the rows know of their `length` tokens, padding included."""
        cache = DynamicCache(config=self.config)
        for index, buffers in enumerate(self.layers):
            if len(buffers) == 2:
                put_ring(cache, index, *buffers, length)
            else:
                past, state, _ = buffers
                taps = past.shape[1]
                slots = (length + torch.arange(taps, device=self.device)) % taps  # oldest first
                cache.update_conv_state(past[:, slots].transpose(1, 2), index)
                cache.update_recurrent_state(state, index)
        return cache

    @torch.no_grad()  # here too: inference_mode(False) turns gradients on
    def _compute(self) -> None:
        embedding, embedded = self.base.embed_tokens, self._places()[0]
        stream, clock = self.ops.begin(self.token, embedding, self.scale, self.clock, self.frequencies, embedded)
        self._read(stream, clock)
        self.ops.end(self.logits, self.token, clock, self.ends)


def put_ring(cache: DynamicCache, index: int, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
    """The last tokens of a ring (B, H_kv, S, K) into a layer of an empty cache, as if it had read `length` tokens."""
    layer, slots = cache.layers[index], keys.shape[2]
    kept = min(length, layer.sliding_window - 1)
    order = (length - kept + torch.arange(kept, device=keys.device)) % slots
    layer.update(keys[:, :, order], values[:, :, order])
    layer.cumulative_length = length
