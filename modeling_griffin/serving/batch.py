"""Many generations at once, each with its own prompt, limits and sampling: rows come and go, none waits for another.

A row of a Griffin's state has the same size whatever its length, so that a batch is put together anew as soon as a row
ends, and no step is spent on a row that has ended. Each row finds the tokens that it would find alone. Behind a cache
(`cached_rows`) prompts are read one by one, unpadded; on a recorded step of a GPU (`recorded_rows`) those of similar
lengths together, padded to the longest.

Legend: B rows, T new tokens, V vocabulary.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import (
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..decode.eligibility import check_places
from .cached_rows import RunningBatch, check_whole
from .recorded_rows import recorded_batch
from .request import GenerationRequest, as_request


OPTIONS = ("max_rows", "prefill_chunk_size", "tokenizer")  # of `stream_batch`


class GeneratedToken(NamedTuple):
    """index: the generation's number in the order given. token: None for a generation of no tokens, or an error.

    finish_reason: None while it goes on, else "eos", "stop", "length", or "error: " and what was wrong with it.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    token: int | None
    finish_reason: str | None


@dataclass
class GenerationResult:
    """tokens: the new ones, with the one that ended it. finish_reason: as of `GeneratedToken`."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None


def generate_batch(
    model: torch.nn.Module, queue: Iterable[GenerationRequest] | None = None, **options: Any
) -> list[GenerationResult]:
    """Runs all generations and returns their results in the order given. Options as for `stream_batch`.

    Raises ValueError for the arguments of Transformers' method of that name, which serves attention's paged caches.
    """
    unknown = options.keys() - OPTIONS
    if queue is None or unknown:
        given = ", ".join(sorted(unknown)) or "no queue"
        raise ValueError(
            f"generate_batch was given {given}: allowed are a queue of GenerationRequest, {OPTIONS}. "
            "Transformers' paged caches are for attention alone, so leave out cache_implementation = 'paged'"
        )
    results: dict[int, GenerationResult] = {}
    for index, token, finish_reason in stream_batch(model, queue, **options):
        result = results.setdefault(index, GenerationResult())
        result.tokens += [] if token is None else [token]
        result.finish_reason = finish_reason
    return [results[index] for index in sorted(results)]


@torch.no_grad()
def stream_batch(
    model: torch.nn.Module,
    queue: Iterable[GenerationRequest],
    max_rows: int = 32,
    prefill_chunk_size: int = 2048,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[GeneratedToken]:
    """Runs generations side by side and yields each token as soon as it is known.

    Args:
        queue: the generations, each a `GenerationRequest`, a dict of its fields or token ids; any iterable. It is
            asked for the next one when a row is free; on a recorded step, for several when an eighth of the rows
            are.
        max_rows: at most so many at once; the others wait.
        prefill_chunk_size: tokens of a prompt read in one forward pass.
        tokenizer: for those with `stop`.

    A generation that cannot run, or whose stop strings raise, ends with "error: " and why; the others go on.
    Raises ValueError for options that are not allowed.
    """
    check_whole("max_rows", max_rows)
    check_whole("prefill_chunk_size", prefill_chunk_size)
    if isinstance(queue, torch.Tensor) or not isinstance(queue, Iterable):
        raise ValueError(f"queue is a {type(queue).__name__}: allowed are iterables of GenerationRequest")
    check_places(model)
    if isinstance(queue, Sequence):
        max_rows = min(max_rows, max(1, len(queue)))
    batch = recorded_batch(model, max_rows) or RunningBatch(model, max_rows)
    try:
        yield from _run(model, batch, enumerate(queue), prefill_chunk_size, tokenizer)
    finally:
        batch.close()


def _run(model, batch, waiting: Iterator, chunk_size: int, tokenizer) -> Iterator[GeneratedToken]:
    rows: list[_Row] = []
    while True:
        rows = _running(batch, rows)
        while (room := batch.room(len(rows))) and (taken := list(islice(waiting, room))):
            new = []
            for index, entry in taken:
                try:
                    row = _Row(model, index, as_request(entry), tokenizer)
                except Exception as error:
                    yield GeneratedToken(index, None, _error(error))
                    continue
                if row.asks_for_nothing:
                    yield GeneratedToken(index, None, "length")
                else:
                    new.append(row)
            if new:
                logits = batch.add([row.request for row in new], chunk_size)
                yield from (row.append(token) for row, token in zip(new, _choose(logits, new)))
            rows = _running(batch, rows + new)
        if not rows:
            return
        logits = batch.read([row.tokens[-1] for row in rows])
        yield from (row.append(token) for row, token in zip(rows, _choose(logits, rows)))


class _Row:
    """One generation while it runs."""

    def __init__(self, model, index: int, request: GenerationRequest, tokenizer):
        self.index, self.request = index, request
        self.tokens: list[int] = []
        self.ended = False
        self.random = random.Random(request.seed)
        eos = model.generation_config.eos_token_id if request.eos_token_id is None else request.eos_token_id
        self.eos = {eos} if isinstance(eos, int) else set(() if eos is None else eos)
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
    def asks_for_nothing(self) -> bool:
        return self.request.max_new_tokens == 0

    def append(self, token: int) -> GeneratedToken:
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
            return "stop" if bool(self.stop(torch.tensor([self.tokens]), None)) else None
        except Exception as error:  # of the user's tokenizer
            return _error(error)


def _running(batch, rows: list[_Row]) -> list[_Row]:
    """The rows that go on; the batch forgets the others."""
    numbers = [number for number, row in enumerate(rows) if not row.ended]
    batch.keep(numbers)
    return [rows[number] for number in numbers]


def _error(error: Exception) -> str:
    return f"error: {type(error).__name__}: {error}"


def _choose(logits: torch.Tensor, rows: Sequence[_Row]) -> list[int]:
    """The next token of each row: the argmax, or a sample of its own distribution by its own random number."""
    chosen = logits.argmax(-1)
    groups: dict[tuple, list[int]] = {}
    for number, row in enumerate(rows):
        if row.request.temperature > 0:
            key = (row.request.temperature, row.request.top_k, row.request.top_p)
            groups.setdefault(key, []).append(number)
    for (temperature, top_k, top_p), numbers in groups.items():
        index = torch.tensor(numbers, device=logits.device)
        scores = TemperatureLogitsWarper(float(temperature))(None, logits[index].float())
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        # By the distribution function in the order of the vocabulary: one number a token, and rounding that differs
        # with the batch moves its steps by 1e-7, where sorted probabilities could change places.
        steps = scores.softmax(-1).double().cumsum(-1)
        drawn = torch.tensor([[rows[number].random.random()] for number in numbers], dtype=torch.float64)
        found = torch.searchsorted(steps, drawn.to(logits.device) * steps[:, -1:], right=True)[:, 0]
        chosen[index] = found.clamp(max=logits.shape[-1] - 1)
    return chosen.tolist()
