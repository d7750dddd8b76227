"""One sequence over several GPUs: each rank of a group holds a chunk of every row, and all compute what one would.

A rank owes its right neighbour one state a channel, the convolution's last inputs, and one window of keys and values,
whatever the length. The model's own code runs on the chunk; hooks bring in what lies in front of it, and the loss of
all chunks. Weights are whole on each rank, or sharded by FSDP2.

Legend: B batch, T tokens of the rows, L tokens of a chunk, N ranks, D hidden size, C RG-LRU channels, W attention
window, K taps of the convolution, H_kv key heads, V vocabulary.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..causal_lm_loss import causal_lm_loss
from ..flash_local_attention import OWN_ATTENTION
from ..fused import rotate
from ..fused_linear import linears
from ..modeling_griffin import eager_attention_forward
from .chunk_layout import ChunkLayout, chunk_length, read_chunk, take_chunk
from .neighbours import exchange_positions, exchange_tails, gather
from .sequence_scan import SequenceScan


ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "use_cache",
    "cu_seq_lens_q",
    "seq_idx",
)  # of `GriffinModel.forward`, in its order


def parallelize_sequence(model: nn.Module, over: DeviceMesh | dist.ProcessGroup | None = None) -> "SequenceParallel":
    """From now on `model` shares each row with the same model on the other ranks, until `remove()` of the result.

    All ranks of the group call the model at the same time, each with the same whole rows: `input_ids`, `labels` and
    what else one process would be given. Each works on its chunk. It returns

    - loss: that of the whole rows, the same on all ranks. The mean over the group's ranks of each parameter's gradient
      is its whole gradient, so the ranks of a group are to DDP and FSDP2 like further data-parallel ranks, whose
      gradients these average. With `num_items_in_batch`, that is the number for the given rows as in one process.
    - logits (B, L, V), hidden states (B, L, D): of the rank's chunk, L = T / N rounded up; `gather` joins them.

    T may be any number: the last ranks fill up behind the end of the rows, which changes nothing.

    Args:
        model: one with a `GriffinModel` in it, with or without a language-model head; it may be sharded by FSDP2, have
            LoRA, or activation checkpointing. Under `torch.compile` what passes between ranks stays as it is, and
            breaks the graph.
        over: the ranks, a DeviceMesh of one dimension or a process group; None: all of them. With one rank, the model
            stays as it is.

    Raises:
        ValueError: for a model that has no such parts, a mesh of several dimensions, another loss than the model's own.
    """
    return SequenceParallel(model, over)


class SequenceParallel:
    """Hooks in a model, see `parallelize_sequence`. Also a context manager, which removes them."""

    def __init__(self, model: nn.Module, over: DeviceMesh | dist.ProcessGroup | None = None):
        self.base, self.head = _find(model)
        self.group = _group(over)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.blocks = [layer.temporal_block for layer in self.base.layers]
        self.pending = {}  # by layer, between the start of a block and the place in it that needs what is on its way
        self.before = None  # a GenerationState of what was read before the rows
        self.collected = None  # by layer, what a GenerationState holds, while one is made
        self._hooks = []
        if self.size > 1:
            self._install()

    def __enter__(self) -> "SequenceParallel":
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    def __deepcopy__(self, memo) -> "SequenceParallel":
        raise ValueError("a model shared over ranks cannot be copied: allowed is after remove()")

    def remove(self) -> None:
        """The model is its own again, on each rank."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks and self.head is not None:
            del self.head._loss_function
        for block in self.blocks:
            if hasattr(block, "rg_lru"):
                block.rg_lru.scan = None
        self._hooks = []

    def chunk(self, tensor: torch.Tensor, filler=0) -> torch.Tensor:
        """(B, T, ...) -> (B, L, ...), this rank's part of it, with `filler` behind the end of the rows."""
        return take_chunk(tensor, self.rank, self.size, filler)

    @torch.no_grad()
    def gather(self, chunk: torch.Tensor, length: int) -> torch.Tensor:
        """(B, L, ...) of each rank -> (B, T, ...) on all ranks, T = `length`. Without gradients."""
        if self.size == 1:
            return chunk
        return gather(self.group, self.size, chunk).transpose(0, 1).flatten(1, 2)[:, :length]

    def _install(self) -> None:
        if self.head is not None:
            if hasattr(self.head, "_loss_function"):
                raise ValueError(
                    "model.loss_function was set: allowed is the model's own, of which chunks can be added"
                )
            self.head.loss_function = self._loss
        self._hooks = [self.base.register_forward_pre_hook(self._take_chunk, with_kwargs=True)]
        for block in self.blocks:
            if hasattr(block, "rg_lru"):
                block.rg_lru.scan = SequenceScan(self.group, self.rank, self.size)
                start, conv = self._start_convolution, block.conv_1d
                self._hooks.append(conv.register_forward_pre_hook(_Convolution(self, block)))
            else:
                start = self._start_attention
            self._hooks.append(block.register_forward_pre_hook(start, with_kwargs=True))

    @torch.compiler.disable
    def _take_chunk(self, base: nn.Module, args, kwargs):
        """From the arguments of the whole rows to those of the chunk; the layout travels as the attention mask."""
        whole = {**dict(zip(ARGUMENTS, args)), **kwargs}
        given = {name: whole.pop(name, None) for name in ARGUMENTS}
        if whole.pop("cache", None) is not None or given["past_key_values"] is not None or given["use_cache"]:
            raise ValueError("a cache with rows shared over ranks: allowed is none; `prefill` makes a GenerationState")
        if isinstance(given["attention_mask"], dict):
            raise ValueError("attention_mask is a dict: allowed is (batch, tokens) with rows shared over ranks")
        ids, embeds = given["input_ids"], given["inputs_embeds"]
        if (ids is None) == (embeds is None):
            raise ValueError("input_ids and inputs_embeds: allowed is exactly one of them")
        rows = ids if embeds is None else embeds
        if rows.dim() != (2 if embeds is None else 3) or rows.shape[1] == 0:
            raise ValueError(f"rows have shape {tuple(rows.shape)}: allowed is (batch, time) with time >= 1")
        chunk = self.chunk(rows)
        chunk = base.embed_tokens(chunk) if embeds is None else chunk
        described = {n: given[n] for n in ("attention_mask", "position_ids", "cu_seq_lens_q", "seq_idx")}
        before = 0 if self.before is None else self.before.lengths[0]
        layout, positions, start, real = read_chunk(base.config, rows, chunk, self.rank, self.size, before, **described)
        mask = {"sliding_attention": layout, "linear_attention": real, "document_start": start}
        return (), {
            **whole,
            "inputs_embeds": chunk,
            "attention_mask": mask,
            "position_ids": positions,
            "use_cache": False,
        }

    @torch.compiler.disable
    def _start_convolution(self, block: nn.Module, args, kwargs) -> None:
        """Sends the last inputs of the block to the ranks on the right, while this one projects its own."""
        hidden = args[0] if args else kwargs["hidden_states"]
        layout, real = kwargs["attention_mask"], kwargs["documents"].real
        taps, chunk = block.conv_1d.weight.shape[-1], hidden.shape[1]
        entries = min(taps - 1, chunk)
        tail = hidden[:, chunk - entries :]
        pending = exchange_positions(self.group, self.rank, self.size, chunk, taps - 1)
        if real is not None:  # the last real ones, however far back
            last = torch.argsort(real.long(), dim=1, stable=True)[:, chunk - entries :]
            tail = hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[-1]))
            pending = exchange_tails(self.group, self.rank, self.size, entries)
        self.pending[block.layer_idx] = pending.start(tail.transpose(0, 1).contiguous()), layout

    @torch.compiler.disable
    def _start_attention(self, block: nn.Module, args, kwargs) -> None:
        """Sends the chunk's last keys and values to the ranks on the right, while this one projects all."""
        hidden = args[0] if args else kwargs["hidden_states"]
        reach, chunk = block.sliding_window - 1, hidden.shape[1]
        tail = slice(chunk - min(reach, chunk), None)
        key, value = linears(hidden[:, tail], block.k_proj, block.v_proj)
        key, value = (x.unflatten(-1, (-1, block.head_dim)) for x in (key, value))
        key = rotate(key, *(x[:, tail] for x in kwargs["position_embeddings"]))
        pending = exchange_positions(self.group, self.rank, self.size, chunk, reach)
        both = torch.stack((key, value)).permute(2, 0, 1, 3, 4)  # (entries, 2, B, H_kv, head_dim)
        layout = kwargs["attention_mask"]
        layout.keys_in_front[block.layer_idx] = _Keys(self, pending.start(both.contiguous()))

    def _loss(
        self, logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs
    ) -> torch.Tensor:
        """`causal_lm_loss` of the whole rows from the chunk's logits (B, L, V) and the rows' labels (B, T)."""
        if shift_labels is None:
            shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
        mine = self.chunk(shift_labels, ignore_index)
        if mine.shape != logits.shape[:2]:
            raise ValueError(f"labels has {mine.shape[1]} tokens a rank, logits {logits.shape[1]}: allowed are as many")
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != ignore_index).sum()
        share = causal_lm_loss(logits, None, vocab_size, num_items_in_batch, ignore_index, mine)
        shares = gather(self.group, self.size, share.detach())
        return _Whole.apply(share, shares.sum(), self.size)


class _Whole(torch.autograd.Function):
    """The loss of all ranks, of which this one's share has N times its gradient: the mean over ranks is the sum."""

    @staticmethod
    def forward(ctx, share, whole, ranks):
        ctx.ranks = ranks
        return whole.to(share.dtype)

    @staticmethod
    def backward(ctx, d_whole):
        return d_whole * ctx.ranks, None, None


class _Convolution:
    """A hook in front of a convolution: its state is what the ranks on the left have sent."""

    def __init__(self, parallel: SequenceParallel, block: nn.Module):
        self.parallel, self.block = parallel, block

    @torch.compiler.disable
    def __call__(self, convolution: nn.Module, args):
        x, _, *rest = args
        parallel, layer = self.parallel, self.block.layer_idx
        pending, layout = parallel.pending.pop(layer)
        taps = convolution.weight.shape[-1]
        hidden = pending.wait().transpose(0, 1)  # (B, entries, D)
        if layout.tails is not None:
            hidden = _last_real(hidden, layout.tails, taps - 1)
        state = self.block.linear_x(hidden)
        if layout.history is not None:
            back = torch.arange(state.shape[1], 0, -1, device=x.device)  # how far in front of the chunk each stands
            state = state.masked_fill((back > layout.history[:, None])[..., None], 0.0)
        state = pad(state, (0, 0, taps - state.shape[1], 0))
        if parallel.before is not None and parallel.rank == 0:
            state = parallel.before.layers[layer][0].to(x.dtype).transpose(1, 2)
        if parallel.collected is not None:
            parallel.collected[layer] = [torch.cat([state, x], dim=1)[:, -taps:].transpose(1, 2)]
        return x, state.transpose(1, 2), *rest


def _last_real(tails: torch.Tensor, counts: torch.Tensor, number: int) -> torch.Tensor:
    """The last `number` real entries of the ranks on the left, (B, up to number, D), wherever those ranks have any.

    tails: (B, ranks * entries, D), real ones last on each rank. counts (B, ranks): how many are real, or more.
    """
    entries = tails.shape[1] // max(1, counts.shape[1])
    slot = torch.arange(entries, 0, -1, device=tails.device)
    real = (slot <= counts[..., None]).flatten(1)
    last = torch.argsort(real.long(), dim=1, stable=True)[:, -number:]
    return tails.gather(1, last[..., None].expand(-1, -1, tails.shape[-1]))


def _attention(module: nn.Module, query, key, value, layout: ChunkLayout, scaling: float, **kwargs):
    """The model's own attention over the chunk and what it sees in front of it; the first queries are nobody's.

    query (B, H, L, K), key and value (B, H_kv, L, K) -> (B, L, H, K), and the weights of an attention that has them.
    """
    key, value = layout.keys_in_front.pop(module.layer_idx).put_in_front(module.layer_idx, key, value, layout.reach)
    query = pad(query, (0, 0, layout.reach, 0))
    attention = OWN_ATTENTION.get(type(layout.mask)) or ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention_forward
    )
    output, weights = attention(module, query, key, value, layout.mask, scaling=scaling, **kwargs)
    return output[:, layout.reach :], None if weights is None else weights[:, :, layout.reach :]


OWN_ATTENTION[ChunkLayout] = torch.compiler.disable(_attention)


class _Keys:
    """Keys and values on their way from the left."""

    def __init__(self, parallel: SequenceParallel, pending):
        self.parallel, self.pending = parallel, pending

    def put_in_front(self, layer: int, key: torch.Tensor, value: torch.Tensor, reach: int):
        """Of `reach` tokens, in front of the chunk's own: (B, H_kv, reach + L, K) each."""
        parallel, own = self.parallel, (key, value)
        pairs = [list(self.pending.wait().permute(1, 2, 3, 0, 4)), own]
        if parallel.before is not None:
            pairs.insert(0, parallel.before.layers[layer])
        joined = tuple(torch.cat(parts, dim=2)[:, :, -(reach + key.shape[2]) :] for parts in zip(*pairs))
        if parallel.collected is not None:
            parallel.collected[layer] = joined
        return joined


def _find(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The GriffinModel in `model` and the language model around it, by name: code from the Hub has its own classes."""
    named = [(_names(module), module) for module in model.modules()]
    bases = [module for names, module in named if "GriffinModel" in names]
    heads = [module for names, module in named if "GriffinForCausalLM" in names]
    others = {name for names, _ in named for name in names if name.startswith("GriffinFor")} - {"GriffinForCausalLM"}
    if len(bases) != 1 or others:
        found = ", ".join(sorted(others)) or type(model).__name__
        raise ValueError(f"model is a {found}: allowed are GriffinForCausalLM and GriffinModel")
    return bases[0], heads[0] if heads else None


def _names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def _group(over) -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise ValueError("no process group: allowed is a process started by torchrun, after init_process_group")
    if not isinstance(over, DeviceMesh):
        return dist.group.WORLD if over is None else over
    if over.ndim != 1:
        raise ValueError(
            f"the mesh has the dimensions {over.mesh_dim_names}: allowed is one, for example mesh['sequence']"
        )
    return over.get_group()


__all__ = ["SequenceParallel", "chunk_length", "parallelize_sequence"]
