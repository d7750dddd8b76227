"""Padding anywhere: a window of real tokens, whatever stands between them, and masks of any one number."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_griffin import GriffinForSequenceClassification
from modeling_griffin.documents import masks_for_generate
from modeling_griffin.padding import inverse_of, zeros_first
from tests.tolerances import assert_close


VOCABULARY, WINDOW = 29, 8
ATTENTIONS = ("sdpa", "eager")


def random_ids(rows, length):
    return torch.randint(1, VOCABULARY, (rows, length))  # `generate` would take 0 for padding


def random_layout(rows, length):
    """Tokens, a mask with gaps, and positions of packed documents, each (rows, length)."""
    mask, starts = torch.rand(rows, length) < 0.6, torch.rand(rows, length) < 0.15
    positions = torch.full((rows, length), 3)
    for row in range(rows):
        position = 0
        for slot in mask[row].nonzero()[:, 0].tolist():
            position = 0 if starts[row, slot] else position
            positions[row, slot], position = position, position + 1
    return random_ids(rows, length), mask, positions


def assert_rows_alone(model, logits, ids, mask, **packing):
    """Every row's logits at its real tokens are those of the row without padding."""
    for row, real in enumerate(mask.bool()):
        alone = {name: values[row, real][None] for name, values in packing.items()}
        assert_close("logits", logits[row, real], model(ids[row, real][None], use_cache=False, **alone).logits[0])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", ["griffin", "attention_first", "hawk"])
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_gaps_beyond_the_window(kind, attention, packed, small_model):
    model, (ids, mask, positions) = small_model(kind, attention), random_layout(3, 5 * WINDOW)
    packing = {"position_ids": positions} if packed else {}
    assert_rows_alone(model, model(ids, attention_mask=mask, **packing).logits, ids, mask, **packing)


@pytest.mark.parametrize("sizes", [[1] * 40, [7, 1, 13, 3, 1, 15], [39, 1]], ids=["1", "mixed", "last"])
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_gaps_in_chunks(sizes, packed, small_model):
    model, (ids, mask, positions) = small_model(attention="sdpa"), random_layout(3, 5 * WINDOW)
    cache, parts, end = DynamicCache(config=model.config), [], 0
    for size in sizes:
        begin, end = end, end + size
        packing = {"position_ids": positions[:, begin:end]} if packed else {}
        arguments = {"attention_mask": mask[:, :end], "past_key_values": cache, **packing}
        parts.append(model(ids[:, begin:end], **arguments).logits)
    packing = {"position_ids": positions} if packed else {}
    assert_rows_alone(model, torch.cat(parts, dim=1), ids, mask, **packing)


def test_gradients_of_gaps(small_model):
    model, (ids, mask, _) = small_model(attention="sdpa").train(), random_layout(1, 5 * WINDOW)
    gradients = []
    for tokens, arguments in ((ids, {"attention_mask": mask}), (ids[mask][None], {})):
        model.zero_grad()
        logits = model(tokens, **arguments).logits
        (logits[mask] if arguments else logits[0]).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for found, expected in zip(*gradients):
        assert_close("gradient", found, expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_a_shared_prefix_longer_than_the_window(attention, small_model):
    """How people share a system prompt: one cache, forked to a batch of suffixes that are padded on the left."""
    model, prefix = small_model(attention=attention), random_ids(1, 20)
    suffixes, new = [random_ids(1, size) for size in (1, 9, 14)], random_ids(3, 12)
    ids, mask = torch.zeros(3, 14, dtype=torch.long), torch.zeros(3, 34, dtype=torch.long)
    mask[:, :20] = 1
    for row, suffix in enumerate(suffixes):
        ids[row, 14 - suffix.shape[1] :], mask[row, 34 - suffix.shape[1] :] = suffix[0], 1
    cache = DynamicCache(config=model.config)
    model(prefix, past_key_values=cache)
    cache.reorder_cache(torch.zeros(3, dtype=torch.long))
    logits = [model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1:]]
    for token in new.split(1, dim=1):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits.append(model(token, attention_mask=mask, past_key_values=cache).logits)
    for row, suffix in enumerate(suffixes):
        alone = model(torch.cat([prefix, suffix, new[row : row + 1]], dim=1)).logits[0, 19 + suffix.shape[1] :]
        assert_close("logits", torch.cat(logits, dim=1)[row], alone)


@torch.no_grad()
def test_generate_behind_a_shared_prefix(small_model):
    model, prefix = small_model(attention="sdpa"), random_ids(1, 20)
    ids, mask = torch.cat([prefix.expand(2, -1), random_ids(2, 9)], dim=1), torch.ones(2, 29, dtype=torch.long)
    mask[0, 20:26] = 0
    cache = DynamicCache(config=model.config)
    model(prefix, past_key_values=cache)
    cache.reorder_cache(torch.zeros(2, dtype=torch.long))
    greedy = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, **greedy)[:, 29:]
    for row in range(2):
        alone = ids[row, mask[row].bool()][None]
        assert torch.equal(found[row], model.generate(alone, **greedy)[0, alone.shape[1] :])


@torch.no_grad()
def test_right_padding_that_is_continued(small_model):
    """The first turn padded on the right, the next one behind it."""
    model, ids, mask = small_model(attention="sdpa"), random_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, 5:20] = 0
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache).logits
    second = model(ids[:, 20:], attention_mask=mask, past_key_values=cache).logits
    assert_rows_alone(model, torch.cat([first, second], dim=1), ids, mask)


@torch.no_grad()
def test_drafts_behind_gaps(small_model):
    """Taking tokens back is right where a cache that records its past has put keys in order."""
    model, ids, mask = small_model(attention="sdpa"), random_ids(1, 30), torch.ones(1, 30, dtype=torch.long)
    ids[:, 15:] = ids[:, :15]  # so that there are drafts
    mask[0, 5:9] = mask[0, 20:23] = 0
    greedy = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, prompt_lookup_num_tokens=4, **greedy)
    alone = ids[mask.bool()][None]
    expected = model.generate(alone, max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert torch.equal(found[0, 30:], expected[0, alone.shape[1] :])


@torch.no_grad()
def test_static_caches_raise_where_they_would_be_wrong(small_model):
    model, ids, mask = small_model(attention="sdpa"), random_ids(1, 12), torch.ones(1, 12, dtype=torch.long)
    mask[0, 5] = 0
    cache = StaticCache(config=model.config, max_cache_len=20)
    with pytest.raises(ValueError, match="attention_mask has padding between real tokens"):
        model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask has padding between real tokens"):
        masks_for_generate(model.config, torch.zeros(1, 12, 0), mask, cache)
    short = model(ids[:, :WINDOW], attention_mask=mask[:, :WINDOW], past_key_values=cache).logits
    assert_rows_alone(model, short, ids[:, :WINDOW], mask[:, :WINDOW])


MASKS = {
    "bool": lambda mask: mask.bool(),
    "uint8 255": lambda mask: (255 * mask).to(torch.uint8),
    "twos": lambda mask: 2 * mask,
    "float": lambda mask: mask.float(),
    "half": lambda mask: 0.5 * mask.half(),
}


@pytest.mark.parametrize("kind", ["griffin", "hawk"])
@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_any_one_number_is_real(name, kind, small_model):
    model, ids, mask = small_model(kind, "sdpa"), random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    other = MASKS[name](mask)
    assert_close("exact", model(ids, attention_mask=other).logits, model(ids, attention_mask=mask).logits)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"return_dict_in_generate": True}, {"num_beams": 2}):
        found, expected = (model.generate(ids, attention_mask=each, **greedy, **more) for each in (other, mask))
        found, expected = (getattr(each, "sequences", each) for each in (found, expected))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("values", [[1, 1, 2, 2, 3, 3], [0.0, 0.0, -1e4, 0.0, 0.0, 0.0], [0, 1, 0.5, 1, 1, 1]])
@torch.no_grad()
def test_other_numbers_raise(values, small_model):
    """Documents numbered in the mask, and masks that are added to scores, would be read as something else."""
    model, mask = small_model(), torch.tensor([values])
    for call in (model, lambda ids, **arguments: model.generate(ids, max_new_tokens=1, **arguments)):
        with pytest.raises(ValueError, match="attention_mask has the values .* pass position_ids or seq_idx"):
            call(random_ids(1, 6), attention_mask=mask)


@pytest.mark.parametrize("length", [0, 1, 13])
def test_the_order_is_that_of_a_stable_sort(length):
    number = torch.randint(0, 2, (5, length))
    number[:2] = torch.tensor([[0], [1]])
    order = zeros_first(number)
    assert torch.equal(order, number.argsort(dim=1, stable=True)) and torch.equal(inverse_of(order), order.argsort(1))


OTHERS = {
    "list of no dtype": lambda mask: mask.tolist(),
    "ndarray of int64": lambda mask: mask.numpy(),
    "Tensor of torch.uint16": lambda mask: mask.to(torch.uint16),
    "Tensor of torch.complex64": lambda mask: mask.to(torch.complex64),
    "Tensor of torch.float8_e4m3fn": lambda mask: mask.float().to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("found", OTHERS)
@torch.no_grad()
def test_what_is_no_mask_is_named(found, small_model):
    """By what it is, before anything is computed; for classes with a head of their own too."""
    mask = OTHERS[found](torch.ones(2, 6, dtype=torch.long))
    model, classifier = small_model(), small_model(cls=GriffinForSequenceClassification)
    for call in (model, lambda ids, **arguments: model.generate(ids, max_new_tokens=1, **arguments), classifier):
        with pytest.raises(ValueError, match=f"attention_mask is a {found}: allowed are tensors of bool, uint8"):
            call(random_ids(2, 6), attention_mask=mask)


@torch.no_grad()
def test_a_mask_of_pairs_is_refused(small_model):
    model, mask = small_model(), torch.zeros(2, 1, 6, 6)
    for call in (model, lambda ids, **arguments: model.generate(ids, max_new_tokens=1, **arguments)):
        with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 6, 6\): allowed is \(batch, past"):
            call(random_ids(2, 6), attention_mask=mask)
