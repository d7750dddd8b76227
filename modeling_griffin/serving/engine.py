"""The loop of continuous batching: rows come and go, none waits for another, and the host stays ahead of the device.

A step's tokens go from the step to the next one on the device; the host learns them later, by reports. So it knows when
a row ends by its length before the token is there, and by an end token or a stop string only afterwards: the steps
taken until then are dropped for that row. Prompts are read in passes between steps; steps are queued in front of a
pass, so that the device has work while the host launches it.

Legend: B rows of a step, N rows that are looked at, V vocabulary.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import StopStringCriteria

from ..gpu import on_its_device
from .request import GenerationRequest, as_request, end_tokens
from .sampling import Sampler
from .watch import Watch


NO_TOKEN = -1  # in a report: nothing could be drawn


class GeneratedToken(NamedTuple):
    """index: the generation's number in the order given. token: None for a generation of no tokens, or an error.

    finish_reason: None while it goes on, else "eos", "stop", "length", "error: " and what was wrong with it, or of
    `Arrivals` "cancelled".
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    token: int | None
    finish_reason: str | None


class Arrivals(Protocol):
    """Where an engine's requests come from."""

    def take(self, room: int, idle: bool) -> list[tuple[int, object]]:
        """At most `room` requests with their numbers, those that are there now. idle: nothing runs; none ends it."""

    def cancelled(self, index: int) -> bool:
        """Whether nobody wants this request any more."""


class Queue:
    """Arrivals from an iterable."""

    def __init__(self, entries: Iterable):
        self.entries = enumerate(entries)

    def take(self, room: int, idle: bool) -> list[tuple[int, object]]:
        return list(islice(self.entries, room))

    def cancelled(self, index: int) -> bool:
        return False


class Row:
    """One generation while it runs. asked: how many tokens the device was asked for. tokens: those that are known."""

    def __init__(
        self, model: torch.nn.Module, index: int, request: GenerationRequest, tokenizer: PreTrainedTokenizerBase | None
    ):
        self.index, self.request = index, request
        self.tokens: list[int] = []
        self.seat, self.asked, self.ended = -1, 0, False
        eos = model.generation_config.eos_token_id if request.eos_token_id is None else request.eos_token_id
        self.eos = set(end_tokens(eos))
        largest = model.config.vocab_size - 1
        outside = [token for token in request.prompt if not 0 <= token <= largest]
        if outside:
            raise ValueError(f"prompt of generation {index} has the token {outside[0]!r}: allowed are 0 to {largest}")
        if request.state is not None:
            request.state.check(model)
        self.stop = None
        if request.stop:
            if tokenizer is None:
                raise ValueError(f"stop = {list(request.stop)} of generation {index}: allowed only with a tokenizer")
            self.stop = StopStringCriteria(tokenizer, list(request.stop))

    @property
    def goes_on(self) -> bool:
        """Whether another token is to be asked for."""
        return not self.ended and self.asked < self.request.max_new_tokens

    def append(self, token: int) -> GeneratedToken:
        if token == NO_TOKEN:
            self.ended = True
            wrong = "logits are NaN or infinite: allowed are numbers, to sample from"
            return GeneratedToken(self.index, None, _error(ValueError(wrong)))
        self.tokens.append(token)
        reason = None
        if token in self.eos:
            reason = "eos"
        elif self.stop is not None and (stopped := self._stops()):
            reason = stopped
        elif len(self.tokens) == self.request.max_new_tokens:
            reason = "length"
        self.ended = reason is not None
        return GeneratedToken(self.index, token, reason)

    def _stops(self) -> str | None:
        try:
            read = getattr(self.stop, "maximum_token_len", 0)  # no more of the end is looked at; 0: all
            return "stop" if bool(self.stop(torch.tensor([self.tokens[-read:]]), None)) else None
        except Exception as error:  # of the user's tokenizer
            return _error(error)


class Report(NamedTuple):
    """What the host learns later: tokens[place] is the next token of each row. event: that it is there, on a GPU."""

    rows: list[tuple[Row, int]]
    tokens: torch.Tensor
    event: torch.cuda.Event | None


class Engine:
    """batch: what the rows run on, `RecordedBatch` or `RunningBatch`. rows: those to be asked for another token.

    watch: of the model, where code of others runs between tokens.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batch: Any,
        chunk_size: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        watch: Watch | None = None,
    ):
        self.model, self.batch, self.chunk_size, self.tokenizer = model, batch, chunk_size, tokenizer
        self.watch, self.was_away = watch, False  # and whether such code has run since it was looked at
        self.rows: list[Row] = []
        self.free = list(range(batch.seats))
        self.sampler = Sampler(batch.seats, model.config.vocab_size, model.device)
        self.reports: deque[Report] = deque()
        self.buffers: list[torch.Tensor] = []  # pinned, of reports that were read
        self.passes: Iterator | None = None  # over prompts that are being read, of
        self.unread = 0  # so many rows
        self.more = True  # whether more requests were there when the last were taken

    def run(self, arrivals: Arrivals) -> Iterator[GeneratedToken]:
        """Until nothing runs and no more arrives. On an error, or when it is closed, the rows are lost.

        Raises RuntimeError where the model has changed meanwhile: tokens of a step that was looked at come before.
        """
        for token in self._tokens(arrivals):
            yield token
            self.was_away = True

    def _tokens(self, arrivals: Arrivals) -> Iterator[GeneratedToken]:
        while True:
            more = yield from self._admit(arrivals)
            if not (more or self.rows or self.passes or self.reports):
                return
            if self.passes is not None:
                while self.rows and len(self.reports) < self.batch.ahead_of_a_pass:
                    self._step()
                self._read()
                yield from self._received(self.batch.ahead_of_a_pass)
                self._let_go()
                if self.passes is None:  # there may be room for more
                    continue
            if self.rows:
                self._step()
            ahead = self.batch.ahead if self.rows or self.passes else 0
            yield from self._received(ahead)
            for row in [row for row in self.rows if arrivals.cancelled(row.index)]:
                row.ended = True
                yield GeneratedToken(row.index, None, "cancelled")
            self._let_go()

    def _admit(self, arrivals: Arrivals) -> Generator[GeneratedToken, None, bool]:
        """Whether any request was taken."""
        room = 0 if self.passes is not None else min(len(self.free), self.batch.room(len(self.rows)))
        if not room:
            return False
        taken = arrivals.take(room, idle=not self.rows and not self.reports)
        self.was_away = True
        self.more, new = len(taken) == room, []
        for index, entry in taken:
            if arrivals.cancelled(index):
                yield GeneratedToken(index, None, "cancelled")
                continue
            try:
                row = Row(self.model, index, as_request(entry), self.tokenizer)
            except Exception as error:
                yield GeneratedToken(index, None, _error(error))
                continue
            if row.goes_on:
                new.append(row)
            else:
                yield GeneratedToken(index, None, "length")
        if new:
            for row in new:
                row.seat = self.free.pop(0)
            self.passes, self.unread = self.batch.read(new, self.chunk_size), len(new)
        return bool(taken)

    @torch.no_grad()
    def _read(self) -> None:
        """The next pass over prompts; the rows that it brings begin."""
        self._check()
        with on_its_device(self.sampler.settings):
            rows, logits = next(self.passes)
            if rows:
                seats = [row.seat for row in rows]
                self.sampler.seat(seats, [row.request for row in rows])  # not before: steps pass over all seats
                tokens = self.sampler.choose(logits, seats=seats)
                self.batch.begin(rows, tokens)
                self._ask([(row, place) for place, row in enumerate(rows)], tokens)
        self.rows += rows
        self.unread -= len(rows)
        if not self.unread:
            self.passes = None
        self._let_go()
        self._note()

    @torch.no_grad()
    def _step(self) -> None:
        """Asks for the next token of all rows."""
        self._check()
        with on_its_device(self.sampler.settings):
            logits, best, seats = self.batch.step(self.rows, last=self.passes is None and not self.more)
            tokens = self.sampler.choose(logits, best, seats)
            self.batch.take(tokens)
            self._ask(list(zip(self.rows, self.batch.places(self.rows))), tokens)
        self._let_go()
        if self.batch.runs_modules:
            self._note()

    def _check(self) -> None:
        """That the model is what it was when others got hold of the thread."""
        if self.watch is not None and self.was_away:
            self.watch.check()
        self.was_away = False

    def _note(self) -> None:
        """Behind Python of the model's modules, which may leave something in them."""
        if self.watch is not None:
            self.watch.note()

    def _ask(self, rows: list[tuple[Row, int]], tokens: torch.Tensor) -> None:
        for row, _ in rows:
            row.asked += 1
        if self.sampler.nothing is not None:
            tokens = torch.where(self.sampler.nothing, NO_TOKEN, tokens)
        if not tokens.is_cuda:
            self.reports.append(Report(rows, tokens.clone(), None))
            return
        fits = next((number for number, each in enumerate(self.buffers) if len(each) == len(tokens)), None)
        buffer = torch.empty_like(tokens, device="cpu", pin_memory=True) if fits is None else self.buffers.pop(fits)
        buffer.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.reports.append(Report(rows, buffer, event))

    def _received(self, ahead: int) -> Iterator[GeneratedToken]:
        """Waits for all but the last `ahead` reports."""
        while len(self.reports) > ahead:
            self._check()
            report = self.reports.popleft()
            tokens = self._wait(report)
            for row, place in report.rows:
                if not row.ended:
                    yield row.append(tokens[place])

    def _wait(self, report: Report) -> list[int]:
        if report.event is not None:
            report.event.synchronize()
            self.buffers.append(report.tokens)
        return report.tokens.tolist()

    def _let_go(self) -> None:
        """Rows that ask for no more leave their seats: what is queued for them comes before what follows."""
        for row in [row for row in self.rows if not row.goes_on]:
            self.sampler.leave(row.seat)
            self.free.append(row.seat)
        self.rows = [row for row in self.rows if row.goes_on]


def _error(error: Exception) -> str:
    return f"error: {type(error).__name__}: {error}"
