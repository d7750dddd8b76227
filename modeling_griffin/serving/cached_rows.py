"""Rows of `generate_batch` behind one cache: attention slots are right-aligned, and masked where a short row has none.

Legend: B rows, T tokens, N new rows, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from transformers.cache_utils import DynamicCache

from ..decode.eligibility import check_places
from .request import GenerationRequest, shown
from .state import GenerationState, check_is_state


ID_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class RunningBatch:
    """Rows behind one cache, to an `Engine` what `RecordedBatch` is: the host waits for each step.

    order: the rows of the cache. joining: the states of rows that have been read since the last step.
    """

    ahead = ahead_of_a_pass = 0
    runs_modules = True  # in a step

    def __init__(self, model: torch.nn.Module, max_rows: int = 1):
        self.model, self.seats = model, max_rows
        self.lengths: tuple[int, ...] = ()
        self.cache = DynamicCache(config=model.config)
        self.real: torch.Tensor | None = None  # (B, slots) 0 where a short row has nothing yet; None where all have
        self.order: list = []
        self.joining: dict[object, GenerationState] = {}

    def start(self, state: GenerationState) -> None:
        self.lengths = state.lengths
        self.cache, self.real = state.to_cache()

    def state(self, logits: torch.Tensor) -> GenerationState:
        return GenerationState.from_cache(self.model.config, self.cache, self.lengths, logits)

    def room(self, running: int) -> int:
        """How many rows to add now: each begins as soon as there is a place."""
        return min(1, self.seats - running)

    def read(self, rows: Sequence, chunk_size: int) -> Iterator[tuple[Sequence, torch.Tensor | None]]:
        """As `RecordedBatch.read`, each row alone."""
        for row in rows:
            for state in read_request(self.model, row.request, chunk_size):
                if state is None:
                    yield (), None
                else:
                    self.joining[row] = state
                    yield [row], state.logits

    def begin(self, rows: Sequence, tokens: torch.Tensor) -> None:
        pass  # the host knows them

    def places(self, rows: Sequence) -> range:
        return range(len(rows))

    def step(self, rows: Sequence, last: bool = False) -> tuple[torch.Tensor, None, list[int]]:
        """One token of each row; the logits (N, V) behind them, and their seats."""
        self._change_rows(rows)
        tokens = torch.tensor([row.tokens[-1] for row in rows], device=self.model.device)
        return self.read_tokens(tokens[:, None]), None, [row.seat for row in rows]

    def take(self, tokens: torch.Tensor) -> None:
        pass

    def _change_rows(self, rows: Sequence) -> None:
        place = {row: number for number, row in enumerate(self.order)}
        going_on = [place[row] for row in rows if row in place]
        new = [self.joining[row] for row in rows if row not in place]
        self.order, self.joining = list(rows), {}
        window_is_full = self.real is not None and min(self.lengths) >= self.model.config.attention_window_size - 1
        if len(going_on) == len(self.lengths) and not new and not window_is_full:
            return
        states = list(new)
        if going_on:
            # A running row's next token is already chosen, so that no logits of it are needed.
            nothing = torch.empty(len(self.lengths), 0, device=self.model.device)
            states = [self.state(nothing)[going_on], *(_without_logits(state) for state in states)]
        self.start(GenerationState.concatenate(states))

    def read_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """One forward pass over tokens (B, T); the logits (B, V) behind the last."""
        batch, length = tokens.shape
        self.lengths = self.lengths or (0,) * batch
        positions = torch.tensor(self.lengths, device=tokens.device)[:, None]
        positions = positions + torch.arange(length, device=tokens.device)
        if self.real is not None:
            self.real = torch.nn.functional.pad(self.real, (0, length), value=1)
        output = self.model(
            tokens,
            attention_mask=self.real,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.lengths = tuple(seen + length for seen in self.lengths)
        return output.logits[:, -1]

    def close(self) -> None:
        pass


def _without_logits(state: GenerationState) -> GenerationState:
    return GenerationState(state.config, state.lengths, state.logits[:, :0].float(), state.layers)


@torch.no_grad()
def prefill(
    model: torch.nn.Module, input_ids: torch.Tensor, state: GenerationState | None = None, chunk_size: int = 2048
) -> GenerationState:
    """Reads tokens, behind those of `state` if one is given, which stays as it is.

    input_ids: (B, T) without padding; rows of other lengths are read apart and joined by
    `GenerationState.concatenate`. chunk_size: tokens a forward pass, which bounds the memory.
    """
    return [*_prefill_passes(model, input_ids, state, chunk_size)][-1]


def _prefill_passes(model, input_ids, state, chunk_size: int) -> Iterator[GenerationState | None]:
    """None behind each pass but the last, then the state."""
    check_prefill(model, input_ids, state, chunk_size)
    batch = RunningBatch(model)
    if state is not None:
        batch.start(state)
    *chunks, last = input_ids.to(model.device, torch.long).split(chunk_size, dim=1)
    for chunk in chunks:
        batch.read_tokens(chunk)
        yield None
    yield batch.state(batch.read_tokens(last))


def check_prefill(
    model: torch.nn.Module, input_ids: torch.Tensor, state: GenerationState | None, chunk_size: int
) -> None:
    """Raises ValueError for arguments of `prefill` that cannot be honoured."""
    _check_prompt(input_ids, model.config.vocab_size)
    check_whole("chunk_size", chunk_size)
    check_places(model)
    if state is not None:
        check_is_state("state", state)
        state.check(model)
        if len(state) != input_ids.shape[0]:
            raise ValueError(f"input_ids has {input_ids.shape[0]} rows: allowed are {len(state)}, the state's")


def read_request(
    model: torch.nn.Module, request: GenerationRequest, chunk_size: int
) -> Iterator[GenerationState | None]:
    """The state behind a request's prompt, read pass by pass: None behind each but the last."""
    if request.prompt:
        yield from _prefill_passes(model, torch.tensor([request.prompt]), request.state, chunk_size)
    else:
        request.state.check(model)
        yield request.state


def check_whole(name: str, number: object) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number < 2**63:
        raise ValueError(f"{name} = {shown(number)}: allowed are whole numbers from 1")


def _check_prompt(input_ids, vocab_size: int) -> None:
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in ID_DTYPES:
        found = f"{input_ids.dtype}" if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids is {found}: allowed is a tensor of token ids")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        shape = tuple(input_ids.shape)
        raise ValueError(f"input_ids has shape {shape}: allowed is (rows, tokens), 1 row and 1 token or more")
    low, high = (int(end) for end in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids has ids from {low} to {high}: allowed are 0 to vocab_size - 1 = {vocab_size - 1}")
