"""One step that reads a token and the drafts behind it, and keeps those that turn out to be what would be chosen.

It shares the state of a `DecodeStep` of one row, and leaves there what single steps over the same tokens would have
left. How many are kept is decided on the device, so that it is one recorded CUDA graph too, and the host waits once for
all that it learns of a pass.

Legend: N tokens, C RG-LRU channels, K head dimension, V vocabulary.
"""

from collections.abc import Sequence

import torch

from ...configuration_griffin import GriffinConfig
from ..network import RecordedStep, in_order
from ..ops import Clock, KernelOps
from ..state import DecodeStep
from .ops import KernelVerifyOps, PlainVerifyOps


MOST_TOKENS = 64  # of a pass: as many rows as there are GEMM kernels for
TOLERANCE = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 5e-2}  # of `disagreement`; float32 may be TF32


def most_tokens(config: GriffinConfig) -> int:
    """Of a pass: in a ring of W keys, more would have to share a slot."""
    return min(MOST_TOKENS, config.attention_window_size if "sliding_attention" in config.layer_types else MOST_TOKENS)


class VerifyStep(RecordedStep):
    """The pass over N = `tokens` tokens of the one row of `step`: the token chosen last and N - 1 drafts.

    tokens (N,) int64: what a pass reads, in the host's memory, where a GPU reads it too. report (1 + N,) int64: what it
    finds, how many of these tokens are kept and the argmax behind each; on_host: the same for the host.
    logits (N, V), in the model's dtype.
    """

    def __init__(self, step: DecodeStep, tokens: int):
        if len(step.token) != 1:
            raise ValueError(f"step: has {len(step.token)} rows; drafts are read for 1 row")
        if not 2 <= tokens <= most_tokens(step.config):
            raise ValueError(f"tokens = {tokens}: allowed is 2 to {most_tokens(step.config)}")
        kernels = isinstance(step.ops, KernelOps)
        ops = KernelVerifyOps(step.ops.launch["PDL"], step.ops.gemms.matmul) if kernels else PlainVerifyOps()
        with torch.inference_mode(False), torch.no_grad():
            super().__init__(step.base, step.head, ops)
            # Its tensors and not the step, which knows its passes: in a circle, memory would wait to be collected.
            self.row_token, self.row_clock = step.token, step.clock
            self.row_rings, self.row_memories = step.rings, step.memories
            self._make_buffers(step, tokens)

    def _make_buffers(self, step: DecodeStep, number: int) -> None:
        config, new, whole = self.config, {"dtype": self.dtype, "device": self.device}, {"dtype": torch.long}
        self.tokens = torch.zeros(number, **whole, pin_memory=self.on_gpu)
        self.report = torch.zeros(1 + number, **whole, device=self.device)
        self.on_host = torch.zeros(1 + number, **whole, pin_memory=self.on_gpu)
        self.offsets = torch.arange(number, device=self.device)
        self.passes = Clock(torch.zeros(1, **whole, device=self.device), self.offsets)
        self.logits = torch.zeros(number, self.head.weight.shape[0], **new)
        ring = (len(self.row_rings[0]), config.num_key_value_heads, number, config.head_dim)
        self.new_rings = torch.zeros(ring, **new), torch.zeros(ring, **new)
        memory = (len(self.row_memories[0]), number, config.lru_width)
        self.new_memories = torch.zeros(memory, **new), torch.zeros(memory, device=self.device)
        kept = in_order(config.layer_types, self.new_rings, self.new_memories)
        self.layers = [(*before, *new) for before, new in zip(step.layers, kept)]

    def read(self, token: int, drafts: Sequence[int]) -> list[int]:
        """Reads the token chosen last and up to N - 1 drafts; the new tokens: right drafts, and the one behind them.

        Places without a draft hold `token` again, a draft like any other: where it is right there are more new tokens.
        """
        tokens = self.tokens.numpy()
        tokens[: 1 + len(drafts)], tokens[1 + len(drafts) :] = (token, *drafts), token
        self.step()
        if self.on_gpu:
            torch.cuda.current_stream(self.device).synchronize()
        accepted, *best = self.on_host.tolist()
        return best[:accepted]

    @torch.no_grad()  # here too: inference_mode(False) turns gradients on
    def _compute(self) -> None:
        ops, row = self.ops, self.row_clock
        # A token's position is that of a row's next token that has as many fewer tokens of padding.
        each = Clock(row.time, row.padding - self.offsets)
        stream, each = ops.begin(self.tokens, self.base.embed_tokens, self.scale, each, self.frequencies)
        self._read(stream, Clock(row.time, row.padding, each.cos, each.sin))
        ops.end(self.logits, self.report[1:], self.passes)  # whose time is how many passes there were
        ops.accept(self.tokens, self.report, self.row_token, row)
        ops.keep_recurrent(*self.row_memories, *self.new_memories, self.report[:1], row)
        ops.keep_attention(*self.row_rings, *self.new_rings, self.report[:1], row)
        self.on_host.copy_(self.report, non_blocking=True)


@torch.no_grad()
def disagreement(step: DecodeStep, drafts: VerifyStep) -> float:
    """How far a pass is from single steps over the same tokens: of the logits, as a share of the largest.

    Half of its drafts are right. Compared are the logits up to the first wrong one, and those of a single step behind
    the pass, which show what it has left. Overwrites the state.
    """
    number, vocabulary = drafts.logits.shape
    step.start(0)
    step.clock.padding.zero_()
    for _ in range(number):  # the state that is compared should have something in it
        step.step()
    state = [step.clock.time, *(tensor for layer in step.layers for tensor in layer)]
    before, tokens, expected = [tensor.clone() for tensor in state], step.token.tolist(), []
    for _ in range(number + 1):
        expected.append(step.step().clone())
        tokens += step.token.tolist()
    for tensor, value in zip(state, before):
        tensor.copy_(value)
    right = number // 2
    wrong = [(token + 1) % vocabulary for token in tokens[right + 1 : number]]
    accepted = len(drafts.read(tokens[0], tokens[1 : right + 1] + wrong))
    step.token.fill_(tokens[accepted])  # where two tokens are as likely, the pass may have found the other one
    pairs = [*zip(drafts.logits[: right + 1, None], expected), (step.step(), expected[accepted])]
    errors = [(found - wanted).abs().max().float() / wanted.abs().max().float() for found, wanted in pairs]
    return torch.stack(errors).max().item()
