"""Runs of tokens instead of masks: the numbers of eager attention with the mask of all pairs, for every layout.

On a CPU the kernel is replaced by its definition; on a GPU it is PyTorch's, in bfloat16.
"""

import pytest
import torch

from modeling_griffin import GriffinConfig, GriffinForCausalLM, gpu
from modeling_griffin.documents import read_layout
from modeling_griffin.kernels import attention, flash_attention
from modeling_griffin.kernels.attention import Visible, visible_tokens
from modeling_griffin.kernels.device import attention_refusal
from modeling_griffin.kernels.device.known import known_gpu
from modeling_griffin.kernels.flash_attention import Runs, edges_of_runs, flash_unavailable_reason
from tests.conftest import make_audible, make_config
from tests.tolerances import assert_close


LENGTH = 29


def attend(query, key, value, queries, keys, longest_queries, longest_keys, *, scale, window_size, **kwargs):
    """What `torch.nn.attention.varlen.varlen_attn` computes, run by run; the last query stands at the last key."""
    assert longest_queries >= queries.diff().max() and longest_keys >= keys.diff().max()
    outputs = []
    for n in range(len(queries) - 1):
        q = query[queries[n] : queries[n + 1]]
        k, v = (x[keys[n] : keys[n + 1]].repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        visible = (distance >= -window_size[1]) & (distance <= window_size[0])
        scores = torch.einsum("qhk,shk->hqs", q, k) * scale
        outputs.append(torch.einsum("hqs,shk->qhk", scores.masked_fill(~visible, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.fixture
def runs_seen(monkeypatch):
    """The number of runs of each call; flash attention is said to be there."""
    seen = []

    def counted(*arguments, **kwargs):
        seen.append(len(arguments[3]) - 1)
        return attend(*arguments, **kwargs)

    def visible(query, key, value, visible, scaling):
        """What the Triton kernels compute."""
        seen.append("triton")
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        token = torch.arange(len(query))
        mask = (token >= visible.first[:, None]) & (token <= token[:, None])
        assert torch.equal(mask, (token[:, None] >= token) & (token[:, None] <= visible.last))
        scores = torch.einsum("qhk,shk->hqs", query, key) * scaling
        return torch.einsum("hqs,shk->qhk", scores.masked_fill(~mask, -torch.inf).softmax(-1), value)

    monkeypatch.setattr(flash_attention, "varlen_attn", counted, raising=False)
    monkeypatch.setattr(flash_attention, "local_attention_triton", visible)
    monkeypatch.setattr(flash_attention, "flash_unavailable_reason", lambda *arguments: None)
    return seen


def layouts():
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :4], mask[1, 21:] = 0, 0
    positions = torch.tensor([[*range(11), 0, *range(9), *range(8)]] * 2)
    return {
        "plain": ({}, 2),
        "mask of ones": ({"attention_mask": torch.ones_like(mask)}, 2),
        "padded": ({"attention_mask": mask}, 4),  # two documents, two runs of padding
        "packed": ({"position_ids": positions}, 8),
        "packed and padded": ({"position_ids": (mask.cumsum(-1) - 1).clamp(min=0) % 11, "attention_mask": mask}, 7),
        "seq_idx": ({"seq_idx": torch.tensor([[0] * 12 + [1] * 17, [0] * 29])}, 3),
    }


def logits_and_gradient(model, ids, arguments):
    real = arguments.get("attention_mask", torch.ones_like(ids))[..., None]
    model.zero_grad()
    logits = model(ids, use_cache=False, **arguments).logits * real
    logits.square().sum().backward()
    return logits, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kernel", ["varlen", "triton"])
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("kind", ["griffin", "attention"])
def test_model_agrees_with_eager_attention(kind, layout, kernel, runs_seen, monkeypatch):
    layout_of_kernels = visible_tokens if kernel == "triton" else None
    monkeypatch.setattr(flash_attention, "kernel_layout", lambda *arguments: layout_of_kernels)
    arguments, runs = layouts()[layout]
    model = make_audible(GriffinForCausalLM(make_config(kind)))
    ids = torch.randint(0, model.config.vocab_size, (2, LENGTH))
    found = logits_and_gradient(model, ids, arguments)
    assert set(runs_seen) == {runs if kernel == "varlen" else "triton"}
    model.set_attn_implementation("eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_attention, "flash_unavailable_reason", lambda *arguments: "eager")
        expected = logits_and_gradient(model, ids, arguments)
    for name, f, e in zip(("logits", "gradient"), found, expected):
        assert_close(name, f, e)


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("sizes", [(13, 16), (5, 1, 23), (28, 1), (1, 28), (9, 9, 11)])
@torch.no_grad()
def test_chunks_behind_a_cache(sizes, triton, runs_seen, monkeypatch):
    """Also with a mask of ones; a single token needs no runs. The Triton kernels take no cached keys."""
    monkeypatch.setattr(flash_attention, "kernel_layout", lambda *arguments: visible_tokens if triton else None)
    model = make_audible(GriffinForCausalLM(make_config("griffin")))
    ids = torch.randint(0, model.config.vocab_size, (2, LENGTH))
    whole = model(ids, use_cache=False).logits
    del runs_seen[:]
    for masked in (False, True):
        past, parts, end = None, [], 0
        for chunk in ids.split(sizes, dim=1):
            end += chunk.shape[1]
            mask = torch.ones_like(ids[:, :end]) if masked else None
            out = model(chunk, attention_mask=mask, past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
        assert_close("logits", torch.cat(parts, dim=1), whole)
    assert len(runs_seen) == 2 * sum(size > 1 for size in sizes)
    assert runs_seen.count("triton") == (2 if triton and sizes[0] > 1 else 0)


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_what_are_no_runs(packed, runs_seen):
    """Padding inside a document, and behind a cache padding or several documents: masks, as ever."""
    model = make_audible(GriffinForCausalLM(make_config("griffin")))
    ids = torch.randint(0, model.config.vocab_size, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    assert edges_of_runs(mask.cumsum(-1) == 1, mask.bool()) is None
    past = model(ids, use_cache=True).past_key_values
    del runs_seen[:]
    positions = torch.tensor([[8, 9, 0, 1]] * 2) if packed else None
    behind = torch.cat([torch.ones_like(ids), mask[:, :4]], dim=1)
    model(ids[:, :4], attention_mask=behind, position_ids=positions, past_key_values=past)
    assert not runs_seen


def test_reasons():
    """Each thing that keeps flash attention from running is named."""
    config = make_config("griffin")
    config._attn_implementation = "eager"
    assert "attn_implementation is 'eager'" in flash_unavailable_reason(config, torch.zeros(1, 2, 16))
    config._attn_implementation = "sdpa"
    reason = flash_unavailable_reason(config, torch.zeros(1, 2, 16))
    assert "cpu" in reason or "has no torch.nn.attention.varlen" in reason
    assert not isinstance(read_layout(config, torch.zeros(1, 30, 16), None, None, None)[0], (Runs, Visible))


@pytest.mark.parametrize(
    "capability, head_dim, reason",
    [
        ((7, 5), 128, "older than compute capability 8.0"),
        ((8, 0), 256, None),
        ((9, 0), 256, None),
        ((8, 9), 192, None),
        ((8, 9), 200, "from 200 to 224"),
        ((10, 3), 224, "from 200 to 224"),
        ((12, 0), 256, None),
        ((8, 0), 224, None),
        ((9, 0), 264, "up to 256"),
        ((9, 0), 20, "multiples of 8"),
    ],
)
def test_heads_that_a_gpu_can_take(capability, head_dim, reason, monkeypatch):
    config = make_config("griffin", head_dim=head_dim)
    config._attn_implementation = "sdpa"
    monkeypatch.setattr(gpu, "_PRETENDED", [gpu.GPU("a GPU", "nvidia", capability, 100, 0)])
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    monkeypatch.setattr(flash_attention, "PARAMETERS", {"window_size"})
    found = flash_unavailable_reason(config, torch.zeros(1, 2, 16, dtype=torch.bfloat16))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    "change, triton, varlen",
    [
        ({}, True, True),
        ({"tokens": 2047}, False, True),
        ({"gpu": "sm_75"}, False, False),
        ({"gpu": "sm_80"}, True, True),
        ({"gpu": "sm_89"}, True, True),
        ({"gpu": "sm_100"}, True, True),
        ({"gpu": "sm_120", "head_dim": 256}, True, True),
        ({"gpu": "sm_89", "head_dim": 208, "past": True}, False, False),
        ({"window": False}, True, False),
        ({"window": False, "past": True}, False, False),
        ({"past": True}, True, True),
        ({"head_dim": 20}, False, False),
        ({"installed": None}, False, True),
    ],
)
def test_choice_of_the_kernel(change, triton, varlen, monkeypatch):
    """Triton for many tokens; PyTorch's for others, and for keys without a query."""
    config = make_config("griffin", head_dim=change.get("head_dim", 128))
    config._attn_implementation = "sdpa"
    monkeypatch.setattr(gpu, "_PRETENDED", [known_gpu(change.get("gpu", "sm_90"))])
    monkeypatch.setattr(gpu, "_triton_version", lambda: (3, 6) if change.get("installed", "there") else None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    monkeypatch.setattr(attention, "triton", change.get("installed", "there"))
    monkeypatch.setattr(flash_attention, "_attention_runs", lambda *of: True)
    monkeypatch.setattr(flash_attention, "PARAMETERS", {"window_size"} if change.get("window", True) else {})
    tokens = torch.zeros(1, change.get("tokens", 2048), 16, dtype=torch.bfloat16)
    past = change.get("past", False)
    assert (flash_attention.kernel_layout(config, tokens) is not None and not past) == (triton and not past)
    assert (flash_unavailable_reason(config, tokens, past) is None) == (varlen or (triton and not past))
    assert flash_attention.kernel_layout(config, tokens.float()) is None


@pytest.mark.gpu
@pytest.mark.parametrize("heads, key_heads, head_dim", [(4, 1, 64), (10, 1, 128), (2, 2, 256), (6, 3, 40)])
@pytest.mark.parametrize("kernel", ["varlen", "triton"])
@pytest.mark.parametrize("layout", layouts())
def test_on_a_gpu(layout, kernel, heads, key_heads, head_dim, monkeypatch):
    """No further from float32 eager attention than SDPA with a mask in bfloat16 is, times 1.2."""
    if kernel == "triton":
        if (reason := attention_refusal(head_dim, gpu.properties(torch.device("cuda", 0)))) is not None:
            pytest.skip(reason)
        monkeypatch.setattr(flash_attention, "LEAST_TOKENS", 0)
        monkeypatch.setattr(flash_attention, "varlen_attn", None)
    torch.manual_seed(0)
    fields = {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": head_dim}
    config = GriffinConfig(
        vocab_size=64, hidden_size=128, num_hidden_layers=3, attention_window_size=7, bos_token_id=None, **fields
    )
    model = make_audible(GriffinForCausalLM(config)).cuda()
    arguments = {name: value.cuda() for name, value in layouts()[layout][0].items()}
    ids = torch.randint(0, 64, (2, LENGTH), device="cuda")
    model.set_attn_implementation("eager")
    right = logits_and_gradient(model, ids, arguments)
    model.set_attn_implementation("sdpa")
    model.bfloat16()
    hidden = torch.zeros(2, LENGTH, 128, device="cuda", dtype=torch.bfloat16)
    assert flash_unavailable_reason(model.config, hidden) is None
    found = logits_and_gradient(model, ids, arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_attention, "flash_unavailable_reason", lambda *arguments: "compared with a mask")
        masked = logits_and_gradient(model, ids, arguments)
    for f, m, r in zip(found, masked, right):
        assert (f - r).norm() <= 1.2 * (m - r).norm() + 1e-3 * r.norm()
