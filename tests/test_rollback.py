"""Tokens taken back leave no trace, and speculative decoding finds the tokens of plain greedy decoding."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from modeling_griffin.rollback import MAX_ROLLBACK, RollbackLayer
from tests.tolerances import assert_close


pytestmark = pytest.mark.usefixtures("transformers_loop")  # which takes back what a cache has read
VOCABULARY, WINDOW = 29, 8
KINDS = ("griffin", "hawk", "attention_first")


def random_ids(rows, length, seed=2):
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def recording_cache(model):
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    return cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [1, 3, 7, 20], ids="prompt {}".format)
@pytest.mark.parametrize("removed", [0, 1, 2, 5])
@torch.no_grad()
def test_removed_tokens_leave_no_trace(kind, prompt, removed, small_model):
    """Prefill, a draft of 6 tokens of which some go, and again: as if the removed ones had never come."""
    model, ids, wrong = small_model(kind, "sdpa"), random_ids(2, prompt + 12), random_ids(2, 12, seed=9)
    cache, kept = recording_cache(model), prompt
    model(ids[:, :prompt], past_key_values=cache)
    cache.crop(0)
    for _ in range(2):
        right = 6 - removed
        draft = torch.cat([ids[:, kept : kept + right], wrong[:, :removed]], dim=1)
        logits = model(draft, past_key_values=cache).logits
        assert_close("logits", logits[:, :right], model(ids[:, : kept + right]).logits[:, kept:])
        cache.crop(-removed)
        kept += right
    assert kind == "hawk" or cache.get_seq_length() == kept
    after = model(wrong[:, :3], past_key_values=cache).logits
    assert_close("logits", after, model(torch.cat([ids[:, :kept], wrong[:, :3]], dim=1)).logits[:, kept:])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_crop_over_several_forward_passes(kind, small_model):
    """As an assistant drafts: token by token, then back; also into the prefill itself.

    Within the window: Transformers' attention layers of 5.17 mistake their length here when it is past.
    """
    model, ids = small_model(kind, attention_window_size=16), random_ids(1, 9)
    for kept in range(9):  # 0: as if nothing had come at all
        cache = recording_cache(model)
        model(ids[:, :3], past_key_values=cache)
        for t in range(3, 9):
            model(ids[:, t : t + 1], past_key_values=cache)
        cache.crop(kept - 9)
        rest = model(ids[:, kept:], past_key_values=cache).logits
        assert_close("logits", rest, model(ids).logits[:, kept:])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_and_documents_inside_what_is_removed(kind, small_model):
    """Rows padded on the left, and documents that start in the chunk: states behind each token are those of the row."""
    model, ids = small_model(kind), random_ids(2, 7)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    for removed in range(4):
        cache = recording_cache(model)
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.crop(-removed)
        kept = 7 - removed
        logits = model(ids[:, kept - 1 :], attention_mask=_repeat_column(mask, kept), past_key_values=cache).logits
        for row, begin in enumerate((3, 0)):
            alone = torch.cat([ids[row, begin:kept], ids[row, kept - 1 :]])[None]
            assert_close("logits", logits[row], model(alone).logits[0, kept - begin :])
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    for removed in range(5):
        cache, kept = recording_cache(model), 7 - removed
        model(ids[:1], position_ids=position_ids, past_key_values=cache)
        cache.crop(-removed)
        if removed:
            rest = model(ids[:1, kept:], position_ids=position_ids[:, kept:], past_key_values=cache).logits
            assert_close("logits", rest, model(ids[:1], position_ids=position_ids).logits[:, kept:])


def _repeat_column(mask, kept):
    """The mask for the kept tokens and then the last of them and all that follow once more."""
    return torch.cat([mask[:, :kept], torch.ones_like(mask[:, kept - 1 :])], dim=1)


@torch.no_grad()
def test_states_are_kept_in_float32(small_model):
    """A bfloat16 model goes back to the very state that it had, not to a rounded one."""
    model, ids = small_model().to(torch.bfloat16), random_ids(1, 10)
    cache = recording_cache(model)
    model(ids, past_key_values=cache)
    cache.crop(-4)
    expected = model(ids[:, :6]).past_key_values.layers[0]
    layer = cache.layers[0]
    assert layer.recurrent_states[0].dtype == torch.float32
    assert_close("layer", layer.recurrent_states[0], expected.recurrent_states[0])
    assert torch.equal(layer.conv_states[0], expected.conv_states[0])


@torch.no_grad()
def test_what_is_kept_is_bounded(small_model):
    model, ids = small_model("hawk"), random_ids(1, 3 * MAX_ROLLBACK)
    cache = recording_cache(model)
    model(ids[:, :-5], past_key_values=cache)
    for t in range(5, 0, -1):
        model(ids[:, -t : ids.shape[1] - t + 1], past_key_values=cache)
    layer = cache.layers[0]
    assert layer.conv_history.untyped_storage().nbytes() == (MAX_ROLLBACK + 1) * 24 * 4 * 4
    assert layer.recurrent_history.untyped_storage().nbytes() == (MAX_ROLLBACK + 1) * 24 * 4
    with pytest.raises(ValueError, match=rf"crop\(-{MAX_ROLLBACK + 1}\): allowed is -{MAX_ROLLBACK} to 0"):
        layer.crop(-MAX_ROLLBACK - 1)
    cache.crop(-MAX_ROLLBACK)
    assert layer.conv_history is None and layer.recurrent_history is None
    kept = ids.shape[1] - MAX_ROLLBACK
    assert_close("logits", model(ids[:, kept:], past_key_values=cache).logits, model(ids).logits[:, kept:])


@torch.no_grad()
def test_what_cannot_be_removed_raises(small_model):
    model, ids = small_model(), random_ids(1, 5)
    layer = lambda cache: cache.layers[0]  # noqa: E731
    cache = recording_cache(model)
    model(ids, past_key_values=cache)
    for number in (1, -6):
        with pytest.raises(ValueError, match=rf"crop\({number}\): allowed is -5 to 0"):
            layer(cache).crop(number)
    cache.crop(-2)
    with pytest.raises(ValueError, match=r"crop\(-1\): allowed is -0 to 0"):
        layer(cache).crop(-1)
    stock = model(ids).past_key_values
    assert not isinstance(layer(stock), RollbackLayer)  # only where the past is recorded
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        stock.crop(-1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_reset_and_reordered_rows(kind, small_model):
    model, ids, more = small_model(kind), random_ids(3, 6), random_ids(3, 2, seed=5)
    cache = recording_cache(model)
    model(ids, past_key_values=cache)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    cache.crop(-2)
    expected = model(torch.cat([ids[order, :4], more], dim=1)).logits[:, 4:]
    assert_close("logits", model(more, past_key_values=cache).logits, expected)
    if kind == "hawk":  # other caches' stock attention layers hold on to an unwindowed past over a reset
        cache.reset()
        assert_close("logits", model(ids, past_key_values=cache).logits, model(ids).logits)
        cache.crop(-3)
        assert_close("logits", model(ids[:, 3:], past_key_values=cache).logits, model(ids).logits[:, 3:])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_recording_is_switched_off(kind, small_model):
    """As Transformers does before it hands a cache back: the layers that recorded go on."""
    model, ids = small_model(kind), random_ids(1, 12)
    cache = recording_cache(model)
    model(ids[:, :5], past_key_values=cache)
    cache.crop(-1)
    for layer in cache.layers:
        layer.record_past = False
    for begin, end in ((4, 5), (5, 8), (8, 12)):
        logits = model(ids[:, begin:end], past_key_values=cache).logits
        assert_close("logits", logits, model(ids[:, :end]).logits[:, begin:])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_recording_starts_on_a_filled_cache(attention, small_model):
    """And takes back as many tokens as it keeps, of a chunk that is longer too."""
    model = small_model("griffin", attention)
    for new, removed in ((8, 8), (MAX_ROLLBACK, MAX_ROLLBACK), (MAX_ROLLBACK + 1, MAX_ROLLBACK), (200, MAX_ROLLBACK)):
        ids = random_ids(1, 12 + new)
        cache = model(ids[:, :12]).past_key_values
        cache.activate_past_recording()
        model(ids[:, 12:], past_key_values=cache)
        cache.crop(-removed)
        rest = model(ids[:, -removed:], past_key_values=cache).logits
        assert_close("logits", rest, model(ids).logits[:, -removed:])


# Speculative decoding


def generate(model, ids, **kwargs):
    defaults = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **{**defaults, **kwargs})


def repetitive_prompt(seed):
    """A prompt that repeats itself, so that its drafts are sometimes right; of any length from 1 to 24."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.randint(5, VOCABULARY, (1, 1 + seed % 6), generator=generator)
    return unit.repeat(1, 1 + seed % 4)


@pytest.fixture
def removed(monkeypatch):
    """What each crop of the first recurrent layers removed."""
    numbers, crop = [], RollbackLayer.crop

    def record(self, tokens_to_remove):
        numbers.append(-tokens_to_remove)
        return crop(self, tokens_to_remove)

    monkeypatch.setattr(RollbackLayer, "crop", record)
    return numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafted", [1, 3, 10])
def test_prompt_lookup_finds_the_tokens_of_greedy_decoding(kind, drafted, small_model, removed):
    model = small_model(kind, "sdpa")
    for seed in range(12):
        ids = repetitive_prompt(seed)
        found = generate(model, ids, prompt_lookup_num_tokens=drafted)
        assert torch.equal(found, generate(model, ids)), seed
    assert 0 in removed and max(removed) == drafted  # whole drafts were kept, and whole drafts rejected


@pytest.mark.parametrize("kind", ["griffin", "attention_first"])
@pytest.mark.parametrize("which", ["itself", "smaller"])
def test_an_assistant_model(kind, which, small_model, removed):
    model = small_model(kind, "sdpa")
    assistant = model if which == "itself" else small_model("griffin", "sdpa", hidden_size=32)
    assistant.generation_config.num_assistant_tokens = 3
    for seed in range(6):
        ids = random_ids(1, 1 + seed, seed)
        new = {"max_new_tokens": 24 if which == "itself" else WINDOW + 4}
        assert torch.equal(generate(model, ids, assistant_model=assistant, **new), generate(model, ids, **new)), seed
    assert which == "itself" or max(removed) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_inside_the_draft(kind, small_model):
    """Every token of the answer in turn ends it, drafted or not; the cache that comes back ends there too."""
    model, ids = small_model(kind, "sdpa"), repetitive_prompt(11)
    whole = generate(model, ids)
    for eos in whole[0, ids.shape[1] :].unique().tolist():
        options = {"eos_token_id": eos, "return_dict_in_generate": True}
        found = generate(model, ids, prompt_lookup_num_tokens=5, **options)
        expected = generate(model, ids, **options)
        assert torch.equal(found.sequences, expected.sequences)
        if kind != "hawk":
            assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


def test_bfloat16(small_model):
    """Chunks and single tokens round differently in bfloat16, so equal tokens are asked of float32 only."""
    model, ids = small_model("griffin", "sdpa").to(torch.bfloat16), repetitive_prompt(11)
    found = generate(model, ids, prompt_lookup_num_tokens=4)
    assert found.shape == (1, ids.shape[1] + 24)
    with torch.no_grad():
        logits = model(found, use_cache=False).logits[0, ids.shape[1] - 1 : -1].float()
    chosen = logits.gather(1, found[0, ids.shape[1] :, None])[:, 0]
    assert ((logits.max(-1).values - chosen) <= 0.02 * logits.abs().max()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_with_drafts_is_reproducible(kind, small_model):
    model, ids = small_model(kind, "sdpa"), repetitive_prompt(7)
    options = {"prompt_lookup_num_tokens": 3, "do_sample": True, "temperature": 0.7}
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(generate(model, ids, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_of_the_first_layers_are_refused(kind, small_model):
    """And leave the model as it was: Transformers shortens its configuration for them."""
    model, ids = small_model(kind), random_ids(1, 4)
    expected = generate(model, ids)
    with pytest.raises(ValueError, match="assistant_early_exit = 1: allowed is None; drafts come from"):
        generate(model, ids, assistant_early_exit=1)
    assert model.config.num_hidden_layers == len(model.model.layers)
    assert torch.equal(generate(model, ids), expected)


def test_a_static_cache_and_several_rows_are_refused(small_model):
    """By Transformers, in its own words."""
    model = small_model()
    with pytest.raises(ValueError, match="Static|can be cropped"):
        generate(model, random_ids(1, 4), prompt_lookup_num_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="batch_size = 1"):
        generate(model, random_ids(2, 4), prompt_lookup_num_tokens=2)
    assert not hasattr(StaticCache(config=model.config, max_cache_len=4).layers[2], "activate_past_recording")


@pytest.mark.parametrize("kind", ["griffin", "attention_first"])
def test_a_static_cache_within_the_window(kind, small_model, removed):
    """Transformers crops static attention layers from 5.24 on, as long as they hold no more than the window."""
    model = small_model(kind, "sdpa", attention_window_size=64)
    options = {"prompt_lookup_num_tokens": 3, "cache_implementation": "static"}
    if not getattr(StaticLayer, "is_croppable", False):
        with pytest.raises(ValueError, match="Static"):
            generate(model, repetitive_prompt(7), **options)
        return
    for seed in range(12):
        ids = repetitive_prompt(seed)
        assert torch.equal(generate(model, ids, **options), generate(model, ids)), seed
    assert 0 in removed and max(removed) == 3
