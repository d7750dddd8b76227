"""The Triton kernels of a decoding step against the same operations in plain PyTorch, which is their definition."""

import copy

import pytest
import torch
from _decode_helpers import (
    DEVICE,
    DTYPES_OF_STEPS,
    INTERPRETED,
    LOGITS,
    both,
    multiply_matrices,
    needs_kernels,
    normal,
    poison_what_is_new,
)
from tolerances import assert_close, relative_error
from torch import nn
from transformers import DynamicCache

import modeling_griffin.decode.ops as decode_ops
from modeling_griffin.decode.forward import ForwardStep
from modeling_griffin.decode.ops import Clock, Ends, KernelOps, PlainOps
from modeling_griffin.decode.state import DecodeStep
from modeling_griffin.kernels import dispatch
from modeling_griffin.kernels.device import decode as tiles


pytestmark = needs_kernels


@pytest.mark.parametrize("scale", [1.0, 50.5])
@pytest.mark.parametrize("time", [0, 100_000])
@pytest.mark.parametrize("dtype", DTYPES_OF_STEPS)
@torch.no_grad()
def test_the_beginning_of_a_step(dtype, time, scale):
    embedding = nn.Embedding(11, 24).to(DEVICE, dtype)
    token, padding = torch.tensor([10, 0, 3], device=DEVICE), torch.tensor([0, time // 2, time], device=DEVICE)
    clock = Clock(torch.tensor([time], device=DEVICE), padding)
    for frequencies in (None, 10000.0 ** -torch.rand(6, device=DEVICE)):
        (expected, plain), (actual, kernel) = both(
            lambda ops, f=frequencies: ops.begin(token, embedding, scale, clock, f)
        )
        assert_close("exact", actual.residual, expected.residual)
        if frequencies is None:
            assert kernel is clock
            continue
        for one, other in ((kernel.cos, plain.cos), (kernel.sin, plain.sin)):
            assert_close(LOGITS[dtype], one, other)


@pytest.mark.parametrize("rows, vocabulary", [(1, 1000), (2, 1), (5, 29), (5, 200), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_end_of_a_step(dtype, rows, vocabulary, monkeypatch):
    """Blocks of 64: the largest of several in one block and in others; values of all kinds; time goes on by one."""
    monkeypatch.setattr(tiles, "LOGITS_BLOCK", 64)
    of_many, of_few = normal(rows, vocabulary), torch.randint(-2, 2, (rows, vocabulary), device=DEVICE).float()
    zeros = torch.zeros(rows, vocabulary, device=DEVICE).copysign(of_many)
    lowest = torch.full((rows, vocabulary), float("-inf"), device=DEVICE)
    cases = [of_many, of_few, zeros, lowest, lowest.clone(), of_many.clone(), of_many.clone(), of_many.clone()]
    cases[4][:, -1] = -1e4
    cases[5][:, vocabulary // 3 :: 3] = float("inf")
    cases[6][:, vocabulary // 2 :: 7] = float("nan")
    cases[7][:, 0], cases[7][:, -1] = float("inf"), -float("nan")
    for time, logits in enumerate(case.to(dtype) for case in cases):
        for ops in (PlainOps(), KernelOps()):
            token = torch.full((rows,), -1, device=DEVICE)
            clock = Clock(torch.tensor([time], device=DEVICE), torch.zeros_like(token))
            ops.end(logits, token, clock)
            assert torch.equal(token, logits.float().argmax(-1))
            assert clock.time.tolist() == [time + 1]


@pytest.mark.parametrize("dtype", DTYPES_OF_STEPS)
@torch.no_grad()
def test_rows_that_end(dtype):
    """Rows whose token ends them, that have ended before, and that go on; nothing ends at -1, which stands for none."""
    logits = torch.zeros(5, 70, device=DEVICE, dtype=dtype)
    logits[range(5), [3, 69, 8, 7, 3]] = 1.0
    for ops in (PlainOps(), KernelOps()):
        new = {"device": DEVICE}
        going_on = torch.tensor([True, True, True, True, False], **new)
        tokens = torch.tensor([69, 3, -1, -1, -1, -1, -1, -1], **new)
        token = torch.full((5,), -2, **new)
        clock = Clock(torch.tensor([1], **new), torch.zeros_like(token))
        ends = Ends(going_on, tokens, torch.tensor([5], **new))
        ops.end(logits, token, clock, ends)
        assert token.tolist() == [3, 69, 8, 7, 5] and clock.time.tolist() == [2]
        assert going_on.tolist() == [False, False, True, True, False]
        logits_of_next = logits.roll(1, 0)
        ops.end(logits_of_next, token, clock, ends)
        assert token.tolist() == [5, 5, 69, 8, 5] and going_on.tolist() == [False, False, False, True, False]
        assert tokens.tolist() == [69, 3] + 6 * [-1] and ends.pad.tolist() == [5]


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [32000, 32003, 256000])
@torch.no_grad()
def test_the_end_of_a_step_of_a_large_vocabulary(vocabulary):
    """The largest in the middle of the row and again at its end."""
    for rows in (1, 64, 65):
        logits, token = normal(rows, vocabulary, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.long).cuda()
        first = torch.randint(vocabulary // 2, vocabulary, (rows, 1), device=DEVICE)
        logits.scatter_(1, first, 10.0)[:, -1] = 10.0
        time = torch.zeros(1, dtype=torch.long, device=DEVICE)
        KernelOps().end(logits, token, Clock(time, token))
        assert torch.equal(token, first[:, 0]) and torch.equal(token, logits.argmax(-1)) and time.item() == 1


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
    reason="kernels overlap from compute capability 9 on",
)
@pytest.mark.parametrize("kind", ["griffin", "hawk", "attention"])
@pytest.mark.parametrize("rows", [1, 4, 5, 64, 65])
def test_overlapping_kernels_change_nothing(rows, kind, small_model):
    """Recorded and replayed many times: a kernel that did not wait for the one before it would show."""
    model = small_model(kind, attention_window_size=150).to(DEVICE, torch.bfloat16)  # in four splits
    ends = []
    for overlap in (False, True):
        step = DecodeStep(model.model, model.lm_head, rows)
        step.ops = KernelOps(overlap)
        step.record()
        for tensor in (step.clock.time, step.token, *(tensor for layer in step.layers for tensor in layer)):
            tensor.zero_()
        for _ in range(300):
            step.step()
            assert torch.equal(step.token, step.logits.argmax(-1))
        ends.append([step.logits.clone(), *(tensor.clone() for layer in step.layers for tensor in layer)])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("kind", ["griffin", "hawk", "attention"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES_OF_STEPS)
def test_steps_past_the_window(dtype, rows, kind, small_model, monkeypatch):
    """Logits and states after each of many steps; rows have started at different times."""
    multiply_matrices(monkeypatch)
    model = small_model(kind).to(DEVICE, dtype)
    steps = [DecodeStep(model.model, model.lm_head, rows) for _ in range(2)]
    steps[0].ops, steps[1].ops = PlainOps(), KernelOps()
    for step in steps:
        step.clock.time.fill_(rows)
        step.clock.padding.copy_(torch.arange(rows))
        for layer, buffers in zip(model.model.layers, step.layers):
            if len(buffers) == 3:
                buffers[2].copy_(layer.temporal_block.rg_lru.decay().detach())
    for tokens in torch.randint(0, 29, (9, rows), device=DEVICE):
        for step in steps:
            step.token.copy_(tokens)
            step.step()
        assert_close(LOGITS[dtype], steps[1].logits, steps[0].logits)
        assert all(torch.equal(step.token, step.logits.argmax(-1)) for step in steps)
        for one, other in zip(steps[1].layers, steps[0].layers):
            for actual, expected in zip(one[:2], other[:2]):
                assert_close(LOGITS[dtype], actual, expected)
                expected.copy_(actual)  # so that rounding does not pile up over the steps


@pytest.mark.parametrize("kind", ["griffin", "attention_first"])
@pytest.mark.parametrize(
    "rows, matmul", [(1, True), (3, True), (3, False), pytest.param(65, True, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("dtype", DTYPES_OF_STEPS)
@torch.no_grad()
def test_a_step_that_keeps_hidden_states(dtype, rows, matmul, kind, small_model, monkeypatch):
    """The model's own, in 16 bits at most twice as far from float32 as these, and no bit of the rest changes.
    Where products are cuBLAS's (65 rows, or without `matmul`), norms add to the stream in place, but not to what is
    kept."""
    multiply_matrices(monkeypatch)
    model = small_model(kind).to(DEVICE, dtype)
    plain, keeping = (DecodeStep(model.model, model.lm_head, rows, hidden=hidden) for hidden in (False, True))
    plain.ops, keeping.ops = KernelOps(matmul=matmul), KernelOps(matmul=matmul)
    tokens = torch.randint(29, (rows, 10), device=DEVICE)
    exact = copy.deepcopy(model).float()
    cache, exact_cache = (DynamicCache(config=model.config) for _ in range(2))
    model(tokens[:, :6], past_key_values=cache, use_cache=True)
    exact(tokens[:, :6], past_key_values=exact_cache, use_cache=True)
    for step in (plain, keeping):
        step.load(cache, 6, None)
    for position in range(6, 10):  # past the window of 8
        for step in (plain, keeping):
            step.token.copy_(tokens[:, position])
            step.step()
        assert plain.hidden_states is None and torch.equal(keeping.logits, plain.logits)
        expected, judge = (
            each(tokens[:, position, None], past_key_values=its_cache, use_cache=True, output_hidden_states=True)
            for each, its_cache in ((model, cache), (exact, exact_cache))
        )
        expected, judge = expected.hidden_states, judge.hidden_states
        assert keeping.hidden_states.dtype == dtype and len(keeping.hidden_states) == len(expected)
        for mine, theirs, true in zip(keeping.hidden_states, expected, judge):
            if dtype == torch.float32:
                assert_close(LOGITS[dtype], mine, theirs)
            else:
                assert relative_error(mine, true) <= 2 * relative_error(theirs, true)


KERNELS_OF_A_PASS = ("triton_add_rms_norm", "triton_gelu_gated", "triton_rotate", "convolve_on_gpu", "rg_lru_gates")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES_OF_STEPS)
@torch.no_grad()
def test_the_model_s_own_pass_over_fixed_buffers_leaves_small_tensors_to_kernels(dtype, rows, small_model, monkeypatch):
    """As the host starts nothing there; the model's own call, which it is compared with, keeps them eager."""
    called = set()
    for name in KERNELS_OF_A_PASS:
        real = getattr(dispatch, name)
        monkeypatch.setattr(dispatch, name, lambda *x, real=real, name=name: called.add(name) or real(*x))
    if INTERPRETED:
        monkeypatch.setattr(dispatch, "pays", lambda *x: dispatch._small_pays())
    model = small_model("griffin").to(DEVICE, dtype)
    tokens, cache = torch.randint(29, (rows, 10), device=DEVICE), DynamicCache(config=model.config)
    model(tokens[:, :6], past_key_values=cache, use_cache=True)
    assert not called
    step = ForwardStep(model, rows, 8, False)
    step.prepare(model)
    expected = set(KERNELS_OF_A_PASS) if dtype != torch.float32 else set(KERNELS_OF_A_PASS[:-1])
    if step.on_gpu:
        assert called == expected
    step.load(cache, 6, None)
    for position in range(6, 10):  # past the window of 8
        step.token.copy_(tokens[:, position])
        step.step()
        output = model(tokens[:, position, None], past_key_values=cache, use_cache=True)
        assert_close(LOGITS[dtype], step.logits, output.logits[:, -1])
    assert called == expected


@pytest.mark.parametrize("heads, key_heads, head_dim, window", [(20, 1, 128, 200), (4, 2, 24, 100), (3, 3, 256, 64)])
@pytest.mark.parametrize("time", [0, 63, 64, 1234])
@torch.no_grad()
def test_attention(time, heads, key_heads, head_dim, window):
    rows, rotary = 3, head_dim // 2
    q, k, v = (normal(rows, n * head_dim) for n in (heads, key_heads, key_heads))
    rings = [normal(rows, key_heads, window, head_dim) for _ in range(2)]
    angles = torch.rand(rows, rotary // 2, device=DEVICE).repeat(1, 2)
    padding = torch.tensor([0, max(0, time - 3), time], device=DEVICE)
    clock = Clock(torch.tensor([time], device=DEVICE), padding, angles.cos(), angles.sin())

    def attend(ops):
        keys, values = copy.deepcopy(rings)
        return [ops.attend(q, k, v, keys, values, clock, head_dim**-0.5), keys, values]

    for expected, actual in zip(*both(attend), strict=True):
        assert_close("logits", actual, expected)


@pytest.mark.parametrize(
    "rows, window, programs, splits",
    [(1, 500, 256, 8), (1, 417, 256, 7), (2, 500, 10, 2), (5, 300, 20, 2), (64, 80, 256, 2), (64, 80, 128, 1)],
)
@pytest.mark.parametrize("dtype", DTYPES_OF_STEPS)
@torch.no_grad()
def test_splits_of_attention(dtype, rows, window, programs, splits, monkeypatch):
    """Tokens in one split, in some and in all; twice by the same kernels: what the first has counted is forgotten."""
    monkeypatch.setattr(tiles, "ATTENTION_PROGRAMS", programs)
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 1)
    poison_what_is_new(monkeypatch)
    head_dim, heads, key_heads, kernels = 16, 6, 2, KernelOps()
    q, k, v = (normal(rows, n * head_dim, dtype=dtype) for n in (heads, key_heads, key_heads))
    rings = [normal(rows, key_heads, window, head_dim, dtype=dtype) for _ in range(2)]
    angles = torch.rand(rows, head_dim // 4, device=DEVICE).repeat(1, 2).to(dtype)
    grids = []
    real = decode_ops.attention_kernel
    seen = type("Seen", (), {"__getitem__": lambda _, grid: grids.append(grid) or real[grid]})
    monkeypatch.setattr(decode_ops, "attention_kernel", seen())

    def attend(ops, time):
        padding = (torch.arange(rows, device=DEVICE) * 97 + time - window + 20).clamp(0, time)
        clock = Clock(torch.tensor([time], device=DEVICE), padding, angles.cos(), angles.sin())
        return ops.attend(q, k, v, *(ring.clone() for ring in rings), clock, head_dim**-0.5)

    for time in (0, 70, 1777) if rows < 64 else (1777,):
        expected, first, second = attend(PlainOps(), time), attend(kernels, time), attend(kernels, time)
        assert_close(LOGITS[dtype], first, expected)
        assert torch.equal(first, second)
    if dtype == torch.float32 and rows == 1:  # blocks are half as long, and each is a split
        splits *= 2
    assert set(grids) == {(rows * key_heads, splits)}
    assert kernels.counters is None if splits == 1 else not kernels.counters.any()


@pytest.mark.parametrize("width, blocks, rows", [(48, 3, 2), (160, 2, 1), (70, 1, 65), (320, 2, 33)])
@pytest.mark.parametrize("lambda_bias", [-9.0, -2.0, 3.0])
@torch.no_grad()
def test_recurrence(lambda_bias, width, blocks, rows, small_model):
    model = small_model("hawk", lru_width=width, num_gate_blocks=blocks).to(DEVICE)
    block = model.model.layers[0].temporal_block
    block.rg_lru.decay.lambda_bias.data.fill_(lambda_bias)
    x, y, past = normal(rows, width), normal(rows, width), normal(rows, 4, width)
    state, log_decay = normal(rows, width), block.rg_lru.decay()

    def recurrent(ops, clock):
        buffers = past.clone(), state.clone()
        return [ops.recurrent(x, y, block, *buffers, log_decay, clock), *buffers]

    for time in (0, 102):
        clock = Clock(torch.tensor([time], device=DEVICE), torch.zeros(rows, dtype=torch.long, device=DEVICE))
        for expected, actual in zip(*both(lambda ops, clock=clock: recurrent(ops, clock)), strict=True):
            assert_close("logits", actual, expected)
