"""The engine's loop: the host ahead of the tokens, requests that come late, threads, errors of the user's."""

import threading

import pytest
import torch
from transformers import StoppingCriteria

from modeling_griffin import GenerationRequest, GriffinForCausalLM
from modeling_griffin.decode.state import DecodeStep
from modeling_griffin.decode.steps import STEPS
from modeling_griffin.serving import recorded_rows
from modeling_griffin.serving.batch import run_arrivals
from modeling_griffin.serving.recorded_rows import RecordedBatch
from tests.serving.test_batch import greedy_alone, mixed_load, random_ids


def queue_of(load, **options):
    return [GenerationRequest(prompt, max_new_tokens=new, **options) for prompt, new in load]


@pytest.fixture
def ahead(monkeypatch):
    """The host ahead of what it has seen, as on a GPU; a CPU computes each step at once all the same."""
    init = RecordedBatch.__init__

    def make(batch, *arguments):
        init(batch, *arguments)
        batch.ahead, batch.ahead_of_a_pass = 3, 6

    monkeypatch.setattr(RecordedBatch, "__init__", make)


def test_a_host_that_is_ahead_finds_the_same_tokens(ahead, small_model, monkeypatch):
    """Of rows that end by length and by an end token that it learns of late, sampled, penalised, long and short."""
    model, taken = small_model("griffin", "sdpa"), []
    load = mixed_load(16, seed=5)
    whole = greedy_alone(model, load[0][0], 20)
    settings = [{}, {"temperature": 0.9, "top_p": 0.9}, {"repetition_penalty": 1.5}, {"eos_token_id": whole[:3]}]
    queue = [
        GenerationRequest(prompt, max_new_tokens=new + 4, seed=number, **settings[number % 4])
        for number, (prompt, new) in enumerate(load)
    ]
    monkeypatch.setattr(DecodeStep, "step", lambda step, real=DecodeStep.step: taken.append(1) or real(step))
    found = model.generate_batch(queue, max_rows=4, prefill_chunk_size=7)
    ended = sum(result.finish_reason == "eos" for result in found)
    assert len(taken) <= sum(request.max_new_tokens for request in queue) and ended >= 2
    monkeypatch.setattr(GriffinForCausalLM, "_fast_generation_devices", ())
    assert found == [model.generate_batch([request])[0] for request in queue]


def test_no_step_is_taken_for_rows_that_have_ended_by_length(ahead, small_model, monkeypatch):
    model, taken = small_model(), []
    monkeypatch.setattr(DecodeStep, "step", lambda step, real=DecodeStep.step: taken.append(1) or real(step))
    model.generate_batch(queue_of([(random_ids(1, 4)[0], 9)] * 4))
    assert len(taken) == 8  # the first token is the prompt's


def test_rows_go_on_while_a_long_prompt_is_read(small_model):
    """A prompt of five chunks comes when another row runs: that one has tokens between them."""
    model, order = small_model(), []
    hook = model.register_forward_pre_hook(
        lambda _, arguments: order.append("chunk") if arguments[0].shape[1] == 4 else None
    )
    queue = queue_of([(random_ids(1, 3)[0], 20), (random_ids(1, 20)[0], 2)])
    for token in model.stream_batch(iter(queue), max_rows=2, prefill_chunk_size=4):
        order.append(token.index)
    hook.remove()
    chunks = [place for place, each in enumerate(order) if each == "chunk"]
    assert len(chunks) == 5 and all(0 in order[one:other] for one, other in zip(chunks, chunks[1:]))


def test_equal_prompts_are_read_once(small_model, monkeypatch, real=recorded_rows.read_packed):
    model, read = small_model(), []
    one, other = random_ids(1, 6)[0], random_ids(1, 9, seed=4)[0]
    monkeypatch.setattr(
        recorded_rows, "read_packed", lambda model, prompts: read.append(prompts) or real(model, prompts)
    )
    found = model.generate_batch(queue_of([(one, 5)] * 3 + [(other, 5)] + [(one, 5)] * 3))
    assert [[list(prompt) for prompt in prompts] for prompts in read] == [[one.tolist(), other.tolist()]]
    assert found[3].tokens == greedy_alone(model, other, 5) and len(found) == 7
    assert all(result.tokens == greedy_alone(model, random_ids(1, 6)[0], 5) for result in found[:3] + found[4:])


class Later:
    """Arrivals: each request when so many tokens have been seen."""

    def __init__(self, requests: dict[int, dict]):
        self.requests, self.seen, self.gone = sorted(requests.items()), 0, set()

    def take(self, room, idle):
        ready = [pair for pair in self.requests if pair[0] <= self.seen][:room]
        ready = ready or (self.requests[:1] if idle else [])
        self.requests = [pair for pair in self.requests if pair not in ready]
        return ready

    def cancelled(self, index):
        return index in self.gone


def test_requests_that_come_and_go_while_others_run(small_model):
    model, prompts = small_model(), {number: random_ids(1, 3 + number, seed=number)[0] for number in (0, 5, 9, 11)}
    later = Later({number: {"prompt": prompt, "max_new_tokens": 12} for number, prompt in prompts.items()})
    tokens, reasons = {}, {}
    for index, token, reason in run_arrivals(model, later, max_rows=2, chunk_size=64):
        later.seen += 1
        tokens[index] = tokens.get(index, []) + [token]
        if reason is not None:
            reasons[index] = reason
        if index == 5 and len(tokens[5]) == 4:
            later.gone.add(5)
    assert reasons == {0: "length", 5: "cancelled", 9: "length", 11: "length"}
    for index, prompt in prompts.items():
        expected = greedy_alone(model, prompt, 12)
        assert tokens[index] == (expected if index != 5 else [*expected[:4], None])


@pytest.mark.parametrize("number", [2, 8])
def test_threads_get_the_tokens_of_serial_calls(number, small_model, monkeypatch):
    """`generate`, `generate_batch` and `stream_batch` at once; calls that end wait for each other's step."""
    model, made, found = small_model("griffin", "sdpa"), [], {}
    loads = [[(random_ids(1, 2 + seed, seed + turn)[0], 6) for turn in range(3)] for seed in range(number)]
    expected = [[greedy_alone(model, prompt, new) for prompt, new in load] for load in loads]
    model.generate_batch(queue_of(loads[0]))
    init = DecodeStep.__init__
    monkeypatch.setattr(DecodeStep, "__init__", lambda step, *a, **k: made.append(a[2]) or init(step, *a, **k))

    def by_stream(load):
        tokens = [[] for _ in load]
        for index, token, _ in model.stream_batch(queue_of(load)):
            tokens[index].append(token)
        return tokens

    def by_generate(load):
        return [model.generate(p[None], max_new_tokens=n, pad_token_id=0)[0, len(p) :].tolist() for p, n in load]

    def by_batch(load):
        return [result.tokens for result in model.generate_batch(queue_of(load))]

    def call(index):
        ways = [by_batch, by_stream, by_generate]
        found[index] = [ways[(index + turn) % 3](loads[index]) for turn in range(3)]

    threads = [threading.Thread(target=call, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [expected[index]] * 3 for index in range(number)}
    assert not any(step.busy for steps in STEPS[model].values() for step in steps)
    assert made.count(1) <= 1 and made.count(4) <= number  # one for all calls; one a stream at most


def test_batches_of_two_threads_share_one_step(small_model, monkeypatch):
    """A second call waits for the first, which is held up in the middle."""
    model, made, order = small_model(), [], []
    queue = queue_of([(random_ids(1, 4)[0], 5)])
    expected = model.generate_batch(queue)
    init, step, held = DecodeStep.__init__, DecodeStep.step, threading.Event()

    def hold(decode_step):
        order.append(threading.current_thread().name)
        if len(order) == 2:
            held.wait(0.5)
        return step(decode_step)

    monkeypatch.setattr(DecodeStep, "__init__", lambda step, *a, **k: made.append(1) or init(step, *a, **k))
    monkeypatch.setattr(DecodeStep, "step", hold)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(model.generate_batch(queue)), name=name) for name in ("one", "two")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected, expected] and not made
    assert order in (["one"] * 4 + ["two"] * 4, ["two"] * 4 + ["one"] * 4)


class Failing(StoppingCriteria):
    """A criterion, a streamer, a tokenizer and a queue of the user's that fails at its third call."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return torch.tensor([False])

    def put(self, value):
        self()

    def end(self):
        pass

    def __iter__(self):
        while True:
            self()
            yield GenerationRequest([5, 6, 7], max_new_tokens=50)


@pytest.mark.parametrize("error", [RuntimeError("of the user's"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_an_error_of_the_users_leaves_the_next_call_right(error, small_model, monkeypatch):
    model, ids = small_model(), random_ids(1, 5)
    expected = greedy_alone(model, ids[0], 8)
    step_of_batch = model.generate_batch(queue_of([(ids[0], 8)]))[0].tokens
    assert step_of_batch == expected
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for call in (
        lambda: model.generate(ids, stopping_criteria=[Failing(error)], **options),
        lambda: model.generate(ids, streamer=Failing(error), **options),
        lambda: list(model.stream_batch(Failing(error), max_rows=1)),
        lambda: model.generate_batch(iter(Failing(error)), max_rows=4),
    ):
        with pytest.raises(type(error)):
            call()
        assert not any(step.busy for steps in STEPS[model].values() for step in steps)
        assert model.generate(ids, **options)[0, 5:].tolist() == expected
        assert model.generate_batch(queue_of([(ids[0], 8)]))[0].tokens == expected


def test_an_error_between_two_tokens_of_a_batch(small_model, monkeypatch):
    """Ctrl-C in the middle of a step."""
    model, queue, real = small_model(), queue_of([(random_ids(1, 4)[0], 9)] * 3), DecodeStep.step
    expected, calls = model.generate_batch(queue), []

    def interrupted(step):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(step)

    monkeypatch.setattr(DecodeStep, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate_batch(queue)
    assert model.generate_batch(queue) == expected


def test_a_model_with_an_adapter_runs_on_its_own_forward_where_that_is_recorded(small_model, monkeypatch):
    """On a GPU; here the step over fixed buffers computes without being recorded, prompts of similar lengths padded."""
    model, load = small_model("griffin", "sdpa"), mixed_load(9, seed=6)
    model.model.layers[0].mlp_block.act_fn = torch.nn.ReLU()  # a module that the fused step is not made for
    expected = [greedy_alone(model, prompt, new) for prompt, new in load]
    monkeypatch.setattr(recorded_rows, "RECORDED_ON", ("cpu",))
    assert [result.tokens for result in model.generate_batch(queue_of(load), max_rows=4)] == expected
    (key,) = [key for key in STEPS[model] if key[0] == "forward" and key[1] == 4]
    assert not STEPS[model][key][0].busy


def test_a_model_without_a_recorded_step_says_so_with_the_reason_and_the_remedy(small_model, monkeypatch):
    model, said, load = small_model("griffin", "sdpa"), [], [(random_ids(1, 4)[0], 5)]
    model.model.layers[0].mlp_block.act_fn = torch.nn.ReLU()
    monkeypatch.setattr(recorded_rows, "RECORDED_ON", ("cpu",))
    obstacle = recorded_rows.Obstacle("a hook that counts", "remove it")
    monkeypatch.setattr(recorded_rows, "forward_obstacles", lambda model: iter([obstacle]))
    monkeypatch.setattr(recorded_rows.logger, "warning_once", said.append)
    assert model.generate_batch(queue_of(load))[0].tokens == greedy_alone(model, *load[0])
    assert said == ["generate_batch runs without a recorded step, which is slow: a hook that counts. Remedy: remove it"]


@pytest.mark.parametrize("kind", ["griffin", "hawk"])
@pytest.mark.parametrize("host", ["waits", "ahead"])
def test_few_rows_that_are_left_go_on_on_a_smaller_step_that_is_there(kind, host, small_model, monkeypatch, request):
    """And back on the large one when others come; sampled and penalised rows take along what they have drawn."""
    model, sizes = small_model(kind, "sdpa"), []
    news = {0: 60, 1: 3, 2: 25, 3: 40, 4: 2, 5: 9, 6: 50, 7: 12}  # of the first eight; the others come late
    settings = [{}, {"temperature": 0.9, "seed": 4}, {"repetition_penalty": 1.5}]
    requests = {
        number: {"prompt": random_ids(1, 2 + number, seed=number)[0], "max_new_tokens": new, **settings[number % 3]}
        for number, new in {**news, 150: 20, 151: 31}.items()
    }
    alone = {number: model.generate_batch([request])[0].tokens for number, request in requests.items()}  # a step of 1

    if host == "ahead":
        request.getfixturevalue("ahead")

    def run():
        later, tokens = Later(dict(requests)), {}
        later.seen = 7  # the first eight are there
        for index, token, _ in run_arrivals(model, later, max_rows=16, chunk_size=64):
            later.seen += 1
            tokens.setdefault(index, []).append(token)
        return tokens

    model.generate_batch(queue_of([(random_ids(1, 3)[0], 2)] * 4))  # one of 4 rows
    real = DecodeStep.step
    monkeypatch.setattr(DecodeStep, "step", lambda step: sizes.append(len(step.token)) or real(step))
    assert run() == alone
    changes = [size for place, size in enumerate(sizes) if not place or size != sizes[place - 1]]
    assert changes in ([16, 4, 16, 4, 1], [16, 4, 16, 4]), changes
    assert not any(step.busy for steps in STEPS[model].values() for step in steps)
