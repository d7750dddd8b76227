"""Agreement with the RG-LRU of hippogriff, written here from its formula: dense gates, and an epsilon below the root.

r_t, i_t = sigmoid(W_r x_t + b_r), sigmoid(W_i x_t + b_i)
alpha_t  = exp(-8 softplus(forget_base) r_t)
beta_t   = sqrt(1 - alpha_t^2 + 1e-6)
h_t      = alpha_t h_{t-1} + beta_t i_t x_t
"""

import pytest
import torch

from modeling_griffin.lambda_init import LAMBDA_INITS
from modeling_griffin.rg_lru import RGLRU


WIDTH, LENGTH = 24, 200
EPSILON = 1e-6
TOLERANCE = 2e-5  # of the largest number compared


def formula(layer: RGLRU, x: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """h (B, T, C), and a bound on how far `epsilon` moves it, both in float64."""
    weights = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    x = x.double()
    r = torch.sigmoid(x @ weights["recurrence_gate.weight"][0] + weights["recurrence_gate.bias"][0])
    i = torch.sigmoid(x @ weights["input_gate.weight"][0] + weights["input_gate.bias"][0])
    alpha = torch.exp(-8 * torch.nn.functional.softplus(weights["decay.lambda_bias"]) * r)
    beta = torch.sqrt(1 - alpha**2 + epsilon)
    shift = epsilon / (2 * torch.sqrt(1 - alpha**2))  # sqrt(y + epsilon) - sqrt(y) is at most this
    h = bound = torch.zeros_like(x[:, 0])
    states, bounds = [], []
    for t in range(x.shape[1]):
        h = alpha[:, t] * h + beta[:, t] * i[:, t] * x[:, t]
        bound = alpha[:, t] * bound + shift[:, t] * i[:, t] * x[:, t].abs()
        states.append(h)
        bounds.append(bound)
    return torch.stack(states, dim=1), torch.stack(bounds, dim=1)


def make_layer() -> RGLRU:
    """One gate block, which is a dense gate, and hippogriff's own Λ."""
    torch.manual_seed(0)
    layer = RGLRU(WIDTH, num_gate_blocks=1, c=8.0)
    with torch.no_grad():
        for gate in (layer.recurrence_gate, layer.input_gate):
            gate.weight.normal_(std=WIDTH**-0.5)
            gate.bias.normal_(std=0.5)
        layer.decay.lambda_bias.copy_(LAMBDA_INITS["hippogriff"](WIDTH, 8.0, 0.9, 0.999))
    return layer


@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
@torch.no_grad()
def test_same_states_up_to_the_epsilon(epsilon):
    layer, x = make_layer(), torch.randn(2, LENGTH, WIDTH)
    found, last = layer(x)  # no start of a document: hippogriff scales the first input like all others
    expected, bound = formula(layer, x, epsilon)
    rounding = TOLERANCE * expected.abs().max()
    assert ((found - expected).abs() <= bound + rounding).all()
    assert torch.equal(last, found[:, -1])


@torch.no_grad()
def test_the_epsilon_is_seen_where_the_decay_is_slow():
    """The bound above is not so wide that it hides the difference: it is there, and it is the epsilon's."""
    layer, x = make_layer(), torch.randn(2, LENGTH, WIDTH)
    layer.decay.lambda_bias.fill_(-14.0)
    with_epsilon, bound = formula(layer, x, EPSILON)
    difference = (layer(x)[0] - with_epsilon).abs()
    assert difference.max() > 10 * TOLERANCE * with_epsilon.abs().max()
    assert (difference <= bound + TOLERANCE * with_epsilon.abs().max()).all()
