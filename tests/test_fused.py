"""Fused chains: the same numbers and gradients as the operations one by one, compiled once for all lengths."""

import pytest
import torch

from modeling_griffin import fused
from modeling_griffin.causal_lm_loss import _compiled
from modeling_griffin.fused import gated, rotate


def rotation(x, other, weight):
    heads = x.unflatten(-1, (3, 8))
    return rotate(heads, other[..., :4], other[..., 4:8])


def losses(x, other, weight):
    targets = torch.arange(x.shape[0] * x.shape[1], device=x.device) % 25 - 1
    return _compiled(x.flatten(0, 1), targets.masked_fill(targets < 0, -100), -100, "sum")


CHAINS = [rotation, losses]


def outcome(chain, length, dtype, device, weight_dtype):
    """The result and every gradient, on random input of that length."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, 24), (2, length, 24), (24, 1, 4)]
    inputs = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    inputs = [x.to(t).requires_grad_() for x, t in zip(inputs, (dtype, dtype, weight_dtype))]
    result = chain(*inputs)
    weights = torch.randn(result.shape, generator=generator).to(device, result.dtype)
    gradients = torch.autograd.grad(result, inputs, weights, allow_unused=True)
    return [result.detach(), *(gradient for gradient in gradients if gradient is not None)]


def compare(chain, dtype, device, weight_dtype):
    for length in (9, 33, 7):
        found = outcome(chain, length, dtype, device, weight_dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "pays", lambda *arguments: False)
            expected = outcome(chain, length, dtype, device, weight_dtype)
            right = outcome(chain, length, torch.float64, device, torch.float64)
        for f, e, r in zip(found, expected, right, strict=True):
            assert f.dtype == e.dtype
            error, allowed = (f.double() - r).norm(), (e.double() - r).norm()
            assert error <= 1.1 * allowed + 1e-6 * r.norm()


@pytest.mark.parametrize("chain", CHAINS)
def test_compiled_is_as_near_to_the_truth(chain, monkeypatch):
    """By the compiler's CPU backend; and the third length compiles nothing more."""
    monkeypatch.setattr(fused, "pays", lambda *arguments: not any(x.dtype == torch.float64 for x in arguments[:1]))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare(chain, torch.bfloat16, "cpu", torch.float32)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chain", CHAINS)
def test_on_a_gpu(chain, dtype, monkeypatch):
    monkeypatch.setattr(fused, "LEAST_ELEMENTS", 1)
    calls = []
    monkeypatch.setattr(fused, "pays", lambda *arguments: calls.append(1) or PAYS(*arguments))
    compare(chain, dtype, "cuda", torch.float32)
    assert calls


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
