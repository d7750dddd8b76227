"""Drafts of a smaller model, by its own step over fixed buffers: each draft is a step, and a wrong one is taken back.

What the assistant's steps overwrite is kept: its memories behind each draft, and the slots of its rings, which a window
that goes back still needs. So it goes back by copies, whatever was accepted, and never reads a token twice. On a GPU
the drafts go from step to step there, and the host waits once for all of them.

Legend: N drafts at most, L layers, S slots of a ring, K head dimension.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig

from ..state import DecodeStep


PATIENCE = 5  # passes in a row without a right draft, behind which an assistant costs more than it brings


class DraftSettings(NamedTuple):
    """What an assistant's generation configuration says, or else Transformers' defaults."""

    num_assistant_tokens: int = 20
    num_assistant_tokens_schedule: str = "constant"
    assistant_confidence_threshold: float = 0.4

    @classmethod
    def of(cls, config: GenerationConfig) -> "DraftSettings":
        found = {name: getattr(config, name, None) for name in cls._fields}
        return cls(**{name: value for name, value in found.items() if value is not None})

    @property
    def changes(self) -> bool:
        """Whether the number of drafts follows how many were right."""
        return self.num_assistant_tokens_schedule in ("heuristic", "heuristic_transient")


class Assistant:
    """Drafts of `model`, whose `step` has read the prompt, `length` tokens with padding.

    most: N. ends: tokens behind which nothing is drafted. number: of drafts that come next, as Transformers counts
    them; no more than N are made.
    """

    def __init__(self, model: nn.Module, step: DecodeStep, length: int, most: int, ends: Collection[int]):
        self.config, self.step, self.time, self.most, self.ends = model.generation_config, step, length, most, ends
        self.settings = DraftSettings.of(self.config)
        self.number = self.settings.num_assistant_tokens
        self.unread: list[int] = []
        self.drafted: list[int] = []  # all that were drafted last; the state has read them but for the last
        self.given = 0  # so many of them were handed out
        self.failures = 0  # passes in a row of whose drafts none was right; at PATIENCE nothing more is drafted
        with torch.inference_mode(False):
            self.memories = [
                torch.empty(most, *each.shape, dtype=each.dtype, device=each.device) for each in step.memories
            ]
            # Drafts and their probabilities, which float64 holds both: the host waits for one tensor.
            self.report = torch.zeros(2, most, dtype=torch.float64, device=step.device)

    @torch.no_grad()
    def accept(self, tokens: Sequence[int]) -> None:
        """The next tokens of the text: behind drafts, those that were right and more."""
        if self.failures == PATIENCE:
            return
        read = 0
        if self.drafted:
            self.failures = self.failures + 1 if len(tokens) == 1 else 0
            read = _agreeing(self.drafted[:-1], tokens[:-1])
            self._go_back(read)
            self._count(right=len(tokens) - 1)
            self.drafted = []
        self.unread += tokens[read:]

    @torch.no_grad()
    def drafts(self, room: int) -> list[int]:
        """What the assistant would choose next, at most `room` tokens."""
        number = min(self.number, self.most, room)
        if number < 1 or self.failures == PATIENCE:
            return []
        *behind, token = self.unread
        for each in behind:
            self.step.token.fill_(each)
            self.step.step()
        self.step.token.fill_(token)
        self.unread = []
        self.begin = self.time + len(behind)
        self._keep_slots(number)
        for i in range(number):
            self._draft(i)
            if not self.step.on_gpu and self._is_last(*self.report[:, i].tolist()):
                number = i + 1
                break
        tokens, shares = self.report[:, :number].tolist()
        self.drafted = [int(token) for token in tokens]
        self.given = next((i for i, pair in enumerate(zip(tokens, shares), 1) if self._is_last(*pair)), number)
        return self.drafted[: self.given]

    def close(self) -> None:
        """Leaves the number to the next call, where Transformers does."""
        if self.settings.num_assistant_tokens_schedule == "heuristic":
            self.config.num_assistant_tokens = self.number

    def _draft(self, i: int) -> None:
        logits = self.step.step()
        for memory, now in zip(self.memories, self.step.memories):
            memory[i].copy_(now)
        self.report[0, i : i + 1].copy_(self.step.token)
        self.report[1, i : i + 1].copy_(logits.float().softmax(-1).amax(-1))

    def _is_last(self, token: float, share: float) -> bool:
        return token in self.ends or share < self.settings.assistant_confidence_threshold

    def _keep_slots(self, number: int) -> None:
        """What the rings have where the next tokens will be written."""
        times = self.begin + torch.arange(number, device=self.step.device)
        self.slots = times % self.step.slots
        self.overwritten = [ring.index_select(3, self.slots) for ring in self.step.rings]

    def _go_back(self, right: int) -> None:
        """To the state behind the token before the drafts and so many drafts."""
        self.time = self.begin + 1 + right
        self.step.clock.time.fill_(self.time)
        for now, memory in zip(self.step.memories, self.memories):
            now.copy_(memory[right])
        wrong = slice(1 + right, len(self.drafted))
        for ring, before in zip(self.step.rings, self.overwritten):
            ring.index_copy_(3, self.slots[wrong], before[:, :, :, wrong])

    def _count(self, right: int) -> None:
        if self.settings.changes:
            self.number = self.number + 2 if right >= self.given else max(1, self.number - 1)


def _agreeing(some: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (one, other) in enumerate(zip(some, others)) if one != other), min(len(some), len(others)))
