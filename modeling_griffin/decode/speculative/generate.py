"""`generate(prompt_lookup_num_tokens=...)` by recorded steps: drafts cost little more than no drafts.

Greedy prompt lookup of one row runs here where it can be honoured exactly, every other request in Transformers' loop.
A pass reads the token chosen last and its drafts, one without a draft is a plain step; the host waits once for each.
The tokens are those of greedy decoding, whatever is drafted. On a CPU the passes are the same, but not recorded.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from transformers.utils import logging

from ..eligibility import CRITERIA, Obstacle, Path, decide, unused_places
from ..generate import by_transformers, prefill_into
from ..state import DecodeStep
from ..steps import take_step
from .prompt_lookup import PromptLookup
from .verify import TOLERANCE, VerifyStep, disagreement, most_tokens


logger = logging.get_logger(__name__)
OF_DRAFTS = ("assistant_model", "assistant_tokenizer", "tokenizer", "inputs_tensor")  # arguments
KEPT_SIZES = 2  # numbers of tokens for which a recorded pass and its buffers stay with a step


def decode_with_drafts(model: torch.nn.Module, stock: Callable, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """`GenerationMixin._assisted_decoding`, arguments and result as there. stock: the loop of Transformers."""
    if model.device.type not in model._fast_generation_devices:
        return stock(input_ids, **kwargs)
    step, drafts, path = _take_step_for(model, input_ids, kwargs)
    if drafts is None:
        if path.step == "uncached" or unused_places(model) or _plain_is_faster(model, kwargs):
            logger.info_once(f"generate decodes without drafts: {path.obstacle.reason}")
            return model._sample(input_ids, **{name: kwargs[name] for name in kwargs if name not in OF_DRAFTS})
        return by_transformers(path, stock, input_ids, kwargs)
    config, criteria, streamer = kwargs["generation_config"], kwargs["stopping_criteria"], kwargs.get("streamer")
    try:
        with torch.cuda.device(step.device) if step.on_gpu else nullcontext():
            prompt = input_ids[0].tolist()  # before the model reads it: the host enters it for lookup meanwhile
            logits = prefill_into(model, step, input_ids, kwargs.get("attention_mask"), config)
            step.token.copy_(logits.argmax(-1))
            new: list[int] = []
            for tokens in _passes(step, drafts, prompt, criteria, config):
                new += tokens
                if streamer is not None:
                    streamer.put(torch.tensor([tokens], device="cpu"))
            if streamer is not None:
                streamer.end()
            return torch.cat([input_ids, torch.tensor([new], device=input_ids.device)], dim=1)
    finally:
        step.release()


def _plain_is_faster(model, kwargs: dict) -> bool:
    """Greedy decoding finds the same tokens, on a GPU by a recorded step: faster than drafts in Transformers' loop."""
    config = kwargs["generation_config"]
    return (
        model.device.type == "cuda"
        and config.prompt_lookup_num_tokens is not None
        and not (config.do_sample or config.return_dict_in_generate)
        and all(type(each) in CRITERIA for each in kwargs["stopping_criteria"])
    )


def _take_step_for(model, input_ids, kwargs: dict) -> tuple[DecodeStep | None, VerifyStep | None, Path | None]:
    """A step and its pass where they honour the request exactly; else the path that does."""
    config = kwargs["generation_config"]
    path = decide(model, input_ids, **kwargs)
    if path.step in ("transformers", "uncached"):
        return None, None, path
    reason = next(_ineligible_reasons(model.config, input_ids, kwargs["logits_processor"], config), None)
    reason = (
        reason or (path.obstacle.reason if path.obstacle else None) or (None if path.ahead else "criteria or outputs")
    )
    if reason is not None:
        return None, None, Path("transformers", False, Obstacle(f"drafts with {reason}", "decode without drafts"))
    step, drafts = _take_drafts(model, config.prompt_lookup_num_tokens + 1, config.max_length)
    if drafts is None:
        path = Path("transformers", False, Obstacle("drafts cannot be verified by a step, see above", "none"))
    return step, drafts, path


def _ineligible_reasons(config, input_ids, logits_processor, generation_config) -> Iterator[str]:
    """What a recorded pass cannot honour, beyond what no recorded step can."""
    number = generation_config.prompt_lookup_num_tokens
    if number is None:
        yield "drafts that are not looked up in the prompt"
        return
    for name in ("assistant_early_exit", "assistant_ensemble_weight", "use_mtp"):
        if getattr(generation_config, name, None):
            yield name
    if generation_config.do_sample:
        yield "do_sample"
    if input_ids.shape[0] != 1:
        yield f"{input_ids.shape[0]} rows"
    yield from (type(each).__name__ for each in logits_processor)
    most = most_tokens(config) - 1
    if not 1 <= number <= most:
        yield f"prompt_lookup_num_tokens = {number}, of which 1 to {most} are recorded"


def _take_drafts(model, tokens: int, length: int | None) -> tuple[DecodeStep, VerifyStep] | tuple[None, None]:
    """The model's step for one row and its pass over so many tokens, recorded unless it is; None as in `take_step`."""
    step = take_step(model, 1, None if length is None else length + tokens)
    if step is None:
        return None, None
    if tokens not in step.drafts:
        step.drafts[tokens] = _recorded(step, tokens)
    drafts = step.drafts[tokens] = step.drafts.pop(tokens)  # the last of them: it was used last
    while len(step.drafts) > KEPT_SIZES:
        del step.drafts[next(iter(step.drafts))]
    if drafts is None:
        step.release()
        return None, None
    return step, drafts


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


def _passes(
    step: DecodeStep, drafts: VerifyStep, prompt: list[int], stopping_criteria, generation_config
) -> Iterator[list[int]]:
    """The new tokens of each pass, of which the first token is in the step already, and none beyond the end."""
    ends = [each.eos_token_id.flatten().tolist() for each in stopping_criteria if hasattr(each, "eos_token_id")]
    ends, max_length = {token for end in ends for token in end}, generation_config.max_length
    most, ngram = generation_config.prompt_lookup_num_tokens, generation_config.max_matching_ngram_size or 2
    lookup = PromptLookup(most, ngram, ends)
    lookup.extend(prompt)
    new = step.token.tolist()
    while True:
        new = _up_to_the_end(new, ends, max_length - len(lookup.tokens))
        lookup.extend(new)
        yield new
        room = max_length - len(lookup.tokens)
        if room <= 0 or new[-1] in ends:
            return
        found = lookup.drafts() if room > 1 else []
        if found:
            new = drafts.read(new[-1], found)
        else:
            step.step()
            new = step.token.tolist()


def _up_to_the_end(tokens: list[int], ends: set[int], room: int) -> list[int]:
    """The first `room` tokens, up to the first of `ends`."""
    tokens = tokens[:room]
    return tokens[: next((i for i, token in enumerate(tokens, 1) if token in ends), len(tokens))]
