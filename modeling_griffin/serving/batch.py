"""Many generations at once, each with its own prompt, limits and sampling: rows come and go, none waits for another.

A row of a Griffin's state has the same size whatever its length, so that a batch is put together anew as soon as a row
ends, and no step is spent on a row that has ended. Each row finds the tokens that it would find alone. Behind a cache
(`running_batch`) prompts are read one by one, unpadded; on a recorded step of a GPU (`recorded_batch`) those of similar
lengths together, padded to the longest.

Legend: B rows, T new tokens, V vocabulary.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from numbers import Integral
from typing import NamedTuple

import torch
from transformers.generation import (
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..decode.eligibility import check_places
from .cached_rows import RunningBatch
from .recorded_rows import recorded_batch
from .state import GenerationState


@dataclass
class GenerationRequest:
    """One generation.

    prompt: token ids. state: what was read before the prompt, one row; with it the prompt may be empty.
    max_new_tokens: from 0. temperature: 0 takes the likeliest token, above 0 samples.
    top_k (0: all) and top_p (1: all): what to sample from, as in Transformers, in this order after the temperature.
    seed: of this generation's own random numbers; the same seed draws the same tokens in any batch.
    eos_token_id: one id or several that end it; None: those of the model's generation configuration; () for none.
    stop: strings that end it when they appear in its new text; they need `tokenizer` in the call.
    """

    prompt: Sequence[int] | torch.Tensor = ()
    state: GenerationState | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    eos_token_id: int | Sequence[int] | None = None
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.prompt, torch.Tensor):
            if self.prompt.dim() != 1:
                raise ValueError(f"prompt has shape {tuple(self.prompt.shape)}: allowed is (tokens,)")
            self.prompt = self.prompt.tolist()
        self.prompt = list(self.prompt)
        if not self.prompt and self.state is None:
            raise ValueError("prompt is empty: allowed is at least one token, or a state")
        if self.state is not None and len(self.state) != 1:
            raise ValueError(f"state has {len(self.state)} rows: allowed is one, for example state[0]")
        if isinstance(self.stop, str):
            self.stop = (self.stop,)
        for name, allowed, holds in (
            ("max_new_tokens", "whole numbers from 0", _is_whole(self.max_new_tokens)),
            ("temperature", "numbers from 0", self.temperature >= 0),
            ("top_k", "whole numbers from 0", _is_whole(self.top_k)),
            ("top_p", "numbers above 0 up to 1", 0 < self.top_p <= 1),
            ("stop", "strings that are not empty", all(self.stop)),
        ):
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)!r}: allowed are {allowed}")


class GeneratedToken(NamedTuple):
    """index: the generation's number in the order given. token: None for a generation of no tokens.

    finish_reason: None while it goes on, else "eos", "stop" or "length".
    """

    index: int
    token: int | None
    finish_reason: str | None


@dataclass
class GenerationResult:
    """tokens: the new ones, with the one that ended it. finish_reason: "eos", "stop" or "length"."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None


def generate_batch(model, queue: Iterable[GenerationRequest], **options) -> list[GenerationResult]:
    """Runs all generations and returns their results in the order given. Options as for `stream_batch`."""
    results: dict[int, GenerationResult] = {}
    for index, token, finish_reason in stream_batch(model, queue, **options):
        result = results.setdefault(index, GenerationResult())
        result.tokens += [] if token is None else [token]
        result.finish_reason = finish_reason
    return [results[index] for index in sorted(results)]


@torch.no_grad()
def stream_batch(
    model,
    queue: Iterable[GenerationRequest],
    max_rows: int = 32,
    prefill_chunk_size: int = 2048,
    tokenizer=None,
) -> Iterator[GeneratedToken]:
    """Runs generations side by side and yields each token as soon as it is known.

    Args:
        queue: the generations; any iterable. It is asked for the next one when a row is free; on a recorded step,
            for several when an eighth of the rows are.
        max_rows: at most so many at once; the others wait.
        prefill_chunk_size: tokens of a prompt read in one forward pass.
        tokenizer: for those with `stop`.

    Raises ValueError for a generation that cannot run, when its turn comes; that ends the whole stream.
    """
    if max_rows < 1:
        raise ValueError(f"max_rows = {max_rows}: allowed are whole numbers from 1")
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
            new = [_Row(model, *entry, tokenizer) for entry in taken]
            yield from (GeneratedToken(row.index, None, "length") for row in new if row.asks_for_nothing)
            new = [row for row in new if not row.asks_for_nothing]
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
        outside = [token for token in request.prompt if not (_is_whole(token) and token <= largest)]
        if outside:
            raise ValueError(f"prompt of generation {index} has the token {outside[0]!r}: allowed are 0 to {largest}")
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
        elif self.stop is not None and bool(self.stop(torch.tensor([self.tokens]), None)):
            reason = "stop"
        elif len(self.tokens) == self.request.max_new_tokens:
            reason = "length"
        self.ended = reason is not None
        return GeneratedToken(self.index, token, reason)


def _running(batch, rows: list[_Row]) -> list[_Row]:
    """The rows that go on; the batch forgets the others."""
    numbers = [number for number, row in enumerate(rows) if not row.ended]
    batch.keep(numbers)
    return [rows[number] for number in numbers]


def _is_whole(number) -> bool:
    return isinstance(number, Integral) and number >= 0


def _choose(logits: torch.Tensor, rows: Sequence[_Row]) -> list[int]:
    """The next token of each row: the likeliest, or a sample of its own distribution by its own random number."""
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
