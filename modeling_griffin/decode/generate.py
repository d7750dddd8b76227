"""`generate` by a recorded step: on a GPU no Python a layer, and the host never waits for the token it just asked for.

`generate` prepares everything as for any model and then calls `_sample`; here a request that can be honoured exactly
runs on a `DecodeStep`, and every other goes on to Transformers' loop. Logits processors are Transformers' own.

On a GPU the host stays ahead of the tokens that it has seen. Steps beyond the end are thus computed and dropped; what
they leave behind is a random generator that has drawn for them too. On a CPU nothing is recorded, but the step does
less than Transformers' loop around it: no masks, no cache that grows.

Legend: B rows, T tokens of the prompt.
"""

import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from .eligibility import ineligible_reason
from .state import DecodeStep


logger = logging.get_logger(__name__)

PREFILL_TOKENS = 16384  # of all rows together in one forward pass
LEAST_CHUNK = 128  # tokens a row
TOKENS_AHEAD = 3  # of what the host has seen, on a GPU
KEPT_STEPS = 4  # batch sizes whose recorded step and buffers stay with the model
STEPS: "weakref.WeakKeyDictionary[torch.nn.Module, OrderedDict[tuple, DecodeStep]]" = weakref.WeakKeyDictionary()


def sample(model, stock, input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """`GenerationMixin._sample`, arguments and result as there. stock: the loop of Transformers."""
    step = take_step_for(model, input_ids, kwargs)
    if step is None:
        return stock(input_ids, **kwargs)
    config, criteria = kwargs["generation_config"], kwargs["stopping_criteria"]
    try:
        with torch.cuda.device(step.device) if step.on_gpu else nullcontext():
            logits = prefill_into(model, step, input_ids, kwargs.get("attention_mask"), config)
            choice = _Choice(input_ids, kwargs["logits_processor"], criteria, config)
            return _decode(step, logits, choice, criteria.max_length, kwargs.get("streamer"))
    finally:
        step.busy = False


def take_step_for(model, input_ids: torch.Tensor, kwargs: dict) -> DecodeStep | None:
    """The model's step where it honours the request exactly; None, and one line why, where Transformers' loop runs."""
    if model.device.type not in model._fast_generation_devices:
        return None
    reason = ineligible_reason(model, input_ids, **kwargs)
    step = None if reason else take_step(model, input_ids.shape[0])
    if step is None:
        logger.info_once(f"generate runs Transformers' own loop: {reason or 'another call runs, or see above'}")
    return step


def prefill_into(model, step: DecodeStep, input_ids, attention_mask, generation_config) -> torch.Tensor:
    """The logits (B, V) behind the prompt, read in chunks of bounded memory; its state goes into the step."""
    batch, length = input_ids.shape
    padding = None
    if attention_mask is not None and not bool(attention_mask.all()):
        padding = length - attention_mask.long().sum(1)
    chunk = generation_config.prefill_chunk_size or max(LEAST_CHUNK, PREFILL_TOKENS // batch)
    cache, logits = read_prompt(model, input_ids, None if padding is None else attention_mask, chunk)
    step.load(cache, length, padding)
    return logits


def read_prompt(model, input_ids, attention_mask: torch.Tensor | None, chunk: int) -> tuple[DynamicCache, torch.Tensor]:
    """The state and the logits (B, V) behind the prompt, read `chunk` tokens at a time."""
    cache, length = DynamicCache(config=model.config), input_ids.shape[1]
    for start in range(0, length, chunk):
        end = min(length, start + chunk)
        output = model(
            input_ids[:, start:end],
            attention_mask=None if attention_mask is None else attention_mask[:, :end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return cache, output.logits[:, -1]


def take_step(model, batch: int) -> DecodeStep | None:
    """The model's step for so many rows, recorded unless it is; None while another call uses it.

    None too where it cannot be recorded: on a GPU that the kernels have not met, a slower answer is better than none.
    """
    steps = STEPS.setdefault(model, OrderedDict())
    weights = tuple((p.data_ptr(), p.dtype, p.shape) for p in model.parameters())
    key = (batch, weights, model.config.final_logit_softcapping)
    for other in [other for other in steps if other[1:] != key[1:]]:  # of weights that were moved or replaced
        del steps[other]
    if key not in steps:
        steps[key] = DecodeStep(model.model, model.lm_head, batch)
    steps.move_to_end(key)
    step = steps[key]
    if step.busy:
        return None
    step.busy = True  # and stays it where recording fails: it is not tried again with these weights
    if step.on_gpu and step.graph is None:
        try:
            step.record()
        except Exception as error:
            logger.warning_once(f"generate is slow: a decoding step of {batch} rows cannot be recorded: {error!r}")
            return None
    while len(steps) > KEPT_STEPS:
        steps.popitem(last=False)
    return step


class _Choice:
    """The next token of each row, as Transformers' loop finds it, without a look at what was found."""

    def __init__(self, prompt: torch.Tensor, logits_processor, stopping_criteria, generation_config):
        self.processors, self.do_sample = list(logits_processor), generation_config.do_sample
        self.length, self.tokens = prompt.shape[1], prompt
        self.going_on = torch.ones(prompt.shape[0], dtype=torch.bool, device=prompt.device)
        ends = [each.eos_token_id.to(prompt.device) for each in stopping_criteria if hasattr(each, "eos_token_id")]
        self.eos = torch.cat([end.flatten() for end in ends]) if ends else None
        if self.eos is not None:
            pad = getattr(generation_config, "_pad_token_tensor", None)
            self.pad = self.eos[0] if pad is None else pad.to(prompt.device)

    def next(self, logits: torch.Tensor, likeliest: torch.Tensor | None = None) -> torch.Tensor:
        """logits (B, V) -> tokens (B,), padding for rows that have ended; they are also put behind the others.

        likeliest (B,): of these logits where it is known; it is returned itself where it is what is chosen.
        """
        scores = logits  # the likeliest is the same in float32, which is exact for them
        if self.processors or self.do_sample:
            scores = logits.to(copy=True, dtype=torch.float32)
        for processor in self.processors:
            scores = processor(self.tokens[:, : self.length], scores)
        if self.do_sample:
            token = _draw(scores.softmax(-1))
        elif self.processors or likeliest is None:
            token = scores.argmax(-1)
        else:
            token = likeliest
        if self.eos is not None:
            token = torch.where(self.going_on, token, self.pad)
            self.going_on = self.going_on & ~torch.isin(token, self.eos)
        if self.length == self.tokens.shape[1]:  # room for as many again, whatever max_length allows
            room = max(1024, self.length)
            self.tokens = torch.nn.functional.pad(self.tokens, (0, room))
        self.tokens[:, self.length] = token
        self.length += 1
        return token


def _draw(shares: torch.Tensor) -> torch.Tensor:
    """A sample of each row, the same as `torch.multinomial(shares, 1)` draws, which makes the host wait."""
    return (shares / torch.empty_like(shares).exponential_(1)).argmax(-1)


def _decode(step: DecodeStep, logits: torch.Tensor, choice: _Choice, max_length: int | None, streamer) -> torch.Tensor:
    """The prompt and the new tokens (B, T + new)."""
    reports, end, likeliest = _Reports(choice, streamer), None, None
    ahead = TOKENS_AHEAD if step.on_gpu else 0
    while True:
        token = choice.next(logits, likeliest)
        reports.send(token)
        end = next(reports.received(ahead), None)
        if end is not None or max_length is not None and choice.length >= max_length:
            break
        if token is not step.token:
            step.token.copy_(token)
        logits, likeliest = step.step(), step.token
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
            going_on.copy_(self.choice.going_on.any(), non_blocking=True)
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
            if not going_on:
                yield length
                return
            self.free.append(report)

    def _new(self, token: torch.Tensor) -> tuple:
        going_on = torch.ones((), dtype=torch.bool, pin_memory=self.on_gpu)
        tokens = torch.empty(token.shape, dtype=token.dtype, pin_memory=self.on_gpu)
        return going_on, tokens, torch.cuda.Event() if self.on_gpu else None
