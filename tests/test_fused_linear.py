"""Linear layers that read the same input: the numbers and gradients of the modules, and when the modules are called."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from modeling_griffin import fused_linear
from modeling_griffin.fused import GELU_TANH
from modeling_griffin.fused_linear import gated_linears, is_plain, linears
from tests.tolerances import assert_close


@pytest.fixture
def paying(monkeypatch):
    """As on a GPU; the kernels of the gated activation in PyTorch's own operations."""
    calls = []
    monkeypatch.setattr(fused_linear, "pays", lambda *x: calls.append(1) or True)
    monkeypatch.setattr(fused_linear, "gelu_gated_forward", lambda gate, x: GELU_TANH()(gate) * x)
    monkeypatch.setattr(fused_linear, "gelu_gated_backward", backward)
    return calls


def backward(d_y, gate, x, sums):
    gate, x = gate.detach().requires_grad_(), x.detach().requires_grad_()
    with torch.enable_grad():
        gradients = torch.autograd.grad(GELU_TANH()(gate) * x, (gate, x), d_y)
    return *gradients, tuple(g.flatten(0, 1).sum(0) for g in gradients) if sums else None


def modules(bias=True):
    return [nn.Linear(6, features, bias=bias).double() for features in (4, 4)]


def gradients(result, x, layers):
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    return [*result, *torch.autograd.grad([r.square().sum() for r in result], [x, *parameters])]


@pytest.mark.parametrize("bias", [True, False])
def test_linears(paying, bias):
    x, layers = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True), modules(bias)
    expected = gradients([layer(x) for layer in layers], x, layers)
    found = linears(x, *layers)
    assert type(found[0].grad_fn) is type(found[1].grad_fn) and found[0].grad_fn is found[1].grad_fn
    for f, e in zip(gradients(found, x, layers), expected, strict=True):
        assert_close("scan float64", f, e)


def test_gated_linears(paying):
    x, layers = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True), modules()
    gate, up = layers
    expected = gradients([GELU_TANH()(gate(x)) * up(x)], x, layers)
    found = gated_linears(GELU_TANH(), x, gate, up)
    assert "GatedLinears" in type(found.grad_fn).__name__
    for f, e in zip(gradients([found], x, layers), expected, strict=True):
        assert_close("scan float64", f, e)


def test_frozen_weights(paying):
    """Of a base model under adapters: only what needs a gradient gets one."""
    x, layers = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True), modules()
    layers[0].requires_grad_(False)
    layers[1].bias.requires_grad_(False)
    expected = gradients([layer(x) for layer in layers], x, layers)
    for f, e in zip(gradients(linears(x, *layers), x, layers), expected, strict=True):
        assert_close("scan float64", f, e)
    gated_linears(GELU_TANH(), x, *layers).sum().backward()
    assert layers[0].weight.grad is None and layers[1].bias.grad is None and layers[1].weight.grad is not None


def test_autocast(paying):
    """Products in bfloat16 and gradients in the parameters' dtype, as of the modules."""
    x, layers = torch.randn(2, 5, 6, requires_grad=True), [layer.float() for layer in modules()]
    with torch.autocast("cpu", torch.bfloat16):
        found = gated_linears(GELU_TANH(), x, *layers)
        expected = [layer(x) for layer in layers]
        pair = linears(x, *layers)
    assert found.dtype == torch.bfloat16 and all(torch.equal(p, e) for p, e in zip(pair, expected))
    found.sum().backward()
    assert layers[0].weight.grad.dtype == torch.float32


def test_other_activations_and_missing_biases_take_the_modules(paying):
    x, layers = torch.randn(2, 5, 6, dtype=torch.float64), modules()
    assert torch.equal(gated_linears(nn.ReLU(), x, *layers), layers[0](x).relu() * layers[1](x))
    bare = modules(bias=False)
    assert torch.equal(gated_linears(GELU_TANH(), x, *bare), GELU_TANH()(bare[0](x)) * bare[1](x))


def test_what_is_plain(paying):
    """Hooks, adapters, parametrisations and replaced forwards (offloading) must be called as modules."""
    assert is_plain(nn.Linear(2, 2), nn.Linear)
    assert not is_plain(type("Adapter", (nn.Linear,), {})(2, 2), nn.Linear)
    for spoil in (
        lambda m: m.register_forward_hook(lambda *a: None),
        lambda m: m.register_forward_pre_hook(lambda *a: None),
        lambda m: m.register_full_backward_hook(lambda *a: None),
        lambda m: m.register_full_backward_pre_hook(lambda *a: None),
        lambda m: setattr(m, "forward", lambda x: x),
        lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()),
    ):
        module = nn.Linear(2, 2)
        spoil(module)
        assert not is_plain(module, nn.Linear)
    seen = []
    layers = modules()
    layers[0].register_forward_hook(lambda *a: seen.append(1))
    linears(torch.randn(1, 2, 6, dtype=torch.float64), *layers)
    assert seen == [1]
