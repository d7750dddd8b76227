"""When chains of operations leave PyTorch's own; the kernels themselves: test_elementwise.py."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_griffin.elementwise import add_rms_norm, gated, gated_linears, linears, rms_norm, rotate
from modeling_griffin.kernels import dispatch
from modeling_griffin.rg_lru import BlockDiagonalLinear, gates


PAYS = dispatch.pays


def test_what_stays_eager(monkeypatch):
    """On a CPU, when small, with wrapped tensors, and in other transformations."""

    class OnGpu(torch.Tensor):
        pass

    monkeypatch.setattr(dispatch, "triton_unavailable_reason", lambda x: None)
    assert not PAYS(torch.zeros(2**20))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    large = torch.empty(2**20, device="meta")
    assert PAYS(large) and not PAYS(large[1:])
    assert not PAYS(large.as_subclass(OnGpu)) and not PAYS(large, large.as_subclass(OnGpu))
    in_grad = []
    torch.func.grad(lambda y: (in_grad.append(PAYS(large)), y.sum())[1])(torch.ones(2))
    assert in_grad == [False]


def test_other_activations():
    gate, x = torch.randn(2, 7)
    assert torch.equal(gated(torch.nn.ReLU(), gate, x), gate.relu() * x)


def flipped(module, args, output):
    return -output


def replaced(act_fn):
    act_fn.act = torch.nn.functional.silu


@pytest.mark.parametrize("change", [replaced, lambda act_fn: act_fn.register_forward_hook(flipped)])
def test_an_activation_that_does_more_is_called(change, monkeypatch):
    """No kernel stands for a hook on it, as those have that switch neurons off, nor for another function within."""
    monkeypatch.setattr(dispatch, "pays", lambda *x: True)
    for name in ("triton_gelu_gated", "gelu_gated_linears"):
        monkeypatch.setattr(dispatch, name, lambda *x: pytest.fail("a kernel runs"))
    act_fn, (gate, up) = dispatch.GELU_TANH(), (torch.nn.Linear(3, 7) for _ in range(2))
    change(act_fn)
    x = torch.randn(2, 3)
    expected = act_fn(gate(x)) * up(x)
    assert torch.equal(gated_linears(act_fn, x, gate, up), expected)
    assert torch.equal(gated(act_fn, gate(x), up(x)), expected)


@pytest.mark.parametrize("cls", [torch.nn.Linear, BlockDiagonalLinear, dispatch.GELU_TANH])
def test_a_class_whose_forward_was_replaced_is_called(cls, monkeypatch):
    monkeypatch.setattr(dispatch, "pays", lambda *x: True)
    for name in ("joined_linears", "rg_lru_gates", "triton_gelu_gated"):
        monkeypatch.setattr(dispatch, name, lambda *x: pytest.fail("a kernel runs"))
    monkeypatch.setattr(dispatch, "gates_unavailable_reason", lambda *x: None)
    real = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: real(self, x).roll(1, -1))
    x = torch.randn(2, 1, 6)
    if cls is dispatch.GELU_TANH:
        assert torch.equal(gated(cls(), x, x), cls()(x) * x)
        return
    pair = [cls(6, 2) for _ in range(2)]
    for parameter in (parameter for layer in pair for parameter in layer.parameters()):
        torch.nn.init.normal_(parameter)
    found = linears(x, *pair) if cls is torch.nn.Linear else gates(x, *pair)[:2]
    assert all(torch.equal(y, layer(x)) for y, layer in zip(found, pair, strict=True))


def test_linear_layers_whose_function_was_replaced_are_called(monkeypatch):
    monkeypatch.setattr(dispatch, "pays", lambda *x: True)
    monkeypatch.setattr(dispatch, "joined_linears", lambda *x: pytest.fail("another function runs"))
    real = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *x: real(*x).roll(1, -1))
    x, pair = torch.randn(2, 1, 6), [torch.nn.Linear(6, 3) for _ in range(2)]
    assert all(torch.equal(y, layer(x)) for y, layer in zip(linears(x, *pair), pair, strict=True))


def test_what_has_to_be_broadcast_stays_eager(monkeypatch):
    """As where a hook puts one mean in the place of all outputs; so do two dtypes whose product is wider."""
    monkeypatch.setattr(dispatch, "pays", lambda *x: True)
    for name in ("triton_add_rms_norm", "triton_gelu_gated", "triton_rotate"):
        monkeypatch.setattr(dispatch, name, lambda *x: pytest.fail("a kernel runs"))
    stream, mean, weight, act_fn = torch.randn(2, 3, 8), torch.randn(8), torch.randn(8), dispatch.GELU_TANH()
    monkeypatch.setattr(dispatch, "triton_rms_norm", lambda x, weight, eps: None)
    for x, residual in ((mean, stream), (mean[None, None], stream), (stream, stream[:1])):
        normed, total = add_rms_norm(x, residual, weight, 1e-6)
        assert torch.equal(total, residual + x) and normed.shape == stream.shape
        assert torch.equal(gated(act_fn, x, residual), act_fn(x) * residual)
    assert gated(act_fn, stream, stream.bfloat16()).dtype == torch.float32
    heads, angles = torch.randn(2, 3, 4, 8), torch.randn(1, 3, 8)
    assert torch.equal(rotate(heads, angles, angles), rotate.__wrapped__(heads, angles, angles))


def test_norm_of_a_sum():
    """With and without something to add."""
    x, residual, weight = torch.randn(3, 2, 5, 8).unbind(0)[0], torch.randn(2, 5, 8), torch.randn(8)
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, residual + x) and torch.equal(normed, rms_norm(total, weight, 1e-6))
    normed, total = add_rms_norm(None, residual, weight, 1e-6)
    assert total is residual and torch.equal(normed, rms_norm(residual, weight, 1e-6))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", ["test_elementwise.py", "test_loss.py"])
def test_kernels_in_the_interpreter(name):
    """Triton decides when it is imported, hence another process."""
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-m", "not common", str(file)]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout and "skipped" not in run.stdout, run.stdout + run.stderr
