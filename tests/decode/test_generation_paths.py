"""Which path each kind of request takes, by name, and that its results are those of Transformers' own loop."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tolerances import assert_close
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, LogitsProcessor, PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from modeling_griffin.cache_name import CACHE_NAME
from modeling_griffin.decode import generate as decode_generate
from modeling_griffin.decode import steps as kept_steps
from modeling_griffin.decode.eligibility import ineligible_model_reasons


NEW = 12  # beyond the window of 8
KINDS = ["griffin", "hawk", "attention_first"]


class Memory(LogitsProcessor):
    """Reads values on the host and remembers them: forbids the two tokens that it has seen chosen last."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids[:, -1].tolist())
        scores = scores.clone()
        for row, tokens in enumerate(zip(*self.seen[-2:])):
            scores[row, list(tokens)] = -torch.inf
        return scores


class After(StoppingCriteria):
    """Ends a row at its third token that is even; counts on the host."""

    def __init__(self):
        self.counts = {}

    def __call__(self, input_ids, scores, **kwargs):
        for row, token in enumerate(input_ids[:, -1].tolist()):
            self.counts[row] = self.counts.get(row, 0) + (token % 2 == 0)
        return torch.tensor([self.counts[row] >= 3 for row in range(len(input_ids))], device=input_ids.device)


def allowed(row, tokens):
    return [token for token in range(5, 29) if token % 3 == int(tokens[-1]) % 3 or token % 5 == row % 5]


ALL_OUTPUTS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
ALL_HIDDEN = {**ALL_OUTPUTS, "output_hidden_states": True}
AHEAD, LOOP, FORWARD, STOCK = ("fused", True), ("fused", False), ("forward", False), ("transformers", False)
# name: (options, the path)
REQUESTS = {
    "greedy": (lambda: {}, AHEAD),
    "sampling": (lambda: {"do_sample": True, "top_k": 9, "temperature": 0.8}, AHEAD),
    "penalty": (lambda: {"repetition_penalty": 1.4}, AHEAD),
    "return sequences": (lambda: {"do_sample": True, "num_return_sequences": 3}, AHEAD),
    "own processor": (lambda: {"logits_processor": [Memory()]}, LOOP),
    "own processor, sampling": (lambda: {"logits_processor": [Memory()], "do_sample": True}, LOOP),
    "allowed tokens": (lambda: {"prefix_allowed_tokens_fn": allowed}, LOOP),
    "own criterion": (lambda: {"stopping_criteria": [After()]}, LOOP),
    "no repeated n-grams": (lambda: {"no_repeat_ngram_size": 2}, LOOP),
    "bad words": (lambda: {"bad_words_ids": [[7], [8, 9]]}, LOOP),
    "return dict": (lambda: {"return_dict_in_generate": True}, LOOP),
    "scores and logits": (lambda: ALL_OUTPUTS, LOOP),
    "scores, sampling": (lambda: {**ALL_OUTPUTS, "do_sample": True}, LOOP),
    "hidden states": (lambda: ALL_HIDDEN, LOOP),
    "hidden states, sampling": (lambda: {**ALL_HIDDEN, "do_sample": True}, LOOP),
    "hidden states, own processor": (lambda: {**ALL_HIDDEN, "logits_processor": [Memory()]}, LOOP),
    "some hidden states": (lambda: {"return_dict_in_generate": True, "output_hidden_states": [0, -1]}, LOOP),
    "beams": (lambda: {"num_beams": 4}, LOOP),
    "beams with scores": (lambda: {"num_beams": 3, "num_return_sequences": 2, **ALL_OUTPUTS}, LOOP),
    "beams, sampling": (lambda: {"num_beams": 3, "do_sample": True, "top_k": 12}, LOOP),
    "beams, own processor": (lambda: {"num_beams": 2, "no_repeat_ngram_size": 2, "length_penalty": 2.0}, LOOP),
    "beams, hidden states": (lambda: {"num_beams": 2, **ALL_HIDDEN}, LOOP),
    "attentions": (lambda: {"return_dict_in_generate": True, "output_attentions": True}, STOCK),
    "no cache": (lambda: {"use_cache": False}, STOCK),
    "cache by name": (lambda: {"cache_implementation": "dynamic"}, STOCK),
    "positions": (lambda: {"position_ids": torch.arange(6)[None] + 3}, STOCK),
    "right padding": (lambda: {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6])}, STOCK),
}


def random_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(5, 29, (batch, length), generator=torch.Generator().manual_seed(2))


def run(model, ids, **options):
    torch.manual_seed(3)
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options})


def by_transformers(monkeypatch, model, ids, **options):
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_fast_generation_devices", ())
        return run(model, ids, **options)


def assert_same(found, expected) -> None:
    """Tokens exactly, numbers to rounding."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
        return
    assert type(found) is type(expected) and found.keys() == expected.keys()
    assert torch.equal(found.sequences, expected.sequences)
    if getattr(expected, "beam_indices", None) is not None:
        assert torch.equal(found.beam_indices, expected.beam_indices)
    if getattr(expected, "sequences_scores", None) is not None:
        assert_close("logits", found.sequences_scores, expected.sequences_scores)
    for name in ("scores", "logits"):
        for mine, theirs in zip(found.get(name) or (), expected.get(name) or (), strict=True):
            finite = theirs.isfinite()
            assert torch.equal(finite, mine.isfinite())
            assert_close("logits", mine[finite], theirs[finite], name)
    for mine, theirs in zip(found.get("hidden_states") or (), expected.get("hidden_states") or (), strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_close("logits", one, other, "hidden states")
    assert_same_cache(found[CACHE_NAME], expected[CACHE_NAME])


def assert_same_cache(found, expected) -> None:
    assert type(found) is type(expected)
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        if hasattr(theirs, "keys"):
            assert mine.get_seq_length() == theirs.get_seq_length()
            assert_close("logits", mine.keys, theirs.keys)
            assert_close("logits", mine.values, theirs.values)
        else:
            assert_close("logits", mine.conv_states[0], theirs.conv_states[0])
            assert_close("logits", mine.recurrent_states[0], theirs.recurrent_states[0])


@pytest.mark.parametrize("name", REQUESTS)
def test_each_request_takes_its_path_and_has_transformers_results(name, small_model, paths, monkeypatch):
    options, path = REQUESTS[name]
    model, ids = small_model(), random_ids(2, 6)
    expected = by_transformers(monkeypatch, model, ids, **options())
    assert_same(run(model, ids, **options()), expected)
    assert [each[:2] for each in paths] == [path]


SHAPES = [(1, 1), (3, 5), (2, 20)]  # rows, tokens: shorter than the window and longer
CELLS = ["own processor", "own criterion", "scores, sampling", "beams with scores", "beams, sampling"]
CELLS += ["hidden states", "hidden states, sampling", "beams, hidden states"]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_all_lengths_with_padding_and_ends(kind, name, small_model, monkeypatch):
    model = small_model(kind)
    for rows, length in SHAPES:
        ids = random_ids(rows, length)
        mask = (torch.arange(length) >= torch.arange(rows)[:, None] * 2 % length).long()
        options = {"attention_mask": mask, "eos_token_id": [7, 8]}
        expected = by_transformers(monkeypatch, model, ids, **options, **REQUESTS[name][0]())
        assert_same(run(model, ids, **options, **REQUESTS[name][0]()), expected)


def test_hidden_states_without_the_last_norm_take_the_forward_pass(small_model, paths, monkeypatch):
    model, ids = small_model(), random_ids(2, 6)
    model.config.tie_last_hidden_states = False  # where Transformers reads it, the last one comes before the final norm
    expected = by_transformers(monkeypatch, model, ids, **ALL_HIDDEN)
    assert_same(run(model, ids, **ALL_HIDDEN), expected)
    assert [each[:2] for each in paths] == [FORWARD]


def test_hidden_states_of_a_prompt_in_chunks_are_those_of_the_last(small_model, paths, monkeypatch):
    """As Transformers has them, whose memory is bounded by the chunk that was asked for."""
    model, ids, options = small_model(), random_ids(2, 10), {**ALL_HIDDEN, "prefill_chunk_size": 4}
    expected = by_transformers(monkeypatch, model, ids, **options)
    assert_same(run(model, ids, **options), expected)
    assert expected.hidden_states[0][0].shape[1] == 2 and [each[:2] for each in paths] == [LOOP]


def test_what_stays_of_hidden_states_is_not_overwritten(small_model):
    """Each token's are its own: those of the first steps still stand when the last step has run."""
    found = run(small_model(), random_ids(1, 6), **ALL_HIDDEN).hidden_states[1:]
    assert len({tuple(map(float, each[-1].flatten())) for each in found}) > NEW // 2
    assert len({each[0].untyped_storage().data_ptr() for each in found}) == NEW - 1


@pytest.mark.parametrize(
    "name", ["greedy", "sampling", "own processor", "scores and logits", "hidden states", "beams with scores"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_models_with_something_of_their_own_take_the_forward_pass(kind, name, small_model, paths, monkeypatch):
    model, ids = small_model(kind), random_ids(3, 9)
    model.model.layers[0].mlp_block.act_fn = nn.SiLU()
    mask = (torch.arange(9) >= torch.tensor([[0], [4], [8]])).long()
    options = {"attention_mask": mask, **REQUESTS[name][0]()}
    expected = by_transformers(monkeypatch, model, ids, **options)
    options |= REQUESTS[name][0]()  # anew: they remember
    assert_same(run(model, ids, **options), expected)
    assert [each.step for each in paths] == ["forward"]


def test_a_returned_cache_can_be_continued(small_model, monkeypatch):
    model, ids = small_model(), random_ids(2, 6)
    more = random_ids(2, 3)

    def two_turns():
        first = run(model, ids, return_dict_in_generate=True)
        return run(model, torch.cat([first.sequences, more], dim=1), **{CACHE_NAME: first[CACHE_NAME]})

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_fast_generation_devices", ())
        expected = two_turns()
    assert torch.equal(two_turns(), expected)


def letters():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(ord("a") + i): 3 + i for i in range(26)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def test_stop_strings(small_model, paths, monkeypatch):
    tokenizer = letters()
    model, ids = small_model(), random_ids(1, 5)
    whole = by_transformers(monkeypatch, model, ids)[0].tolist()
    options = {"stop_strings": [tokenizer.decode(whole[7:10])], "tokenizer": tokenizer}
    expected = by_transformers(monkeypatch, model, ids, **options)
    assert torch.equal(run(model, ids, **options), expected) and expected.shape[1] < 5 + NEW
    assert [each[:2] for each in paths] == [LOOP]


class Recorder(BaseStreamer):
    def __init__(self):
        self.values = []

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.values.append("end")


def test_a_streamer_beside_an_own_processor(small_model, monkeypatch):
    model, ids, streamers = small_model(), random_ids(1, 5), [Recorder(), Recorder()]
    by_transformers(monkeypatch, model, ids, logits_processor=[Memory()], streamer=streamers[0])
    run(model, ids, logits_processor=[Memory()], streamer=streamers[1])
    assert streamers[0].values == streamers[1].values


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_of_the_users_leaves_the_next_call_right(error, small_model):
    model, ids, calls = small_model(), random_ids(2, 5), []
    expected = run(model, ids)

    def fails(input_ids, scores, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return scores

    with pytest.raises(error):
        run(model, ids, logits_processor=[fails])
    assert not any(step.busy for steps in kept_steps.STEPS[model].values() for step in steps)
    assert torch.equal(run(model, ids), expected)
    with pytest.raises(error):
        run(model, ids, num_beams=2, prefix_allowed_tokens_fn=lambda row, tokens: (_ for _ in ()).throw(error()))
    assert torch.equal(run(model, ids), expected)


def test_what_is_slow_says_so_once_with_reason_and_remedy(small_model, monkeypatch):
    said = []
    monkeypatch.setattr(decode_generate.logger, "warning_once", said.append)
    model = small_model()
    run(model, random_ids(2, 5))
    run(model, random_ids(2, 5), logits_processor=[Memory()])
    assert said == []
    run(model, random_ids(2, 5), **{CACHE_NAME: DynamicCache(config=model.config)})
    assert len(said) == 1 and "a DynamicCache that was passed. Remedy: keep states by model.prefill" in said[0]
    model.model.layers.insert(1, model.model.layers[0])
    run(model, random_ids(2, 5))
    assert "without a cache" in said[1] and "two of model.layers share place 0" in said[1]


def test_in_the_middle_of_a_training_with_checkpointing(small_model, paths):
    """As a callback that samples: nothing is computed again where there are no gradients."""
    model, ids = small_model(), random_ids(2, 5)
    expected = run(model, ids)
    model.gradient_checkpointing_enable()
    assert torch.equal(run(model.train(), ids), expected)
    assert torch.equal(run(model.eval(), ids), expected)
    assert [each.step for each in paths] == ["fused"] * 3


def on_a_gpu(model, **options):
    """What would be decided there: nothing but the checks of `forward_obstacles` asks for the device."""
    from modeling_griffin.decode.eligibility import forward_obstacles

    fake = SimpleNamespace(
        device=torch.device("cuda"),
        config=model.config,
        training=model.training,
        modules=model.modules,
        named_modules=model.named_modules,
        named_parameters=lambda: iter(()),
    )
    return next(forward_obstacles(fake), None)


DIRECTION = torch.ones(16)


def steer(module, args, output):
    return output + DIRECTION


def collect(module, args, output, into=[]):  # noqa: B006  a hook that remembers
    into.append(output)


SWITCH = True


def switched(module, args, output):
    return -output if SWITCH else output


class Counter:
    def __call__(self, module, args, output):
        self.seen = getattr(self, "seen", 0) + 1


def printing(module, args, output):
    print(output.shape)


def summing_into(total):
    return lambda module, args, output: total.add_(output.sum(0)[-1])


@pytest.mark.parametrize(
    "hook, reason",
    [
        (steer, None),
        (lambda module, args, output: torch.nn.functional.silu(output) * 2, None),
        (collect, "holds a list"),
        (switched, "reads the global SWITCH"),
        (Counter(), "is a Counter"),
        (printing, "calls print"),
        (summing_into(torch.zeros(16)), "in place"),
    ],
)
def test_which_hooks_a_recording_can_hold(hook, reason, small_model):
    model = small_model()
    assert on_a_gpu(model) is None
    model.model.layers[0].mlp_block.register_forward_hook(hook)
    found = on_a_gpu(model)
    assert found is None if reason is None else reason in found.reason and "mlp_block" in found.reason


def test_hooks_of_every_module_count_too(small_model):
    for hook, recordable in ((steer, True), (collect, False)):
        handle = nn.modules.module.register_module_forward_hook(hook)
        try:
            assert (on_a_gpu(small_model()) is None) == recordable
        finally:
            handle.remove()


def test_adapters_can_be_recorded(small_model):
    from peft import LoraConfig, inject_adapter_in_model

    for options in ({}, {"use_dora": True}):
        model = small_model()
        inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear", **options), model)
        assert on_a_gpu(model.eval()) is None
        model.train()
        inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1), model, "other")
        assert on_a_gpu(model).reason == "dropout in training mode"


def patch_linear(monkeypatch):
    real = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: real(self, x).roll(1, -1))


def patch_functional(monkeypatch):
    real = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *inputs: real(*inputs).roll(1, -1))


def patch_adapters(monkeypatch):
    from peft.tuners.lora.layer import Linear

    real = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x: real(self, x).roll(1, -1))


def patch_casts_of_adapters(monkeypatch):
    from peft.tuners.lora.layer import Linear

    monkeypatch.setattr(Linear, "_cast_input_dtype", lambda self, x, dtype: x.to(dtype).roll(1, -1))


def patch_dropout_of_adapters(monkeypatch):
    monkeypatch.setattr(nn.Identity, "forward", lambda self, x: x.roll(1, -1))


PATCHES = [None, patch_linear, patch_functional, patch_adapters, patch_casts_of_adapters, patch_dropout_of_adapters]


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("name", ["greedy", "scores and logits"])
def test_adapters_whose_operations_are_merged(name, patch, small_model, paths, monkeypatch):
    """Not so where somebody has put a function of his own in the place of one that they stand for."""
    from peft import LoraConfig, inject_adapter_in_model

    model, ids = small_model(), random_ids(2, 6)
    options = {"target_modules": "all-linear", "init_lora_weights": False}
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=5, **options), model).eval()
    if patch is not None:
        unpatched = run(model, ids)
        patch(monkeypatch)
        assert not torch.equal(run(model, ids), unpatched)
    expected = by_transformers(monkeypatch, model, ids, **REQUESTS[name][0]())
    assert_same(run(model, ids, **REQUESTS[name][0]()), expected)
    assert {each.step for each in paths} == {"forward"}


class Rolling(TorchFunctionMode):
    """Changes what each linear layer puts out."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        return y.roll(1, -1) if function is nn.functional.linear else y


def test_a_mode_sees_the_operations_of_adapters(small_model, paths, monkeypatch):
    """Which are merged in the calls before and behind."""
    from peft import LoraConfig, inject_adapter_in_model

    model, ids = small_model(), random_ids(2, 6)
    inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), model).eval()
    plain = run(model, ids)
    with Rolling():
        expected = by_transformers(monkeypatch, model, ids)
        assert torch.equal(run(model, ids), expected) and not torch.equal(expected, plain)
    assert torch.equal(run(model, ids), plain)
    assert [each.step for each in paths] == ["forward"] * 3


def test_dropout_of_one_block_counts(small_model):
    """Whatever the configuration and the model as a whole say: the block is what drops."""
    model = small_model(attention="sdpa")
    block = model.model.layers[2].temporal_block
    block.attention_dropout = 0.5
    assert on_a_gpu(model) is None and next(ineligible_model_reasons(model), None) is None
    block.train()
    assert on_a_gpu(model).reason == "dropout in training mode"
    assert next(ineligible_model_reasons(model)) == "attention_dropout in training mode"
