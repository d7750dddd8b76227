"""The state lives in the cache: chunks are the whole, generations do not meet, and the cache stops growing."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_griffin.cache_name import CACHE_NAME
from tests.tolerances import assert_close


VOCABULARY, WINDOW = 29, 8
KINDS = ("griffin", "hawk")


def random_ids(rows, length):
    return torch.randint(VOCABULARY, (rows, length))


def in_chunks(model, ids, sizes, cache=None, mask=None):
    logits, begin = [], 0
    for size in sizes:
        part = {} if mask is None else {"attention_mask": mask[:, : begin + size]}
        output = model(ids[:, begin : begin + size], past_key_values=cache, use_cache=True, **part)
        cache = output.past_key_values
        logits.append(output.logits)
        begin += size
    assert begin == ids.shape[1]
    return torch.cat(logits, dim=1), cache


def cache_bytes(cache):
    """What the cache keeps alive: whole storages, not views."""
    tensors = []
    for layer in cache.layers:
        if hasattr(layer, "conv_states"):
            tensors += [*_values(layer.conv_states), *_values(layer.recurrent_states)]
        else:
            tensors += [layer.keys, layer.values]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _values(states):
    return states.values() if isinstance(states, dict) else states


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 30])
@pytest.mark.parametrize("cache_class", [None, DynamicCache, StaticCache])
@torch.no_grad()
def test_token_by_token_is_the_whole(kind, length, cache_class, small_model):
    model, ids = small_model(kind, "sdpa"), random_ids(2, length)
    sizes = {DynamicCache: {}, StaticCache: {"max_cache_len": length}, None: {}}[cache_class]
    cache = cache_class(config=model.config, **sizes) if cache_class else None
    logits, _ = in_chunks(model, ids, [1] * length, cache)
    assert_close("logits", logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[30], [1, 29], [29, 1], [7, 8, 9, 6], [2, 1, 3, 1, 1, 22], [16, 14]], ids=str)
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@torch.no_grad()
def test_chunks_are_the_whole(kind, sizes, cache_class, small_model):
    model, ids = small_model(kind, "eager"), random_ids(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :5] = 0
    cache = cache_class(config=model.config, **({"max_cache_len": 33} if cache_class is StaticCache else {}))
    logits, _ = in_chunks(model, ids, sizes, cache, mask)
    assert_close("logits", logits[1], model(ids[1:]).logits[0])
    assert_close("logits", logits[0, 5:], model(ids[:1, 5:]).logits[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_two_generations_interleaved_on_one_model(kind, small_model):
    model = small_model(kind)
    first, second = random_ids(1, 21), random_ids(3, 17)
    caches, logits = [None, None], [[], []]
    for step in range(17):
        for index, ids in enumerate((first, second)):
            output = model(ids[:, step : step + 1], past_key_values=caches[index], use_cache=True)
            caches[index] = output.past_key_values
            logits[index].append(output.logits)
    for index, ids in enumerate((first, second)):
        assert_close("logits", torch.cat(logits[index], dim=1), model(ids[:, :17]).logits)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_forward_pass_leaves_no_trace_on_the_model(kind, small_model):
    model, ids = small_model(kind), random_ids(1, 9)
    before = model(ids).logits
    in_chunks(model, random_ids(2, 12), [5, 7])
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cache_stops_growing(kind, small_model):
    model, ids = small_model(kind), random_ids(1, 200)
    sizes, cache = [], None
    for step in range(200):
        cache = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True).past_key_values
        sizes.append(cache_bytes(cache))
    assert len(set(sizes[WINDOW:])) == 1
    recurrent = 2 * 24 * (model.config.conv1d_width + 1) * 4  # 2 layers of 24 channels in float32
    assert sizes[-1] == recurrent + (kind == "griffin") * 2 * WINDOW * 8 * 4  # keys and values of 8 numbers
    # A long prefill keeps no more, once the next token has come.
    _, cache = in_chunks(model, ids, [199, 1])
    assert cache_bytes(cache) == sizes[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_dtypes_in_the_cache(dtype, small_model):
    """The recurrent state is float32 whatever the model is, and carries more than the model's own precision."""
    model, ids = small_model().to(dtype), random_ids(1, 9)
    _, cache = in_chunks(model, ids, [4, 5])
    for layer in cache.layers[:2]:
        assert layer.conv_states[0].dtype == dtype
        assert layer.conv_states[0].shape == (1, 24, model.config.conv1d_width)
        state = layer.recurrent_states[0]
        assert state.dtype == torch.float32 and state.shape == (1, 24)
        assert dtype == torch.float32 or not torch.equal(state.to(dtype).float(), state)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_continuing_a_conversation_with_right_padded_rows(kind, small_model):
    """Turn after turn, each right-padded to the longest row of the turn: as each row's own tokens in one go."""
    model = small_model(kind, attention_window_size=64 if kind == "griffin" else WINDOW)
    turns = [[3, 6, 1], [5, 1, 0], [2, 2, 4]]  # tokens of each row in each turn
    cache, mask = None, torch.zeros(3, 0, dtype=torch.long)
    tokens, logits = [[], [], []], [[], [], []]
    for lengths in turns:
        width = max(lengths)
        ids = random_ids(3, width)
        real = torch.arange(width) < torch.tensor(lengths)[:, None]
        mask = torch.cat([mask, real.long()], dim=1)
        output = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        for row, length in enumerate(lengths):
            tokens[row] += ids[row, :length].tolist()
            logits[row].append(output.logits[row, :length])
    for row in range(3):
        assert_close("logits", torch.cat(logits[row]), model(torch.tensor([tokens[row]])).logits[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_documents_over_chunks(kind, small_model):
    """A new document may start, end and go on anywhere, over the edge of the window too."""
    model, sizes = small_model(kind), [1, 13, 4, 1, 1, 11]
    documents = [random_ids(1, size) for size in sizes]
    ids = torch.cat(documents, dim=1)
    position_ids = torch.cat([torch.arange(size) for size in sizes])[None]
    for chunk in (1, 3, 9, 14):
        cache, logits = None, []
        for begin in range(0, ids.shape[1], chunk):
            part = slice(begin, begin + chunk)
            output = model(ids[:, part], position_ids=position_ids[:, part], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        assert_close("logits", torch.cat(logits, dim=1), torch.cat([model(one).logits for one in documents], dim=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[1] * 14, [3, 1, 8, 2]], ids=["tokens", "chunks"])
def test_gradient_through_the_cache(kind, sizes, small_model):
    """Back-propagation through time over chunks is that of the whole."""
    model, ids, upstream = small_model(kind, "sdpa"), random_ids(2, 14), torch.randn(2, 14, VOCABULARY)
    logits, _ = in_chunks(model, ids, sizes)
    parameters = list(model.parameters())
    actual = torch.autograd.grad(logits, parameters, upstream)
    expected = torch.autograd.grad(model(ids, use_cache=False).logits, parameters, upstream)
    for one, wanted in zip(actual, expected, strict=True):
        assert_close("gradient", one, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_gradient(kind, small_model):
    """States made without gradients are constants: the second chunk trains, the first does not."""
    model, ids = small_model(kind), random_ids(1, 12)
    embeds = torch.randn(1, 12, 16, requires_grad=True)
    with torch.no_grad():
        cache = model(inputs_embeds=embeds[:, :7], use_cache=True).past_key_values
    logits = model(inputs_embeds=embeds[:, 7:], past_key_values=cache, labels=ids[:, 7:])
    assert_close("logits", logits.logits, model(inputs_embeds=embeds).logits[:, 7:])
    (gradient,) = torch.autograd.grad(logits.loss, embeds)
    assert (gradient[:, :7] == 0).all() and (gradient[:, 7:11] != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_with_a_filled_cache_raises(kind, small_model):
    """Transformers' checkpointed layers would forget the state without a word."""
    model, ids = small_model(kind), random_ids(1, 9)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="past_key_values.*checkpointing"):
        model(ids[:, 4:], past_key_values=cache)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [4, 8, 10])
def test_mask_of_a_wrong_width_raises(kind, width, small_model):
    """With 5 tokens in the cache and 4 new ones the mask has 9 columns. (A Hawk's cache does not count its tokens.)"""
    model = small_model(kind)
    cache = model(random_ids(1, 5), use_cache=True).past_key_values
    model(random_ids(1, 4), past_key_values=cache, attention_mask=torch.ones(1, 9))
    if kind == "hawk" and width > 4:
        return
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(random_ids(1, 4), past_key_values=cache, attention_mask=torch.ones(1, width))


def test_packing_arguments_with_a_filled_cache_raise(small_model):
    """Nobody can tell whether the chunk's first token starts a document; position_ids say it."""
    model, ids = small_model(), random_ids(1, 9)
    seq_idx, position_ids = torch.zeros(1, 9, dtype=torch.long), torch.arange(9)[None]
    cache = model(ids[:, :5], seq_idx=seq_idx[:, :5], use_cache=True).past_key_values
    for kwargs in ({"seq_idx": seq_idx[:, 5:]}, {"cu_seq_lens_q": torch.tensor([0, 4])}):
        with pytest.raises(ValueError, match="position_ids"):
            model(ids[:, 5:], past_key_values=cache, **kwargs)
    logits = model(ids[:, 5:], past_key_values=cache, seq_idx=seq_idx[:, 5:], position_ids=position_ids[:, 5:]).logits
    assert_close("logits", logits, model(ids).logits[:, 5:])


@pytest.mark.parametrize("sizes", [[5, 1], [1] * 6, [6]], ids=str)
@torch.no_grad()
def test_a_static_cache_that_is_too_small_raises(sizes, small_model):
    """Transformers' layer would forget keys that the window still sees. From the window on, any length has room."""
    model, ids = small_model(attention="sdpa"), random_ids(1, 30)
    with pytest.raises(
        ValueError, match="past_key_values has room for 5 tokens and would hold 6: allowed is a max_cache_len"
    ):
        in_chunks(model, ids[:, :6], sizes, StaticCache(config=model.config, max_cache_len=5))
    in_chunks(model, ids[:, :5], [5], StaticCache(config=model.config, max_cache_len=5))
    logits, _ = in_chunks(model, ids, [*sizes, 23, 1], StaticCache(config=model.config, max_cache_len=WINDOW))
    assert_close("logits", logits, model(ids).logits)


def test_a_cache_of_another_model_raises(small_model):
    with pytest.raises(ValueError, match="past_key_values, a DynamicCache, has 2 layers"):
        small_model()(random_ids(1, 3), past_key_values=DynamicCache(config=small_model("hawk").config))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_reordered_and_repeated_rows(kind, small_model):
    """What beam search does between its steps."""
    model, ids, more = small_model(kind), random_ids(3, 11), random_ids(3, 4)
    order = torch.tensor([2, 0, 0])
    cache = model(ids, use_cache=True).past_key_values
    cache.reorder_cache(order)
    expected = model(torch.cat([ids[order], more], dim=1)).logits[:, 11:]
    assert_close("logits", model(more, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_reset(kind, small_model):
    model, ids = small_model(kind), random_ids(1, 11)
    cache = DynamicCache(config=model.config) if kind == "hawk" else StaticCache(config=model.config, max_cache_len=16)
    first = model(ids, past_key_values=cache).logits
    cache.reset()
    if kind == "griffin":
        assert torch.equal(model(ids, past_key_values=cache).logits, first)
    else:
        assert all((layer.recurrent_states[0] == 0).all() for layer in cache.layers)


# generate

PROMPT_MASK = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])


def greedy_by_hand(model, ids, mask, new):
    """No cache, one row at a time, the whole row again for each token."""
    rows = []
    for row in range(ids.shape[0]):
        tokens = ids[row, mask[row].bool()][None]
        for _ in range(new):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        rows.append(tokens[0, -new:])
    return torch.stack(rows)


def generate(model, ids, mask=PROMPT_MASK, new=14, **kwargs):
    torch.manual_seed(4)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, pad_token_id=0, **kwargs)[:, ids.shape[1] :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["default", "static", "no cache", "own cache"])
@torch.no_grad()
def test_greedy_generation(kind, how, small_model):
    model, ids = small_model(kind, "sdpa"), random_ids(2, 5)
    kwargs = {
        "default": {},
        "static": {"cache_implementation": "static"},
        "no cache": {"use_cache": False},
        "own cache": {CACHE_NAME: DynamicCache(config=model.config)},
    }[how]
    if kind == "hawk" and how == "own cache" and CACHE_NAME == "past_key_values":
        # Up to Transformers 5.23 generate asks for a length that only attention layers know.
        with pytest.raises(ValueError, match="get_seq_length"):
            generate(model, ids, **kwargs)
        return
    expected = greedy_by_hand(model, ids, PROMPT_MASK, 14)
    assert len(expected.unique()) > 4  # not one token for ever
    assert torch.equal(generate(model, ids, do_sample=False, **kwargs), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
        {"num_beams": 3, "do_sample": True},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(kind, options, small_model):
    model, ids = small_model(kind, "sdpa"), random_ids(2, 5)
    expected = generate(model, ids, use_cache=False, **options)
    assert torch.equal(generate(model, ids, **options), expected)
    assert torch.equal(generate(model, ids, cache_implementation="static", **options), expected)


@torch.no_grad()
def test_chunked_prefill(small_model):
    model, ids = small_model(attention="sdpa"), random_ids(2, 5)
    assert torch.equal(generate(model, ids, prefill_chunk_size=2), generate(model, ids))


@torch.no_grad()
def test_a_conversation_through_generate(small_model):
    """The cache of one answer continues with the next question."""
    model, ids = small_model(), random_ids(1, 5)
    first = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    question = torch.cat([first.sequences, random_ids(1, 4)], dim=1)
    cached = model.generate(question, max_new_tokens=6, do_sample=False, **{CACHE_NAME: first[CACHE_NAME]})
    assert torch.equal(cached, model.generate(question, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generation_from_embeddings(kind, small_model):
    model, ids = small_model(kind), random_ids(2, 5)
    embeds = model.get_input_embeddings()(ids)
    actual = model.generate(inputs_embeds=embeds, attention_mask=PROMPT_MASK, max_new_tokens=9, pad_token_id=0)
    assert torch.equal(actual, generate(model, ids, new=9))


@pytest.mark.parametrize("change", ["doubled", "copied", "block shared", "appended", "another kind's"])
@torch.no_grad()
def test_blocks_that_share_a_place_of_the_cache(change, small_model):
    """Each would go on from the other's state: refused with a cache, also with the one that a call makes by itself."""
    model, ids = small_model(), torch.randint(5, 29, (2, 6))
    layers = model.model.layers
    if change == "doubled":
        layers.insert(1, layers[0])
    elif change == "copied":
        layers.insert(1, copy.deepcopy(layers[0]))
    elif change == "block shared":
        layers[1].temporal_block = layers[0].temporal_block
    else:
        layers.append(copy.deepcopy(layers[0]))
        layers[-1].temporal_block.layer_idx = 3 if change == "appended" else 2
    assert torch.isfinite(model(ids, use_cache=False).logits).all()
    for options in ({}, {"past_key_values": DynamicCache(config=model.config)}):
        with pytest.raises(ValueError, match="layer_idx = . of a .* is no place of its own in the cache: allowed"):
            model(ids, **options)
