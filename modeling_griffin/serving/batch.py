"""Many generations at once, each with its own prompt, limits and sampling: rows come and go, none waits for another.

A row of a Griffin's state has the same size whatever its length, so that a batch is put together anew as soon as a row
ends, and no step is spent on a row that has ended. Each row finds the tokens that it would find alone. Rows run on a
recorded step (`recorded_rows`), and where there is none behind a cache (`cached_rows`); `engine` has the loop.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.continuous_batching.requests import GenerationOutput

from ..decode.eligibility import check_places
from .cached_rows import RunningBatch, check_whole
from .engine import Arrivals, Engine, GeneratedToken, Queue
from .recorded_rows import recorded_batch
from .request import GenerationRequest, as_request
from .transformers_call import as_transformers, is_of_transformers
from .watch import Watch


OPTIONS = ("max_rows", "prefill_chunk_size", "tokenizer")  # of `stream_batch`


@dataclass
class GenerationResult:
    """tokens: the new ones, with the one that ended it. finish_reason: as of `GeneratedToken`."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None


def generate_batch(
    model: torch.nn.Module,
    queue: Iterable[GenerationRequest] | None = None,
    generation_config: GenerationConfig | None = None,
    **options: Any,
) -> list[GenerationResult] | dict[str, GenerationOutput]:
    """Runs all generations and returns their results.

    queue: as for `stream_batch`, and the options too; then the results are a list of `GenerationResult` in its order.
    Or the call is that of Transformers' method of this name: lists of token ids and nothing else, or any of its
    arguments (`inputs`, `generation_config`, ...). Then they are its dict of `GenerationOutput` by request id:
    `transformers_call.as_transformers`.
    """
    if generation_config is not None or is_of_transformers(queue, options):
        return as_transformers(model, queue, collect, generation_config, **options)
    if queue is None or (unknown := options.keys() - OPTIONS):
        given = ", ".join(sorted(unknown)) if queue is not None else "no queue"
        raise ValueError(f"generate_batch was given {given}: allowed are a queue of GenerationRequest, and {OPTIONS}")
    results: dict[int, GenerationResult] = {}
    for index, token, finish_reason in collect(model, queue, **options):
        result = results.setdefault(index, GenerationResult())
        result.tokens += [] if token is None else [token]
        result.finish_reason = finish_reason
    return [results[index] for index in sorted(results)]


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
        prefill_chunk_size: a prompt of more tokens is read in so many at a time, while the others go on.
        tokenizer: for those with `stop`.

    A generation that cannot run, or whose stop strings raise, ends with "error: " and why; the others go on.
    Raises ValueError for options that are not allowed, and RuntimeError where the model was changed between two
    tokens.
    """
    yield from _run(model, queue, max_rows, prefill_chunk_size, tokenizer, stream=True)


def collect(
    model: torch.nn.Module,
    queue: Iterable,
    max_rows: int = 32,
    prefill_chunk_size: int = 2048,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[GeneratedToken]:
    """`stream_batch` for a call that runs to its end: another thread waits for its step, unless the queue is code."""
    return _run(model, queue, max_rows, prefill_chunk_size, tokenizer, stream=not isinstance(queue, Sequence))


def _run(model, queue, max_rows, chunk_size, tokenizer, stream: bool) -> Iterator[GeneratedToken]:
    check_whole("max_rows", max_rows)
    if isinstance(queue, torch.Tensor | Mapping | str | bytes) or not isinstance(queue, Iterable):
        raise ValueError(f"queue is a {type(queue).__name__}: allowed are iterables of GenerationRequest")
    if isinstance(queue, Sequence):
        max_rows = min(max_rows, max(1, len(queue)))
    tokens = most_tokens(queue) if isinstance(queue, list | tuple) else None
    yield from run_arrivals(model, Queue(queue), max_rows, chunk_size, tokenizer, stream, tokens)


def most_tokens(requests: Sequence) -> int:
    """That a row of these requests will hold at most, so that no step is larger; at least 1."""
    most = 1
    for entry in requests:
        try:
            request = as_request(entry)
        except Exception:  # it will end with an error
            continue
        read = 0 if request.state is None else request.state.lengths[0]
        most = max(most, read + len(request.prompt) + request.max_new_tokens)
    return most


def run_arrivals(
    model: torch.nn.Module,
    arrivals: Arrivals,
    max_rows: int,
    chunk_size: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stream: bool = True,
    tokens: int | None = None,
) -> Iterator[GeneratedToken]:
    """`stream_batch` of requests that come while others run. tokens: that each holds at most; None: any number."""
    check_whole("prefill_chunk_size", chunk_size)
    check_places(model)
    batch, watch = recorded_batch(model, max_rows, stream, tokens) or RunningBatch(model, max_rows), None
    try:
        watch = Watch(model) if stream else None
        yield from Engine(model, batch, chunk_size, tokenizer, watch).run(arrivals)
    finally:
        batch.close()
        if watch is not None:
            watch.close()
