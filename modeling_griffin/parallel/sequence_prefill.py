"""A long prompt, read by several ranks into one `GenerationState`, from which any one of them generates.

Each pass reads as many tokens as all ranks take at a time. What the last rank knows at its end goes to all, as what
stands before the next pass.
"""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from ..serving.cached_rows import check_prefill
from ..serving.state import GenerationState
from .neighbours import Ranks
from .sequence_layers import AttentionLayer


if TYPE_CHECKING:  # they import each other
    from .sequence import SequenceParallel


@torch.no_grad()
def prefill(
    parallel: "SequenceParallel", input_ids: torch.Tensor, state: GenerationState | None, chunk_size: int
) -> GenerationState:
    """See `SequenceParallel.prefill`."""
    model, ranks = parallel.language_model(), parallel.ranks
    if ranks.size == 1:
        return model.prefill(input_ids, state, chunk_size)
    check_prefill(model, input_ids, state, chunk_size)
    if state is not None and len(set(state.lengths)) > 1:
        raise ValueError(f"state has rows of {state.lengths} tokens: allowed are rows of one length")
    length = input_ids.shape[1]
    least = ranks.size * model.config.conv1d_width  # in fewer tokens a rank would not see its left neighbour's end
    done = 0
    while (taken := min(chunk_size * ranks.size, (length - done) // ranks.size * ranks.size)) >= least:
        state = _read(parallel, input_ids[:, done : done + taken].to(model.device), state)
        done += taken
    if done == length:
        return state
    parallel.remove()
    try:
        return model.prefill(input_ids[:, done:], state, chunk_size)
    finally:
        parallel.install()


def _read(parallel, tokens: torch.Tensor, state: GenerationState | None) -> GenerationState:
    """One forward pass over (B, T) tokens, T a multiple of the ranks, behind those of `state`."""
    model, ranks, layers = parallel.head, parallel.ranks, parallel.layers
    parallel.before = 0 if state is None else state.lengths[0]
    for number, layer in enumerate(layers):
        layer.before, layer.collect = None if state is None else state.layers[number], True
    length = parallel.before + tokens.shape[1]
    try:
        logits = _of_last_rank(ranks, model(tokens, logits_to_keep=1, use_cache=False).logits[:, -1])
        known = [_known_to_last_rank(ranks, layer, length) for layer in layers]
    finally:
        parallel.before = 0
        for layer in layers:
            layer.before, layer.collect, layer.collected = None, False, None
    return GenerationState(model.config, (length,) * len(tokens), logits, tuple(known))


def _known_to_last_rank(ranks: Ranks, layer, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a state of `length` tokens holds of the layer; other ranks saw fewer keys, and bring the room for all."""
    first, second = layer.collected
    if isinstance(layer, AttentionLayer):
        slots = min(length, layer.reach)
        first, second = (pad(x[:, :, -slots:], (0, 0, max(0, slots - x.shape[2]), 0)) for x in (first, second))
    return _of_last_rank(ranks, first), _of_last_rank(ranks, second)


def _of_last_rank(ranks: Ranks, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    dist.broadcast(tensor, group_src=ranks.size - 1, group=ranks.group)
    return tensor
