"""What is sampled behind a recorded step as a CUDA graph of its own: one replay instead of fifteen operators.

The same operators on the same shapes, so that ties and random numbers are those of the loop that starts each of them:
a replay draws from the device's generator where that stands, and moves it on as far.

Legend: B rows, V vocabulary, E end tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import generation
from transformers.utils import logging

from ..kernels.capture import capture
from .network import ONE_RECORDS, Recording


logger = logging.get_logger(__name__)

RECORD_BEHIND = 128  # tokens of one call: a recording takes about as long as it saves over so many
LARGEST = 2**21  # logits: with more, the recording's memory counts, and the time between launches does not
KEPT_DRAWINGS = 4  # of a step
NUMBERS = (bool, int, float, type(None))
# They read the scores and numbers of their own, and no tokens.
RECORDED = tuple(
    getattr(generation, name)
    for name in (
        *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"),
        *("TypicalLogitsWarper", "EpsilonLogitsWarper"),
    )
)


def draw(shares: torch.Tensor) -> torch.Tensor:
    """A sample of each row, the same as `torch.multinomial(shares, 1)` draws, which makes the host wait."""
    return (shares / torch.empty_like(shares).exponential_(1)).argmax(-1)


def drawing_of(step: Recording, processors: Sequence[Any], ends: int, drawn: int) -> "Drawing | None":
    """The recording behind a step for these processors and so many end tokens; made where a call has drawn enough.

    None where there is none, because a processor reads more than scores, or because it could not be recorded.
    """
    key = _key(processors, ends)
    if not _is_recorded(step) or key is None or key not in step.drawings and drawn < RECORD_BEHIND:
        return None
    if key not in step.drawings:
        step.drawings[key] = _recorded(step, processors, ends)
        while len(step.drawings) > KEPT_DRAWINGS:
            step.drawings.popitem(last=False)
    step.drawings.move_to_end(key)
    return step.drawings[key]


def _is_recorded(step: Recording) -> bool:
    return step.graph is not None and step.logits is not None and step.logits.numel() <= LARGEST


def _key(processors: Sequence[Any], ends: int) -> tuple | None:
    """All that a recording holds; None where it would hold more than numbers."""
    key: list = [ends]
    for each in processors:
        held = vars(each)
        if type(each) not in RECORDED or not all(isinstance(value, NUMBERS) for value in held.values()):
            return None
        key.append((type(each), type(each).__call__, *held.items()))
    return tuple(key)


def _recorded(step: Recording, processors: Sequence[Any], ends: int) -> "Drawing | None":
    try:
        return Drawing(step, processors, ends)
    except Exception as error:  # as where an operator makes the host wait
        logger.warning_once(f"sampling is not recorded, and starts its operators one by one: {error!r}")
        return None


class Drawing:
    """The next token (B,) of the step's logits (B, V), into the step's token.

    going_on (B,) bool: rows that have not ended; eos (E,) and pad (B,) int64. All are read where they lie.
    """

    def __init__(self, step: Recording, processors: Sequence[Any], ends: int):
        self.logits, self.token, self.processors = step.logits, step.token, list(processors)
        with torch.inference_mode(False), torch.no_grad():
            self.going_on = torch.ones_like(self.token, dtype=torch.bool)
            self.eos, self.pad = self.token.new_zeros(ends), torch.zeros_like(self.token)
            self.graph = record(self._compute, step.device)

    def begin(self, going_on: torch.Tensor, eos: torch.Tensor | None, pad: torch.Tensor | None) -> None:
        """What a call knows of its rows so far."""
        self.going_on.copy_(going_on)
        if eos is not None and pad is not None:
            self.eos.copy_(eos)
            self.pad.copy_(pad)

    def next(self) -> torch.Tensor:
        self.graph.replay()
        return self.token

    def _compute(self) -> None:
        scores = self.logits.to(copy=True, dtype=torch.float32)
        for processor in self.processors:
            scores = processor(None, scores)
        token = draw(scores.softmax(-1))
        if len(self.eos):
            token = torch.where(self.going_on, token, self.pad)
            self.going_on.logical_and_((token[:, None] != self.eos).all(-1))
        self.token.copy_(token)


def record(compute: Any, device: torch.device) -> torch.cuda.CUDAGraph:
    """Of operators that have all run before, so that nothing is left to load."""
    with ONE_RECORDS, torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with capture(graph, capture_error_mode="thread_local"):
            compute()
    return graph
