"""When chains of operations leave PyTorch's own; the kernels themselves: test_fused_triton.py."""

import torch

from modeling_griffin import fused
from modeling_griffin.fused import add_rms_norm, gated, rms_norm


PAYS = fused.pays


def test_what_stays_eager(monkeypatch):
    """On a CPU, when small, with wrapped tensors, and in other transformations."""

    class OnGpu(torch.Tensor):
        pass

    monkeypatch.setattr(fused, "triton_unavailable_reason", lambda x: None)
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


def test_norm_of_a_sum():
    """With and without something to add."""
    x, residual, weight = torch.randn(3, 2, 5, 8).unbind(0)[0], torch.randn(2, 5, 8), torch.randn(8)
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, residual + x) and torch.equal(normed, rms_norm(total, weight, 1e-6))
    normed, total = add_rms_norm(None, residual, weight, 1e-6)
    assert total is residual and torch.equal(normed, rms_norm(residual, weight, 1e-6))
