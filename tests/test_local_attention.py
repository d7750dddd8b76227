"""local_attention against a softmax over all pairs in float64, its gradients, and its cost.

Legend: B batch, H heads, T queries, S keys, K head dimension, W window.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_griffin import GriffinForCausalLM
from modeling_griffin.local_attention import LocalMask, local_attention
from tests.conftest import make_audible, make_config
from tests.tolerances import assert_close


B, H, K, W = 2, 4, 3, 5
LENGTHS = (1, W - 1, W, W + 1, 2 * W, 3 * W + 2)


def all_pairs(query, key, value, visible, scaling):
    """The definition: (B, H, T, K) queries over the keys that they see, visible (B, T, S)."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.mT * scaling).masked_fill(~visible[:, None], -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def tensors(length, past, heads):
    shapes = [(B, H, length, K), (B, heads, past + length, K), (B, heads, past + length, K)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def random_rows(length, past):
    """number and real (B, S) of the keys, first (B, T) of the queries' documents, visible (B, T, S) slot by slot."""
    slots = past + length
    real = torch.rand(B, slots) < 0.8
    document = (torch.rand(B, slots) < 0.2).cumsum(-1)
    number = real.long().cumsum(-1) - 1
    first = torch.zeros(B, length, dtype=torch.long)
    visible = torch.zeros(B, length, slots, dtype=torch.bool)
    for row in range(B):
        for t in range(length):
            own = past + t
            members = ((document[row] == document[row, own]) & real[row]).nonzero()[:, 0]
            first[row, t] = number[row, members[0]] if len(members) else number[row, own] + 1
            for slot in range(max(0, own - W + 1), own + 1):
                visible[row, t, slot] = slot == own or bool(
                    real[row, slot] and document[row, slot] == document[row, own]
                )
    return number, first, real, visible


@pytest.mark.parametrize("heads", [1, 2, H])
@pytest.mark.parametrize("past", [0, 1, W - 1])
@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients(length, past, heads):
    inputs = tensors(length, past, heads)
    number, first, real, visible = random_rows(length, past)
    output, _ = local_attention(None, *inputs, LocalMask(W, number, first, real), scaling=0.7)
    expected = all_pairs(*inputs, visible, 0.7)
    assert_close("scan float64", output, expected)
    weights = torch.randn_like(expected)
    for found, wanted in zip(
        torch.autograd.grad(output, inputs, weights), torch.autograd.grad(expected, inputs, weights)
    ):
        assert_close("scan float64", found, wanted)


@pytest.mark.parametrize("length", LENGTHS)
def test_one_document_without_padding(length):
    inputs = tensors(length, past=2, heads=1)
    distance = torch.arange(2, 2 + length)[:, None] - torch.arange(2 + length)
    visible = ((distance >= 0) & (distance < W)).expand(B, -1, -1)
    output, _ = local_attention(None, *inputs, LocalMask(W, None, None, None), scaling=0.7)
    assert_close("scan float64", output, all_pairs(*inputs, visible, 0.7))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_model_agrees_with_eager_attention(packed, padded):
    """Whole, and in two chunks behind a cache; eager attention always has the mask of all pairs."""
    model = make_audible(GriffinForCausalLM(make_config("griffin")))
    length = 5 * model.config.attention_window_size + 3
    ids = torch.randint(0, model.config.vocab_size, (2, length))
    mask = torch.ones_like(ids)
    mask[0, : 4 * padded] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    arguments = {"attention_mask": mask if padded else None, "position_ids": positions % 11 if packed else positions}
    found = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        logits = model(ids, use_cache=False, **arguments).logits
        (logits * mask[..., None]).square().sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        found[attention] = (logits * mask[..., None], gradients, in_two_chunks(model, ids, arguments) * mask[..., None])
    for name, actual, expected in zip(("logits", "gradient", "logits"), found["sdpa"], found["eager"]):
        assert_close(name, actual, expected)


@torch.no_grad()
def in_two_chunks(model, ids, arguments):
    cut, past, parts = ids.shape[1] // 2, None, []
    for chunk in (slice(0, cut), slice(cut, None)):
        mask = arguments["attention_mask"]
        seen = None if mask is None else mask[:, : chunk.stop]
        positions = arguments["position_ids"][:, chunk]
        out = model(ids[:, chunk], attention_mask=seen, position_ids=positions, past_key_values=past, use_cache=True)
        past = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


class Elements(TorchDispatchMode):
    """Counts the elements of all results but views: the largest one, and their sum."""

    largest = total = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                self.largest, self.total = max(self.largest, tensor.numel()), self.total + tensor.numel()
        return result


def count(length):
    model = GriffinForCausalLM(make_config("attention"))
    ids = torch.randint(0, model.config.vocab_size, (1, length))
    with Elements() as elements:
        model(ids, position_ids=torch.arange(length)[None] % 100, use_cache=False).logits.sum().backward()
    return elements


def test_cost_is_linear_in_time():
    """Forward and backward: no T x T tensor, and twice the elements for twice the tokens."""
    short, long = count(1024), count(2048)
    assert long.largest < 2048 * 64
    assert long.total < 2.05 * short.total
