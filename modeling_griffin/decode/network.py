"""What every step over fixed buffers does: it goes through the layers, and can be recorded as a CUDA graph.

Legend: B rows, or tokens of one row where the operations say so; V vocabulary.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.capture import capture
from .ops import Clock, Ends, PlainOps, Stream


ONE_RECORDS = threading.Lock()  # at a time, whatever the model: what a thread captures is not another's


class Recording:
    """What can be computed over fixed buffers, and recorded. A kind of it has `_compute`.

    token (B,): what a step reads, logits (B, V): what it leaves. drawings: recordings of what is sampled behind it.
    ends: what a step looks for itself, where it does.
    """

    token: torch.Tensor
    logits: torch.Tensor | None = None
    ends: Ends | None = None
    _compute: Callable[[], None]

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.drawings: OrderedDict[tuple, Any] = OrderedDict()

    def step(self) -> torch.Tensor:
        """Reads `token`, puts the argmax of its logits there and returns `logits`; the next step overwrites both."""
        self.run()
        return self.logits

    @torch.no_grad()
    def run(self) -> None:
        if self.graph is None:
            self._compute()
        else:
            self.graph.replay()

    def record(self) -> None:
        """Compiles what has to be and records the step. Overwrites the state: `load` comes afterwards."""
        with ONE_RECORDS, torch.inference_mode(False), torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._compute()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with capture(graph, capture_error_mode="thread_local"):
                self._compute()
            self.graph = graph


class RecordedStep(Recording):
    """A fused step: it goes through the layers by its own operations. A kind of it has `_compute`, which calls `_read`.

    layers: for each layer, the buffers that its operation takes. trace: where it is a list, `_read` puts the residual
    stream (B, D) there, in front of the first layer and behind each. hidden_states (L + 1, B, 1, D): where the step
    leaves what the model calls so; None: nowhere.
    """

    layers: list[tuple[torch.Tensor, ...]]

    def __init__(self, base: nn.Module, head: nn.Linear, ops: PlainOps):
        super().__init__(head.weight.device)
        self.base, self.head, self.config = base, head, base.config
        self.ops: Any = ops  # those of a pass over drafts take buffers besides
        self.dtype = head.weight.dtype
        self.trace: list[torch.Tensor] | None = None
        self.hidden_states: torch.Tensor | None = None
        self.scale = base.embedding_scale if self.config.scale_embeddings else 1.0
        self.frequencies = None
        if "sliding_attention" in self.config.layer_types:  # as rotary_emb computes them
            rotary = base.rotary_emb
            exponents = torch.arange(0, rotary.dim, 2, device=self.device, dtype=torch.float32) / rotary.dim
            self.frequencies = torch.cat([rotary.theta**-exponents] * 2)

    def _read(self, stream: Stream, clock: Clock) -> None:
        """The embeddings through all layers and the head, into `logits`."""
        ops, base = self.ops, self.base
        *between, normed = self._places()[1:]
        self._keep(stream)
        for layer, buffers, kind, into in zip(base.layers, self.layers, self.config.layer_types, (*between, None)):
            mix = self._attend if kind == "sliding_attention" else self._recur
            stream = mix(stream, layer.temporal_block, layer.temporal_pre_norm, buffers, clock)
            mlp = layer.mlp_block
            x = ops.gated_project(stream, layer.channel_pre_norm, mlp.gate_proj, mlp.up_proj)
            stream = ops.add_project(stream, x, mlp.down_proj, into)
            self._keep(stream)
        ops.head(stream, base.final_norm, self.head, self.logits, normed)
        if (cap := self.config.final_logit_softcapping) is not None:
            torch.mul((self.logits / cap).tanh_(), cap, out=self.logits)

    def _places(self) -> Sequence[torch.Tensor | None]:
        """(B, D) for the embeddings, for the stream behind each layer but the last, and for the norm behind that."""
        if self.hidden_states is None:
            return [None] * (len(self.layers) + 1)
        return self.hidden_states[:, :, 0].unbind()

    def _keep(self, stream: Stream) -> None:
        if self.trace is not None:
            self.trace.append(stream.residual + (0 if stream.delta is None else stream.delta))

    def _attend(self, stream: Stream, block: nn.Module, norm: nn.Module, buffers: tuple, clock: Clock) -> Stream:
        q, k, v = self.ops.project(stream, norm, [block.q_proj, block.k_proj, block.v_proj])
        return self.ops.add_project(stream, self.ops.attend(q, k, v, *buffers, clock, block.scaling), block.o_proj)

    def _recur(self, stream: Stream, block: nn.Module, norm: nn.Module, buffers: tuple, clock: Clock) -> Stream:
        x, y = self.ops.project(stream, norm, [block.linear_x, block.linear_y])
        return self.ops.add_project(stream, self.ops.recurrent(x, y, block, *buffers, clock), block.linear_out)


def in_order(layer_types: Sequence[str], attending: tuple, recurring: tuple) -> list[tuple[torch.Tensor, ...]]:
    """For each layer its part of the buffers of all layers that attend, or of all that recur."""
    attending, recurring = zip(*attending), zip(*recurring)
    return [next(attending if kind == "sliding_attention" else recurring) for kind in layer_types]
