"""Griffin as a function of tokens and state: what is exported to read a prompt, and to generate token by token.

The state is a dictionary of tensors of fixed sizes, whatever the number of tokens read. It comes in and goes out, and
nothing is written in place: any runtime can keep it.

Legend: B rows, T tokens, C RG-LRU channels, W attention window, K head dimension, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..cache_name import CACHE_NAME
from ..decode.forward import Memory, Ring, mask_of_slots
from ..modeling_griffin import config_of_masks


ATTENTIONS = ("eager", "sdpa")
State = dict[str, torch.Tensor]


class StatefulGriffin(nn.Module):
    """(tokens, state) -> (logits, state), of a `GriffinForCausalLM`; for `torch.export` and what builds on it.

    The state holds, for N = 0, 1, ... layers: `conv_state.N` (B, C, taps) and `recurrent_state.N` (B, C) float32, or
    `keys.N` and `values.N` (B, H_kv, W - 1, K); and `count` (B,) int64, the real tokens that each row has read.

    Raises:
        ValueError: for another model, for attention other than "eager" and "sdpa", and for a model in training mode.
    """

    def __init__(self, model: nn.Module, logits_to_keep: int = 0):
        """logits_to_keep: logits of the last so many tokens only; 0: of all."""
        super().__init__()
        config = getattr(model, "config", None)
        if getattr(config, "model_type", None) != "griffin" or not hasattr(model, "lm_head"):
            raise ValueError(f"model is a {type(model).__name__}: allowed is a GriffinForCausalLM")
        if config._attn_implementation not in ATTENTIONS:
            raise ValueError(f"attn_implementation = {config._attn_implementation!r}: allowed are {ATTENTIONS}")
        if model.training:
            raise ValueError("model is in training mode: allowed is model.eval()")
        self.model, self.config, self.logits_to_keep = model, config, logits_to_keep

    def empty_state(self, rows: int = 1) -> State:
        """The state before the first token."""
        config, model = self.config, self.model
        state, device = {}, model.device
        for index, kind in enumerate(config.layer_types):
            if kind == "sliding_attention":
                shape = rows, config.num_key_value_heads, config.attention_window_size - 1, config.head_dim
                shapes: dict[str, tuple] = {"keys": shape, "values": shape}
            else:
                shapes = {"conv_state": (rows, config.lru_width, config.conv1d_width)}
                shapes["recurrent_state"] = rows, config.lru_width
            for name, shape in shapes.items():
                dtype = torch.float32 if name == "recurrent_state" else model.dtype
                state[f"{name}.{index}"] = torch.zeros(shape, dtype=dtype, device=device)
        state["count"] = torch.zeros(rows, dtype=torch.long, device=device)
        return state

    def forward(
        self, input_ids: torch.Tensor, state: State, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, State]:
        """
        Args:
            input_ids: (B, T).
            state: of `empty_state`, or what the call before returned.
            attention_mask: (B, T), 0 for padding, which stands before a row's first token; None without padding.

        Returns:
            logits (B, T or logits_to_keep, V), and the state behind these tokens.
        """
        real = None if attention_mask is None else attention_mask != 0
        number = torch.ones_like(input_ids) if real is None else real.long()
        count = state["count"][:, None]
        position_ids = (count + number.cumsum(1) - 1).clamp(min=0)
        start = position_ids == 0 if real is None else real & (position_ids == 0)
        cache = StateCache([_layer(state, index, kind) for index, kind in enumerate(self.config.layer_types)])
        seen = self._seen(input_ids.shape[1], count, real)
        masks = config_of_masks(self.config, [self.model])._attn_implementation
        output = self.model(
            input_ids,
            attention_mask={
                "sliding_attention": mask_of_slots(seen, masks, self.model.dtype),
                "linear_attention": real,
                "document_start": start,
                "packed": False,
            },
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=self.logits_to_keep,
            **{CACHE_NAME: cache},
        )
        after = {name: tensor for index, layer in enumerate(cache.layers) for name, tensor in _tensors(index, layer)}
        return output.logits, {**after, "count": state["count"] + number.sum(1)}

    def _seen(self, length: int, count: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """(B, 1, T, W - 1 + T) bool: of the kept keys and those of these tokens, the ones that each token sees."""
        window, device = self.config.attention_window_size, count.device
        slot = torch.arange(window - 1 + length, device=device)
        distance = slot[window - 1 :, None] - slot
        kept = slot >= window - 1 - count  # (B, S): what lies before a row's first token was never written
        if real is not None:
            kept = torch.cat([kept[:, : window - 1], real], dim=1)
        # Padding sees itself, so that its softmax is a number.
        return ((distance >= 0) & (distance < window) & kept[:, None] | (distance == 0))[:, None]


class StateCache(Cache):
    """A state as the cache of one forward pass: what is written takes the place of what was read."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer, length = self.layers[layer_idx], key_states.shape[2]
        keys = torch.cat([layer.keys, key_states], dim=2)
        values = torch.cat([layer.values, value_states], dim=2)
        layer.keys, layer.values = keys[:, :, length:], values[:, :, length:]
        return keys, values

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.layers[layer_idx].conv_states[0] = conv_states
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        self.layers[layer_idx].recurrent_states[0] = recurrent_states
        return recurrent_states

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 1


def _layer(state: State, index: int, kind: str) -> Ring | Memory:
    if kind == "sliding_attention":
        return Ring(state[f"keys.{index}"], state[f"values.{index}"])
    return Memory(state[f"conv_state.{index}"], state[f"recurrent_state.{index}"])


def _tensors(index: int, layer: Ring | Memory) -> list[tuple[str, torch.Tensor]]:
    if isinstance(layer, Ring):
        return [(f"keys.{index}", layer.keys), (f"values.{index}", layer.values)]
    return [(f"conv_state.{index}", layer.conv_states[0]), (f"recurrent_state.{index}", layer.recurrent_states[0])]
