"""Linear layers that read the same input: the numbers and gradients of the modules, and when the modules are called."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import modeling_griffin.kernels.linears as fused_linear
from modeling_griffin import slots
from modeling_griffin.elementwise import gated_linears, linears
from modeling_griffin.kernels import dispatch
from modeling_griffin.kernels.dispatch import GELU_TANH, is_plain
from tests.tolerances import assert_close


@pytest.fixture
def paying(monkeypatch):
    """As on a GPU; the kernels of the gated activation in PyTorch's own operations."""
    calls = []
    monkeypatch.setattr(dispatch, "pays", lambda *x: calls.append(1) or True)
    for name in ("gated", "rotate"):  # which have no kernels here
        monkeypatch.setitem(slots._FILLED, name, lambda *x: None)
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
def test_linears(paying, bias, monkeypatch):
    monkeypatch.setattr(fused_linear, "NARROW", 3)
    x, layers = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True), modules(bias)
    expected = gradients([layer(x) for layer in layers], x, layers)
    found = linears(x, *layers)
    assert type(found[0].grad_fn) is type(found[1].grad_fn) and found[0].grad_fn is found[1].grad_fn
    for f, e in zip(gradients(found, x, layers), expected, strict=True):
        assert_close("scan float64", f, e)


def attention_like(order=(9, 2, 3)):
    """A wide layer and narrow ones, none with a bias."""
    return [nn.Linear(6, features, bias=False).double() for features in order]


@pytest.fixture
def products(paying, monkeypatch):
    """How many outputs each product has."""
    monkeypatch.setattr(fused_linear, "NARROW", 3)
    seen, linear = [], fused_linear.linear
    monkeypatch.setattr(fused_linear, "linear", lambda x, w, b: seen.append(len(w)) or linear(x, w, b))
    return seen


@pytest.mark.parametrize(
    "order, expected", [((9, 2, 3), [9, 5]), ((2, 9, 3), [9, 5]), ((2, 3, 1), [6]), ((9, 4, 3), [9, 4, 3])]
)
def test_narrow_layers_are_one_product(products, order, expected):
    """In their places, whatever the order; each with its own values and gradients."""
    x, layers = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True), attention_like(order)
    right = gradients([layer(x) for layer in layers], x, layers)
    found = linears(x, *layers)
    assert products == expected
    for f, e in zip(gradients(found, x, layers), right, strict=True):
        assert_close("scan float64", f, e)


def test_narrow_layers_with_a_bias_keep_their_products(products):
    x, layers = torch.randn(2, 5, 6, dtype=torch.float64), [nn.Linear(6, 2).double(), *attention_like()]
    for f, layer in zip(linears(x, *layers), layers, strict=True):
        assert_close("scan float64", f, layer(x))
    assert products == [2, 9, 5]


def test_gradients_of_one_product_accumulate_and_are_apart(products):
    """They start as views of one buffer: an optimizer must be able to add to, clear or drop each alone."""
    x, layers = torch.randn(2, 5, 6, dtype=torch.float64), attention_like()
    weights = [layer.weight for layer in layers]
    right = torch.autograd.grad([layer(x).square().sum() for layer in layers], weights)

    def backward():
        sum(y.square().sum() for y in linears(x, *layers)).backward()

    for passes in (1, 2):
        backward()
        for weight, r in zip(weights, right):
            assert weight.grad.is_contiguous()
            assert_close("scan float64", weight.grad, passes * r)
    weights[1].grad.zero_()
    assert_close("scan float64", weights[2].grad, 2 * right[2])
    weights[1].grad = None
    backward()
    assert_close("scan float64", weights[1].grad, right[1])
    assert_close("scan float64", weights[2].grad, 3 * right[2])


def test_of_one_product_a_part_is_frozen_or_unused(products):
    x, layers = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True), attention_like()
    layers[1].requires_grad_(False)
    right = gradients([layer(x) for layer in layers], x, layers)
    for f, r in zip(gradients(linears(x, *layers), x, layers), right, strict=True):
        assert_close("scan float64", f, r)
    linears(x, *layers)[2].sum().backward()
    assert layers[1].weight.grad is None
    assert_close("scan float64", x.grad, layers[2].weight.sum(0).expand_as(x))


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


def test_autocast_of_one_product(products):
    x, layers = torch.randn(2, 5, 6, requires_grad=True), [layer.float() for layer in attention_like()]
    with torch.autocast("cpu", torch.bfloat16):
        right, found = [layer(x) for layer in layers], linears(x, *layers)
    assert products == [9, 5] and all(y.dtype == torch.bfloat16 for y in found)
    for f, r in zip(gradients(found, x, layers), gradients(right, x, layers), strict=True):
        assert f.dtype == r.dtype
        assert_close("bfloat16 layer", f, r)


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


def test_attention_reads_the_views(products, monkeypatch):
    """Keys and values of several heads: the block's result and gradients are those of separate products."""
    from modeling_griffin.configuration_griffin import GriffinConfig
    from modeling_griffin.modeling_griffin import GriffinAttention

    monkeypatch.setattr(fused_linear, "NARROW", 16)
    config = GriffinConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    config._attn_implementation = "sdpa"
    block = GriffinAttention(config, 2).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(2, 5, 4, dtype=torch.float64)

    def outcome():
        return gradients([block(x, (angles.cos(), angles.sin()))[0]], x, [block])

    found = outcome()
    assert products == [32, 32]
    monkeypatch.setattr(dispatch, "pays", lambda *x: False)
    for f, e in zip(found, outcome(), strict=True):
        assert_close("scan float64", f, e)
    assert products == [32, 32]


@pytest.mark.gpu
def test_attention_projects_keys_and_values_by_one_product_on_a_gpu(monkeypatch):
    """And what reads them takes views: the block with a hook on one of the layers has nearly the same gradients."""
    from modeling_griffin.configuration_griffin import GriffinConfig
    from modeling_griffin.modeling_griffin import GriffinForCausalLM

    seen, linear = [], fused_linear.linear
    monkeypatch.setattr(fused_linear, "linear", lambda x, w, b: seen.append(len(w)) or linear(x, w, b))
    config = GriffinConfig(
        vocab_size=64, hidden_size=1024, num_hidden_layers=1, num_attention_heads=8, attention_window_size=96,
        layer_types=["sliding_attention"],
    )  # fmt: skip
    model = GriffinForCausalLM(config).cuda().bfloat16()
    ids = torch.randint(0, 64, (8, 512), device="cuda")

    def outcome():
        model.zero_grad()
        result = model(ids, labels=ids, use_cache=False)
        result.loss.backward()
        return [result.logits, *(parameter.grad for parameter in model.parameters())]

    found = outcome()
    assert 256 in seen and 128 not in seen
    model.model.layers[0].temporal_block.k_proj.register_forward_hook(lambda *arguments: None)
    seen.clear()
    for f, e in zip(found, outcome(), strict=True):
        assert (f - e).norm() <= 2e-2 * e.norm()
    assert 256 not in seen
