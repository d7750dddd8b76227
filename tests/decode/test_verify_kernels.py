"""The Triton kernels of a step over drafts against the same operations in plain PyTorch, which is their definition."""

import pytest
import torch
from _decode_helpers import (
    DEVICE,
    DTYPES_OF_STEPS,
    INTERPRETED,
    LOGITS,
    multiply_matrices,
    needs_kernels,
    normal,
    poison_what_is_new,
)
from tolerances import assert_close

from modeling_griffin.decode.ops import Clock, KernelOps
from modeling_griffin.decode.speculative.ops import KernelVerifyOps, PlainVerifyOps
from modeling_griffin.decode.speculative.verify import VerifyStep
from modeling_griffin.decode.state import DecodeStep
from modeling_griffin.kernels.device import decode as tiles


pytestmark = needs_kernels
KERNELS = [PlainVerifyOps, KernelVerifyOps]


def clock_of(time: int, padding: int = 0, cos=None, sin=None) -> Clock:
    return Clock(torch.tensor([time], device=DEVICE), torch.tensor([padding], device=DEVICE), cos, sin)


def unwritten(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    "tokens, heads, key_heads, head_dim, window",
    [(9, 20, 1, 128, 200), (5, 4, 2, 24, 100), (2, 3, 3, 256, 64), (33, 2, 1, 16, 33)],
)
@pytest.mark.parametrize("programs", [256, 4])
@pytest.mark.parametrize("dtype", DTYPES_OF_STEPS)
@torch.no_grad()
def test_attention(dtype, programs, tokens, heads, key_heads, head_dim, window, monkeypatch):
    """In many splits of the ring and in few; twice by the same kernels: what the first has counted is forgotten."""
    monkeypatch.setattr(tiles, "DRAFT_PROGRAMS", programs)
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 1)
    poison_what_is_new(monkeypatch)
    q, k, v = (normal(tokens, n * head_dim, dtype=dtype) for n in (heads, key_heads, key_heads))
    rings = [normal(1, key_heads, window, head_dim, dtype=dtype) for _ in range(2)]
    before = [ring.clone() for ring in rings]
    angles = torch.rand(tokens, head_dim // 4, device=DEVICE).repeat(1, 2).to(dtype)
    kernels = KernelVerifyOps()

    def attend(ops, time, padding):
        new = [unwritten(key_heads, tokens, head_dim, dtype=dtype) for _ in range(2)]
        clock = clock_of(time, padding, angles.cos(), angles.sin())
        return [ops.attend(q, k, v, *rings, *new, clock, head_dim**-0.5), *new]

    for time, padding in ((0, 0), (window - 1, 3), (window + 2, window + 2), (1234, 1230), (1777, 0)):
        cases = [attend(ops, time, padding) for ops in (PlainVerifyOps(), kernels, kernels)]
        for expected, first, second in zip(*cases, strict=True):
            assert_close(LOGITS[dtype], first, expected)
            assert torch.equal(first, second)
        assert all(map(torch.equal, rings, before))
    assert kernels.counters is None or not kernels.counters.any()


@pytest.mark.parametrize(
    "width, blocks, tokens, taps", [(48, 3, 2, 4), (160, 2, 9, 4), (70, 1, 33, 4), (320, 2, 16, 2), (64, 1, 64, 6)]
)
@pytest.mark.parametrize("lambda_bias", [-9.0, 3.0])
@torch.no_grad()
def test_recurrence(lambda_bias, width, blocks, tokens, taps, small_model):
    model = small_model("hawk", lru_width=width, num_gate_blocks=blocks, conv1d_width=taps).to(DEVICE)
    block = model.model.layers[0].temporal_block
    block.rg_lru.decay.lambda_bias.data.fill_(lambda_bias)
    x, y, past, state = normal(tokens, width), normal(tokens, width), normal(1, taps, width), normal(1, width)
    before, log_decay = [past.clone(), state.clone()], block.rg_lru.decay()
    for time in (0, 1, 102, 103):
        cases = []
        for make in KERNELS:
            new = unwritten(tokens, width), unwritten(tokens, width)
            cases.append([make().recurrent(x, y, block, past, state, log_decay, *new, clock_of(time)), *new])
        for expected, actual in zip(*cases, strict=True):
            assert_close("logits", actual, expected)
    assert torch.equal(past, before[0]) and torch.equal(state, before[1])


@pytest.mark.parametrize(
    "largest, drafts, accepted",
    [([3, 4, 5], [3, 4], 3), ([3, 4, 5], [3, 9], 2), ([3, 4, 5], [9, 4], 1), ([3, 4, 7], [3, 4], None)],
)
@pytest.mark.parametrize("more", [0, 1, 20])
def test_what_is_accepted(largest, drafts, accepted, more):
    """`more` places without a draft, where the token chosen last stands: all right (None), or behind a wrong one."""
    expected, behind = accepted or 3 + more, [*largest, *[7] * more]
    for make in KERNELS:
        tokens = torch.tensor([7, *drafts, *[7] * more], pin_memory=DEVICE == "cuda")
        tokens = tokens if make is KernelVerifyOps else tokens.to(DEVICE)
        report = torch.tensor([-9, *behind], device=DEVICE)
        token, clock = torch.tensor([-9], device=DEVICE), clock_of(40)
        make().accept(tokens, report, token, clock)
        assert report.tolist() == [expected, *behind]
        assert token.tolist() == [behind[expected - 1]] and clock.time.tolist() == [40 + expected]


@pytest.mark.parametrize("dtype", DTYPES_OF_STEPS)
@pytest.mark.parametrize(
    "tokens, taps, window, key_heads, layers", [(2, 4, 2, 1, 1), (9, 4, 11, 3, 2), (40, 6, 64, 1, 3), (3, 4, 8, 1, 0)]
)
def test_what_is_kept(tokens, taps, window, key_heads, layers, dtype):
    """In all layers at once, or in none."""
    new_x, new_h, new_keys, new_values = (
        normal(layers, *shape, dtype=kind)
        for shape, kind in (
            *(((tokens, 300), dtype), ((tokens, 300), torch.float32)),
            *[((key_heads, tokens, 24), dtype)] * 2,
        )
    )
    past, state = normal(layers, 1, taps, 300, dtype=dtype), normal(layers, 1, 300)
    keys, values = (normal(layers, 1, key_heads, window, 24, dtype=dtype) for _ in range(2))
    for accepted in sorted({1, 2, tokens // 2, tokens}, reverse=True):
        for rejected in (
            new_x[:, accepted:],
            new_h[:, accepted:],
            new_keys[:, :, accepted:],
            new_values[:, :, accepted:],
        ):
            rejected.fill_(float("nan"))
        for time in (0, 1, 5, 1000, 1001):
            report, clock = torch.tensor([accepted], device=DEVICE), clock_of(time + accepted)
            cases = []
            for make in KERNELS:
                kept = [tensor.clone() for tensor in (past, state, keys, values)]
                make().keep_recurrent(*kept[:2], new_x, new_h, report, clock)
                make().keep_attention(*kept[2:], new_keys, new_values, report, clock)
                cases.append(kept)
            assert all(map(torch.equal, *cases))
            assert torch.equal(cases[0][1][:, 0], new_h[:, accepted - 1])


class PlainVerifyOpsOfDevice(PlainVerifyOps):
    """Plain PyTorch on a GPU does not read tokens where the host has them."""

    def begin(self, token, *others):
        return super().begin(token.to(DEVICE), *others)

    def accept(self, tokens, *others):
        super().accept(tokens.to(DEVICE), *others)


@pytest.mark.parametrize("kind", ["griffin", "hawk", "attention"])
@pytest.mark.parametrize("tokens", [2, 5])
@pytest.mark.parametrize("dtype", DTYPES_OF_STEPS)
def test_whole_passes(dtype, tokens, kind, small_model, monkeypatch):
    """Logits, what is accepted and all states, past the window; the drafts are those that the plain step takes."""
    multiply_matrices(monkeypatch)
    model = small_model(kind, scale_embeddings=True, final_logit_softcapping=5.0).to(DEVICE, dtype)
    steps, passes = [DecodeStep(model.model, model.lm_head, 1) for _ in range(2)], []
    steps[1].ops = KernelOps()
    for step in steps:
        step.start(1)
        step.clock.padding.fill_(1)
        passes.append(VerifyStep(step, tokens))
    passes[0].ops = PlainVerifyOpsOfDevice()
    assert type(passes[1].ops) is KernelVerifyOps
    for number in range(tokens if INTERPRETED else 40):
        drafts = [1] * (tokens - 1)
        for right in range(tokens - 1):  # of which as many are right as the number says
            before = [
                tensor.clone() for tensor in (steps[0].clock.time, *(t for kept in steps[0].layers for t in kept))
            ]
            found = passes[0].read(3, drafts)
            for tensor, value in zip(
                (steps[0].clock.time, *(t for kept in steps[0].layers for t in kept)), before, strict=True
            ):
                tensor.copy_(value)
            if right < number % tokens:
                drafts[right] = found[right]
        found = [each.read(3, drafts) for each in passes]
        assert_close(LOGITS[dtype], passes[1].logits, passes[0].logits)
        assert found[0] == found[1] or dtype != torch.float32
        if found[0] != found[1]:  # two tokens are as likely as can be told in 16 bits
            return
        assert torch.equal(steps[0].clock.time, steps[1].clock.time)
        for one, other in zip(steps[1].layers, steps[0].layers):
            for actual, expected in zip(one[:2], other[:2]):
                assert_close(LOGITS[dtype], actual, expected)
                expected.copy_(actual)  # so that rounding does not pile up over the passes
