"""`generate` with drafts by recorded steps, from the prompt or from an assistant model.

Greedy decoding of one row runs here where it can be honoured exactly, every other request in Transformers' loop.
A pass reads the token chosen last and its drafts, one without a draft is a plain step; the host waits once for each.
The tokens are those of greedy decoding, whatever is drafted. On a CPU the passes are the same, but not recorded.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from transformers.utils import logging

from ..eligibility import CRITERIA, Obstacle, Path, decide, ineligible_model_reasons, shared_places, unused_places
from ..generate import by_transformers, prefill_into
from ..original import patched_loop
from ..state import DecodeStep
from ..steps import take_step
from .assistant import Assistant, DraftSettings
from .prompt_lookup import PromptLookup
from .verify import TOLERANCE, VerifyStep, disagreement, most_tokens


logger = logging.get_logger(__name__)
OF_DRAFTS = ("assistant_model", "assistant_tokenizer", "tokenizer", "inputs_tensor")  # arguments
KEPT_SIZES = 2  # numbers of tokens for which a recorded pass and its buffers stay with a step


class Drafter(Protocol):
    """Where drafts come from."""

    def accept(self, tokens: Sequence[int]) -> None:
        """The next tokens of the text, whatever was drafted for them."""

    def drafts(self, room: int) -> list[int]:
        """What may follow, at most `room` tokens; nothing for a step without drafts."""

    def close(self) -> None:
        """The text has ended."""


class Steps(NamedTuple):
    """What one call holds. row: the step of the model. verify: its pass. assistant: the step of the assistant."""

    row: DecodeStep
    verify: VerifyStep
    assistant: DecodeStep | None


def decode_with_drafts(model: torch.nn.Module, stock: Callable, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """`GenerationMixin._assisted_decoding`, arguments and result as there. stock: the loop of Transformers."""
    if model.device.type not in model._fast_generation_devices:
        return stock(input_ids, **kwargs)
    with ExitStack() as held:  # steps, which are left to others behind it
        steps, path = _take_steps_for(model, input_ids, kwargs, held)
        if steps is not None:
            with torch.cuda.device(model.device) if steps.row.on_gpu else nullcontext():
                return _decode(model, steps, input_ids, **kwargs)
    if path.step == "uncached" or unused_places(model) or _plain_is_faster(model, kwargs):
        logger.info_once(f"generate decodes without drafts: {path.obstacle.reason}")
        return model._sample(input_ids, **{name: kwargs[name] for name in kwargs if name not in OF_DRAFTS})
    return by_transformers(path, stock, input_ids, kwargs)


def _decode(model, steps: Steps, input_ids, *, generation_config, stopping_criteria, streamer=None, **kwargs):
    """The prompt and the new tokens (1, T + new)."""
    prompt, mask = input_ids[0].tolist(), kwargs.get("attention_mask")  # before the model reads it: see `_drafter`
    logits = prefill_into(model, steps.row, input_ids, mask, generation_config)
    steps.row.token.copy_(logits.argmax(-1))
    ends, new = _ends(stopping_criteria), []
    drafter = _drafter(steps, prompt, ends, input_ids, generation_config, kwargs)
    for tokens in _passes(steps, drafter, ends, generation_config.max_length - len(prompt)):
        new += tokens
        if streamer is not None:
            streamer.put(torch.tensor([tokens], device="cpu"))
    drafter.close()
    if streamer is not None:
        streamer.end()
    return torch.cat([input_ids, torch.tensor([new], device=input_ids.device)], dim=1)


def _plain_is_faster(model, kwargs: dict) -> bool:
    """Greedy decoding finds the same tokens, on a GPU by a recorded step: faster than drafts in Transformers' loop."""
    config = kwargs["generation_config"]
    return (
        model.device.type == "cuda"
        and config.prompt_lookup_num_tokens is not None
        and patched_loop() is None
        and not (config.do_sample or config.return_dict_in_generate)
        and all(type(each) in CRITERIA for each in kwargs["stopping_criteria"])
    )


def _take_steps_for(model, input_ids, kwargs: dict, held: ExitStack) -> tuple[Steps | None, Path]:
    """Steps where they honour the request exactly, to be released by `held`; else the path that does."""
    config, assistant = kwargs["generation_config"], kwargs.get("assistant_model")
    is_looked_up = config.prompt_lookup_num_tokens is not None
    path = decide(model, input_ids, **{name: kwargs[name] for name in kwargs if name != "assistant_model"})
    if path.step in ("transformers", "uncached"):
        return None, path
    reason = next(_ineligible_reasons(model, input_ids, kwargs["logits_processor"], config, assistant), None)
    reason = (
        reason or (path.obstacle.reason if path.obstacle else None) or (None if path.ahead else "criteria or outputs")
    )
    if reason is not None:
        return None, Path("transformers", False, Obstacle(f"drafts with {reason}", "decode without drafts"))
    tokens = config.prompt_lookup_num_tokens + 1 if is_looked_up else _tokens_of_passes(model, assistant)
    step = take_step(model, 1, config.max_length + tokens)
    if step is not None:
        held.callback(step.release)
    if step is None or (verify := _pass_of(step, tokens)) is None:
        return None, Path("transformers", False, Obstacle("drafts cannot be verified by a step, see above", "none"))
    if is_looked_up:
        return Steps(step, verify, None), path
    # Nobody waits for it, nor does it for others: two calls whose models are each other's assistant would wait forever.
    drafting = take_step(assistant, 1, config.max_length + tokens, stream=True)
    if drafting is None:
        return None, Path("transformers", False, Obstacle("the assistant's step cannot be used, see above", "none"))
    held.callback(drafting.release)
    return Steps(step, verify, drafting), path


def _ineligible_reasons(model, input_ids, logits_processor, generation_config, assistant) -> Iterator[str]:
    """What a recorded pass cannot honour, beyond what no recorded step can."""
    for name in ("assistant_early_exit", "assistant_ensemble_weight", "use_mtp"):
        if getattr(generation_config, name, None):
            yield name
    if generation_config.do_sample:
        yield "do_sample"
    if input_ids.shape[0] != 1:
        yield f"{input_ids.shape[0]} rows"
    yield from (type(each).__name__ for each in logits_processor)
    if (number := generation_config.prompt_lookup_num_tokens) is None:
        yield from _of_an_assistant(model, assistant)
        return
    most = most_tokens(model.config) - 1
    if not 1 <= number <= most:
        yield f"prompt_lookup_num_tokens = {number}, of which 1 to {most} are recorded"


def _of_an_assistant(model, assistant) -> Iterator[str]:
    if assistant is None:
        yield "neither a prompt to look up nor an assistant"
        return
    yield from (f"an assistant without a fused step: {reason}" for reason in ineligible_model_reasons(assistant))
    if assistant.device != model.device or assistant.device.type not in assistant._fast_generation_devices:
        yield f"an assistant on {assistant.device}"
    if assistant.config.vocab_size != model.config.vocab_size:
        yield f"an assistant of {assistant.config.vocab_size} tokens, not {model.config.vocab_size}"
    if (obstacle := shared_places(assistant)) is not None:
        yield f"an assistant: {obstacle.reason}"
    if (number := DraftSettings.of(assistant.generation_config).num_assistant_tokens) < 1:
        yield f"num_assistant_tokens = {number}"


def _tokens_of_passes(model, assistant) -> int:
    """Of a pass: a power of two where the number of drafts changes, as each size is compiled and recorded."""
    settings = DraftSettings.of(assistant.generation_config)
    tokens = int(settings.num_assistant_tokens) + 1
    tokens = 1 << (tokens - 1).bit_length() if settings.changes else tokens
    return min(tokens, most_tokens(model.config), most_tokens(assistant.config))


def _pass_of(step: DecodeStep, tokens: int) -> VerifyStep | None:
    """Over so many tokens, recorded unless it is; None where it cannot be used, and one warning."""
    if tokens not in step.drafts:
        step.drafts[tokens] = _recorded(step, tokens)
    verify = step.drafts[tokens] = step.drafts.pop(tokens)  # the last of them: it was used last
    while len(step.drafts) > KEPT_SIZES:
        del step.drafts[next(iter(step.drafts))]
    return verify


def _recorded(step: DecodeStep, tokens: int) -> VerifyStep | None:
    """None where it cannot be recorded or does not agree with single steps, which is then not tried again."""
    try:
        drafts = VerifyStep(step, tokens)
        if step.on_gpu:
            drafts.record()
            _check(step, drafts)
        return drafts
    except Exception as error:
        logger.warning_once(f"generate with drafts is slow: {tokens} tokens cannot be recorded: {error!r}")
        return None


def _check(step: DecodeStep, drafts: VerifyStep) -> None:
    """On a GPU that the kernels have not met, a slower answer is better than a wrong one."""
    error = disagreement(step, drafts)
    if not error <= TOLERANCE[drafts.dtype]:
        raise RuntimeError(f"logits of a pass differ by {error:.1e} of the largest from those of single steps")


def _drafter(steps: Steps, prompt: list[int], ends: Collection[int], input_ids, config, kwargs: dict) -> Drafter:
    """One that knows the prompt. The host enters it for lookup while the model reads it on a GPU."""
    if steps.assistant is None:
        lookup = PromptLookup(config.prompt_lookup_num_tokens, config.max_matching_ngram_size or 2, ends)
        lookup.accept(prompt)
        return lookup
    assistant = kwargs["assistant_model"]
    prefill_into(assistant, steps.assistant, input_ids, kwargs.get("attention_mask"), config)
    return Assistant(assistant, steps.assistant, len(prompt), len(steps.verify.tokens) - 1, ends)


def _passes(steps: Steps, drafter: Drafter, ends: Collection[int], room: int) -> Iterator[list[int]]:
    """The new tokens of each pass, of which the first token is in the step already: `room` or up to an end."""
    step, new = steps.row, steps.row.token.tolist()
    while True:
        new = _up_to_the_end(new, ends, room)
        room -= len(new)
        yield new
        drafter.accept(new)
        if room <= 0 or new[-1] in ends:
            return
        found = drafter.drafts(room - 1)
        if found:
            new = steps.verify.read(new[-1], found)
        else:
            step.step()
            new = step.token.tolist()


def _ends(stopping_criteria) -> set[int]:
    ends = [each.eos_token_id.flatten().tolist() for each in stopping_criteria if hasattr(each, "eos_token_id")]
    return {token for end in ends for token in end}


def _up_to_the_end(tokens: list[int], ends: Collection[int], room: int) -> list[int]:
    """The first `room` tokens, up to the first of `ends`."""
    tokens = tokens[:room]
    return tokens[: next((i for i, token in enumerate(tokens, 1) if token in ends), len(tokens))]
