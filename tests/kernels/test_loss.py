"""The Triton kernels of the loss against PyTorch's cross_entropy in float64.

On a GPU, or without one by `TRITON_INTERPRET=1 pytest tests/kernels/test_loss.py` in Triton's interpreter.
"""

import os

import pytest
import torch
from torch.nn.functional import cross_entropy

import modeling_griffin.kernels.loss as causal_lm_loss_triton
from modeling_griffin.kernels.loss import KernelRowLosses


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Of the largest gradient: rounding once; the interpreter cuts to bfloat16 where a GPU rounds.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}
pytestmark = [pytest.mark.skipif(causal_lm_loss_triton.triton is None, reason="Triton is not installed")]
if not INTERPRETED:
    pytestmark.append(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    """Many turns over a row."""
    for name in ("LOSSES", "LOSS_GRADIENTS"):
        monkeypatch.setattr(causal_lm_loss_triton, name, (128, 4))


def draw(rows, vocabulary, dtype=torch.float32):
    logits = (5 * torch.randn(rows, vocabulary, device=DEVICE)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    return logits, targets.masked_fill(torch.rand(rows, device=DEVICE) < 0.3, -100)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("rows, vocabulary", [(1, 1), (5, 29), (3, 128), (7, 129), (4, 1000)])
def test_losses_and_gradients(rows, vocabulary, dtype):
    logits, targets = draw(rows, vocabulary, dtype)
    weights = torch.randn(rows, device=DEVICE)
    exact = logits.detach().double().requires_grad_()
    right = cross_entropy(exact, targets, reduction="none")
    losses = KernelRowLosses.apply(logits, targets, -100)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), right, rtol=1e-6, atol=2e-6)
    (gradient,) = torch.autograd.grad(losses, logits, weights)
    (expected,) = torch.autograd.grad(right, exact, weights.double())
    assert gradient.dtype == dtype
    assert ((gradient.double() - expected).abs() <= ROUNDING[dtype] * expected.abs() + 1e-7).all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite(value):
    """One logit, a whole row, and a row that is left out: NaN and numbers where PyTorch has them."""
    logits, targets = draw(6, 300)
    logits, targets = logits.detach(), targets.clamp(min=0)
    logits[1, 7], logits[2], targets[4] = value, value, -100
    logits[3, 5], logits[4, 5], targets[3] = value, value, 5
    logits.requires_grad_()
    losses = KernelRowLosses.apply(logits, targets, -100)
    right = cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, right, equal_nan=True, rtol=1e-6, atol=2e-6)
    found, expected = (torch.autograd.grad(x[targets != -100].sum(), logits)[0] for x in (losses, right))
    assert torch.equal(found[:4].isnan(), expected[:4].isnan())


def test_targets_that_are_no_tokens():
    logits, targets = draw(4, 40)
    targets = torch.tensor([3, 40, -1, -100], device=DEVICE)
    losses = KernelRowLosses.apply(logits, targets, -100)
    assert losses.isnan().tolist() == [False, True, True, False]


def test_second_derivatives():
    logits, targets = draw(3, 20)
    exact = logits.detach().double().requires_grad_()
    for x, losses in ((logits, KernelRowLosses.apply(logits, targets, -100)), (exact, None)):
        losses = cross_entropy(x, targets, reduction="none") if losses is None else losses
        (first,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        if x is logits:
            found = second
    torch.testing.assert_close(found.double(), second, rtol=1e-5, atol=1e-6)
