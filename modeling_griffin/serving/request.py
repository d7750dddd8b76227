"""What `generate_batch` is asked for, checked once: each value is taken, or refused by the name of its field."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import torch

from .state import GenerationState, check_is_state


LARGEST = torch.finfo(torch.float32).max  # of settings, which the sampler holds so


@dataclass
class GenerationRequest:
    """One generation.

    prompt: token ids. state: what was read before the prompt, one row; with it the prompt may be empty.
    max_new_tokens: from 0. temperature: 0 takes the argmax, above 0 samples.
    top_k (0: all), top_p (1: all) and min_p (0: all): what to sample from, as in Transformers, in this order after the
    temperature. repetition_penalty (1: none): as in Transformers, of the tokens of the prompt and the new ones.
    seed: of this generation's own random numbers; the same seed draws the same tokens in any batch.
    eos_token_id: one id or several that end it; None: those of the model's generation configuration; () for none.
    stop: strings that end it when they appear in its new text; they need `tokenizer` in the call.

    Numbers may be Python's, NumPy's or tensors of one; lists of them also arrays and tensors.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    prompt: Sequence[int] | torch.Tensor = ()
    state: GenerationState | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    eos_token_id: int | Sequence[int] | None = None
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.prompt = _whole_numbers("prompt", self.prompt)
        if not self.prompt and self.state is None:
            raise ValueError("prompt is empty: allowed is at least one token, or a state")
        if self.state is not None:
            check_is_state("state", self.state)
            if len(self.state) != 1:
                raise ValueError(f"state has {len(self.state)} rows: allowed is one, for example state[0]")
        if self.eos_token_id is not None:
            self.eos_token_id = end_tokens(self.eos_token_id)
        self.stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name in ("max_new_tokens", "top_k", "temperature", "top_p", "min_p", "repetition_penalty", "seed"):
            setattr(self, name, _plain(getattr(self, name)))
        for name, allowed, holds in (
            ("max_new_tokens", "whole numbers from 0", _is_whole(self.max_new_tokens) and self.max_new_tokens >= 0),
            ("temperature", f"numbers from 0 to {LARGEST:.1e}", _is_number(self.temperature) and self.temperature >= 0),
            ("top_k", "whole numbers from 0", _is_whole(self.top_k) and self.top_k >= 0),
            ("top_p", "numbers above 0 up to 1", _is_number(self.top_p) and 0 < self.top_p <= 1),
            ("min_p", "numbers from 0 to 1", _is_number(self.min_p) and 0 <= self.min_p <= 1),
            ("repetition_penalty", f"numbers above 0 up to {LARGEST:.1e}", _is_positive(self.repetition_penalty)),
            ("seed", "whole numbers", _is_whole(self.seed)),
            ("stop", "strings that are not empty", _are_strings(self.stop)),
        ):
            if not holds:
                raise ValueError(f"{name} = {shown(getattr(self, name))}: allowed are {allowed}")
        if self.state is not None and self.repetition_penalty != 1:
            raise ValueError(
                f"repetition_penalty = {self.repetition_penalty} with a state: allowed is 1, its text is not known"
            )


def as_request(entry: Any) -> GenerationRequest:
    """A request, a dict of its fields or a prompt alone, checked anew: fields may have been set since it was made."""
    if any(cls.__name__ == GenerationRequest.__name__ for cls in type(entry).__mro__):  # by name, as states
        return replace(entry)
    if not isinstance(entry, Mapping):
        return GenerationRequest(entry)
    names = [field.name for field in fields(GenerationRequest)]
    if unknown := [name for name in entry if name not in names]:
        raise ValueError(f"request has the field {unknown[0]!r}: allowed are {names}")
    return GenerationRequest(**entry)


def end_tokens(value: Any) -> tuple[int, ...]:
    """Of an `eos_token_id`: one id or several, in any form of numbers; none for None."""
    if value is None:
        return ()
    return tuple(_whole_numbers("eos_token_id", [value] if isinstance(_plain(value), Integral) else value))


def _plain(value):
    """Python's number for a tensor, an array or a scalar of one number; anything else as it is."""
    try:
        return value.item() if getattr(value, "shape", None) == () else value
    except Exception:  # of a tensor without values, or of somebody's own class
        return value


def _is_whole(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_positive(value) -> bool:
    return _is_number(value) and value > 0


def _are_strings(value) -> bool:
    return isinstance(value, Sequence) and all(isinstance(each, str) and each for each in value)


def _whole_numbers(name: str, values) -> list[int]:
    """A list of whole numbers; of one dimension where the values have a shape."""
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        raise ValueError(f"{name} = {shown(values)}: allowed are lists of token ids")
    if type(values) is list and all(type(value) is int for value in values):
        return list(values)
    try:
        shape = tuple(getattr(values, "shape", (None,)))
        values = [_plain(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]
    except Exception as error:  # of a tensor without values, or of somebody's own class
        raise ValueError(f"{name} = {shown(values)}: allowed are lists of token ids ({shown(error)})") from error
    if len(shape) != 1:
        raise ValueError(f"{name} has shape {shape}: allowed is (tokens,)")
    if wrong := [value for value in values if not _is_whole(value)]:
        raise ValueError(f"{name} has {shown(wrong[0])}: allowed are whole numbers")
    return [int(value) for value in values]


def shown(value: object) -> str:
    """Its beginning, in one line."""
    return " ".join(repr(value).split())[:80]
