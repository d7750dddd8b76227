"""`generate` with prompt lookup by recorded passes: the tokens of greedy decoding, in fewer passes.

On a CPU the passes are the same, without a CUDA graph and by plain PyTorch.
"""

import pytest
import torch
from test_generate import Never, Noop, Recorder, add_hook
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

import modeling_griffin.decode.generate as decode_generate
import modeling_griffin.decode.speculative.generate as fast_drafts
from modeling_griffin.decode.speculative.verify import VerifyStep
from modeling_griffin.decode.state import DecodeStep
from modeling_griffin.decode.steps import STEPS


pytestmark = pytest.mark.usefixtures("transformers_loop")  # by which tokens are judged; `use_passes` turns passes on
KINDS = ["griffin", "hawk", "attention", "attention_first"]
NEW = 40  # five windows


def random_ids(length: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(5, 29, (1, length), generator=torch.Generator().manual_seed(seed))


def repetitive_ids(seed: int) -> torch.Tensor:
    """From 1 to 24 tokens that repeat themselves."""
    return random_ids(1 + seed % 6, seed).repeat(1, 1 + seed % 4)


def run(model, ids, **options):
    defaults = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **{**defaults, **options})


class Passes:
    """What ran: numbers of right drafts of each pass with drafts, and how many single steps."""

    def __init__(self):
        self.right, self.single = [], 0

    def __len__(self):
        return len(self.right) + self.single


@pytest.fixture
def passes(monkeypatch):
    """Recorded passes are used from here on, and counted."""
    found, read, step = Passes(), VerifyStep.read, DecodeStep.step

    def counted_read(drafts, *arguments):
        new = read(drafts, *arguments)
        found.right.append(len(new) - 1)
        return new

    def counted_step(decode_step):
        found.single += 1
        return step(decode_step)

    monkeypatch.setattr(VerifyStep, "read", counted_read)
    monkeypatch.setattr(DecodeStep, "step", counted_step)
    return found


def use_passes(monkeypatch, model, *devices: str) -> None:
    monkeypatch.setattr(type(model), "_fast_generation_devices", devices or ("cpu", "cuda"))


def as_it_repeats_itself(model):
    """Weights under which the answer soon goes in a circle, so that drafts are often right."""
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data * 0.3 + model.lm_head.weight.data * 0.3)
    return model


@pytest.mark.parametrize("drafted", [1, 3, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_greedy_decoding(kind, drafted, small_model, passes, monkeypatch):
    """Of many prompts, some in circles: shorter than the window and longer."""
    model, tokens = as_it_repeats_itself(small_model(kind)), 0
    for seed in range(16):
        ids = repetitive_ids(seed) if seed % 2 else random_ids(1 + 2 * seed, seed)
        expected = run(model, ids)
        passes.right.clear()
        passes.single = 0
        with monkeypatch.context() as patch:
            use_passes(patch, model)
            found = run(model, ids, prompt_lookup_num_tokens=drafted)
        assert torch.equal(found, expected), seed
        tokens += len(passes)
    assert tokens < 16 * (NEW - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_circles_take_fewer_passes(kind, small_model, passes, monkeypatch):
    model, ids = as_it_repeats_itself(small_model(kind)), repetitive_ids(11)
    expected = run(model, ids, max_new_tokens=100)
    use_passes(monkeypatch, model)
    found = run(model, ids, max_new_tokens=100, prompt_lookup_num_tokens=7)
    assert torch.equal(found, expected)
    assert len(passes) < 60 and max(passes.right) == 7 and min(passes.right) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_window_size": 11},
        {"attention_window_size": 64},
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"conv1d_width": 2},
        {"scale_embeddings": True, "final_logit_softcapping": 5.0},
    ],
)
def test_other_configurations(changes, small_model, passes, monkeypatch):
    """With passes of more tokens than the convolution has taps, up to the window."""
    model = as_it_repeats_itself(small_model(**changes))
    prompts = [random_ids(20), repetitive_ids(7), repetitive_ids(11)]
    expected = [run(model, ids) for ids in prompts]
    use_passes(monkeypatch, model)
    for drafted in (2, 5, min(model.config.attention_window_size, 64) - 1):
        for ids, tokens in zip(prompts, expected):
            assert torch.equal(run(model, ids, prompt_lookup_num_tokens=drafted), tokens)
    assert passes.right


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding(kind, small_model, passes, monkeypatch):
    model = as_it_repeats_itself(small_model(kind))
    for length, padding in ((6, 3), (12, 11), (24, 9)):
        ids = random_ids(6).repeat(1, 4)[:, :length]
        mask = (torch.arange(length) >= padding).long()[None]
        with monkeypatch.context() as patch:
            expected = run(model, ids, attention_mask=mask)
            use_passes(patch, model)
            assert torch.equal(run(model, ids, attention_mask=mask, prompt_lookup_num_tokens=4), expected)
    assert passes.right


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_inside_a_draft(kind, small_model, passes, monkeypatch):
    """Every token of the answer in turn ends it, drafted or not, alone and with others."""
    model, ids = as_it_repeats_itself(small_model(kind)), repetitive_ids(11)
    whole = run(model, ids)[0, ids.shape[1] :].unique().tolist()
    for eos in [*whole, whole]:
        expected = run(model, ids, eos_token_id=eos)
        with monkeypatch.context() as patch:
            use_passes(patch, model)
            assert torch.equal(run(model, ids, eos_token_id=eos, prompt_lookup_num_tokens=5), expected)


def test_an_end_that_a_pass_finds_in_its_middle(small_model, passes, monkeypatch):
    """The generation ends there, even where right drafts follow: no draft runs past an end, but a pass may."""
    model, ids = as_it_repeats_itself(small_model()), repetitive_ids(11)
    use_passes(monkeypatch, model)
    expected = run(model, ids, prompt_lookup_num_tokens=5)
    length = ids.shape[1]
    monkeypatch.setattr(
        fast_drafts.PromptLookup, "drafts", lambda lookup, room: expected[0, len(lookup.tokens) :][:5].tolist()
    )
    assert torch.equal(run(model, ids, prompt_lookup_num_tokens=5), expected)
    eos = expected[0, length + 3].item()
    first = expected[0, length:].tolist().index(eos)
    found = run(model, ids, prompt_lookup_num_tokens=5, eos_token_id=eos)
    assert torch.equal(found, expected[:, : length + first + 1])


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14])
def test_max_length_inside_a_draft(new, small_model, passes, monkeypatch):
    model, ids = as_it_repeats_itself(small_model()), repetitive_ids(11)
    expected = run(model, ids, max_new_tokens=new)
    use_passes(monkeypatch, model)
    assert torch.equal(run(model, ids, max_new_tokens=new, prompt_lookup_num_tokens=7), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_one_generation_after_another_leaves_nothing_behind(kind, small_model, passes, monkeypatch):
    """With drafts of several sizes and without, on the same step."""
    model = as_it_repeats_itself(small_model(kind))
    prompts = [repetitive_ids(11), random_ids(30), repetitive_ids(7), random_ids(3)]
    expected = [run(model, ids) for ids in prompts]
    use_passes(monkeypatch, model)
    for drafted in (3, None, 7, 3, 1, 2):
        for ids, tokens in zip(prompts, expected):
            assert torch.equal(run(model, ids, prompt_lookup_num_tokens=drafted), tokens)
    ((step,),) = STEPS[model].values()
    assert list(step.drafts) == [2, 3] and not step.busy


@pytest.mark.parametrize("eos", [None, [7, 8, 9, 10]])
def test_streamer_gets_the_tokens_of_each_pass(eos, small_model, passes, monkeypatch):
    model, ids, recorder = as_it_repeats_itself(small_model()), repetitive_ids(11), Recorder()
    use_passes(monkeypatch, model)
    found = run(model, ids, streamer=recorder, eos_token_id=eos, prompt_lookup_num_tokens=5)
    prompt, *parts, end = recorder.values
    assert torch.equal(prompt, ids) and end == "end" and len(parts) == 1 + len(passes)
    assert all(part.shape[0] == 1 and part.device.type == "cpu" for part in parts)
    assert torch.equal(torch.cat([prompt, *parts], dim=1), found)


@pytest.mark.parametrize("ngram", [1, 4])
def test_size_of_the_ngrams_and_a_configuration_as_argument(ngram, small_model, passes, monkeypatch):
    model, ids = as_it_repeats_itself(small_model()), repetitive_ids(11)
    options = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": ngram}
    expected = run(model, ids)
    use_passes(monkeypatch, model)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)
    assert torch.equal(run(model, ids, **options), expected)
    assert torch.equal(model.generate(ids, generation_config=config), expected) and passes.right


@pytest.mark.parametrize(
    "options",
    [
        lambda model: {"return_dict_in_generate": True},
        lambda model: {"logits_processor": LogitsProcessorList([Noop()])},
        lambda model: {"repetition_penalty": 1.2},
        lambda model: {"stopping_criteria": StoppingCriteriaList([Never()])},
        lambda model: {"do_sample": True},
        lambda model: {"prompt_lookup_num_tokens": 8},
        lambda model: {"prompt_lookup_num_tokens": 64},
        lambda model: {"prompt_lookup_num_tokens": None, "assistant_model": model, "repetition_penalty": 1.2},
        lambda model: {"past_key_values": DynamicCache(config=model.config)},
        lambda model: {"cache_implementation": "static", "max_new_tokens": 2},
        lambda model: {"position_ids": torch.arange(5)[None] + 3},
        lambda model: add_hook(model) or {},
    ],
)
def test_other_requests_run_in_transformers_loop(options, small_model, passes, monkeypatch):
    """With its tokens, or refused in its words: static caches are up to Transformers 5.23."""
    model, ids = small_model(), random_ids(5)
    options = {"prompt_lookup_num_tokens": 3, **options(model)}
    found = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(type(model), "_fast_generation_devices", devices)
        torch.manual_seed(3)
        try:
            result = run(model, ids, **options)
        except ValueError as error:
            found.append(str(error))
        else:
            found.append((result if isinstance(result, torch.Tensor) else result.sequences).tolist())
        if "past_key_values" in options:
            options["past_key_values"] = DynamicCache(config=model.config)
    assert found[0] == found[1] and not passes.right
    assert isinstance(found[0], list) or options.get("cache_implementation") == "static"


def test_what_transformers_refuses_is_refused(small_model, monkeypatch):
    model = small_model()
    use_passes(monkeypatch, model)
    with pytest.raises(ValueError, match="batch_size = 1"):
        run(model, random_ids(4).repeat(2, 1), prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="assistant_early_exit = 1: allowed is None"):
        run(model, random_ids(4), prompt_lookup_num_tokens=2, assistant_early_exit=1)


def test_the_reason_is_said(small_model, monkeypatch):
    model, said = small_model(), []
    use_passes(monkeypatch, model)
    monkeypatch.setattr(decode_generate.logger, "warning_once", said.append)
    run(model, random_ids(4), prompt_lookup_num_tokens=3)
    assert said == []
    run(model, random_ids(4), prompt_lookup_num_tokens=8)
    run(model, random_ids(4), prompt_lookup_num_tokens=3, repetition_penalty=1.2)
    assert "prompt_lookup_num_tokens = 8, of which 1 to 7" in said[0] and "RepetitionPenalty" in said[1]


def test_a_call_within_a_call_has_a_step_of_its_own(small_model, monkeypatch):
    model, ids = as_it_repeats_itself(small_model()), repetitive_ids(11)
    expected, inner = run(model, ids), []

    class Nested(Recorder):
        def put(self, value):
            if not inner:
                inner.append(run(model, ids, prompt_lookup_num_tokens=3))

    use_passes(monkeypatch, model)
    assert torch.equal(run(model, ids, streamer=Nested(), prompt_lookup_num_tokens=3), expected)
    assert torch.equal(inner[0], expected)


def test_a_pass_that_cannot_be_recorded_is_said_and_done_without(small_model, passes, monkeypatch):
    """Once; the step without drafts stays in use."""
    tried, said = [], []

    def fails(drafts, step, tokens):
        tried.append(tokens)
        raise RuntimeError("no such GPU")

    model, ids = small_model(), random_ids(5)
    expected = run(model, ids)
    use_passes(monkeypatch, model)
    monkeypatch.setattr(VerifyStep, "__init__", fails)
    monkeypatch.setattr(fast_drafts.logger, "warning_once", said.append)
    for _ in range(2):
        assert torch.equal(run(model, ids, prompt_lookup_num_tokens=3), expected)
    assert tried == [4] and "4 tokens cannot be recorded: RuntimeError('no such GPU')" in said[0]
    assert passes.single == 0 and torch.equal(run(model, ids), expected) and passes.single > 0


def test_under_inference_mode_and_then_without(small_model, passes, monkeypatch):
    model, ids = as_it_repeats_itself(small_model()), repetitive_ids(11)
    expected = run(model, ids)
    use_passes(monkeypatch, model)
    with torch.inference_mode():
        assert torch.equal(run(model, ids, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(run(model, ids, prompt_lookup_num_tokens=3), expected) and passes.right


@pytest.mark.gpu
@pytest.mark.parametrize("drafted", [1, 3, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_passes_on_a_gpu(kind, drafted, small_model, passes, monkeypatch):
    model = as_it_repeats_itself(small_model(kind)).cuda()
    for seed in range(12):
        ids = repetitive_ids(seed).cuda() if seed % 2 else random_ids(1 + 2 * seed, seed).cuda()
        with monkeypatch.context() as patch:
            expected = run(model, ids)
            use_passes(patch, model)
            assert torch.equal(run(model, ids, prompt_lookup_num_tokens=drafted), expected)
    assert max(passes.right) == drafted
    ((step,),) = STEPS[model].values()
    assert step.drafts[drafted + 1].graph is not None


@pytest.mark.gpu
@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_drafts_of_an_assistant_on_a_gpu(kind, threshold, small_model, passes, monkeypatch):
    """One that is the model itself, and one that knows nothing, in turn on the steps that were kept."""
    model, other = as_it_repeats_itself(small_model(kind)).cuda(), small_model(attention_window_size=11).cuda()
    other.lm_head.weight.data.copy_(other.lm_head.weight.data.flip(0))
    for assistant in (model, other):
        assistant.generation_config.num_assistant_tokens = 5
        assistant.generation_config.assistant_confidence_threshold = threshold
    for seed in range(8):
        ids = repetitive_ids(seed).cuda() if seed % 2 else random_ids(1 + 4 * seed, seed).cuda()
        with monkeypatch.context() as patch:
            expected = run(model, ids)
            use_passes(patch, model)
            for assistant in (model, other):
                assert torch.equal(run(model, ids, assistant_model=assistant), expected)
    assert max(passes.right) == 5
    (step,) = (each for steps in STEPS[other].values() for each in steps)
    assert step.graph is not None and not step.busy
