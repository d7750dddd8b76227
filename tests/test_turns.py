"""Caches and turns: made elsewhere, continued, sampled in the middle of a training; right, or one clear line."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_griffin import GriffinForCausalLM
from modeling_griffin.cache_name import CACHE_NAME
from modeling_griffin.rollback import MAX_DRAFTS
from tests.tolerances import assert_close


VOCABULARY = 29
GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


def random_ids(rows, length):
    return torch.randint(1, VOCABULARY, (rows, length))  # `generate` would take 0 for padding


@pytest.mark.parametrize("kind", ["griffin", "hawk"])
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_a_cache_from_inference_mode(kind, cache_class, small_model):
    model, ids = small_model(kind, "sdpa"), random_ids(2, 20)
    cache = cache_class(config=model.config, **({"max_cache_len": 40} if cache_class is StaticCache else {}))
    with torch.inference_mode():
        model(ids[:, :9], past_key_values=cache, use_cache=True)
    with torch.no_grad():
        logits = model(ids[:, 9:], past_key_values=cache, use_cache=True).logits
    assert_close("logits", logits, model(ids).logits[:, 9:])


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("new_only", [False, True])
@torch.no_grad()
def test_a_second_turn_of_a_hawk(padding, new_only, small_model):
    model, ids, mask = small_model("hawk", "sdpa"), random_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :padding] = 0
    cache = DynamicCache(config=model.config)
    said = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    if new_only:  # the last token that was said has not been read
        cache = DynamicCache(config=model.config)
        model(said, attention_mask=torch.nn.functional.pad(mask, (0, 10), value=1), past_key_values=cache)
    ids = torch.cat([said, random_ids(2, 3)], dim=1)
    mask = torch.nn.functional.pad(mask, (0, 13), value=1)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)[:, -10:]
    ids = ids[:, -3:] if new_only else ids
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)[:, -10:]
    assert torch.equal(found, expected)


def test_a_mask_that_leaves_out_a_hawks_past_raises(small_model):
    model, cache = small_model("hawk"), None
    cache = getattr(model(random_ids(2, 5), use_cache=True), CACHE_NAME)
    for positions in (None, torch.arange(5, 8)):
        with pytest.raises(ValueError, match="attention_mask has shape"):
            model(random_ids(2, 3), attention_mask=torch.ones(2, 3), position_ids=positions, past_key_values=cache)


@pytest.mark.parametrize("kind", ["griffin", "hawk"])
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"output_scores": True}, {}, {"num_beams": 2, "embeds": True}], ids=str
)
@torch.no_grad()
def test_prompts_in_chunks(kind, options, small_model):
    model, ids, mask = small_model(kind, "sdpa"), random_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :6] = 0
    options, arguments = dict(options), {"attention_mask": mask, "return_dict_in_generate": True, **GREEDY}
    prompt = {"input_ids": ids}
    if options.pop("embeds", False):
        if kind == "griffin":
            pytest.skip("Transformers' own chunks take no embeddings")
        prompt = {"inputs_embeds": model.get_input_embeddings()(ids)}
    expected = model.generate(**prompt, **arguments, **options)
    found = model.generate(**prompt, **arguments, **options, prefill_chunk_size=4)
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("layers", [slice(3), slice(2), slice(3, 6), slice(2, 4)], ids=str)
@torch.no_grad()
def test_fewer_layers_than_the_configuration(layers, small_model):
    """People cut layers off to look inside; the cache is still made for all."""
    kinds = ["linear_attention", "linear_attention", "sliding_attention"] * 2
    model, ids = small_model(attention="sdpa", layer_types=kinds), random_ids(2, 30)
    model.model.layers = model.model.layers[layers]
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :4] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    for packing in ({}, {"attention_mask": mask}):
        expected = model(ids, use_cache=False, **packing).logits
        cache, parts = DynamicCache(config=model.config), []
        for begin, end in ((0, 13), (13, 14), (14, 15), (15, 30)):
            part = {"attention_mask": mask[:, :end]} if packing else {}
            parts.append(model(ids[:, begin:end], past_key_values=cache, **part).logits)
        real = mask.bool() if packing else torch.ones(2, 30, dtype=torch.bool)
        assert_close("logits", torch.cat(parts, dim=1)[real], expected[real])


@torch.no_grad()
def test_another_models_cache_raises(small_model):
    model, ids = small_model(attention="sdpa"), random_ids(2, 5)
    others = {
        "is of another model: its layer 0": {"layer_types": ["sliding_attention"] * 2 + ["linear_attention"]},
        "with a window of 4: allowed is sliding_attention with 8": {"attention_window_size": 4},
        r"\(rows, channels, taps\) = \(2, 12, 4\) in layer 0: allowed is \(2, 24, 4\)": {"lru_width": 12},
        r"\(rows, channels, taps\) = \(2, 24, 3\) in layer 0": {"conv1d_width": 3},
    }
    for message, fields in others.items():
        cache = getattr(small_model(attention="sdpa", **fields)(ids, use_cache=True), CACHE_NAME)
        with pytest.raises(ValueError, match=message):
            model(ids, past_key_values=cache)
    cache = getattr(model(ids[:1], use_cache=True), CACHE_NAME)
    with pytest.raises(ValueError, match=r"past_key_values has \(rows, channels, taps\) = \(1, 24, 4\)"):
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="has 0 layers"):
        model(ids, past_key_values=DynamicCache())


@pytest.mark.parametrize("kind", ["griffin", "hawk"])
@pytest.mark.parametrize("loop", [False, True])
def test_sampling_in_the_middle_of_a_checkpointed_training(kind, loop, small_model, monkeypatch):
    if loop:
        monkeypatch.setattr(GriffinForCausalLM, "_fast_generation_devices", ())
    model, ids = small_model(kind, "sdpa"), random_ids(2, 12)
    expected = model.generate(ids, **GREEDY)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match="past_key_values with gradient checkpointing"):
        model(ids, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("kind", ["griffin", "hawk"])
@pytest.mark.parametrize("by", ["lookup", "assistant"])
@torch.no_grad()
def test_two_hundred_drafts(kind, by, small_model):
    """More than can be taken back: fewer are read at once, and the tokens are the same."""
    model, ids = small_model(kind, "sdpa"), random_ids(1, 150).repeat(1, 2)
    expected = model.generate(ids, **{**GREEDY, "max_new_tokens": 40})
    drafts = {"prompt_lookup_num_tokens": 200}
    if by == "assistant":
        assistant = small_model("griffin", "sdpa")
        torch.nn.init.normal_(assistant.lm_head.weight)
        assistant.generation_config.num_assistant_tokens = 200
        assistant.generation_config.assistant_confidence_threshold = 0.0
        drafts = {"assistant_model": assistant}
    read = []
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    found = model.generate(ids, **{**GREEDY, "max_new_tokens": 40}, **drafts)
    assert torch.equal(found, expected)
    assert max(read[1:], default=1) <= MAX_DRAFTS + 1
