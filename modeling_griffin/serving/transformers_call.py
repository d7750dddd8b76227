"""`generate_batch` as Transformers' continuous batching and TRL call it, on the engine of `batch`.

Transformers pages the keys of attention; a row of a Griffin's state has one size, so that what sizes pages is of no use
here and is not read. Everything else of a call is honoured, or refused by name.
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerBase, generation
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from .request import end_tokens, shown


ARGUMENTS = (
    *("inputs", "continuous_batching_config", "record_timestamps", "progress_bar"),
    *("persistent_manager", "warmup", "max_new_tokens"),
)
# Of each of Transformers' processors that the engine knows: its attribute, and the field of a request.
PROCESSORS = {
    generation.TemperatureLogitsWarper: ("temperature", "temperature"),
    generation.TopKLogitsWarper: ("top_k", "top_k"),
    generation.TopPLogitsWarper: ("top_p", "top_p"),
    generation.MinPLogitsWarper: ("min_p", "min_p"),
    generation.RepetitionPenaltyLogitsProcessor: ("penalty", "repetition_penalty"),
    generation.LogitNormalization: None,  # changes no choice
}
MODES = (
    generation.GenerationMode.GREEDY_SEARCH,
    generation.GenerationMode.SAMPLE,
    generation.GenerationMode.ASSISTED_GENERATION,
)
# What changes an answer, or adds to it, and is no processor.
REFUSED = ("max_time", "token_healing", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
MAX_ROWS = 64  # of a call that does not say
NO_LIMIT = 2**31 - 1  # of new tokens, as in Transformers


def is_of_transformers(queue: Any, options: Mapping) -> bool:
    """Whether a call of `generate_batch` is Transformers': by its arguments, or lists of token ids and nothing else."""
    if any(name in options for name in ARGUMENTS):
        return True
    return type(queue) is list and bool(queue) and all(type(prompt) is list for prompt in queue)


def as_transformers(
    model: torch.nn.Module,
    inputs_by_position: Iterable | None,
    collect: Callable[..., Iterator],
    generation_config: GenerationConfig | None = None,
    *,
    inputs: Iterable | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    record_timestamps: bool = False,
    progress_bar: bool = False,
    persistent_manager: bool = False,
    warmup: bool = True,
    max_new_tokens: int | None = None,
    max_rows: int | None = None,
    prefill_chunk_size: int = 2048,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **kwargs: Any,
) -> dict[str, GenerationOutput]:
    """`ContinuousMixin.generate_batch` of Transformers, arguments and result as there.

    Args:
        continuous_batching_config: its max_requests_per_batch is the number of rows at once, else max_rows, else
            64; its seed is that of all random numbers, else they come from torch's generator.
        persistent_manager, warmup: nothing has to be done for them: steps stay with the model, and are recorded when
            they are first used.
        max_rows, prefill_chunk_size, tokenizer: as of `stream_batch`.
        kwargs: as `generate` hands them on; they must be what the generation configuration says.

    Raises:
        ValueError: for what a generation configuration asks for beyond processors of PROCESSORS, end tokens, stop
            strings, max_new_tokens, max_length and num_return_sequences.
    """
    given = inputs_by_position if inputs is None else inputs
    config = generation_config or model.generation_config
    if given is None:
        raise ValueError("inputs is None: allowed are lists of token ids")
    prompts = list(given)
    _check_kwargs(kwargs, config)
    batching = continuous_batching_config
    if getattr(batching, "return_logprobs", False):
        raise ValueError("return_logprobs = True: allowed is False; `generate` with output_scores has them")
    copies = config.num_return_sequences or 1
    outputs, requests = {}, []
    seeds = _seeds(getattr(batching, "seed", None), len(prompts) * copies)
    for number, prompt in enumerate(prompts):
        prompt = prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt
        if not isinstance(prompt, Iterable):
            raise ValueError(f"inputs[{number}] = {shown(prompt)}: allowed are lists of token ids")
        prompt = list(prompt)
        fields = request_fields(model, config, prompt, max_new_tokens)
        for name in (*(f"req_{number}__child#{child}" for child in range(copies - 1)), f"req_{number}"):
            outputs[name] = GenerationOutput(name, prompt, timestamps=[] if record_timestamps else None)
            requests.append({**fields, "seed": seeds[len(requests)]})
    rows = getattr(batching, "max_requests_per_batch", None) or max_rows or MAX_ROWS
    stream = collect(model, requests, rows, prefill_chunk_size, tokenizer)
    with tqdm(total=len(requests), disable=not progress_bar, unit="request") as bar:
        _fill(list(outputs.values()), stream, bar)
    return outputs


def request_fields(
    model: torch.nn.Module, config: GenerationConfig, prompt: list[int], max_new_tokens: int | None = None
) -> dict:
    """The `GenerationRequest` of a prompt under a generation configuration, without its seed.

    Raises ValueError for what the engine does not know: see `as_transformers`.
    """
    ends = config.eos_token_id if config.eos_token_id is not None else model.config.eos_token_id
    ends = [end for end in end_tokens(ends) if end >= 0]
    prepared = _checked(model, config, ends)
    settings = {"temperature": 1.0 if config.do_sample else 0.0}
    for processor in model._get_logits_processor(
        prepared, input_ids_seq_length=len(prompt), encoder_input_ids=torch.zeros(1, 1), device="cpu"
    ):
        if type(processor) not in PROCESSORS:
            allowed = ", ".join(each.__name__ for each in PROCESSORS)
            raise ValueError(
                f"generation_config asks for {type(processor).__name__}: allowed are {allowed}; "
                "`generate` has the others"
            )
        if (names := PROCESSORS[type(processor)]) is not None:
            settings[names[1]] = getattr(processor, names[0])
    if config.stop_strings is not None:
        settings["stop"] = config.stop_strings
    limit = _limit(config, max_new_tokens, len(prompt), ends)
    return {"prompt": prompt, "max_new_tokens": limit, "eos_token_id": ends, **settings}


def _checked(model: torch.nn.Module, config: GenerationConfig, ends: Sequence[int]) -> GenerationConfig:
    """A copy of it as Transformers' makers of processors read it: without these end tokens they leave some out.

    Raises ValueError for what asks for no processor, and that the engine does not know.
    """
    if (config.num_beams or 1) > 1:
        raise ValueError(f"num_beams = {config.num_beams}: allowed is 1; `generate` searches beams")
    if (mode := config.get_generation_mode()) not in MODES:
        raise ValueError(f"generation_config asks for {mode.value}: allowed are greedy search and samples")
    for name in REFUSED:
        if value := getattr(config, name, None):
            raise ValueError(f"generation_config has {name} = {shown(value)}: allowed is none; `generate` has it")
    prepared = copy.copy(config)
    prepared._eos_token_tensor = torch.tensor(ends) if ends else None
    return prepared


def _limit(config, max_new_tokens: int | None, length: int, ends: Sequence[int]) -> int:
    limit = config.max_new_tokens if max_new_tokens is None else max_new_tokens
    if limit is None and config.max_length is not None:
        limit = max(0, config.max_length - length)
    if limit is None and not ends:
        raise ValueError("max_new_tokens = None: allowed is None only with an eos_token_id, else nothing would end")
    return NO_LIMIT if limit is None else limit


def _seeds(seed: int | None, number: int) -> list[int]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randint(2**62, (number,), generator=generator).tolist()


def _check_kwargs(kwargs: Mapping, config) -> None:
    """`generate` has put its arguments into the configuration, and hands them on once more."""
    mask = kwargs.get("attention_mask")
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise ValueError("attention_mask has zeros: allowed are lists of token ids without padding")
    for name, value in kwargs.items():
        if name in ("input_ids", "attention_mask"):
            continue
        if not hasattr(config, name) or getattr(config, name) != value:
            raise ValueError(f"generate_batch was given {name} = {value!r}: allowed is to set it in generation_config")


def _fill(outputs: Sequence[GenerationOutput], stream: Iterator, bar) -> None:
    begin = time.perf_counter()
    for index, token, finish_reason in stream:
        output, now = outputs[index], time.perf_counter()
        if output.status == RequestStatus.PENDING:
            output.status, output.lifespan = RequestStatus.DECODING, (begin, -1)
        if token is not None:
            output.generated_tokens.append(token)
            if output.timestamps is not None:
                output.timestamps.append(now)
        if finish_reason is not None:
            failed = finish_reason.startswith("error: ")
            output.status = RequestStatus.FAILED if failed else RequestStatus.FINISHED
            output.error = finish_reason.removeprefix("error: ") if failed else None
            output.lifespan = (output.lifespan[0], now)
            bar.update(1)
