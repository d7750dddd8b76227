"""Local attention in Triton against its definition in float64, which in the same dtype is the measure of error.

Without a GPU, the first test runs others of this file in Triton's interpreter, in a process of its own, since Triton
asks for `TRITON_INTERPRET=1` when it is imported.

Legend: N tokens, H heads, H_kv key-value heads, K head dimension, W window.
"""

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

import modeling_griffin.kernels.attention as module
from modeling_griffin.kernels.attention import (
    BLOCK,
    Tile,
    local_attention_triton,
    triton_attention_unavailable_reason,
    visible_tokens,
)
from modeling_griffin.kernels.device import training


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = [torch.bfloat16, torch.float16]
NAMES = ["out", "d_query", "d_key", "d_value"]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside of test_in_the_interpreter")
gpu = pytest.mark.gpu

# Where runs start, and the end; W. Runs of one token, starts off the blocks, windows below and above T, blocks' edges.
LAYOUTS = {
    "a row": ([0, 200], 70),
    "runs": ([0, 7, 8, 9, 70, 160, 200], 30),
    "rows": ([0, 64, 128, 192, 256], 1000),
    "only itself": ([0, 40], 1),
    "one token": ([0, 1], 5),
    "behind a block": ([0, 129], 129),
}
# (H, H_kv, K)
HEADS = [(2, 1, 32), (3, 1, 24), (4, 2, 16)]
# Pack, held, walked: of the forward pass and the queries' gradient; of the keys'.
TILES = [((1, 32, 16), (1, 32, 16)), ((2, 16, 32), (1, 16, 32)), ((2, 64, 64), (1, 128, 64))]
INTERPRETED_TESTS = len(LAYOUTS) * len(TILES) + 1


@needs_triton
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="this process runs the kernels itself")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", "interpreted", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{INTERPRETED_TESTS} passed" in done.stdout.replace("\n", " "), done.stdout


@pytest.fixture
def loops(monkeypatch):
    """Loops of a length that is a tensor: the interpreter of Triton 3.6 does not read it with NumPy 2.4."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.fixture
def poison():
    """NaN in all memory that is allocated and not yet written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def definition(starts, window):
    """Attention of all pairs, run by run, as a function of query, key, value and scaling."""

    def attend(query, key, value, scaling):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        outputs = []
        for begin, end in itertools.pairwise(starts):
            q, k, v = (x[begin:end] for x in (query, key, value))
            token = torch.arange(end - begin, device=query.device)
            distance = token[:, None] - token
            scores = torch.einsum("qhk,shk->hqs", q, k) * scaling
            scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
            outputs.append(torch.einsum("hqs,shk->qhk", scores.softmax(-1), v))
        return torch.cat(outputs)

    return attend


def edges(starts):
    edge = torch.zeros(starts[-1], dtype=torch.bool)
    edge[[start for start in starts if start < starts[-1]]] = True
    return edge


def kernels(starts, window, device):
    visible = visible_tokens(edges(starts).to(device), window)
    return lambda query, key, value, scaling: local_attention_triton(query, key, value, visible, scaling)


def make_inputs(tokens, heads, key_heads, dim, dtype, device):
    """Query, key, value and the gradient of the output, NaN before and behind each."""
    generator = torch.Generator().manual_seed(tokens * heads * dim)
    inputs = []
    for number in (heads, key_heads, key_heads, heads):
        among = torch.full((tokens + 2 * BLOCK, number, dim), torch.nan, dtype=dtype, device=device)
        among[BLOCK:-BLOCK] = torch.randn(tokens, number, dim, generator=generator).to(device, dtype)
        inputs.append(among[BLOCK:-BLOCK])
    return inputs


def run(attention, inputs, dtype):
    """Output and the gradients."""
    *leaves, d_out = (x.detach() if x.dtype == dtype else x.detach().to(dtype) for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    out = attention(*leaves, leaves[0].shape[-1] ** -0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def check(starts, window, heads, key_heads, dim, dtype, device):
    """No further from float64 than the definition in the same dtype, which also rounds the scores; a quarter for luck.

    The interpreter cuts to bfloat16 where a GPU rounds, which doubles that error.
    """
    inputs = make_inputs(starts[-1], heads, key_heads, dim, dtype, device)
    right = run(definition(starts, window), inputs, torch.float64)
    plain = run(definition(starts, window), inputs, dtype)
    actual = run(kernels(starts, window, device), inputs, dtype)
    allowed = 2 if INTERPRETED and dtype == torch.bfloat16 else 1.25
    for name, a, p, r in zip(NAMES, actual, plain, right, strict=True):
        assert a.shape == p.shape and a.dtype == p.dtype and bool(a.isfinite().all()), name
        ours, theirs = ((x.double() - r).norm() for x in (a, p))
        # Of a token that sees itself only, the scores' gradients are 0 but for rounding.
        assert ours <= allowed * theirs + 1e-6 * inputs[3].double().norm(), f"{name}: error {ours:.3g}, {theirs:.3g}"


@interpreted
@pytest.mark.parametrize("case", range(len(TILES)))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_interpreted(layout, case, loops, poison, monkeypatch):
    """Every layout with every tile, heads and dtypes in turn."""
    turn = case + list(LAYOUTS).index(layout)
    (of_queries, of_keys), heads, dtype = TILES[case], HEADS[turn % len(HEADS)], DTYPES[turn % 2]
    for name, tile in (("FORWARD", of_queries), ("QUERY_GRADIENT", of_queries), ("KEY_GRADIENTS", of_keys)):
        monkeypatch.setattr(training, f"ATTENTION_{name}", {64: [Tile(*tile, 4, 2)]})
    check(*LAYOUTS[layout], *heads, dtype, "cpu")


@interpreted
def test_interpreted_parts_of_a_group(loops, poison, monkeypatch):
    """Three heads, two at once: partial sums, and the last program has one head."""
    monkeypatch.setattr(module, "_heads_at_once", lambda *arguments: 2)
    check(*LAYOUTS["runs"], 3, 1, 32, torch.float16, "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_visible(layout):
    starts, window = LAYOUTS[layout]
    visible = visible_tokens(edges(starts), window)
    token = torch.arange(starts[-1])
    run_of = torch.bucketize(token, torch.tensor(starts), right=True)
    distance = token[:, None] - token
    seen = (run_of[:, None] == run_of) & (distance >= 0) & (distance < window)
    assert torch.equal(visible.first.long(), seen.long().argmax(1))
    assert torch.equal(visible.last.long(), starts[-1] - 1 - seen.long().flip(0).argmax(0))
    assert all(x.dtype == torch.int32 for x in visible)


def test_blocks_with_most_to_do_come_first():
    visible = visible_tokens(edges([0, 4 * BLOCK, 5 * BLOCK]), 2 * BLOCK)
    assert visible.query_blocks.tolist() == [2, 3, 1, 0, 4]
    assert visible.key_blocks.tolist() == [0, 1, 2, 3, 4]


def test_nothing_is_nothing():
    visible = visible_tokens(edges([0, 0]), 7)
    assert [len(x) for x in visible] == [0, 0, 0, 0]


def test_says_why_it_cannot_run(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(module, "triton", "there")
    assert triton_attention_unavailable_reason(128, torch.float16, cpu) is None
    assert "float32" in triton_attention_unavailable_reason(128, torch.float32, cpu)
    assert "head_dim is 20," in triton_attention_unavailable_reason(20, torch.float16, cpu)
    assert "head_dim is 264," in triton_attention_unavailable_reason(264, torch.float16, cpu)
    monkeypatch.setattr(module, "triton", None)
    assert "not installed" in triton_attention_unavailable_reason(128, torch.float16, cpu)


@pytest.mark.parametrize("scaling", [0.0, -1.0])
def test_scaling_is_checked(scaling):
    inputs = make_inputs(4, 1, 1, 8, torch.float16, "cpu")[:3]
    with pytest.raises(ValueError, match=f"scaling is {scaling}: allowed is a number above 0"):
        kernels([0, 4], 2, "cpu")(*inputs, scaling)


ON_A_GPU = {**LAYOUTS, "documents": ([*range(0, 1500, 300), 1500], 1024), "long": ([0, 3000], 1024)}


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(20, 1, 128), (4, 2, 64), (3, 1, 256), (6, 3, 40), (2, 2, 8), (3, 1, 200)])
@pytest.mark.parametrize("layout", ON_A_GPU)
def test_on_a_gpu(layout, heads, dtype, poison):
    check(*ON_A_GPU[layout], *heads, dtype, "cuda")


@gpu
def test_no_tokens_on_a_gpu():
    inputs = [torch.empty(0, 2, 64, dtype=torch.float16, device="cuda", requires_grad=True) for _ in range(3)]
    out = kernels([0, 0], 7, "cuda")(*inputs, 0.125)
    assert [x.shape for x in torch.autograd.grad(out.sum(), inputs)] == [(0, 2, 64)] * 3


@gpu
def test_the_same_bits_every_time_on_a_gpu():
    inputs = make_inputs(4000, 20, 1, 128, torch.bfloat16, "cuda")
    attention = kernels([0, 1700, 4000], 1024, "cuda")
    for a, b in zip(run(attention, inputs, torch.bfloat16), run(attention, inputs, torch.bfloat16), strict=True):
        assert torch.equal(a, b)


@gpu
def test_checkpointing_strides_and_second_derivatives_on_a_gpu():
    inputs = make_inputs(500, 4, 1, 64, torch.bfloat16, "cuda")
    attention = kernels([0, 500], 100, "cuda")
    expected = run(attention, inputs, torch.bfloat16)
    checkpointed = lambda *x: torch.utils.checkpoint.checkpoint(attention, *x, use_reentrant=False)  # noqa: E731
    strided = [x.mT.contiguous().mT for x in inputs]
    for found in (run(checkpointed, inputs, torch.bfloat16), run(attention, strided, torch.bfloat16)):
        assert all(torch.equal(e, f) for e, f in zip(expected, found, strict=True))
    query, key, value = (x.detach().requires_grad_() for x in inputs[:3])
    out = attention(query, key, value, 0.125)
    d_out = torch.ones_like(out, requires_grad=True)
    (d_query,) = torch.autograd.grad(out, query, d_out, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_query.sum().backward()


@pytest.mark.skipif(INTERPRETED, reason="launches nothing")
def test_a_compiled_layer_calls_it_as_it_is(monkeypatch):
    class Traced:
        @staticmethod
        def apply(query, *arguments):
            return query * (3 if torch.compiler.is_compiling() else 2)

    monkeypatch.setattr(module, "_LocalAttention", Traced)
    visible, x = visible_tokens(edges([0, 4]), 2), torch.ones(4, 1, 8)
    layer = torch.compile(lambda x: local_attention_triton(x + 1, x, x, visible, 1.0) + 1, backend="eager")
    assert torch.equal(layer(x), torch.full_like(x, 5.0))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_second_gpu():
    check(*LAYOUTS["runs"], 4, 1, 64, torch.bfloat16, "cuda:1")


@gpu
def test_more_than_two_to_the_31_elements_on_a_gpu():
    """The last rows are what they are alone."""
    q, k, v, d_out = make_inputs(1024, 20, 1, 128, torch.bfloat16, "cuda")
    rows = 2**31 // q[0].numel() // 1024 + 2
    large = [x.repeat(rows, 1, 1) for x in (q, k, v, d_out)]
    found = run(kernels([*range(0, rows * 1024 + 1, 1024)], 300, "cuda"), large, torch.bfloat16)
    alone = run(kernels([0, 1024], 300, "cuda"), [q, k, v, d_out], torch.bfloat16)
    for f, a in zip(found[:2], alone):
        assert torch.equal(f[-1024:], a)
    for f, a in zip(found[2:], alone[2:]):  # summed over the heads in other parts
        assert (f[-1024:] - a).float().norm() <= 1e-2 * a.float().norm()
