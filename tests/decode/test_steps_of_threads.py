"""Steps of a model among threads, among calls within calls, and in size; and what is not used because it differs."""

import threading

import pytest
import torch

from modeling_griffin import GenerationRequest
from modeling_griffin.decode import steps as kept_steps
from modeling_griffin.decode.agreement import Disagreement, check_step
from modeling_griffin.decode.forward import ForwardStep
from modeling_griffin.decode.ops import PlainOps
from modeling_griffin.decode.state import DecodeStep
from modeling_griffin.decode.steps import STEPS, ring_slots, take_step


NEW = 8


def random_ids(batch: int, length: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(5, 29, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(model, ids, **options):
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options})


@pytest.mark.parametrize("number", [2, 8])
def test_threads_get_the_tokens_of_serial_calls_on_one_step(number, small_model, monkeypatch):
    model, made = small_model(), []
    prompts = [random_ids(1, 3 + seed, seed) for seed in range(number)]
    expected = [run(model, ids) for ids in prompts]
    init = DecodeStep.__init__
    monkeypatch.setattr(DecodeStep, "__init__", lambda step, *a, **k: made.append(1) or init(step, *a, **k))
    found, options = [None] * number, [{}, {"num_beams": 1, "logits_processor": [lambda ids, scores: scores]}]

    def call(index):
        found[index] = [run(model, prompts[index], **options[turn % 2]) for turn in range(2)]

    threads = [threading.Thread(target=call, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(tokens, right) for each, right in zip(found, expected) for tokens in each)
    assert not made and not any(step.busy for steps in STEPS[model].values() for step in steps)


def test_a_thread_waits_for_a_call_and_not_for_a_stream(small_model):
    model, order = small_model(), []
    step = take_step(model, 1)

    def wait():
        with_it = take_step(model, 1)
        order.append(with_it)
        with_it.release()

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and not order
    step.release()
    thread.join()
    assert order == [step]
    held = take_step(model, 1, stream=True)
    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    assert held is step and order[1] is not step
    held.release()


def test_a_call_within_a_call_gets_a_step_of_its_own(small_model):
    model = small_model()
    outer = take_step(model, 1)
    inner = take_step(model, 1)
    assert inner is not None and inner is not outer
    inner.release()
    outer.release()


def test_a_stream_that_lies_about_keeps_nobody_waiting(small_model):
    model, ids = small_model(), random_ids(1, 5)
    expected = run(model, ids)
    stream = model.stream_batch([GenerationRequest(prompt=ids[0].tolist(), max_new_tokens=NEW)])
    next(stream)
    assert torch.equal(run(model, ids), expected)
    tokens = [token.token for token in stream]
    assert tokens == expected[0, 6:].tolist()


@pytest.mark.parametrize("tokens, slots", [(31, 4096), (4096, 4096), (4097, 8192), (2**22 + 1, 2**23), (2**25, 2**23)])
def test_a_ring_is_no_larger_than_the_tokens_need(tokens, slots, small_config):
    assert ring_slots(small_config(attention_window_size=2**23), tokens, torch.device("cuda")) == slots
    assert ring_slots(small_config(attention_window_size=100), tokens, torch.device("cuda")) == min(100, slots)
    assert ring_slots(small_config(attention_window_size=2**23), None, torch.device("cuda")) == 2**23


def test_generation_with_fewer_slots_than_the_window(small_model, monkeypatch):
    """Prompts of several lengths, each of which needs another ring, and the answers of the whole window."""
    model = small_model(attention_window_size=64)
    prompts = [random_ids(2, length) for length in (1, 5, 12, 30)]
    expected = [run(model, ids, use_cache=False) for ids in prompts]
    monkeypatch.setitem(kept_steps.LEAST_SLOTS, "cpu", 4)
    for ids, right in zip(prompts, expected):
        assert torch.equal(run(model, ids), right)
        assert torch.equal(run(model, ids, logits_processor=[lambda tokens, scores: scores]), right)
    slots = [step.slots for steps in STEPS[model].values() for step in steps]
    assert slots == [16, 32, 64]


def test_an_eleven_token_prompt_at_a_huge_window(small_model):
    model = small_model(attention_window_size=2**23)
    run(model, random_ids(1, 11))
    ((step,),) = STEPS[model].values()
    assert sum(ring.untyped_storage().nbytes() for ring in step.rings) < 2**14


@pytest.mark.parametrize(
    "kind, layer", [("attend", "model.layers.2, sliding_attention"), ("recurrent", "layers.0, lin")]
)
def test_a_step_that_computes_something_else_is_not_used_and_the_layer_is_named(kind, layer, small_model, monkeypatch):
    """As after a change of a layer's forward that the step does not follow, by whatever way."""
    model, ids, said = small_model(), random_ids(2, 5), []
    expected = run(model, ids, use_cache=False)
    right = getattr(PlainOps, kind)
    monkeypatch.setattr(PlainOps, kind, lambda *arguments: right(*arguments) * 1.3)
    monkeypatch.setattr(kept_steps.logger, "warning_once", said.append)
    for _ in range(2):
        assert torch.equal(run(model, ids), expected)
    assert len(said) == 1 and "a fused step of 2 rows is not used" in said[0] and layer in said[0]


@pytest.mark.parametrize("number", [0, 2])
def test_of_the_forward_pass_over_fixed_buffers_the_layer_is_named_too(number, small_model):
    model = small_model()
    step = ForwardStep(model, 2, 8, False)
    step.prepare(model)
    check_step(model, step)
    block = model.model.layers[number].mlp_block
    right = block.forward
    block.forward = lambda x: right(x) * (1.3 if model_of_step else 1.0)
    model_of_step, compute = [], step._compute

    def computes():
        model_of_step.append(1)
        compute()
        model_of_step.clear()

    step._compute = step.run = computes
    with pytest.raises(Disagreement, match=rf"first in model.layers.{number}, "):
        check_step(model, step)


def test_a_step_without_memory_is_tried_again(small_model, monkeypatch):
    """And one that fails in another way is not, nor does it keep its buffers."""
    model, ids, tried = small_model(), random_ids(2, 5), []
    expected = run(model, ids, use_cache=False)
    init, errors = DecodeStep.__init__, [torch.OutOfMemoryError("none left"), RuntimeError("never")]

    def fails(step, *arguments):
        tried.append(1)
        if errors:
            raise errors.pop(0)
        init(step, *arguments)

    monkeypatch.setattr(DecodeStep, "__init__", fails)
    for _ in range(3):
        assert torch.equal(run(model, ids), expected)
    assert len(tried) == 2
    assert {type(step).__name__ for steps in STEPS[model].values() for step in steps} == {"Lease", "ForwardStep"}


def test_a_ring_that_wraps_wrongly_is_found_too(small_model, monkeypatch):
    """The comparison is made where the ring begins anew."""
    model, ids, said = small_model(), random_ids(2, 5), []
    monkeypatch.setattr(kept_steps.logger, "warning_once", said.append)
    attend = PlainOps.attend

    def forgets(ops, q, k, v, keys, values, clock, scaling):
        if int(clock.time) % keys.shape[2] == 0:
            keys.zero_()
        return attend(ops, q, k, v, keys, values, clock, scaling)

    monkeypatch.setattr(PlainOps, "attend", forgets)
    run(model, ids)
    assert len(said) == 1 and "sliding_attention" in said[0]
