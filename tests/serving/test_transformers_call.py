"""`generate_batch` as Transformers and TRL call it: its arguments, its dict of outputs, the tokens of `generate`."""

import numpy as np
import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from modeling_griffin import GenerationRequest, GenerationResult


PROMPTS = [[5, 9, 11], [7], [20, 6, 5, 8, 12, 13, 14, 15, 16, 17]]


def alone(model, prompt, new, **options):
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def test_a_dict_of_outputs_in_the_order_of_the_prompts(small_model):
    model = small_model()
    config = GenerationConfig(max_new_tokens=7, do_sample=False, pad_token_id=0)
    found = model.generate_batch(PROMPTS, generation_config=config, progress_bar=False, record_timestamps=True)
    assert list(found) == ["req_0", "req_1", "req_2"]
    for (name, output), prompt in zip(found.items(), PROMPTS):
        assert isinstance(output, GenerationOutput) and output.request_id == name and output.prompt_ids == prompt
        assert output.generated_tokens == alone(model, prompt, 7)
        assert output.is_finished() and output.status == RequestStatus.FINISHED and output.error is None
        assert len(output.timestamps) == 7 and output.timestamps == sorted(output.timestamps)
        assert 0 < output.lifespan[0] <= output.lifespan[1]


def test_every_argument_of_transformers_is_taken(small_model):
    model = small_model()
    found = model.generate_batch(
        inputs=PROMPTS,
        generation_config=GenerationConfig(max_new_tokens=99),
        continuous_batching_config=ContinuousBatchingConfig(max_requests_per_batch=2, max_memory_percent=0.5),
        record_timestamps=False,
        progress_bar=True,
        persistent_manager=True,
        warmup=False,
        max_new_tokens=4,
    )
    assert [output.generated_tokens for output in found.values()] == [alone(model, prompt, 4) for prompt in PROMPTS]
    assert found["req_0"].timestamps is None


def test_lists_alone_are_transformers_call_and_requests_are_ours(small_model):
    model = small_model()
    model.generation_config.max_new_tokens = 5
    assert list(model.generate_batch(PROMPTS)) == ["req_0", "req_1", "req_2"]
    ours = model.generate_batch([GenerationRequest(prompt, max_new_tokens=5) for prompt in PROMPTS])
    assert ours == [GenerationResult(alone(model, prompt, 5), "length") for prompt in PROMPTS]
    assert model.generate_batch([tuple(PROMPTS[0])])[0].tokens[:5] == ours[0].tokens
    assert model.generate_batch([], generation_config=model.generation_config) == {}


def test_ends_lengths_and_copies(small_model):
    model = small_model()
    whole = alone(model, PROMPTS[0], 12)
    end = whole[4]
    config = GenerationConfig(max_length=15, eos_token_id=[end, 3], do_sample=True, top_k=1, num_return_sequences=3)
    found = model.generate_batch(PROMPTS[:1], generation_config=config)
    assert list(found) == ["req_0__child#0", "req_0__child#1", "req_0"]
    assert [each.generated_tokens for each in found.values()] == [whole[: whole.index(end) + 1]] * 3
    config = GenerationConfig(max_length=15, eos_token_id=-1)
    assert model.generate_batch(PROMPTS[:1], generation_config=config)["req_0"].generated_tokens == whole


@pytest.mark.parametrize("form", [torch.tensor, lambda end: torch.tensor([end, 3]), lambda end: [end], np.int64])
def test_end_tokens_in_any_form(form, small_model):
    model = small_model()
    end = alone(model, PROMPTS[0], 5)[4]
    config = GenerationConfig(max_new_tokens=12, eos_token_id=form(end))
    tokens = model.generate_batch(PROMPTS[:1], config)["req_0"].generated_tokens
    assert tokens[-1] == end and len(tokens) <= 5


def test_sampling_and_its_seeds(small_model):
    model = small_model()
    config = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=1.3, top_k=1)
    assert model.generate_batch(PROMPTS, config)["req_2"].generated_tokens == alone(model, PROMPTS[2], 12)
    config = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=1.3, top_p=0.95, min_p=0.01, top_k=0)

    def drawn(seed=None):
        batching = ContinuousBatchingConfig(seed=seed)
        outputs = model.generate_batch([PROMPTS[0]] * 2, config, continuous_batching_config=batching)
        return [output.generated_tokens for output in outputs.values()]

    torch.manual_seed(3)
    first, second = drawn(), drawn()
    torch.manual_seed(3)
    assert drawn() == first != second and first[0] != first[1]
    assert drawn(seed=8) == drawn(seed=8) != drawn(seed=9)


def test_penalties_are_those_of_generate(small_model):
    model = small_model()
    config = GenerationConfig(max_new_tokens=12, do_sample=False, repetition_penalty=1.7)
    found = model.generate_batch(PROMPTS, config)
    for output, prompt in zip(found.values(), PROMPTS):
        assert output.generated_tokens == alone(model, prompt, 12, repetition_penalty=1.7)


def test_a_bad_prompt_fails_alone(small_model):
    model = small_model()
    found = model.generate_batch([PROMPTS[0], [29], []], max_new_tokens=4)
    assert found["req_0"].generated_tokens == alone(model, PROMPTS[0], 4)
    for name, message in (("req_1", "has the token 29"), ("req_2", "prompt is empty")):
        assert found[name].status == RequestStatus.FAILED and message in found[name].error
        assert found[name].generated_tokens == [] and found[name].is_finished()


def test_generate_with_a_paged_cache_comes_here(small_model):
    model, ids = small_model(), torch.tensor([PROMPTS[0], PROMPTS[2][:3]])
    for call in ({"inputs": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        found = model.generate(**call, cache_implementation="paged", max_new_tokens=5, do_sample=False)
        assert found[0].tolist() == [prompt + alone(model, prompt, 5) for prompt in ids.tolist()]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 2}, "num_beams = 2: allowed is 1"),
        ({"no_repeat_ngram_size": 2}, "asks for NoRepeatNGramLogitsProcessor: allowed are TemperatureLogitsWarper"),
        ({"do_sample": True, "typical_p": 0.5}, "asks for TypicalLogitsWarper"),
        ({"min_new_tokens": 2, "eos_token_id": 5}, "asks for MinNewTokensLengthLogitsProcessor"),
        ({"min_length": 9, "eos_token_id": [5, 6]}, "asks for MinLengthLogitsProcessor"),
        ({"exponential_decay_length_penalty": (1, 1.5), "eos_token_id": 5}, "asks for ExponentialDecayLengthPenalty"),
        ({"bad_words_ids": [[5]]}, "asks for NoBadWordsLogitsProcessor"),
        ({"encoder_repetition_penalty": 2.0}, "asks for EncoderRepetitionPenaltyLogitsProcessor"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "asks for contrastive_search: allowed are greedy search and samples"),
        ({"force_words_ids": [[5]]}, "asks for constrained_beam_search"),
        ({"max_time": 3.0}, "has max_time = 3.0: allowed is none"),
        ({"token_healing": True}, "has token_healing = True"),
        ({"output_scores": True}, "has output_scores = True"),
        ({"max_new_tokens": None}, "max_new_tokens = None: allowed is None only with an eos_token_id"),
    ],
    ids=str,
)
def test_what_the_engine_does_not_know_is_refused_by_name(options, message, small_model):
    config = GenerationConfig(**{"max_new_tokens": 3, **options})
    with pytest.raises(ValueError, match=message):
        small_model().generate_batch(PROMPTS, generation_config=config)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.3}, "temperature = 0.3: allowed is to set it in generation_config"),
        ({"nonsense": 1}, "nonsense = 1"),
        ({"attention_mask": [[0, 1]]}, "attention_mask has zeros"),
        ({"continuous_batching_config": ContinuousBatchingConfig(return_logprobs=True)}, "return_logprobs = True"),
        ({"inputs": None}, "inputs is None"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_honoured_are_refused(options, message, small_model):
    config = GenerationConfig(max_new_tokens=3)
    inputs = () if "inputs" in options else (PROMPTS,)
    with pytest.raises(ValueError, match=message):
        small_model().generate_batch(*inputs, generation_config=config, **options)


@pytest.mark.parametrize("nonsense", [None, 3, 0.5, torch.tensor(1), object()])
def test_what_is_no_prompt_is_refused_by_its_place(nonsense, small_model):
    with pytest.raises(ValueError, match=r"inputs\[1\] = .*: allowed are lists of token ids"):
        small_model().generate_batch([[5, 6], nonsense], max_new_tokens=2)
