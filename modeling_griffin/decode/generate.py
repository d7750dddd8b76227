"""`generate` by a step over fixed buffers: on a GPU one replay a token.

`generate` prepares everything as for any model and then calls `_sample` or `_beam_search`; `eligibility.decide` says
what the request runs on. Logits processors are Transformers' own.

Where nothing of the user's runs between two tokens, the host stays ahead of those that it has seen. Steps beyond the
end are thus computed and dropped; what they leave behind is a random generator that has drawn for them too. On a CPU
nothing is recorded, but the step does less than Transformers' loop around it: no masks, no cache that grows.

Legend: B rows, T tokens of the prompt.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from ..cache_name import CACHE_NAME
from .drawing import RECORD_BEHIND, Drawing, draw, drawing_of
from .eligibility import CACHES, Path, asks_for_hidden_states, behind, decide
from .loop import run_loop
from .state import DecodeStep
from .steps import take_step


logger = logging.get_logger(__name__)

PREFILL_TOKENS = 16384  # of all rows together in one forward pass
LEAST_CHUNK = 128  # tokens a row
TOKENS_AHEAD = 3  # of what the host has seen, on a GPU


def sample(model: torch.nn.Module, stock: Callable, input_ids: torch.Tensor, **kwargs: Any) -> Any:
    """`GenerationMixin._sample`, arguments and result as there. stock: the loop of Transformers."""
    return _generate("_sample", model, stock, input_ids, **kwargs)


def beam_search(model: torch.nn.Module, stock: Callable, input_ids: torch.Tensor, **kwargs: Any) -> Any:
    """`GenerationMixin._beam_search`, arguments and result as there. stock: the loop of Transformers."""
    return _generate("_beam_search", model, stock, input_ids, **kwargs)


def _generate(name: str, model, stock: Callable, input_ids: torch.Tensor, **kwargs):
    if model.device.type not in model._fast_generation_devices:
        return stock(input_ids, **kwargs)
    path = decide(model, input_ids, **kwargs)
    while path.step in ("fused", "forward"):
        if path.step == "forward":
            logger.info_once(f"generate runs the model's own forward pass over fixed buffers: {path.obstacle.reason}")
        with torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext():
            done, result = _on_step(name, model, path, input_ids, kwargs)
        if done:
            return result
        path = behind(path, model)
    return by_transformers(path, stock, input_ids, kwargs)


def by_transformers(path: Path, stock: Callable, input_ids: torch.Tensor, kwargs: dict) -> Any:
    """Transformers' loop, with one warning that names the reason and the remedy."""
    say_slow("generate", path)
    if path.step == "uncached":
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHES} | {"use_cache": False}
    return stock(input_ids, **kwargs)


def say_slow(what: str, path: Path) -> None:
    reason, remedy = path.obstacle
    cache = " without a cache" if path.step == "uncached" else ""
    logger.warning_once(f"{what} runs Transformers' own loop{cache}, which is slow: {reason}. Remedy: {remedy}")


def _on_step(name: str, model, path: Path, input_ids: torch.Tensor, kwargs: dict) -> tuple[bool, object]:
    """Whether there is such a step, and the result."""
    config, (batch, length) = kwargs["generation_config"], input_ids.shape
    hidden = asks_for_hidden_states(config)
    reading = {"output_hidden_states": config.output_hidden_states} if hidden else {}
    mask, tokens = kwargs.get("attention_mask"), None
    if config.max_length is not None:
        tokens = config.max_length + TOKENS_AHEAD
    like, step = None, None
    if path.step == "fused":
        step = take_step(model, batch, tokens, hidden=hidden)
        if step is None:
            return False, None
    try:
        padding = padding_of(mask, length)
        chunk = config.prefill_chunk_size or length if hidden else chunk_of(batch, config)
        cache, output = prompt_output(model, input_ids, None if padding is None else mask, chunk, **reading)
        if step is None:
            like = cache, output.logits[:, -1]
            step = take_step(model, batch, tokens, path.step, hidden, like)
            if step is None:
                return False, None
        step.load(cache, length, padding)
        del cache, like
        if not path.ahead:
            return True, run_loop(name, model, step, output, input_ids, **kwargs)
        criteria = kwargs["stopping_criteria"]
        choice = _Choice(input_ids, kwargs["logits_processor"], criteria, config)
        return True, _decode(step, output.logits[:, -1], choice, criteria.max_length, kwargs.get("streamer"))
    finally:
        if step is not None:
            step.release()


def prefill_into(
    model: torch.nn.Module,
    step: DecodeStep,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    generation_config: GenerationConfig,
) -> torch.Tensor:
    """The logits (B, V) behind the prompt, read in chunks of bounded memory; its state goes into the step."""
    batch, length = input_ids.shape
    padding = padding_of(attention_mask, length)
    mask, chunk = None if padding is None else attention_mask, chunk_of(batch, generation_config)
    cache, logits = read_prompt(model, input_ids, mask, chunk)
    step.load(cache, length, padding)
    return logits


def padding_of(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """How many tokens in front of each row (B,) are none; None where all are real."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return length - attention_mask.long().sum(1)


def chunk_of(batch: int, generation_config: GenerationConfig) -> int:
    """Tokens a row that one forward pass reads of a prompt."""
    return generation_config.prefill_chunk_size or max(LEAST_CHUNK, PREFILL_TOKENS // batch)


def read_prompt(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, chunk: int
) -> tuple[DynamicCache, torch.Tensor]:
    """The state and the logits (B, V) behind the prompt, read `chunk` tokens at a time."""
    cache, output = prompt_output(model, input_ids, attention_mask, chunk)
    return cache, output.logits[:, -1]


@torch.no_grad()
def prompt_output(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, chunk: int, **options: Any
) -> tuple:
    """The state and the output of the model behind the prompt, read `chunk` tokens at a time."""
    cache, length = DynamicCache(config=model.config), input_ids.shape[1]
    for start in range(0, length, chunk):
        end = min(length, start + chunk)
        output = model(
            input_ids[:, start:end],
            attention_mask=None if attention_mask is None else attention_mask[:, :end],
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_NAME: cache},  # by the name that a forward of the user's knows from Transformers' loop
            **options,
        )
    return cache, output


class _Choice:
    """The next token of each row, as Transformers' loop finds it, without a look at what was found."""

    def __init__(self, prompt: torch.Tensor, logits_processor, stopping_criteria, generation_config):
        self.processors, self.do_sample = list(logits_processor), generation_config.do_sample
        self.length, self.tokens = prompt.shape[1], prompt
        self.going_on = torch.ones(prompt.shape[0], dtype=torch.bool, device=prompt.device)
        ends = [each.eos_token_id.to(prompt.device) for each in stopping_criteria if hasattr(each, "eos_token_id")]
        self.eos = torch.cat([end.flatten() for end in ends]) if ends else None
        self.pad: torch.Tensor | None = None
        if self.eos is not None:
            pad = getattr(generation_config, "_pad_token_tensor", None)
            self.pad = self.eos[0] if pad is None else pad.to(prompt.device)
        self.drawing: Drawing | None = None
        self.start, self.step_ends = self.length, False

    def let_end(self, step: DecodeStep) -> None:
        """Where nothing but the step chooses, it also looks for ends: behind the first token, before the next."""
        if self.eos is None or self.do_sample or self.processors or step.ends is None:
            return
        self.step_ends = step.end_at(self.eos, self.pad, self.going_on)
        if self.step_ends:
            self.going_on = step.ends.going_on

    def use_recording(self, step: DecodeStep) -> None:
        """Draws behind this step by one replay from here on, where that can be."""
        if self.drawing is None and self.do_sample and (drawn := self.length - self.start) in (1, RECORD_BEHIND):
            ends = 0 if self.eos is None else len(self.eos)
            self.drawing = drawing_of(step, self.processors, ends, drawn)
            if self.drawing is not None:
                self.drawing.begin(self.going_on, self.eos, self.pad)
                self.going_on = self.drawing.going_on

    def next(self, logits: torch.Tensor, best: torch.Tensor | None = None) -> torch.Tensor:
        """logits (B, V) -> tokens (B,), padding for rows that have ended; they are also put behind the others.

        best (B,): the argmax of these logits where it is known; it is returned itself where it is what is chosen.
        """
        token = self._chosen(logits, best) if self.drawing is None else self.drawing.next()
        if self.length == self.tokens.shape[1]:  # room for as many again, whatever max_length allows
            room = max(1024, self.length)
            self.tokens = torch.nn.functional.pad(self.tokens, (0, room))
        self.tokens[:, self.length] = token
        self.length += 1
        return token

    def _chosen(self, logits: torch.Tensor, best: torch.Tensor | None) -> torch.Tensor:
        scores = logits  # whose argmax is the same in float32, which is exact for them
        if self.processors or self.do_sample:
            scores = logits.to(copy=True, dtype=torch.float32)
        for processor in self.processors:
            scores = processor(self.tokens[:, : self.length], scores)
        if self.do_sample:
            token = draw(scores.softmax(-1))
        elif self.processors or best is None:
            token = scores.argmax(-1)
        else:
            token = best
        if self.eos is not None and not (self.step_ends and token is best):
            token = torch.where(self.going_on, token, self.pad)
            self.going_on = self.going_on & ~torch.isin(token, self.eos)
        return token


def _decode(step: DecodeStep, logits: torch.Tensor, choice: _Choice, max_length: int | None, streamer) -> torch.Tensor:
    """The prompt and the new tokens (B, T + new)."""
    reports, end, best = _Reports(choice, streamer), None, None
    ahead = TOKENS_AHEAD if step.on_gpu else 0
    while True:
        token = choice.next(logits, best)
        reports.send(token)
        end = next(reports.received(ahead), None)
        if end is not None or max_length is not None and choice.length >= max_length:
            break
        if token is not step.token:  # the first one, or where not the step chooses
            step.token.copy_(token)
            if best is None:
                choice.let_end(step)
        logits, best = step.step(), step.token
        choice.use_recording(step)
    if end is None:
        end = next(reports.received(0), choice.length)
    if streamer is not None:
        streamer.end()
    return choice.tokens[:, :end].clone()


class _Reports:
    """What the host learns of each step, some steps later: tokens for a streamer, and whether all rows have ended."""

    def __init__(self, choice: _Choice, streamer):
        self.choice, self.streamer = choice, streamer
        self.on_gpu = choice.tokens.is_cuda
        self.sent, self.free = deque(), []

    def send(self, token: torch.Tensor) -> None:
        report = self.free.pop() if self.free else self._new(token)
        going_on, tokens, event = report
        if self.choice.eos is not None:
            going_on.copy_(self.choice.going_on, non_blocking=True)
        if self.streamer is not None:
            tokens.copy_(token, non_blocking=True)
        if event is not None:
            event.record()
        self.sent.append((self.choice.length, report))

    def received(self, ahead: int) -> Iterator[int]:
        """Waits for all but the last `ahead` reports; yields the length at which the last row ended, and stops."""
        while len(self.sent) > ahead:
            length, report = self.sent.popleft()
            going_on, tokens, event = report
            if event is not None:
                event.synchronize()
            if self.streamer is not None:
                self.streamer.put(tokens.clone())
            if not going_on.any():
                yield length
                return
            self.free.append(report)

    def _new(self, token: torch.Tensor) -> tuple:
        going_on = torch.ones(token.shape, dtype=torch.bool, pin_memory=self.on_gpu)
        tokens = torch.empty(token.shape, dtype=token.dtype, pin_memory=self.on_gpu)
        return going_on, tokens, torch.cuda.Event() if self.on_gpu else None
