"""`generate` by the recorded step: Transformers' own loop is what every token is judged by, with the same seed.

On a CPU the step is the same, without a CUDA graph and by plain PyTorch.
"""

from types import SimpleNamespace

import pytest
import torch
from tolerances import assert_close
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import modeling_griffin.decode.generate as fast_generate
from modeling_griffin.decode import drawing
from modeling_griffin.decode import steps as kept_steps
from modeling_griffin.decode.state import DecodeStep


KINDS = ["griffin", "hawk", "attention_first"]
NEW = 24  # three windows


def random_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(5, 29, (batch, length), generator=torch.Generator().manual_seed(2))


def left_padded(batch: int, length: int) -> torch.Tensor:
    return (torch.arange(length) >= torch.arange(batch)[:, None] * 2 % length).long()


def run(model, ids, **options):
    torch.manual_seed(3)
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options})


@pytest.fixture
def both(monkeypatch):
    """both(model, ids, **options) -> (by Transformers' loop, by the step); fails where the step was not used."""

    def call(model, ids, **options):
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "_fast_generation_devices", ())
            expected = run(model, ids, **options)
        return expected, by_step(monkeypatch, model, ids, **options)

    return call


def by_step(monkeypatch, model, ids, **options):
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_fast_generation_devices", ("cpu", "cuda"))
        load = DecodeStep.load
        patch.setattr(DecodeStep, "load", lambda step, *state: steps.append(step) or load(step, *state))
        found = run(model, ids, **options)
    assert steps, "Transformers' own loop has run"
    return found


@pytest.mark.parametrize("length", [1, 5, 7, 8, 9, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_around_the_window(kind, length, both, small_model):
    expected, found = both(small_model(kind), random_ids(2, length))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("length", [6, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_left_padding(kind, length, both, small_model):
    expected, found = both(small_model(kind), random_ids(4, length), attention_mask=left_padded(4, length))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 10},
        {"top_k": 0, "top_p": 0.8},
        {"min_p": 0.05, "repetition_penalty": 1.3},
        {"typical_p": 0.8, "epsilon_cutoff": 0.01},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_the_same_under_the_same_seed(kind, options, both, small_model):
    mask = left_padded(3, 6)
    expected, found = both(small_model(kind), random_ids(3, 6), do_sample=True, attention_mask=mask, **options)
    assert torch.equal(found, expected)


def test_draws_follow_the_distribution():
    shares = torch.tensor([0.5, 0.3, 0.2, 0.0])
    counts = torch.bincount(drawing.draw(shares.expand(20000, 4)), minlength=4) / 20000
    assert (counts - shares).abs().max() < 0.015 and counts[3] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_argmax_is_found_as_in_float32(dtype):
    """Where many are largest, and where some are infinite or no numbers."""
    logits = torch.randint(-3, 4, (64, 500), generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[1, 7::50], logits[2, 9::60], logits[3] = float("inf"), float("nan"), float("-inf")
    logits[4] = torch.where(logits[4] == 0, -logits[4], logits[4]).clamp(max=0)  # zeros of both signs
    choice = fast_generate._Choice(torch.ones(64, 2, dtype=torch.long), [], [], SimpleNamespace(do_sample=False))
    assert torch.equal(choice.next(logits), logits.float().argmax(-1))


def test_the_step_s_own_argmax_is_taken_where_nothing_changes_it():
    """The host then looks at the prompt's logits alone; padding behind an end is put into the step."""
    prompt, argmax, logits = torch.ones(2, 2, dtype=torch.long), torch.tensor([3, 4]), torch.rand(2, 29)
    plain, sampling = SimpleNamespace(do_sample=False), SimpleNamespace(do_sample=True)
    assert fast_generate._Choice(prompt, [], [], plain).next(logits, argmax) is argmax
    choice = fast_generate._Choice(prompt, [lambda tokens, scores: -scores], [], plain)
    assert torch.equal(choice.next(logits, argmax), logits.argmin(-1))
    certain = torch.full((2, 29), -100.0).scatter(1, torch.tensor([[7], [8]]), 0.0)
    assert fast_generate._Choice(prompt, [], [], sampling).next(certain, argmax).tolist() == [7, 8]
    ends, plain._pad_token_tensor = [SimpleNamespace(eos_token_id=torch.tensor([4]))], torch.tensor(0)
    choice = fast_generate._Choice(prompt, [], ends, plain)
    found = [choice.next(logits, argmax).tolist() for _ in range(2)]
    assert found == [[3, 4], [3, 0]] and choice.tokens[:, 2:4].T.tolist() == found and argmax.tolist() == [3, 4]


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.5}, {"eos_token_id": [7, 8, 9], "min_new_tokens": 9}])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_where_argmax_is_not_what_is_chosen(kind, options, both, small_model):
    model, ids = small_model(kind), random_ids(3, 6)
    expected, found = both(model, ids, **options)
    assert torch.equal(found, expected) and not torch.equal(found, run(model, ids))


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("eos", [[7], [7, 11, 20], list(range(5, 29))])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_end_at_their_own_token(kind, eos, do_sample, both, small_model):
    expected, found = both(small_model(kind), random_ids(5, 9), eos_token_id=eos, do_sample=do_sample)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [1, 5])
def test_the_step_looks_for_ends_itself_and_forgets_them(rows, both, small_model, monkeypatch):
    """Behind a call with end tokens one without them, with others, and with more than the step takes."""
    model, ids, taken, real = small_model(), random_ids(rows, 9), [], DecodeStep.end_at
    monkeypatch.setattr(DecodeStep, "end_at", lambda *given: taken.append(real(*given)) or taken[-1])
    common = run(model, ids)[:, 12:].flatten().mode().values.item()
    for eos in ([common], None, [common, 1, 2], list(range(9)), [28]):
        expected, found = both(model, ids, eos_token_id=eos, do_sample=False)
        assert torch.equal(found, expected)
    assert {True, False} <= set(taken)


def test_ends_are_reached_on_the_way(both, small_model):
    """Of which the test above is about: with 24 of 29 tokens as ends, all rows end long before the last step."""
    expected, _ = both(small_model(), random_ids(5, 9), eos_token_id=list(range(5, 29)), do_sample=True)
    assert 9 < expected.shape[1] < 9 + NEW and (expected == 0).any()


def test_minimum_of_new_tokens(both, small_model):
    options = {"eos_token_id": list(range(5, 29)), "min_new_tokens": 6, "do_sample": True}
    expected, found = both(small_model(), random_ids(3, 4), **options)
    assert torch.equal(found, expected) and found.shape[1] >= 10


@pytest.mark.parametrize("new", [1, 2, 3])
def test_few_tokens(new, both, small_model, monkeypatch):
    model, ids = small_model(), random_ids(2, 4)
    expected = run(model, ids, max_new_tokens=new)
    monkeypatch.setattr(type(model), "_fast_generation_devices", ("cpu",))
    assert torch.equal(run(model, ids, max_new_tokens=new), expected)


def test_more_tokens_than_room_was_made_for(both, small_model):
    expected, found = both(small_model(), random_ids(1, 3), max_new_tokens=1100)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "changes", [{"scale_embeddings": True, "final_logit_softcapping": 5.0}, {"num_key_value_heads": 2}]
)
def test_other_configurations(changes, both, small_model):
    expected, found = both(small_model(**changes), random_ids(2, 5))
    assert torch.equal(found, expected)


def test_long_prompts_are_read_in_chunks(both, small_model, monkeypatch):
    monkeypatch.setattr(fast_generate, "PREFILL_TOKENS", 12)
    monkeypatch.setattr(fast_generate, "LEAST_CHUNK", 3)
    for mask in (None, left_padded(4, 40)):
        expected, found = both(small_model(), random_ids(4, 40), attention_mask=mask)
        assert torch.equal(found, expected)


class Recorder(BaseStreamer):
    def __init__(self):
        self.values = []

    def put(self, value):
        self.values.append(value.clone())

    def end(self):
        self.values.append("end")


@pytest.mark.parametrize("eos", [None, [7, 8, 9, 10, 11]])
def test_streamer_gets_every_token_in_order_and_none_beyond_the_end(eos, small_model, monkeypatch):
    model, ids, ours, theirs = small_model(), random_ids(1, 5), Recorder(), Recorder()
    run(model, ids, streamer=theirs, eos_token_id=eos, do_sample=True)
    by_step(monkeypatch, model, ids, streamer=ours, eos_token_id=eos, do_sample=True)
    assert ours.values[-1] == theirs.values[-1] == "end" and len(ours.values) == len(theirs.values)
    assert all(torch.equal(one, other) for one, other in zip(ours.values[:-1], theirs.values[:-1]))


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_calls_and_other_batch_sizes_leave_nothing_behind(kind, both, small_model):
    model = small_model(kind)
    for batch, length in ((2, 5), (1, 30), (2, 3), (3, 9), (4, 2), (5, 8), (2, 12)):
        expected, found = both(model, random_ids(batch, length))
        assert torch.equal(found, expected)
    assert len(kept_steps.STEPS[model]) == kept_steps.KEPT_STEPS


def test_weights_are_read_where_they_lie(both, small_model):
    """Trained in place between two calls, and moved: what was kept is used again, or not."""
    model, ids = small_model(), random_ids(2, 5)
    first, _ = both(model, ids)
    kept = list(kept_steps.STEPS[model].values())
    for parameter in model.parameters():
        parameter.data.mul_(1.3)
    expected, found = both(model, ids)
    assert torch.equal(found, expected) and not torch.equal(found, first)
    assert list(kept_steps.STEPS[model].values()) == kept
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0)
    expected, found = both(model, ids)
    assert torch.equal(found, expected) and list(kept_steps.STEPS[model].values()) != kept


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_each_step(kind, small_model):
    model, ids = small_model(kind), random_ids(3, 40)
    step = DecodeStep(model.model, model.lm_head, 3)
    with torch.no_grad():
        cache = model(ids[:, :5], past_key_values=DynamicCache(config=model.config)).past_key_values
        step.load(cache, 5, None)
        expected = model(ids, use_cache=False).logits
    for position in range(5, 40):
        step.token.copy_(ids[:, position])
        assert_close("logits", step.step(), expected[:, position])


class Noop(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def right_padded():
    return {"attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])}


@pytest.mark.parametrize(
    "options",
    [
        lambda model: {"past_key_values": DynamicCache(config=model.config)},
        lambda model: {"cache_implementation": "dynamic"},
        lambda model: {"use_cache": False},
        lambda model: right_padded(),
        lambda model: {"inputs_embeds": model.get_input_embeddings()(random_ids(2, 5))},
        lambda model: {"position_ids": torch.arange(5)[None] + 3},
    ],
)
def test_other_requests_run_in_transformers_loop(options, small_model, monkeypatch):
    model, ids = small_model(), random_ids(2, 5)
    expected = run(model, ids, **options(model))
    monkeypatch.setattr(type(model), "_fast_generation_devices", ("cpu",))
    monkeypatch.setattr(fast_generate, "take_step", None)  # to call it would raise
    found = run(model, ids, **options(model))
    found, expected = (x if isinstance(x, torch.Tensor) else x.sequences for x in (found, expected))
    assert torch.equal(found, expected)


def add_hook(model):
    model.model.layers[0].mlp_block.register_forward_hook(lambda module, args, output: output * 0)


def add_adapter(model):
    class Adapter(torch.nn.Linear):
        pass

    model.model.layers[0].mlp_block.gate_proj.__class__ = Adapter


def add_forward(model):
    model.model.layers[1].forward = type(model.model.layers[1]).forward.__get__(model.model.layers[1])


def cast_norm(model):
    model.model.final_norm.double()


def parametrize(model):
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)


@pytest.mark.parametrize("change", [add_hook, add_adapter, add_forward, cast_norm, parametrize])
def test_models_with_something_added_do_not_run_on_the_fused_step(change, small_model, monkeypatch):
    model, ids = small_model(), random_ids(2, 5)
    change(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_fast_generation_devices", ())
        expected = run(model, ids)
    monkeypatch.setattr(kept_steps, "DecodeStep", None)  # to make one would raise
    assert torch.equal(run(model, ids), expected)


def test_hooks_that_transformers_left_behind_do_not_count(both, small_model):
    model, ids = small_model(), random_ids(1, 5)
    model(ids, output_hidden_states=True)
    expected, found = both(model, ids)
    assert torch.equal(found, expected)


def test_a_call_within_a_call_has_a_step_of_its_own(small_model, monkeypatch):
    """A streamer that generates itself, with the same number of rows."""
    model, ids = small_model(), random_ids(1, 5)
    expected, inner = run(model, ids), []

    class Nested(Recorder):
        def put(self, value):
            if not inner:
                inner.append(run(model, ids))

    monkeypatch.setattr(type(model), "_fast_generation_devices", ("cpu",))
    outer = run(model, ids, streamer=Nested())
    assert torch.equal(outer, expected) and torch.equal(inner[0], expected)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_step_keeps_no_graph_of_weights_that_train(rows, small_model):
    """As it is recorded, outside any inference mode of the caller's, which turns gradients on."""
    model = small_model()
    assert all(parameter.requires_grad for parameter in model.parameters())
    step = DecodeStep(model.model, model.lm_head, rows)
    with torch.inference_mode(), torch.inference_mode(False):
        assert torch.is_grad_enabled()
        step._compute()
    assert not step.logits.requires_grad


def test_a_step_that_cannot_be_recorded_is_said_and_done_without(small_model, monkeypatch, transformers_loop):
    """Once: the next call does not try again."""
    tried = []

    def record(step):
        tried.append(step.token.shape[0])
        raise RuntimeError("no such GPU")

    model, ids = small_model(), random_ids(2, 5)
    expected = run(model, ids)
    monkeypatch.setattr(type(model), "_fast_generation_devices", ("cpu",))
    monkeypatch.setattr(DecodeStep, "record", record)
    real = DecodeStep.__init__

    def as_on_a_gpu(step, *arguments):
        real(step, *arguments)
        step.on_gpu = True

    monkeypatch.setattr(DecodeStep, "__init__", as_on_a_gpu)
    said = []
    monkeypatch.setattr(kept_steps.logger, "warning_once", said.append)
    for _ in range(2):
        assert torch.equal(run(model, ids), expected)
    assert tried == [2] and "2 rows is not used: RuntimeError('no such GPU')" in said[0]


def test_under_inference_mode_and_then_without(both, small_model):
    model, ids = small_model(), random_ids(2, 5)
    with torch.inference_mode():
        expected, found = both(model, ids)
    assert torch.equal(found, expected)
    assert torch.equal(both(model, ids)[1], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_step_on_a_gpu(kind, rows, both, small_model):
    model, ids = small_model(kind).cuda(), random_ids(rows, 9).cuda()
    mask = left_padded(rows, 9).cuda()
    ends = {"eos_token_id": [7, 8, 9]}
    sampled = [{"do_sample": True, "top_k": 10}, {"do_sample": True, **ends}]
    for options in ({}, ends, {"repetition_penalty": 1.5}, *sampled):
        expected, found = both(model, ids, attention_mask=mask, **options)
        assert torch.equal(found, expected)
    (step,) = next(iter(kept_steps.STEPS[model].values()))
    assert step.graph is not None


@pytest.mark.gpu
def test_a_gpu_uses_the_step_by_default(small_model):
    model = small_model().cuda()
    run(model, random_ids(2, 5).cuda())
    assert len(kept_steps.STEPS[model]) == 1


@pytest.mark.parametrize("eos", [None, "first", "later"])
def test_a_cpu_computes_nothing_beyond_the_end(eos, small_model, monkeypatch):
    """One step between two tokens, and none behind the last."""
    model, ids, steps, real = small_model(), random_ids(1, 5), [], DecodeStep.step
    tokens = run(model, ids)[0, 5:].tolist()
    monkeypatch.setattr(DecodeStep, "step", lambda step: steps.append(1) or real(step))
    eos_token_id = {None: None, "first": tokens[0], "later": tokens[6]}[eos]
    new = run(model, ids, eos_token_id=eos_token_id).shape[1] - 5
    assert len(steps) == new - 1
    assert new == (NEW if eos is None else tokens.index(eos_token_id) + 1)
