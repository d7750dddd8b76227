"""Rows of `generate_batch` behind one cache: attention slots are right-aligned, and masked where a short row has none.

Legend: B rows, T tokens, N new rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache

from ..decode.eligibility import check_places
from .request import GenerationRequest
from .state import GenerationState


class RunningBatch:
    """The rows that run; between steps, `members` are the next step's: numbers of rows in the cache, and new states."""

    def __init__(self, model: torch.nn.Module, max_rows: int = 1):
        self.model, self.max_rows = model, max_rows
        self.lengths: tuple[int, ...] = ()
        self.cache = DynamicCache(config=model.config)
        self.real: torch.Tensor | None = None  # (B, slots) 0 where a short row has nothing yet; None where all have
        self.members: list[int | GenerationState] = []

    def start(self, state: GenerationState) -> None:
        self.lengths = state.lengths
        self.cache, self.real = state.to_cache()

    def state(self, logits: torch.Tensor) -> GenerationState:
        return GenerationState.from_cache(self.model.config, self.cache, self.lengths, logits)

    def room(self, running: int) -> int:
        """How many rows to add now: each begins as soon as there is a place."""
        return min(1, self.max_rows - running)

    def keep(self, numbers: Sequence[int]) -> None:
        """Ends all rows but these."""
        self.members = [self.members[number] for number in numbers]

    def add(self, generations: Sequence, chunk_size: int) -> torch.Tensor:
        """Reads the prompts of new rows; the logits (N, V) behind them."""
        states = [read_request(self.model, request, chunk_size) for request in generations]
        self.members += states
        return torch.cat([state.logits for state in states])

    def read(self, tokens: Sequence[int]) -> torch.Tensor:
        """One token of each running row; the logits (B, V) behind them."""
        self._change_rows()
        return self.read_tokens(torch.tensor(tokens, device=self.model.device)[:, None])

    def _change_rows(self) -> None:
        going_on = [member for member in self.members if isinstance(member, int)]
        new = [member for member in self.members if not isinstance(member, int)]
        self.members = list(range(len(self.members)))
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
    _check_prompt(input_ids, model.config.vocab_size)
    check_whole("chunk_size", chunk_size)
    check_places(model)
    batch = RunningBatch(model)
    if state is not None:
        if type(state).__name__ != GenerationState.__name__:
            raise ValueError(f"state is a {type(state).__name__}: allowed are a GenerationState and None")
        state.check(model)
        if len(state) != input_ids.shape[0]:
            raise ValueError(f"input_ids has {input_ids.shape[0]} rows: allowed are {len(state)}, the state's")
        batch.start(state)
    for chunk in input_ids.to(model.device).split(chunk_size, dim=1):
        logits = batch.read_tokens(chunk)
    return batch.state(logits)


def read_request(model: torch.nn.Module, request: GenerationRequest, chunk_size: int) -> GenerationState:
    if not request.prompt:
        request.state.check(model)
        return request.state
    return prefill(model, torch.tensor([request.prompt]), request.state, chunk_size)


def check_whole(name: str, number: object) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{name} = {number!r}: allowed are whole numbers from 1")


def _check_prompt(input_ids, vocab_size: int) -> None:
    if not isinstance(input_ids, torch.Tensor) or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        found = f"{input_ids.dtype}" if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids is {found}: allowed is a tensor of token ids")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        shape = tuple(input_ids.shape)
        raise ValueError(f"input_ids has shape {shape}: allowed is (rows, tokens), 1 row and 1 token or more")
    low, high = (int(end) for end in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids has ids from {low} to {high}: allowed are 0 to vocab_size - 1 = {vocab_size - 1}")
