"""Rows of `generate_batch` on a recorded decoding step: rows come and go while one CUDA graph is replayed.

All rows of a step share its time. A row that joins is loaded as if its last token had been read just now; its padding
makes its own positions out of that time. Rows that nobody uses read on and touch no other. A row's number in the step
is its seat.

Legend: B rows of the step, N new rows, T tokens of the longest prompt, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from transformers.utils import logging

from ..decode.eligibility import MASKS, Obstacle, forward_obstacles, ineligible_model_reasons
from ..decode.generate import PREFILL_TOKENS, read_prompt
from ..decode.steps import take_kept_step, take_step
from ..decode.upload import upload
from .cached_rows import read_request
from .packed_prefill import read_packed


logger = logging.get_logger(__name__)
LEAST_FREE = 8  # a batch's share of rows, 1 / LEAST_FREE, that waits to be filled by one pass over several prompts
MOST_PADDING = 2  # times the shortest prompt that the longest of one padded pass may have
# Steps of which the host has not seen the tokens, on a GPU: as many hide what the host does for one; and in front of a
# pass over prompts, whose launches take the host about as long as these take the GPU.
STEPS_AHEAD, STEPS_AHEAD_OF_A_PASS = 4, 16
FEWER = 4  # times fewer rows has the next smaller step, which a batch goes on on when so few are left
RECORDED_ON = ("cuda",)  # where the model's own forward over fixed buffers is faster than a cache, being recorded


def recorded_batch(
    model: torch.nn.Module, max_rows: int, stream: bool, tokens: int | None = None
) -> "RecordedBatch | None":
    """Room for max_rows rows on one of the model's steps; None, and one warning why, where there is none.

    tokens: that a row will hold at most; None: any number. stream: see `take_step`.
    """
    if model.device.type not in model._fast_generation_devices:
        return None
    rows, reason = 1 << (max_rows - 1).bit_length(), next(ineligible_model_reasons(model), None)
    if reason is None and (step := take_step(model, rows, tokens, stream=stream)) is not None:
        # Prompts end to end were checked with the attentions that take a mask of slots.
        made = PackedBatch if model.config._attn_implementation in MASKS else RecordedBatch
        return made(model, step, max_rows)
    if model.device.type not in RECORDED_ON:
        return None
    reason = reason or "its fused step cannot be used, see above"
    obstacle = next(forward_obstacles(model), None)
    if obstacle is None and (step := take_step(model, rows, tokens, "forward", stream=stream)) is not None:
        logger.info_once(f"generate_batch runs the model's own forward pass over fixed buffers: {reason}")
        return RecordedBatch(model, step, max_rows)
    reason, remedy = obstacle or Obstacle(reason, "none")
    logger.warning_once(f"generate_batch runs without a recorded step, which is slow: {reason}. Remedy: {remedy}")
    return None


class RecordedBatch:
    """The same to an `Engine` as its batch behind a cache."""

    runs_modules = False  # in a step

    def __init__(self, model: torch.nn.Module, step: Any, max_rows: int):
        self.model, self.max_rows, self.seats = model, max_rows, len(step.token)
        self.steps = [step]  # that it holds; the rows are on the last
        self.seated: list[int] | None = None  # the seat in each place of the last; None: its own number
        self.looked_for: set[int] = set()  # sizes of smaller steps
        self.ahead, self.ahead_of_a_pass = (STEPS_AHEAD, STEPS_AHEAD_OF_A_PASS) if step.on_gpu else (0, 0)
        step.start(model.config.attention_window_size)  # so late that a full window lies behind it

    @property
    def current(self) -> Any:
        return self.steps[-1]

    def room(self, running: int) -> int:
        """How many rows to add now: none while a few are free, as a pass over one prompt takes many steps' time."""
        free = self.max_rows - running
        return free if running == 0 or free * LEAST_FREE >= self.max_rows else 0

    def read(self, rows: Sequence, chunk_size: int) -> Iterator[tuple[Sequence, torch.Tensor | None]]:
        """Passes over the prompts of new rows: those that have been read, and the logits (N, V) behind them.

        Between the passes the others step. A row behind a state, or of more tokens than a pass reads, is read alone.
        """
        alone = [row for row in rows if row.request.state or len(row.request.prompt) > chunk_size]
        together = [row for row in rows if row not in alone]
        for group in self.groups([row.request.prompt for row in together]):
            group = [together[number] for number in group]
            yield group, self._read_together(group)
        for row in alone:
            state = None
            for state in read_request(self.model, row.request, chunk_size):
                if state is None:
                    yield (), None
            self.current.load_rows(self._index([row]), state.to_cache()[0], state.lengths[0], None)
            yield [row], state.logits

    def groups(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Numbers of the prompts that one pass reads."""
        return _of_similar_lengths([len(prompt) for prompt in prompts])

    def _read_together(self, rows: Sequence) -> torch.Tensor:
        prompts, device = [row.request.prompt for row in rows], self.current.device
        length = max(map(len, prompts))
        padding = torch.tensor([length - len(prompt) for prompt in prompts])
        ids = upload([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], device)
        mask = upload((torch.arange(length) >= padding[:, None]).long(), device) if padding.any() else None
        cache, logits = read_prompt(self.model, ids, mask, length)
        self.current.load_rows(self._index(rows), cache, length, upload(padding, device))
        return logits

    def _index(self, rows: Sequence) -> torch.Tensor:
        return upload([row.seat for row in rows], self.current.device)

    def places(self, rows: Sequence) -> list[int]:
        """Of rows in the current step."""
        return [row.seat if self.seated is None else self.seated.index(row.seat) for row in rows]

    def begin(self, rows: Sequence, tokens: torch.Tensor) -> None:
        """The first tokens (N,) of rows that have been read, for their next step."""
        self.current.token[self._index(rows)] = tokens

    def step(self, rows: Sequence, last: bool = False) -> tuple[torch.Tensor, torch.Tensor, list[int] | None]:
        """Reads one token of each row: logits (B, V), their argmax (B,), and their seats; None: all, in their order.

        last: whether no more rows are waiting to join.
        """
        return self.current.step(), self.current.token, None

    def take(self, tokens: torch.Tensor) -> None:
        """The tokens (B,) that the next step reads."""
        if tokens is not self.current.token:
            self.current.token.copy_(tokens)

    def close(self) -> None:
        """Leaves the steps to others."""
        for step in self.steps:
            step.release()


class PackedBatch(RecordedBatch):
    """On the fused step, whose model's prompts are read end to end, and equal ones once."""

    def groups(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        return of_bounded_length(prompts)

    def _read_together(self, rows: Sequence) -> torch.Tensor:
        number: dict[tuple, int] = {}
        prompts = [number.setdefault(tuple(row.request.prompt), len(number)) for row in rows]
        packed = read_packed(self.model, list(number))
        # Attention counts 0 times what it masks, so that one prompt's NaN spoils the others. A GPU is not asked.
        if len(number) > 1 and not self.current.on_gpu and bool(packed.logits.isnan().any()):
            return self._read_apart(rows, prompts)
        self.current.load_packed([row.seat for row in rows], prompts, packed)
        return packed.logits[upload(prompts, packed.logits.device)]

    def _read_apart(self, rows: Sequence, prompts: Sequence[int]) -> torch.Tensor:
        """The same, each prompt in a pass of its own. prompts: the number of each row's."""
        logits = torch.empty_like(self.current.logits[: len(rows)])
        for number in set(prompts):
            places = [place for place, each in enumerate(prompts) if each == number]
            logits[places] = self._read_together([rows[place] for place in places])
        return logits

    def step(self, rows: Sequence, last: bool = False) -> tuple[torch.Tensor, torch.Tensor, list[int] | None]:
        size = len(self.current.token) // FEWER
        if last and len(rows) <= size and size not in self.looked_for:
            self.looked_for.add(size)
            self._go_on_with(rows, size)
        return self.current.step(), self.current.token, self.seated

    def _go_on_with(self, rows: Sequence, size: int) -> None:
        """On a smaller step, where an earlier call has left one: it takes less time."""
        smaller = take_kept_step(self.model, size, self.current.slots, stream=self.current.stream)
        if smaller is None:
            return
        seats = [row.seat for row in rows]
        smaller.take_rows(self.current, self.places(rows), range(size)[: len(rows)])
        nobodys = (seat for seat in range(self.seats) if seat not in seats)
        self.seated = [*seats, *islice(nobodys, size - len(rows))]
        self.steps.append(smaller)

    def read(self, rows: Sequence, chunk_size: int) -> Iterator[tuple[Sequence, torch.Tensor | None]]:
        if self.seated is not None:  # back to the step that has a row for each seat
            self.steps[0].take_rows(self.current, range(len(self.seated)), self.seated)
            for smaller in self.steps[1:]:
                smaller.release()
            self.steps, self.seated = self.steps[:1], None
            self.looked_for.clear()
        return super().read(rows, chunk_size)


def _of_similar_lengths(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Padded to the longest, no more than bounded memory holds."""
    group: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        length = lengths[number]
        shortest = lengths[group[0]] if group else 0
        if group and (length > MOST_PADDING * shortest or length * (len(group) + 1) > PREFILL_TOKENS):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def of_bounded_length(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """In their order, no more than bounded memory holds; one that is there already costs nothing."""
    group: list[int] = []
    seen: set[tuple] = set()
    tokens = 0
    for number, prompt in enumerate(prompts):
        cost = 0 if tuple(prompt) in seen else len(prompt)
        if group and tokens + cost > PREFILL_TOKENS:
            yield group
            group, seen, tokens, cost = [], set(), 0, len(prompt)
        group.append(number)
        seen.add(tuple(prompt))
        tokens += cost
    if group:
        yield group
