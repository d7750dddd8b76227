"""The RG-LRU layer: its gates, its decay and how they meet the scan.

Legend: B batch, T time, C channels, N gate blocks.
"""

import pytest
import torch

from modeling_griffin import rg_lru
from modeling_griffin.kernels import dispatch
from modeling_griffin.kernels.block_diagonal import BlockDiagonalProduct, _join_narrow_blocks
from modeling_griffin.rg_lru import RGLRU, BlockDiagonalLinear, Decay
from tests.tolerances import assert_close


B, T, C, N = 2, 7, 12, 3


def make_layer(dtype=torch.float32):
    layer = RGLRU(C, N, 8.0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.uniform_(layer.decay.lambda_bias, -7, -2)
    return layer.to(dtype)


def test_parameters():
    layer = RGLRU(C, N, 8.0)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "recurrence_gate.weight": (N, C // N, C // N),
        "recurrence_gate.bias": (N, C // N),
        "input_gate.weight": (N, C // N, C // N),
        "input_gate.bias": (N, C // N),
        "decay.lambda_bias": (C,),
    }


@pytest.mark.parametrize("blocks", [1, 3, 12])
def test_gate_is_a_block_diagonal_matrix(blocks):
    gate = BlockDiagonalLinear(C, blocks)
    torch.nn.init.normal_(gate.weight)
    torch.nn.init.normal_(gate.bias)
    x = torch.randn(B, T, C)
    expected = x @ torch.block_diag(*gate.weight) + gate.bias.flatten()  # input axis first
    assert_close("layer", gate(x), expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_products_written_in_place_are_the_same(blocks, autocast, monkeypatch):
    """What large inputs on a GPU take: values and all gradients, for a strided input and a strided gradient too."""
    gate = BlockDiagonalLinear(C, blocks)
    torch.nn.init.normal_(gate.weight)
    torch.nn.init.normal_(gate.bias)
    x, weights = torch.randn(2, T, B, C, dtype=torch.bfloat16 if autocast else torch.float32)
    x.requires_grad_()

    def outcome():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = gate(x.transpose(0, 1))
        return [y, *torch.autograd.grad(y, [x, *gate.parameters()], weights.transpose(0, 1).to(y.dtype))]

    expected = outcome()
    monkeypatch.setattr(dispatch, "pays", lambda *tensors: True)
    for right, found in zip(expected, outcome(), strict=True):
        assert found.dtype == right.dtype
        assert_close("bfloat16 layer" if autocast else "layer", found.float(), right.float())


@pytest.mark.parametrize(
    "blocks, width, joined", [(16, 4, 1), (9, 4, 1), (3, 20, 1), (5, 20, 5), (4, 32, 2), (2, 160, 2)]
)
@pytest.mark.parametrize("rows", [63, 192])
def test_narrow_blocks_are_multiplied_together(blocks, width, joined, rows):
    """Blocks joined to wider ones, and sums over rows in parts, are the same products, in float64."""
    weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((blocks, width, width), (blocks, width))
    )
    x, d_y = torch.randn(2, 3, rows // 3, blocks * width, dtype=torch.float64)
    x.requires_grad_()
    assert _join_narrow_blocks(weight).shape[0] == joined
    found = BlockDiagonalProduct.apply(x, weight, bias)
    expected = x @ torch.block_diag(*weight) + bias.flatten()
    torch.testing.assert_close(found, expected)
    found, expected = (torch.autograd.grad(y, [x, weight, bias], d_y) for y in (found, expected))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("c", [0.5, 8.0])
def test_decay_is_the_log_of_a_to_the_c(c):
    """Equation 6: a^c with log a = -softplus(Λ), where the stored Λ may be large or very negative."""
    decay = Decay(9, c)
    decay.lambda_bias.data = torch.tensor([-80.0, -30.0, -8.987, -4.323, -1.0, 0.0, 1.0, 30.0, 80.0])
    expected = -c * torch.log1p(torch.exp(decay.lambda_bias.double()))
    assert decay().dtype == torch.float32
    assert_close("decay", decay() / expected, torch.ones(9))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert Decay(3, c).lambda_bias.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_layer_is_the_equations():
    """Equations 1 to 4 written out in float64, with a continued state."""
    layer, x, state = make_layer(), torch.randn(B, T, C), torch.randn(B, C)
    hidden, last = layer(x, state=state)
    wide = {name: parameter.double() for name, parameter in layer.named_parameters()}
    gate = lambda name: torch.sigmoid(  # noqa: E731
        x.double() @ torch.block_diag(*wide[f"{name}.weight"]) + wide[f"{name}.bias"].flatten()
    )
    a = torch.sigmoid(-wide["decay.lambda_bias"]) ** (8.0 * gate("recurrence_gate"))
    h = state.double()
    for t in range(T):
        h = a[:, t] * h + torch.sqrt(1 - a[:, t] ** 2) * gate("input_gate")[:, t] * x[:, t].double()
        assert_close("layer", hidden[:, t], h)
    assert_close("layer", last, h)
    assert last.dtype == torch.float32


def test_padding_carries_the_state_whatever_stands_there():
    layer, x, state = make_layer(), torch.randn(B, T, C), torch.randn(B, C)
    real = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 1, 0, 1]], dtype=torch.bool)
    padded = torch.where(real[..., None], x, torch.tensor(1e4)).requires_grad_()
    hidden, last = layer(padded, torch.zeros_like(real), real, state)
    for row in range(B):
        alone, alone_last = layer(x[row, real[row]][None], None, None, state[row : row + 1])
        assert_close("layer", hidden[row, real[row]], alone[0])
        assert_close("layer", last[row], alone_last[0])
    gradients = torch.autograd.grad(hidden.sum() + last.sum(), [padded, *layer.parameters()])
    assert (gradients[0][~real] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_half_precision_keeps_decay_and_state_in_float32():
    layer = make_layer(torch.bfloat16)
    x = torch.randn(B, T, C, dtype=torch.bfloat16)
    hidden, last = layer(x)
    assert hidden.dtype == torch.bfloat16 and last.dtype == layer.decay().dtype == torch.float32
    wide = make_layer()
    wide.load_state_dict(layer.state_dict())
    assert_close("bfloat16 logits", last, wide(x.float())[1])


def test_autocast_keeps_the_scan_in_bfloat16(monkeypatch):
    """Float32 weights under autocast must not turn the scan, and what it keeps, into float32."""
    from modeling_griffin.causal_conv1d import CausalConv1d

    seen, scan = [], rg_lru.rg_lru_scan
    monkeypatch.setattr(
        rg_lru,
        "rg_lru_scan",
        lambda x, r, i, *a, **k: seen.extend([x.dtype, r.dtype, i.dtype]) or scan(x, r, i, *a, **k),
    )
    with torch.autocast("cpu", torch.bfloat16):
        x, _ = CausalConv1d(C, 4)(torch.randn(B, T, C, dtype=torch.bfloat16))
        make_layer()(x)
    assert seen == [torch.bfloat16] * 3


def test_the_decay_is_called_with_an_argument():
    """FSDP2 of PyTorch 2.9 to 2.11 takes the first one's device, on a GPU where activations are made anew."""
    layer, seen = make_layer(), []
    layer.decay.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    layer(torch.randn(1, 3, layer.decay.lambda_bias.numel()))
    assert seen == [(torch.float32,)]
