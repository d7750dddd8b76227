"""Several prompts read in one pass, end to end in one row: no token is padding, and each prompt leaves a state.

For a model that the fused step can compute, whose modules are known. They are called one after the other as
`GriffinModel.forward` does; a recurrent block's convolution and recurrence take the sequences, and the attention layers
find a cache that keeps what it is given. Nothing is read from the device, so that the host runs ahead of it.

Legend: T tokens of all prompts, N prompts, C RG-LRU channels, H_kv key heads, K head dimension, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..decode.upload import upload
from ..documents import Documents, attention_mask_for_documents
from ..elementwise import gated, linears
from ..kernels.convolution_varlen import causal_conv1d_varlen
from ..kernels.flash_attention import Runs, flash_unavailable_reason, kernel_layout


@dataclass
class PackedPrompts:
    """lengths: of the N prompts. logits (N, V): behind each.

    layers: for each layer the keys and values (1, H_kv, T, K) of all tokens; or the convolution states (N, C, taps) and
    the recurrent states (N, C) float32 behind each prompt.
    """

    lengths: list[int]
    logits: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]


class KeptKeys:
    """To attention layers a cache, which hands back what it is given and keeps it."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple:
        self.pair = keys, values
        return self.pair


@torch.no_grad()
def read_packed(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> PackedPrompts:
    """Reads prompts of one token or more each. model: one without `fused_obstacles`."""
    base, config, device = model.model, model.config, model.device
    lengths = [len(prompt) for prompt in prompts]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    ids = upload([[token for prompt in prompts for token in prompt]], device)
    cu_seqlens = upload([0, *ends], device).int()
    number = torch.arange(ids.shape[1], device=device)
    first = cu_seqlens.long()[torch.searchsorted(cu_seqlens[1:], number.int(), right=True)]
    positions = (number - first)[None]
    documents = Documents(positions == 0, real=None, packed=True)

    hidden = base.embed_tokens(ids)
    if config.scale_embeddings:
        hidden = hidden * base.embedding_scale
    rotation = base.rotary_emb(hidden, positions)
    mask = _attention_mask(config, hidden, positions, documents, cu_seqlens, max(lengths))
    layers = []
    for layer, kind in zip(base.layers, config.layer_types):
        normed, hidden = layer.temporal_pre_norm(None, residual=hidden)
        if kind == "sliding_attention":
            kept = KeptKeys()
            mixed, _ = layer.temporal_block(normed, rotation, mask, kept, documents)
            layers.append(kept.pair)
        else:
            mixed, *states = _recur(layer.temporal_block, normed, cu_seqlens)
            layers.append(tuple(states))
        normed, hidden = layer.channel_pre_norm(mixed, residual=hidden)
        hidden = hidden + layer.mlp_block(normed)
    last = upload([end - 1 for end in ends], device)
    logits = model.lm_head(base.final_norm(hidden[:, last]))[0]
    if (cap := config.final_logit_softcapping) is not None:
        logits = cap * torch.tanh(logits / cap)
    return PackedPrompts(lengths, logits, layers)


def _recur(block, hidden: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`GriffinRecurrentBlock.forward` of sequences that start: output, convolution states and recurrent states."""
    x, y = linears(hidden, block.linear_x, block.linear_y)
    x, inputs = causal_conv1d_varlen(x, None, block.conv_1d.weight, block.conv_1d.bias, cu_seqlens)
    x, state = block.rg_lru(x, cu_seqlens=cu_seqlens)
    return block.linear_out(gated(block.act_fn, y, x)), inputs, state


def _attention_mask(config, hidden, positions, documents: Documents, cu_seqlens, longest: int):
    """As for packed documents, but the runs are known: to find them, the model would wait for the GPU."""
    if "sliding_attention" not in config.layer_types:
        return None
    if flash_unavailable_reason(config, hidden) is None and kernel_layout(config, hidden) is None:
        return Runs(config.attention_window_size, cu_seqlens, cu_seqlens, longest, longest)
    return attention_mask_for_documents(config, hidden, None, None, positions, documents)
