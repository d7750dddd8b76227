"""One sequence over several GPUs: each rank of a group holds a chunk of every row, and all compute what one would.

A rank owes its right neighbour one state a channel, the convolution's last inputs, and one window of keys and values,
whatever the length. The model's own code runs on the chunk; hooks bring in what lies in front of it, and the loss of
all chunks. Weights are whole on each rank, or sharded by FSDP2.

Legend: B batch, T tokens of the rows, L tokens of a chunk, N ranks, D hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from ..causal_lm_loss import causal_lm_loss
from ..kernels.hooks import forward_pre_hooks
from ..modeling_griffin import config_of_masks
from ..serving.state import GenerationState
from .chunk_layout import read_chunk, take_chunk
from .neighbours import Ranks, gather
from .sequence_layers import AttentionLayer, RecurrentLayer
from .sequence_prefill import prefill


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
        group = _group(over)
        self.ranks = Ranks(group, dist.get_rank(group), dist.get_world_size(group))
        self.layers: list[RecurrentLayer | AttentionLayer] = []
        self.before = 0  # tokens read before the rows, whose state the layers have
        self.rows: torch.Size | None = None  # (B, T) of those that the model has read last
        self._hook = None
        self.install()

    def __enter__(self) -> "SequenceParallel":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict) -> "SequenceParallel":
        raise ValueError("a model shared over ranks cannot be copied: allowed is after remove()")

    def install(self) -> None:
        """Undoes `remove`. With one rank there is nothing to do."""
        if self.ranks.size == 1 or self._hook is not None:
            return
        if any(isinstance(getattr(hook, "__self__", None), SequenceParallel) for hook in forward_pre_hooks(self.base)):
            raise ValueError("the model is shared over ranks already: allowed is once, or after remove()")
        blocks = [layer.temporal_block for layer in self.base.layers]
        _check_scans(blocks)
        if self.head is not None:
            if hasattr(self.head, "_loss_function"):
                raise ValueError("model.loss_function was set: allowed is the model's own, of which chunks add up")
            self.head.loss_function = self._loss
        self._hook = self.base.register_forward_pre_hook(self._take_chunk, with_kwargs=True)
        self.layers = [
            RecurrentLayer(self.ranks, block) if _recurs(block) else AttentionLayer(self.ranks, block)
            for block in blocks
        ]

    def remove(self) -> None:
        """The model is its own again, on each rank."""
        if self._hook is None:
            return
        for part in (self._hook, *self.layers):
            part.remove()
        if self.head is not None:
            del self.head._loss_function
        self._hook, self.layers = None, []

    def chunk(self, tensor: torch.Tensor, filler: float = 0) -> torch.Tensor:
        """(B, T, ...) -> (B, L, ...), this rank's part of it, with `filler` behind the end of the rows."""
        return take_chunk(tensor, self.ranks, filler)

    @torch.no_grad()
    def gather(self, chunk: torch.Tensor, length: int) -> torch.Tensor:
        """(B, L, ...) of each rank -> (B, T, ...) on all ranks, T = `length`. Without gradients."""
        if self.ranks.size == 1:
            return chunk
        return gather(self.ranks, chunk).transpose(0, 1).flatten(1, 2)[:, :length]

    def prefill(
        self, input_ids: torch.Tensor, state: GenerationState | None = None, chunk_size: int = 2048
    ) -> GenerationState:
        """The model's `prefill` with all ranks at work: the same state, on each of them.

        input_ids: (B, T) without padding, the same on all ranks. state: of rows of one length. chunk_size: tokens of a
        rank in one forward pass, which bounds the memory.
        """
        return prefill(self, input_ids, state, chunk_size)

    def loss_in_pieces(
        self, hidden: torch.Tensor, labels: torch.Tensor, piece: int = 8192, **kwargs: Any
    ) -> torch.Tensor:
        """The loss that the model would return, without the logits of the whole chunk: at a million tokens the most of
        the memory. They are made again, `piece` tokens at a time, on the way back.

        hidden: (B, L, D), `last_hidden_state` of the model without its head. labels: (B, T), as for the model. kwargs:
        `num_items_in_batch`, `shift_labels`.
        """

        def total(hidden, labels):
            logits = self._logits(hidden)
            return causal_lm_loss(logits, None, logits.shape[-1], 1, shift_labels=labels)

        mine, count = self._labels(labels, hidden, **kwargs)
        pieces = zip(hidden.split(piece, dim=1), mine.split(piece, dim=1))
        return self._whole(sum(checkpoint(total, *each, use_reentrant=False) for each in pieces) / count)

    @torch.no_grad()
    def token_losses(self, hidden: torch.Tensor, labels: torch.Tensor, piece: int = 8192) -> torch.Tensor:
        """-log p (B, T - 1) in nats, float32, of labels[:, 1:], the same on all ranks; 0 where a label is -100.

        Arguments as of `loss_in_pieces`. For the loss by position of rows that one GPU cannot hold.
        """
        mine = self._labels(labels, hidden)[0]
        parts = [
            cross_entropy(self._logits(part).float().transpose(1, 2), expected, reduction="none")
            for part, expected in zip(hidden.split(piece, dim=1), mine.split(piece, dim=1))
        ]
        return self.gather(torch.cat(parts, dim=1), labels.shape[1])[:, :-1]

    def language_model(self) -> nn.Module:
        """The model with its head. Raises ValueError where there is none."""
        if self.head is None:
            raise ValueError("the model has no language-model head: allowed is GriffinForCausalLM")
        return self.head

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits, cap = self.language_model().lm_head(hidden), self.base.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

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
        self.rows = rows.shape[:2]
        chunk = self.chunk(rows)
        chunk = base.embed_tokens(chunk) if embeds is None else chunk
        described = {n: given[n] for n in ("attention_mask", "position_ids", "cu_seq_lens_q", "seq_idx")}
        config = config_of_masks(base.config, base.layers)
        layout, positions, start, real = read_chunk(config, rows, chunk, self.ranks, self.before, **described)
        mask = {"sliding_attention": layout, "linear_attention": real, "document_start": start}
        return (), {
            **whole,
            "inputs_embeds": chunk,
            "attention_mask": mask,
            "position_ids": positions,
            "use_cache": False,
        }

    def _loss(self, logits, labels, vocab_size, ignore_index=-100, **kwargs) -> torch.Tensor:
        """`causal_lm_loss` of the whole rows from the chunk's logits (B, L, V) and the rows' labels (B, T)."""
        given = labels if kwargs.get("shift_labels") is None else kwargs["shift_labels"]
        if given.shape != self.rows:
            raise ValueError(f"labels has shape {tuple(given.shape)}: allowed is {tuple(self.rows)}, that of the rows")
        mine, count = self._labels(labels, logits, ignore_index=ignore_index, **kwargs)
        return self._whole(causal_lm_loss(logits, None, vocab_size, count, ignore_index, mine))

    def _labels(self, labels, output, num_items_in_batch=None, shift_labels=None, ignore_index=-100, **kwargs):
        """What each token of the chunk predicts (B, L), and how many labels of all rows the loss is a mean over.

        output (B, L, ...): of the chunk, what is to predict them.
        """
        if shift_labels is None:
            shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != ignore_index).sum()
        mine = self.chunk(shift_labels, ignore_index)
        if mine.shape != output.shape[:2]:
            found, wanted = tuple(mine.shape), tuple(output.shape[:2])
            raise ValueError(f"labels has {found} tokens of a rank: allowed is {wanted}, those of the model's output")
        return mine, num_items_in_batch

    def _whole(self, share: torch.Tensor) -> torch.Tensor:
        if self.ranks.size == 1:
            return share
        return _Whole.apply(share, gather(self.ranks, share.detach()).sum(), self.ranks.size)


class _Whole(torch.autograd.Function):
    """The loss of all ranks, of which this one's share has N times its gradient: the mean over ranks is the sum."""

    @staticmethod
    def forward(ctx, share, whole, ranks):
        ctx.ranks = ranks
        return whole.to(share.dtype, copy=True)  # its own: Trainer multiplies losses in place

    @staticmethod
    def backward(ctx, d_whole):
        return d_whole * ctx.ranks, None, None


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


def _check_scans(blocks: list[nn.Module]) -> None:
    """Raises ValueError where another scan than the model's own runs, or none can be put in: states would not pass."""
    for number, block in enumerate(blocks):
        scan = getattr(block.rg_lru, "scan", "not there, as in code of an older release") if _recurs(block) else None
        if scan is not None:
            raise ValueError(f"model.layers[{number}]: rg_lru.scan is {scan}: allowed is None, the model's own scan")


def _recurs(block: nn.Module) -> bool:
    return hasattr(block, "rg_lru")


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
