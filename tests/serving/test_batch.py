"""Generations side by side find the tokens that each finds alone, whatever comes and goes around them."""

import dataclasses
import itertools
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.generation import StopStringCriteria

from modeling_griffin import GeneratedToken, GenerationRequest, GenerationState, GriffinForCausalLM
from modeling_griffin.decode.state import DecodeStep
from modeling_griffin.decode.steps import STEPS
from modeling_griffin.serving import recorded_rows
from modeling_griffin.serving.recorded_rows import _of_similar_lengths, of_bounded_length
from tests.tolerances import assert_close


KINDS = ("griffin", "hawk", "attention_first")
VOCABULARY, WINDOW = 29, 8


@pytest.fixture(params=["cache", "step"])
def way(request, monkeypatch):
    """How rows run: behind a cache, or on a recorded step, which on a CPU computes without recording."""
    devices = ("cpu",) if request.param == "step" else ()
    monkeypatch.setattr(GriffinForCausalLM, "_fast_generation_devices", devices)
    return request.param


@pytest.fixture
def steps(monkeypatch):
    """The rows of each step taken."""
    taken = []
    monkeypatch.setattr(
        DecodeStep, "step", lambda step, real=DecodeStep.step: taken.append(len(step.token)) or real(step)
    )
    return taken


def random_ids(rows, length, seed=2):
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def mixed_load(number, seed=0):
    """(prompt, new tokens): prompts of 1 token to several windows, answers of 0 tokens to past the window."""
    chance = random.Random(seed)
    return [
        (random_ids(1, chance.choice([1, 2, 5, 8, 30]), seed=i)[0], chance.choice([0, 1, 2, 9, 20]))
        for i in range(number)
    ]


def greedy_alone(model, prompt, new, **kwargs):
    """Transformers' own generate, of this prompt alone."""
    if new == 0:
        return []
    kwargs |= {"output_logits": True, "return_dict_in_generate": True}  # which no recorded step gives
    ids = prompt[None]
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, **kwargs
    )
    return found.sequences[0, len(prompt) :].tolist()


@pytest.mark.parametrize("max_rows", [1, 3, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_each_finds_what_it_finds_alone(kind, max_rows, way, small_model):
    """More generations than rows, of all lengths: rows end at different steps and others take their places."""
    model = small_model(kind, "sdpa")
    load = mixed_load(12)
    results = model.generate_batch([GenerationRequest(p, max_new_tokens=n) for p, n in load], max_rows=max_rows)
    for (prompt, new), result in zip(load, results, strict=True):
        assert result.tokens == greedy_alone(model, prompt, new)
        assert result.finish_reason == "length"


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_each_step_are_those_of_the_row_alone(kind, small_model):
    """Across the window's edge, where the masked slots of the short rows fill up and the mask is dropped."""
    model, seen = small_model(kind, "sdpa"), []
    load = [(random_ids(1, n, seed=n)[0], 24) for n in (1, 4, 30)]
    hook = model.register_forward_hook(lambda _, arguments, output: seen.append(output.logits[:, -1]))
    results = model.generate_batch([GenerationRequest(p, max_new_tokens=n) for p, n in load])
    hook.remove()
    steps = torch.stack([logits for logits in seen if logits.shape[0] == 3], dim=1)
    for row, ((prompt, _), result) in enumerate(zip(load, results)):
        text = torch.cat([prompt, torch.tensor(result.tokens)])[None]
        with torch.no_grad():
            expected = model(text, use_cache=False).logits[0, len(prompt) : -1]
        assert_close("logits", steps[row], expected)


def test_the_mask_is_dropped_when_all_windows_are_full(small_model):
    """The 2-D mask must not grow with the answer."""
    model, masks = small_model(attention="sdpa"), []
    hook = model.register_forward_pre_hook(
        lambda _, arguments, named: masks.append(named["attention_mask"]), with_kwargs=True
    )
    model.generate_batch([GenerationRequest(random_ids(1, n)[0], max_new_tokens=40) for n in (2, 20)])
    hook.remove()
    widths = [0 if mask is None else mask.shape[1] for mask in masks]
    assert max(widths) <= 2 * WINDOW and widths[-20:] == [0] * 20


@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_depend_on_the_company(kind, way, small_model):
    """The same seed draws the same tokens alone, in any batch and in any order; another seed draws others."""
    model = small_model(kind, "sdpa")
    settings = itertools.cycle(
        [{"temperature": 0.7}, {"temperature": 1.3, "top_k": 5}, {"temperature": 1.0, "top_p": 0.8}, {}]
    )
    queue = [
        GenerationRequest(prompt, max_new_tokens=new + 3, seed=number, **setting)
        for number, ((prompt, new), setting) in enumerate(zip(mixed_load(12, seed=1), settings))
    ]
    alone = [model.generate_batch([one])[0].tokens for one in queue]
    assert [result.tokens for result in model.generate_batch(queue, max_rows=5)] == alone
    backwards = model.generate_batch(queue[::-1], max_rows=4)
    assert [result.tokens for result in backwards[::-1]] == alone
    again = GenerationRequest(queue[0].prompt, max_new_tokens=20, temperature=1.0, seed=77)
    other = GenerationRequest(queue[0].prompt, max_new_tokens=20, temperature=1.0, seed=78)
    first, second, third = (result.tokens for result in model.generate_batch([again, again, other]))
    assert first == second != third


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.5, "min_p": 0.2}, {"min_p": 0.1}], ids=str
)
def test_what_is_sampled_is_the_distribution_of_transformers(options, small_model):
    """4000 first tokens against the probabilities behind Transformers' own processors: within 5 standard deviations."""
    model, prompt, temperature = small_model(), random_ids(1, 6), 0.8
    kwargs = {"temperature": temperature, "top_k": 0, "top_p": 1.0, **options}
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=1,
        do_sample=True,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **kwargs,
    )
    expected = found.scores[0][0].softmax(-1)
    state = model.prefill(prompt)
    queue = (
        GenerationRequest(state=state, max_new_tokens=1, seed=i, temperature=temperature, **options)
        for i in range(4000)
    )
    tokens = torch.tensor([result.tokens[0] for result in model.generate_batch(queue)])
    share = torch.bincount(tokens, minlength=VOCABULARY) / 4000
    assert (share[expected == 0] == 0).all()
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_ends(kind, way, small_model):
    """By eos, also as the very first token; by the model's own configuration, by several, by none."""
    model, prompt = small_model(kind, "sdpa"), random_ids(1, 6)[0]
    whole = greedy_alone(model, prompt, 20)
    first, later = whole[0], whole[-1]
    cases = [(first, whole[:1]), ([later, 3], whole[: whole.index(later) + 1]), ((), whole), (None, whole[:1])]
    model.generation_config.eos_token_id = first
    queue = [GenerationRequest(prompt, max_new_tokens=20, eos_token_id=eos) for eos, _ in cases]
    results = model.generate_batch(queue, max_rows=2)
    for (eos, expected), result in zip(cases, results):
        assert result.tokens == expected
        assert result.finish_reason == ("length" if eos == () else "eos")


@pytest.mark.parametrize("penalty", [0.6, 1.8])
def test_repetition_penalties_are_those_of_transformers(penalty, way, small_model):
    """Some rows have one and others join and leave beside them."""
    model = small_model("griffin", "sdpa")
    load = [(prompt, new) for prompt, new in mixed_load(9, seed=4) if new]
    penalties = [penalty if number % 2 else 1.0 for number in range(len(load))]
    queue = [GenerationRequest(p, max_new_tokens=n, repetition_penalty=r) for (p, n), r in zip(load, penalties)]
    for (prompt, new), r, result in zip(load, penalties, model.generate_batch(queue, max_rows=3)):
        assert result.tokens == greedy_alone(model, prompt, new, repetition_penalty=r)


def letters() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(ord("a") + i): 3 + i for i in range(26)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def test_stop_strings(way, small_model):
    """A string in the new text ends a generation, and ends no other."""
    model, prompt, tokenizer = small_model(), random_ids(1, 6)[0], letters()
    whole = greedy_alone(model, prompt, 20)
    words = tokenizer.convert_ids_to_tokens(whole)
    stop = words[3] + words[4]
    end = next(i for i in range(20) if stop in "".join(words[: i + 1]))
    queue = [
        GenerationRequest(prompt, max_new_tokens=20, stop=["zzz", stop]),
        GenerationRequest(prompt, max_new_tokens=20),
        GenerationRequest(prompt, max_new_tokens=20, stop="zzzz"),
    ]
    stopped, free, unmet = model.generate_batch(queue, tokenizer=tokenizer)
    assert stopped.tokens == whole[: end + 1] and stopped.finish_reason == "stop"
    assert free.tokens == unmet.tokens == whole and unmet.finish_reason == "length"


def test_stop_strings_look_at_the_end_alone(small_model, monkeypatch):
    """Else each token of a long answer would cost more than the one before, for all rows of the batch."""
    model, read = small_model(), []

    class Counting(StopStringCriteria):
        def __call__(self, tokens, scores):
            read.append(tokens.shape[1])
            return super().__call__(tokens, scores)

    monkeypatch.setattr("modeling_griffin.serving.engine.StopStringCriteria", Counting)
    request = GenerationRequest([5, 6], max_new_tokens=30, stop=["zzzz", "zq"])
    (result,) = model.generate_batch([request], tokenizer=letters())
    assert result.finish_reason == "length" and read == [1, 2, 3, *[4] * 27]


@pytest.mark.parametrize("kind", KINDS)
def test_one_prompt_and_many_continuations(kind, way, small_model):
    """A system prompt read once: its state, some with questions behind it; the state stays as it was."""
    model, system = small_model(kind, "sdpa"), random_ids(1, 19)
    questions = [random_ids(1, n, seed=n)[0] for n in (1, 4, 12)]
    state = model.prefill(system)
    passes = []
    hook = model.register_forward_pre_hook(lambda _, arguments: passes.append(arguments[0].shape[1]))
    queue = [GenerationRequest(question, state=state, max_new_tokens=9) for question in questions]
    queue += [GenerationRequest(state=state.fork(2)[1], max_new_tokens=9)]
    results = model.generate_batch(queue)
    hook.remove()
    assert sorted(passes)[-3:] == [1, 4, 12]
    for question, result in zip([*questions, questions[0][:0]], results):
        assert result.tokens == greedy_alone(model, torch.cat([system[0], question]), 9)
    assert results[-1].tokens == model.generate_batch(queue[-1:])[0].tokens


def test_streaming(way, small_model):
    """Tokens come as they are found, those of a row in order; the queue is asked only when a row is free."""
    model, asked = small_model(), []

    def queue():
        for number, (prompt, new) in enumerate(mixed_load(6, seed=3)):
            asked.append(number)
            yield GenerationRequest(prompt, max_new_tokens=new + 2)

    stream = model.stream_batch(queue(), max_rows=2)
    assert isinstance(next(stream), GeneratedToken) and asked == ([0] if way == "cache" else [0, 1])
    found = {0: 1}
    for index, token, reason in stream:
        assert token is not None
        found[index] = found.get(index, 0) + 1
        running = [n for n, (_, new) in enumerate(mixed_load(6, seed=3)) if 0 < found.get(n, 0) < new + 2]
        assert len(running) <= 2
        assert (reason == "length") == (found[index] == mixed_load(6, seed=3)[index][1] + 2)
    assert sorted(found) == list(range(6)) and asked == list(range(6))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_join_a_recorded_step_late(kind, small_model, steps, monkeypatch):
    """Long and short prompts at any time of the step, some behind a state, in rows that others have left."""
    monkeypatch.setattr(GriffinForCausalLM, "_fast_generation_devices", ("cpu",))
    model, system = small_model(kind, "sdpa"), random_ids(1, 13)
    state = model.prefill(system)
    load = [(random_ids(1, n, seed=n)[0], new) for n, new in ((30, 5), (2, 23), (1, 9), (9, 40), (12, 3), (31, 30))]
    queue = [
        GenerationRequest(prompt, max_new_tokens=new, state=state if i % 2 else None)
        for i, (prompt, new) in enumerate(load)
    ]
    results = model.generate_batch(queue, max_rows=3)
    assert set(steps) == {4}  # rows of the step: the next power of 2
    for i, ((prompt, new), result) in enumerate(zip(load, results)):
        whole = torch.cat([system[0], prompt]) if i % 2 else prompt
        assert result.tokens == greedy_alone(model, whole, new)


def test_a_window_longer_than_the_requests_takes_no_memory(small_model):
    """Rings hold what the longest request needs; of requests that nobody knows yet, the window."""
    model, prompt = small_model(attention="sdpa", attention_window_size=500), random_ids(1, 9)[0]
    state = model.prefill(random_ids(1, 80))
    slots = lambda: {step.slots for found in STEPS[model].values() for step in found}  # noqa: E731
    for fields, expected in (
        ({"max_new_tokens": 50}, 64),
        ({"max_new_tokens": 60}, 128),
        ({"max_new_tokens": 50, "state": state}, 256),
    ):
        STEPS.pop(model, None)
        results = model.generate_batch([GenerationRequest(prompt, **fields), None])
        assert slots() == {expected} and results[1].finish_reason.startswith("error")
        alone = model.generate_batch(GenerationRequest(prompt, **fields) for _ in range(1))
        assert slots() == {expected, 500} and alone == results[:1]


def test_a_recorded_step_is_free_again(small_model, steps, monkeypatch):
    """After a stream that was left in the middle; a second one meanwhile has a step of its own."""
    monkeypatch.setattr(GriffinForCausalLM, "_fast_generation_devices", ("cpu",))
    model, queue = small_model(), [GenerationRequest(random_ids(1, 4)[0], max_new_tokens=6)]
    expected = model.generate_batch(queue)[0].tokens
    assert len(steps) == 5
    stream = model.stream_batch(queue)
    next(stream), next(stream)
    assert model.generate_batch(queue)[0].tokens == expected and len(steps) == 11
    stream.close()
    assert model.generate_batch(queue)[0].tokens == expected and len(steps) == 16


def test_a_padded_pass_reads_similar_prompts():
    lengths = [5, 100, 7, 16384, 11, 9000, 99]
    groups = list(_of_similar_lengths(lengths))
    assert sorted(number for group in groups for number in group) == list(range(7))
    assert [[lengths[number] for number in group] for group in groups] == [[5, 7], [11], [99, 100], [9000], [16384]]


def test_a_packed_pass_is_bounded_and_reads_equal_prompts_once():
    prompts = [[5] * 9000, [6] * 7000, [5] * 9000, [7] * 400, [6] * 7000, [8] * 16385, [8]]
    assert list(of_bounded_length(prompts)) == [[0, 1, 2], [3, 4], [5], [6]]


def test_nothing_to_do(way, small_model):
    model = small_model()
    assert model.generate_batch([]) == []
    result = model.generate_batch([GenerationRequest([5], max_new_tokens=0)])[0]
    assert result.tokens == [] and result.finish_reason == "length"


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind, way, small_model):
    """Rows of a batch round differently, so that each token has to be argmax up to bfloat16's error."""
    model = small_model(kind, "sdpa").to(torch.bfloat16)
    load = [(random_ids(1, n, seed=n)[0], 14) for n in (1, 5, 30)]
    for (prompt, _), result in zip(
        load, model.generate_batch([GenerationRequest(p, max_new_tokens=n) for p, n in load])
    ):
        text = torch.cat([prompt, torch.tensor(result.tokens)])[None]
        with torch.no_grad():
            logits = model(text, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, text[0, len(prompt) :, None])[:, 0]
        assert ((logits.max(-1).values - chosen) <= 0.02 * logits.abs().max()).all()


def test_bad_arguments(way, small_model):
    model = small_model()
    states = GenerationState.concatenate([model.prefill(random_ids(2, 3))])
    for make, message in (
        (lambda: GenerationRequest(), "prompt is empty"),
        (lambda: GenerationRequest(random_ids(1, 3)), r"prompt has shape \(1, 3\)"),
        (lambda: GenerationRequest([5], max_new_tokens=-1), "max_new_tokens = -1"),
        (lambda: GenerationRequest([5], max_new_tokens=2.5), "max_new_tokens = 2.5"),  # would never end
        (lambda: GenerationRequest([5], temperature=-0.1), "temperature = -0.1"),
        (lambda: GenerationRequest([5], top_k=-1), "top_k = -1"),
        (lambda: GenerationRequest([5], top_k=1.5), "top_k = 1.5"),
        (lambda: GenerationRequest([5], top_p=0.0), "top_p = 0.0"),
        (lambda: GenerationRequest([5], top_p=1.1), "top_p = 1.1"),
        (lambda: GenerationRequest([5], stop=[""]), "stop = "),
        (lambda: GenerationRequest(state=states), "state has 2 rows"),
        (lambda: GenerationRequest([5, 6.5]), "prompt has 6.5"),
        (lambda: GenerationRequest("text"), "prompt = 'text'"),
        (lambda: model.generate_batch(torch.ones(2, 3)), "queue is a Tensor"),
        (lambda: model.generate_batch({"prompt": [5]}), "queue is a dict"),
        (lambda: model.generate_batch("text"), "queue is a str"),
        (lambda: GenerationRequest([5], min_p=1.5), "min_p = 1.5"),
        (lambda: GenerationRequest([5], repetition_penalty=0), "repetition_penalty = 0"),
        (lambda: GenerationRequest([5], state=states[0], repetition_penalty=2), "repetition_penalty = 2 with a state"),
        (lambda: model.generate_batch([(5,)], prefill_chunk_size=0.5), "prefill_chunk_size = 0.5"),
        (lambda: model.generate_batch([(5,)], rows=3), "generate_batch was given rows: allowed are a queue"),
        (lambda: model.generate_batch(), "generate_batch was given no queue"),
        (lambda: model.prefill([[1, 2]]), "input_ids is list"),
        (lambda: model.prefill(torch.ones(1, 2)), "input_ids is torch.float32"),
        (lambda: model.prefill(torch.tensor([[3, 29]])), "input_ids has ids from 3 to 29: allowed are 0 to .* = 28"),
        (lambda: model.prefill(torch.tensor([[3, -1]])), "input_ids has ids from -1 to 3"),
        (lambda: model.prefill(torch.ones(0, 2, dtype=torch.long)), r"input_ids has shape \(0, 2\)"),
        (lambda: model.prefill(random_ids(1, 2), state=3), "state is a int"),
        (lambda: model.generate_batch([GenerationRequest([5])], max_rows=0), "max_rows = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_bad_request_leaves_the_others_alone(way, small_model):
    model, other = small_model(), small_model(attention_window_size=12)
    good = GenerationRequest(random_ids(1, 4)[0], max_new_tokens=6)
    bad = {
        "prompt of generation 1 has the token 29": [29],
        "only with a tokenizer": {"prompt": [5], "stop": ["x"]},
        "attention_window_size = 12": {"state": other.prefill(random_ids(1, 3))},
        "temperature = -1": {"prompt": [5], "temperature": -1},
        "temperature = 1000": {"prompt": [5], "temperature": 10**400},  # more than any float
        "temperature = Fraction(1000": {"prompt": [5], "temperature": Fraction(10**400, 3)},
        "repetition_penalty = 1000": {"prompt": [5], "repetition_penalty": 10**400},
        "'new_tokens'": {"prompt": [5], "new_tokens": 3},
        "prompt = 7": 7,
        "prompt = None": None,
    }
    (alone,) = model.generate_batch([good])
    assert len(alone.tokens) == 6
    for message, request in bad.items():
        for rows in (1, 4):
            results = model.generate_batch([good, request, good, good], max_rows=rows)
            assert results[1].tokens == [] and results[1].finish_reason.startswith("error: ValueError: ")
            assert message in results[1].finish_reason
            assert [results[0], results[2], results[3]] == [alone] * 3
    sampled = {"prompt": [5, 6], "temperature": 1.0, "seed": 3}
    found = model.generate_batch([good, {**sampled, "top_k": 10**400}, {**sampled, "top_k": 29}])
    assert found[0] == alone and found[1] == found[2]


@pytest.mark.parametrize("on", ["cache", "fused step", "forward step"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_whose_numbers_are_no_numbers_spoils_no_other(kind, on, small_model, monkeypatch):
    """Beside others in one pass over prompts, before others in the same row, and before `generate`."""
    model = small_model(kind, "sdpa")
    monkeypatch.setattr(GriffinForCausalLM, "_fast_generation_devices", () if on == "cache" else ("cpu",))
    if on == "forward step":
        model.model.layers[0].mlp_block.act_fn = torch.nn.SiLU()  # for which the fused step is not made
        monkeypatch.setattr(recorded_rows, "RECORDED_ON", ("cpu",))
    good = [GenerationRequest(prompt, max_new_tokens=12) for prompt in ([5], [6, 7, 20], [9, 11])]
    model.generate_batch([*good, good[0]])  # its step is found right before one embedding goes wrong
    alone = [model.generate_batch([request])[0] for request in good]
    wrong = min(set(range(21, VOCABULARY)) - {token for result in alone for token in result.tokens})  # of no prompt
    with torch.no_grad():
        model.model.embed_tokens.weight[wrong] = torch.nan
    poison = GenerationRequest([wrong, 9], max_new_tokens=20)
    queue = [good[0], poison, *good[1:]]
    found = model.generate_batch(queue)
    assert [found[0], *found[2:]] == alone
    for request, result in zip(good, alone):
        model.generate_batch([poison])
        assert model.generate_batch([request]) == [result]
        model.generate_batch([poison])
        ids = torch.tensor([request.prompt])
        tokens = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(request.prompt) :]
        assert tokens.tolist() == result.tokens


def test_what_cannot_be_sampled_ends_with_an_error(way, small_model):
    """As in `generate`, which raises; greedy rows and sampled ones beside it go on."""
    model = small_model()
    good = [GenerationRequest([5, 6], max_new_tokens=6, temperature=t, seed=1) for t in (0, 1)]
    alone = [model.generate_batch([request])[0] for request in good]
    first = alone[1].tokens[0]
    late = {"prompt": [5, 6], "max_new_tokens": 6, "temperature": 1, "seed": 1}
    at_once = {**late, "repetition_penalty": 1e-45}  # so that scores are infinite
    found = model.generate_batch([good[0], at_once, good[1]])
    assert [found[0], found[2]] == alone
    error = "error: ValueError: logits are NaN or infinite: allowed are numbers, to sample from"
    assert (found[1].tokens, found[1].finish_reason) == ([], error)
    with torch.no_grad():
        model.model.embed_tokens.weight[first] = torch.nan  # read at the second token
    (result,) = model.generate_batch([late])
    assert (result.tokens, result.finish_reason) == ([first], error)


def test_stop_strings_that_raise_end_their_own_generation(way, small_model, monkeypatch):
    model = small_model()
    good = GenerationRequest(random_ids(1, 4)[0], max_new_tokens=6)
    (alone,) = model.generate_batch([good])

    class Raising:
        def __init__(self, tokenizer, strings):
            self.calls = 0

        def __call__(self, tokens, scores):
            self.calls += 1
            if self.calls == 3:
                raise KeyError("no such token")
            return torch.tensor([False])

    monkeypatch.setattr("modeling_griffin.serving.engine.StopStringCriteria", Raising)
    request = GenerationRequest(good.prompt, max_new_tokens=6, stop="x")
    results = model.generate_batch([good, request, good], tokenizer=object())
    assert results[1].tokens == alone.tokens[:3] and results[1].finish_reason == "error: KeyError: 'no such token'"
    assert results[0] == results[2] == alone


def test_requests_in_any_form(way, small_model):
    model, prompt = small_model(), random_ids(1, 4)[0]
    (expected,) = model.generate_batch([GenerationRequest(prompt, max_new_tokens=128)])
    end = expected.tokens[5]
    first = expected.tokens.index(end)
    forms = [prompt, prompt.tolist(), prompt.numpy(), tuple(prompt.tolist()), {"prompt": prompt.int()}]
    assert model.generate_batch(forms) == [expected] * len(forms)
    ends = [
        end,
        [end],
        torch.tensor(end),
        torch.tensor([end, 3]),
        prompt.new_tensor([end]).numpy(),
        np.int32(end),
        {end},
    ]
    ends = [{"prompt": prompt, "eos_token_id": each} for each in ends]
    for result in model.generate_batch(ends):
        assert result.tokens[: first + 1] == expected.tokens[: len(result.tokens)] and result.finish_reason == "eos"
    numbers = {"temperature": np.float32(0), "top_k": torch.tensor(0), "top_p": np.float64(1), "seed": np.int64(3)}
    (result,) = model.generate_batch([{"prompt": prompt, "max_new_tokens": np.int64(6), **numbers}])
    assert result.tokens == expected.tokens[:6]


class Raising:
    """Somebody's own sequence and number, neither of which can be read."""

    shape = ()

    def __iter__(self):
        raise RuntimeError("not today")

    item = __iter__


NONSENSE = (
    None,
    "x",
    b"x",
    1.5,
    -1,
    True,
    float("nan"),
    float("inf"),
    [],
    [[1]],
    {},
    object(),
    2**70,
    torch.ones(2, 2),
    torch.ones(1, dtype=torch.long, device="meta"),
    torch.ones(2).to_sparse(),
    Raising(),
    int,
)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(GenerationRequest)])
def test_nonsense_is_refused_by_the_name_of_its_field(field):
    refused = 0
    for value in (*NONSENSE, *([value] for value in NONSENSE), *((value, value) for value in NONSENSE)):
        try:
            GenerationRequest(**{"prompt": [5], field: value})
        except ValueError as error:
            assert str(error).startswith(field) and "\n" not in str(error), error
            refused += 1
    assert refused >= 20


def test_fields_that_were_set_afterwards_are_checked_too(way, small_model):
    model, good = small_model(), GenerationRequest([5, 6], max_new_tokens=4)
    (alone,) = model.generate_batch([good])

    class Subclass(GenerationRequest):
        pass

    assert model.generate_batch([Subclass([5, 6], max_new_tokens=4)]) == [alone]
    for field, value in (("max_new_tokens", -3), ("prompt", [[1]]), ("temperature", "x"), ("top_p", 5.0)):
        changed = dataclasses.replace(good)
        setattr(changed, field, value)
        result, other = model.generate_batch([changed, good])
        assert result.finish_reason.startswith(f"error: ValueError: {field}") and other == alone
    changed = dataclasses.replace(good)
    changed.eos_token_id = torch.tensor([alone.tokens[0]])
    assert model.generate_batch([changed])[0].finish_reason == "eos"


def test_ends_of_the_generation_configuration_in_any_form(way, small_model):
    model = small_model()
    request = GenerationRequest([5, 6], max_new_tokens=4)
    end = model.generate_batch([request])[0].tokens[0]
    for form in (end, [end], np.int64(end), torch.tensor(end), torch.tensor([end]), [torch.tensor(end)]):
        model.generation_config.eos_token_id = form
        (result,) = model.generate_batch([request])
        assert (result.tokens, result.finish_reason) == ([end], "eos")
