"""Taking tokens back: the states behind each recent token, so that speculative decoding can reject a draft.

Transformers drafts tokens, checks them in one forward pass and calls `cache.crop(-rejected)`. Its recurrent cache
layers roll their convolution back but not their recurrence. Here both are kept, one state a token: C floats a layer for
the RG-LRU and C * W inputs for the convolution, for the last `MAX_ROLLBACK` tokens only, however long the prompt.

A Griffin's cache is made of stock layers otherwise. In a cache that records its past, and in no other, the model
replaces each recurrent layer by a `RollbackLayer`, because a stock layer has no place for these states.

Legend: B batch, N recent tokens, C RG-LRU channels, W taps of the convolution.
"""  # SPDX-License-Identifier: Apache-2.0

import torch
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.generation import CandidateGenerator


MAX_ROLLBACK = 128  # tokens; drafts are far shorter, and a long prompt must not keep a state for each of its tokens
KEPT_STATES = MAX_ROLLBACK + 1  # behind each of these tokens, and before them
MAX_DRAFTS = MAX_ROLLBACK - 1  # of one pass: with the token before them they can all be taken back


class RollbackLayer(LinearAttentionLayer):
    """A recurrent cache layer that records the states behind its recent tokens, and `crop` goes back to one of them."""

    def __init__(self, layer: LinearAttentionLayer):
        super().__init__(number_of_states=layer.number_of_states)
        self.__dict__.update(layer.__dict__)  # it takes over the states that the stock layer holds
        self._forget()

    def _forget(self) -> None:
        self.conv_history: torch.Tensor | None = None  # (B, 1 + N, C, W): before the N tokens, and behind each of them
        self.recurrent_history: torch.Tensor | None = None  # (B, 1 + N, C)
        self.begins_empty = False  # the first of them is the state before any token

    @property
    def is_croppable(self) -> bool:
        return True

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **_: object) -> torch.Tensor:
        """conv_states: (B, N, C, W), behind each of the last N tokens."""
        if not self.is_conv_states_initialized[state_idx]:
            self.lazy_initialization(conv_states=conv_states[:, -1], state_idx=state_idx)
        if self.conv_history is None:
            self.begins_empty = not self.has_previous_state[state_idx]
            self.conv_history = self.conv_states[state_idx][:, None]  # zeros where it begins empty
        self.begins_empty &= self.conv_history.shape[1] + conv_states.shape[1] <= KEPT_STATES
        self.conv_history = _extended(self.conv_history, conv_states)
        self.has_previous_state[state_idx] = True
        return self.conv_states[state_idx].copy_(conv_states[:, -1])

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: object) -> torch.Tensor:
        """recurrent_states: (B, N, C) float32, behind each of the last N tokens."""
        if not self.is_recurrent_states_initialized[state_idx]:
            self.lazy_initialization(recurrent_states=recurrent_states[:, -1], state_idx=state_idx)
        if self.recurrent_history is None:
            self.recurrent_history = self.recurrent_states[state_idx][:, None]
        self.recurrent_history = _extended(self.recurrent_history, recurrent_states)
        return super().update_recurrent_state(recurrent_states[:, -1], state_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -tokens_to_remove tokens. Those seen before cannot be removed by a later call."""
        recorded = 0 if self.recurrent_history is None else self.recurrent_history.shape[1] - 1
        if not -recorded <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop({tokens_to_remove}): allowed is -{recorded} to 0; recurrent states are kept from the last crop "
                f"on, for {MAX_ROLLBACK} tokens at most"
            )
        if recorded:
            self.conv_states[0].copy_(self.conv_history[:, tokens_to_remove - 1])
            self.recurrent_states[0].copy_(self.recurrent_history[:, tokens_to_remove - 1])
            self.has_previous_state[0] = not (self.begins_empty and tokens_to_remove == -recorded)
        self._forget()

    def reset(self) -> None:
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.recurrent_history is not None:
            self.conv_history = self.conv_history.index_select(0, beam_idx.to(self.device))
            self.recurrent_history = self.recurrent_history.index_select(0, beam_idx.to(self.device))


def check_drafts(generation_config: object) -> None:
    """Raises ValueError for drafts by the model's own first layers, for which Transformers edits its configuration.

    An error within would leave the model with that configuration.
    """
    if (layers := getattr(generation_config, "assistant_early_exit", None)) is not None:
        raise ValueError(
            f"assistant_early_exit = {layers}: allowed is None; drafts come from assistant_model or "
            "prompt_lookup_num_tokens"
        )


def bound_drafts(generator: CandidateGenerator) -> CandidateGenerator:
    """The same generator of drafts, with no more of them at once than can be taken back: fewer change no token."""
    get_candidates = generator.get_candidates

    def get_few(input_ids, *args, **kwargs):
        for name in ("num_assistant_tokens", "num_output_tokens"):  # a Griffin that drafts takes tokens back too
            if getattr(generator, name, None) is not None:
                setattr(generator, name, min(getattr(generator, name), MAX_DRAFTS))
        candidates, logits = get_candidates(input_ids, *args, **kwargs)
        most = input_ids.shape[1] + MAX_DRAFTS
        return candidates[:, :most], None if logits is None else logits[:, :MAX_DRAFTS]

    generator.get_candidates = get_few
    return generator


def leave_inference_mode(cache: Cache | None) -> None:
    """Makes ordinary tensors of what a cache holds from `torch.inference_mode`, which allows writing only inside it."""
    if cache is None or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    for layer in getattr(cache, "layers", ()):
        for name, value in [*vars(layer).items()]:
            if isinstance(value, torch.Tensor) and value.is_inference():
                setattr(layer, name, value.clone())
            elif isinstance(value, dict | list):  # of tensors, by the number of the state
                for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                    if isinstance(each, torch.Tensor) and each.is_inference():
                        value[key] = each.clone()


def states_to_keep(cache: Cache | None, layer_idx: int) -> int | None:
    """How many tokens' states a recurrent layer hands to the cache; None: only the state behind the last token.

    In a cache that records its past, the stock layer is replaced by one that has a place for them. It stays when the
    recording is switched off, as Transformers does before it hands a cache back.
    """
    if cache is None:
        return None
    layer = cache.layers[layer_idx]
    if not isinstance(layer, RollbackLayer):
        if not getattr(layer, "record_past", False):
            return None
        cache.layers[layer_idx] = RollbackLayer(layer)
    return KEPT_STATES


def _extended(history: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The last states of both along dim 1. Cloned: neither a view of a long prefill nor what is written in place."""
    return torch.cat([history, new], dim=1)[:, -KEPT_STATES:].clone()
