"""`generate(assistant_model=...)` by recorded steps: the tokens of greedy decoding, whatever the assistant drafts."""

import pytest
import torch
from test_generate import Recorder
from test_speculative_generate import (
    KINDS,
    as_it_repeats_itself,
    passes,  # noqa: F401  # a fixture
    random_ids,
    use_passes,
)
from test_speculative_generate import run as run_longer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.candidate_generator import AssistedCandidateGenerator

import modeling_griffin.decode.generate as decode_generate
import modeling_griffin.decode.speculative.generate as fast_drafts
from modeling_griffin.decode.generate import prefill_into
from modeling_griffin.decode.speculative.assistant import PATIENCE, Assistant
from modeling_griffin.decode.speculative.verify import VerifyStep
from modeling_griffin.decode.state import DecodeStep
from modeling_griffin.decode.steps import STEPS
from tests.tolerances import assert_close


pytestmark = pytest.mark.usefixtures("transformers_loop")  # by which tokens are judged; `use_passes` turns passes on


def run(model, ids, **options):
    return run_longer(model, ids, **{"max_new_tokens": 20, **options})  # beyond two windows


def settle(assistant, number=4, threshold=0.0, schedule="constant"):
    config = assistant.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = number, schedule
    config.assistant_confidence_threshold = threshold
    return assistant


def half_right(model, small_model, kind="griffin", **fields):
    """An assistant that often agrees with the model: its head, behind embeddings that say more than its layers."""
    assistant = small_model(kind, **fields)
    for mine, theirs in (
        (assistant.model.embed_tokens, model.model.embed_tokens),
        (assistant.lm_head, model.lm_head),
    ):
        mine.weight.data.copy_(theirs.weight.data)
    return settle(assistant)


ASSISTANTS = {
    "itself": lambda model, small_model: settle(model),
    "griffin": half_right,
    "hawk": lambda model, small_model: half_right(model, small_model, "hawk"),
    "attention": lambda model, small_model: half_right(model, small_model, "attention"),
    "smaller window": lambda model, small_model: half_right(model, small_model, attention_window_size=5),
    "larger window": lambda model, small_model: half_right(model, small_model, attention_window_size=80),
    "scaled": lambda model, small_model: half_right(model, small_model, scale_embeddings=True, conv1d_width=2),
    "backwards": lambda model, small_model: settle(backwards(small_model())),
}


def backwards(model):
    model.lm_head.weight.data.copy_(model.lm_head.weight.data.flip(0))
    return model


@pytest.mark.parametrize("name", ASSISTANTS)
@pytest.mark.parametrize("kind", ["griffin", "hawk"])
def test_the_tokens_of_greedy_decoding(kind, name, small_model, passes, monkeypatch):  # noqa: F811
    """Prompts shorter than the windows and longer, with padding and without, one after another on the same steps."""
    model = as_it_repeats_itself(small_model(kind))
    assistant = ASSISTANTS[name](model, small_model)
    for length, padding in ((1, 0), (7, 3), (20, 0)):
        ids = random_ids(length, seed=length)
        mask = (torch.arange(length) >= padding).long()[None]
        with monkeypatch.context() as patch:
            expected = run(model, ids, attention_mask=mask)
            use_passes(patch, model)
            found = run(model, ids, attention_mask=mask, assistant_model=assistant)
        assert torch.equal(found, expected), length
    assert passes.right and (max(passes.right) == 4) == (name != "backwards")
    assert not any(step.busy for each in (model, assistant) for steps in STEPS[each].values() for step in steps)


def test_settings_of_recurrent_gemma(small_model, passes, monkeypatch):  # noqa: F811
    model = as_it_repeats_itself(small_model(scale_embeddings=True, final_logit_softcapping=5.0))
    assistant = half_right(model, small_model, scale_embeddings=True, final_logit_softcapping=5.0)
    expected = run(model, random_ids(11))
    use_passes(monkeypatch, model)
    assert torch.equal(run(model, random_ids(11), assistant_model=assistant), expected) and passes.right


def test_every_draft_of_the_model_itself_is_right(small_model, passes, monkeypatch):  # noqa: F811
    """So that passes are few: the first token, and five of each pass."""
    model = settle(small_model())
    use_passes(monkeypatch, model)
    run(model, random_ids(5), max_new_tokens=31, assistant_model=model)
    assert passes.right == [4] * 6


@pytest.mark.parametrize("name", ["itself", "griffin"])
def test_an_end_inside_drafts(name, small_model, monkeypatch):
    """Every token of the answer in turn ends it."""
    model, ids = as_it_repeats_itself(small_model()), random_ids(6)
    assistant = ASSISTANTS[name](model, small_model)
    whole = run(model, ids)[0, 6:].tolist()
    for eos in list(dict.fromkeys(whole))[:7]:
        expected = run(model, ids, eos_token_id=eos)
        with monkeypatch.context() as patch:
            use_passes(patch, model)
            assert torch.equal(run(model, ids, eos_token_id=eos, assistant_model=assistant), expected)
            assert expected.shape[1] == 6 + whole.index(eos) + 1


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5, 6, 7, 8])
def test_max_length_inside_a_pass(new, small_model, monkeypatch):
    model, ids = small_model(), random_ids(6)
    expected = run(model, ids, max_new_tokens=new)
    use_passes(monkeypatch, model)
    assert torch.equal(run(model, ids, max_new_tokens=new, assistant_model=settle(model)), expected)


def test_streamer_gets_the_tokens_of_each_pass(small_model, passes, monkeypatch):  # noqa: F811
    model, ids, recorder = settle(small_model()), random_ids(6), Recorder()
    use_passes(monkeypatch, model)
    found = run(model, ids, streamer=recorder, assistant_model=model)
    prompt, *parts, end = recorder.values
    assert end == "end" and len(parts) == 1 + len(passes.right) and torch.equal(torch.cat([prompt, *parts], 1), found)


def drafting(assistant, ids, most=4, ends=()):
    """An `Assistant` that has read a prompt, and its step."""
    step = DecodeStep(assistant.model, assistant.lm_head, 1, assistant.config.attention_window_size)
    prefill_into(assistant, step, ids, None, GenerationConfig())
    return Assistant(assistant, step, ids.shape[1], most, ends), step


@pytest.mark.parametrize("length", [1, 6, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_behind_wrong_drafts_is_that_of_reading_afresh(kind, length, small_model):
    """After several rounds in which 0 to 4 drafts were right, the step's next logits are those of a new one."""
    model = settle(small_model(kind, attention_window_size=5))
    ids = random_ids(length)
    for rights in ([0, 0, 1], [4, 2, 0, 3], [1, 4, 4, 4, 0], [3]):
        drafter, step = drafting(model, ids)
        text, token = ids, 7
        drafter.accept([token])
        for right in rights:
            found = drafter.drafts(room=9)
            wrong = (found[right] + 1) % 29 if right < 4 else 11
            text = torch.cat([text, torch.tensor([[token, *found[:right]]])], dim=1)
            token = wrong
            drafter.accept([*found[:right], wrong])
        *behind, last = drafter.unread
        assert last == token and behind == ([] if right < 4 else found[3:])
        for each in (*behind, last):
            step.token.fill_(each)
            logits = step.step().clone()
        text = torch.cat([text, torch.tensor([[token]])], dim=1)
        assert_close("logits", logits, model(text).logits[:, -1])
        assert step.clock.time.item() == text.shape[1]
        other = drafting(model, text)[1]
        for mine, theirs in zip(step.memories, other.memories, strict=True):
            assert_close("logits", mine, theirs)
        needed = [slot for slot in range(step.slots) if slot != text.shape[1] % step.slots]  # the next token has it
        for mine, theirs in zip(step.rings, other.rings, strict=True):
            assert_close("logits", mine[:, :, :, needed], theirs[:, :, :, needed])


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 1.0])
def test_drafts_are_those_of_transformers(threshold, small_model):
    """Up to the first that the assistant is not sure of, or an end, or the room."""
    model, lengths = settle(as_it_repeats_itself(small_model()), 7, threshold), set()
    for seed in range(12):
        ids, room = random_ids(1 + seed, seed), 7 - seed % 3
        length = ids.shape[1] + room + 1
        config = GenerationConfig(eos_token_id=9, max_length=length, pad_token_id=0, do_sample=False, min_length=0)
        config.min_new_tokens = None
        theirs = AssistedCandidateGenerator(ids, model, config, {"attention_mask": torch.ones_like(ids)})
        candidates = theirs.get_candidates(ids)[0][0, ids.shape[1] :].tolist()
        if seed == 0:  # nothing in front of the token
            continue
        drafter, _ = drafting(model, ids[:, :-1], most=7, ends={9})
        drafter.accept([ids[0, -1].item()])
        assert drafter.drafts(room) == candidates
        lengths.add(len(candidates))
    assert len(lengths) == 1 if threshold == 1 else len(lengths) > 1, lengths


def test_an_assistant_that_is_never_right_is_asked_no_more(small_model, passes, monkeypatch):  # noqa: F811
    model = as_it_repeats_itself(small_model())
    assistant = settle(backwards(small_model()))
    use_passes(monkeypatch, model)
    run(model, random_ids(9), max_new_tokens=60, assistant_model=assistant)
    assert passes.right == [0] * PATIENCE
    run(model, random_ids(9), max_new_tokens=60, assistant_model=assistant)  # but by the next request
    assert passes.right == [0] * 2 * PATIENCE


@pytest.mark.parametrize("schedule", ["constant", "heuristic", "heuristic_transient"])
def test_the_number_of_drafts(schedule, small_model):
    """Two more where all were right, one fewer where not; kept for the next call where Transformers keeps it."""
    model = settle(small_model(), 2, schedule=schedule)
    drafter, _ = drafting(model, random_ids(3), most=7)
    numbers, new = [], [7]
    for right in (True, True, False, True, False, False, False, False):
        drafter.accept(new)
        found = drafter.drafts(room=30)
        numbers.append(len(found))
        new = [*found, 5] if right else [(found[0] + 1) % 29]
    drafter.accept(new)
    assert numbers == ([2] * 8 if schedule == "constant" else [2, 4, 6, 5, 7, 6, 5, 4])
    drafter.close()
    assert model.generation_config.num_assistant_tokens == (3 if schedule == "heuristic" else 2)


def test_more_drafts_than_a_window_are_bounded(small_model, passes, monkeypatch):  # noqa: F811
    """By the smaller of both, and by what a pass has room for; Transformers' default is 20."""
    model, assistant = small_model(attention_window_size=12), small_model(attention_window_size=6)
    expected = run(model, random_ids(5))
    use_passes(monkeypatch, model)
    assert torch.equal(run(model, random_ids(5), assistant_model=assistant), expected)
    assert torch.equal(run(model, random_ids(5), assistant_model=settle(model, 63)), expected)
    ((step,),) = ([each for each in steps if each.drafts] for steps in STEPS[model].values())
    assert list(step.drafts) == [6, 12] and max(passes.right) == 11
    settle(assistant, 2, schedule="heuristic")
    assert torch.equal(run(model, random_ids(5), assistant_model=assistant), expected)
    assert list(step.drafts) == [12, 4]


REFUSED = {
    "do_sample": lambda model, small_model: {"assistant_model": model, "do_sample": True},
    "RepetitionPenalty": lambda model, small_model: {"assistant_model": model, "repetition_penalty": 1.2},
    "criteria or outputs": lambda model, small_model: {"assistant_model": model, "return_dict_in_generate": True},
    "num_assistant_tokens = 0": lambda model, small_model: {"assistant_model": settle(small_model(), 0)},
    "without a fused step: layers.0 has a hook": lambda model, small_model: {"assistant_model": hooked(small_model())},
    "without a fused step: the model is a LlamaForCausalLM": lambda model, small_model: {"assistant_model": llama()},
}


def llama():
    config = LlamaConfig(
        vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    config.bos_token_id = config.eos_token_id = None
    return settle(LlamaForCausalLM(config).eval())


def hooked(model):
    model.model.layers[0].register_forward_hook(lambda module, args, output: None)
    return model


@pytest.mark.parametrize("reason", REFUSED)
def test_other_requests_run_in_transformers_loop_and_say_why(reason, small_model, passes, monkeypatch):  # noqa: F811
    model, ids, found, said = small_model(), random_ids(5), [], []
    monkeypatch.setattr(decode_generate.logger, "warning_once", said.append)
    for devices in ((), ("cpu", "cuda")):
        monkeypatch.setattr(type(model), "_fast_generation_devices", devices)
        torch.manual_seed(3)
        result = run(model, ids, max_new_tokens=6, **REFUSED[reason](model, small_model))
        found.append((result if isinstance(result, torch.Tensor) else result.sequences).tolist())
    assert found[0] == found[1] and not passes.right and reason in said[0], said


def test_an_assistant_of_another_vocabulary_is_none_of_ours(small_model, monkeypatch):
    """Transformers' loop translates its drafts, by the tokenizers of both."""
    model = small_model()
    use_passes(monkeypatch, model)
    found = fast_drafts._of_an_assistant(model, small_model(vocab_size=31))
    assert [*found] == ["an assistant of 31 tokens, not 29"]


def test_two_models_that_are_each_others_assistants(small_model, monkeypatch):
    """In two threads at once: neither waits for the other's step."""
    import threading

    one, other, ids = settle(small_model()), settle(backwards(small_model())), random_ids(5)
    expected = [run(model, ids) for model in (one, other)]
    use_passes(monkeypatch, one)
    found = [[], []]

    def call(index):
        model, assistant = ((one, other), (other, one))[index]
        found[index] = [run(model, ids, assistant_model=assistant) for _ in range(3)]

    threads = [threading.Thread(target=call, args=(index,), daemon=True) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(len(each) == 3 for each in found)
    assert all(torch.equal(tokens, right) for each, right in zip(found, expected) for tokens in each)


def test_an_error_in_a_streamer_frees_both_steps(small_model, monkeypatch):
    model, assistant, ids = small_model(), settle(small_model()), random_ids(5)

    class Failing(Recorder):
        def put(self, value):
            if len(self.values) == 2:
                raise KeyboardInterrupt
            super().put(value)

    use_passes(monkeypatch, model)
    with pytest.raises(KeyboardInterrupt):
        run(model, ids, streamer=Failing(), assistant_model=assistant)
    assert not any(step.busy for each in (model, assistant) for steps in STEPS[each].values() for step in steps)


def test_under_inference_mode_and_then_without(small_model, monkeypatch):
    model, ids = settle(small_model()), random_ids(5)
    expected = run(model, ids)
    use_passes(monkeypatch, model)
    with torch.inference_mode():
        assert torch.equal(run(model, ids, assistant_model=model), expected)
    assert torch.equal(run(model, ids, assistant_model=model), expected)


@pytest.mark.parametrize("place", [VerifyStep, Assistant])
def test_an_interrupt_while_steps_are_made_frees_them(place, small_model, monkeypatch):
    model, assistant, ids = small_model(), settle(small_model()), random_ids(5)
    expected = run(model, ids)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    use_passes(monkeypatch, model)
    with monkeypatch.context() as patch:
        patch.setattr(place, "__init__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, ids, assistant_model=assistant)
    assert torch.equal(run(model, ids, assistant_model=assistant), expected)
    assert not any(step.busy for each in (model, assistant) for steps in STEPS[each].values() for step in steps)
    assert [len(steps) for steps in STEPS[model].values()] == [1]  # the second call had the step of the first
