"""Rows of `generate_batch` on a recorded decoding step: rows come and go while one CUDA graph is replayed.

All rows of a step share its time. A row that joins is loaded as if its last token had been read just now; its padding
makes its own positions out of that time. Rows that nobody uses read token 0 and touch no other.

Legend: N new rows, T tokens of the longest prompt, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from transformers.utils import logging

from ..decode.eligibility import ineligible_model_reasons
from ..decode.generate import PREFILL_TOKENS, read_prompt, take_step
from ..decode.state import DecodeStep
from .cached_rows import prefill


logger = logging.get_logger(__name__)
LEAST_FREE = 8  # a batch's share of rows, 1 / LEAST_FREE, that waits to be filled by one pass over several prompts
MOST_PADDING = 2  # times the shortest prompt that the longest of one pass may have


def recorded_batch(model: torch.nn.Module, max_rows: int) -> "RecordedBatch | None":
    """Room for max_rows rows on the model's recorded step; None, and one line why, where there is none."""
    if model.device.type not in model._fast_generation_devices:
        return None
    reason = next(ineligible_model_reasons(model), None)
    step = None if reason else take_step(model, 1 << (max_rows - 1).bit_length(), stream=True)
    if step is None:
        logger.info_once(f"generate_batch runs without a recorded step: {reason or 'another call uses it'}")
        return None
    return RecordedBatch(model, step, max_rows)


class RecordedBatch:
    """The same to `stream_batch` as its batch behind a cache. Running rows have numbers 0, 1, ... in their order."""

    def __init__(self, model: torch.nn.Module, step: DecodeStep, max_rows: int):
        self.model, self.step, self.max_rows = model, step, max_rows
        self.places: list[int] = []  # of each running row in the step
        self.free = list(range(len(step.token)))
        step.start(model.config.attention_window_size)  # so late that a full window lies behind it

    def room(self, running: int) -> int:
        """How many rows to add now: none while a few are free, because reading one prompt takes many steps' time."""
        free = self.max_rows - running
        return free if running == 0 or free * LEAST_FREE >= self.max_rows else 0

    def keep(self, numbers: Sequence[int]) -> None:
        """Ends all rows but these."""
        kept = [self.places[number] for number in numbers]
        self.free += set(self.places) - set(kept)
        self.places = kept

    def add(self, generations: Sequence, chunk_size: int) -> torch.Tensor:
        """Reads the prompts of new rows, N; the logits (N, V) behind them."""
        places, self.free = self.free[: len(generations)], self.free[len(generations) :]
        self.places += places
        logits = self.step.logits.new_empty(len(generations), self.step.logits.shape[1])
        for numbers in _together([0 if each.state else len(each.prompt) for each in generations]):
            rows = torch.tensor([places[number] for number in numbers], device=logits.device)
            if generations[numbers[0]].state:
                logits[numbers] = self._add_state(rows, generations[numbers[0]], chunk_size)
            else:
                logits[numbers] = self._add_prompts(
                    rows, [generations[number].prompt for number in numbers], chunk_size
                )
        return logits

    def _add_state(self, row: torch.Tensor, request, chunk_size: int) -> torch.Tensor:
        request.state.check(self.model)
        state = request.state
        if request.prompt:
            state = prefill(self.model, torch.tensor([request.prompt]), state, chunk_size)
        self.step.load_rows(row, state.to_cache()[0], state.lengths[0], None)
        return state.logits

    def _add_prompts(self, rows: torch.Tensor, prompts: Sequence[Sequence[int]], chunk_size: int) -> torch.Tensor:
        length = max(map(len, prompts))
        padding = torch.tensor([length - len(prompt) for prompt in prompts])
        ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
        ids, padding = ids.to(rows.device), padding.to(rows.device)
        mask = (torch.arange(length, device=rows.device) >= padding[:, None]).long()
        chunk = max(1, min(chunk_size, PREFILL_TOKENS // len(prompts)))
        cache, logits = read_prompt(self.model, ids, mask if bool(padding.any()) else None, chunk)
        self.step.load_rows(rows, cache, length, padding)
        return logits

    def read(self, tokens: Sequence[int]) -> torch.Tensor:
        """One token of each running row; the logits (N, V) behind them."""
        every = [0] * len(self.step.token)
        for place, token in zip(self.places, tokens):
            every[place] = token
        with torch.cuda.device(self.step.device) if self.step.on_gpu else nullcontext():
            self.step.token.copy_(torch.tensor(every))
            return self.step.step()[self.places]

    def close(self) -> None:
        """Leaves the step to others."""
        self.step.release()


def _together(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of the prompts that one pass reads: of similar lengths, no more than bounded memory holds; 0 alone."""
    group: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        length = lengths[number]
        shortest = lengths[group[0]] if group else 0
        if group and (shortest == 0 or length > MOST_PADDING * shortest or length * (len(group) + 1) > PREFILL_TOKENS):
            yield group
            group = []
        group.append(number)
    if group:
        yield group
