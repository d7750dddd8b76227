"""A kernel that does not compile or start: PyTorch takes over, with one warning that names it."""

import pytest
import torch

from modeling_griffin.kernels import fallback, scan_calls
from modeling_griffin.rg_lru_scan import rg_lru_scan


class OutOfResources(Exception):
    """As Triton's, whose module is what tells it."""

    __module__ = "triton.runtime.errors"


class Double(torch.autograd.Function):
    wrong: Exception | None = None
    wrong_back: Exception | None = None
    calls = 0

    @staticmethod
    def forward(ctx, x):
        Double.calls += 1
        if Double.wrong is not None:
            raise Double.wrong
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx, d_y):
        if Double.wrong_back is not None:
            raise Double.wrong_back
        return 2 * d_y


def twice(x):
    return Double.apply(x)


@pytest.fixture
def doubled(monkeypatch):
    """`twice` as a slot has it, with a CPU's tensors taken for a GPU's."""
    monkeypatch.setattr(fallback, "FAILED", {})
    monkeypatch.setattr(fallback, "_TRIED", set())
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("wrong", "wrong_back"):
        monkeypatch.setattr(Double, name, None)
    monkeypatch.setattr(Double, "calls", 0)
    return fallback.or_definition(twice)


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    for module in (fallback, scan_calls):
        monkeypatch.setattr(module.logger, "warning", lines.append)
    return lines


def test_what_works_is_called(doubled, warnings):
    x = torch.ones(3, requires_grad=True)
    for calls in (2, 3):  # the first is tried before
        doubled(x).sum().backward()
        assert Double.calls == calls
    assert torch.equal(x.grad, torch.full((3,), 4.0)) and not warnings


@pytest.mark.parametrize("where", ["wrong", "wrong_back"])
@pytest.mark.parametrize("error", [OutOfResources("shared memory: 172032"), RuntimeError("Triton Error [CUDA]: x")])
def test_what_fails_is_left_to_pytorch(where, error, doubled, warnings, monkeypatch):
    """Backward too, although its failure comes only when the graph is made; and it is asked no second time."""
    monkeypatch.setattr(Double, where, error)
    x = torch.ones(3, requires_grad=True)
    assert doubled(x) is None and doubled(x) is None and Double.calls == 1
    (line,) = warnings
    assert "twice" in line and str(error) in line


def test_without_gradients_only_forward_is_asked(doubled, warnings, monkeypatch):
    monkeypatch.setattr(Double, "wrong_back", OutOfResources("never reached"))
    with torch.no_grad():
        assert torch.equal(doubled(torch.ones(2)), torch.full((2,), 2.0))
    assert Double.calls == 1 and not warnings


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("memory"), ValueError("x"), RuntimeError("shapes differ")])
def test_other_errors_are_raised(error, doubled, monkeypatch):
    monkeypatch.setattr(Double, "wrong", error)
    with pytest.raises(type(error)):
        doubled(torch.ones(3, requires_grad=True))
    assert not fallback.FAILED


def test_hooks_of_the_caller_see_one_call(doubled):
    """Non-reentrant checkpointing counts what is saved."""
    saved = []
    x = torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        doubled(x)
    assert len(saved) == 1


def make_inputs():
    torch.manual_seed(0)
    x, r, i = torch.randn(3, 2, 9, 4)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 3] = True
    return [x, r, i, -torch.rand(4), torch.randn(2, 4), reset]


def fail(*args):
    raise OutOfResources("shared memory: 300000")


def test_the_scan_falls_to_the_torch_backend(warnings, monkeypatch):
    monkeypatch.setattr(scan_calls, "FAILED", {})
    inputs = make_inputs()
    leaves = [x.requires_grad_() for x in inputs[:5]]
    expected = rg_lru_scan(*inputs[:4], initial_state=inputs[4], reset=inputs[5], backend="reference")
    d_hidden, d_last = torch.randn_like(expected[0]), torch.randn_like(expected[1])
    gradients = torch.autograd.grad(expected, leaves, (d_hidden, d_last))
    for _ in range(2):
        actual = scan_calls.forward_or_torch(fail, tuple(inputs))
        torch.testing.assert_close(actual, expected)
    found = scan_calls.backward_or_torch(fail, d_hidden, d_last, *inputs, expected[0])
    torch.testing.assert_close(tuple(found), gradients)
    assert len(warnings) == 1 and "shared memory: 300000" in warnings[0]


def test_the_scan_without_a_state(warnings, monkeypatch):
    """Backward alone fails: gradients of all inputs, zeros for a state that is none."""
    monkeypatch.setattr(scan_calls, "FAILED", {})
    inputs = make_inputs()
    inputs[4:] = None, None
    leaves = [x.requires_grad_() for x in inputs[:4]]
    hidden, _ = rg_lru_scan(*inputs[:4], backend="reference")
    gradients = torch.autograd.grad(hidden, leaves, torch.ones_like(hidden))
    *found, d_state = scan_calls.backward_or_torch(fail, torch.ones_like(hidden), None, *inputs, hidden)
    torch.testing.assert_close(tuple(found), gradients)
    assert d_state.shape == (2, 4) and not d_state.any()


def test_what_is_a_failure_of_a_kernel():
    assert fallback.is_kernel_failure(OutOfResources("")) and fallback.is_kernel_failure(FileNotFoundError("gcc"))
    assert fallback.is_kernel_failure(RuntimeError("Failed to find C compiler"))
    assert not fallback.is_kernel_failure(torch.OutOfMemoryError("Triton")) and not fallback.is_kernel_failure(
        KeyError("x")
    )


def test_what_no_kernel_takes_is_asked_once_more_only(doubled, monkeypatch):
    """Small tensors are PyTorch's: the second call costs one question, and a large one is still tried."""
    asked = []
    small = fallback.or_definition(lambda x: asked.append(x) if x.numel() < 2**20 else twice(x))
    for calls in (2, 3):
        assert small(torch.ones(4, requires_grad=True)) is None and len(asked) == calls
    monkeypatch.setattr(Double, "wrong_back", OutOfResources("only for large ones"))
    assert small(torch.ones(2**20, requires_grad=True)) is None and len(asked) == 3
