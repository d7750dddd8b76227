"""`causal_lm_loss` against PyTorch's `cross_entropy` in float64: values, gradients, what is held in memory."""

import pytest
import torch
from tolerances import assert_close, relative_error
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_griffin import causal_lm_loss as module
from modeling_griffin.causal_lm_loss import causal_lm_loss


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Of the loss, in float32, and of the gradient, which is rounded to the dtype of the logits.
TOLERANCE = {
    torch.float64: ("loss float64", "loss float64"),
    torch.float32: ("loss", "loss gradient"),
    torch.bfloat16: ("loss", "bfloat16 rounding"),
    torch.float16: ("loss", "float16 rounding"),
}
SHAPES = [(2, 9, 29), (1, 1, 300), (3, 7, 130), (1, 33, 64), (2, 2, 1)]


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Chunks of 64 elements, so that small logits take many; none go to PyTorch's own operator."""
    monkeypatch.setattr(module, "SMALL_ELEMENTS", 0)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", dict.fromkeys(module.CHUNK_ELEMENTS, 64))


def draw(shape, dtype=torch.float32, ignored=0.3):
    """Logits (B, T, V) that need gradients and labels (B, T), a share of them -100."""
    logits = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(0, shape[-1], shape[:2])
    return logits, labels.masked_fill(torch.rand(shape[:2]) < ignored, -100)


def shifted(labels):
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


def expected(logits, targets, **kwargs):
    """cross_entropy and its gradient in float64 at these logits."""
    exact = logits.detach().double().requires_grad_()
    loss = cross_entropy(exact.flatten(0, -2), targets.flatten(), **kwargs)
    return loss, torch.autograd.grad(loss, exact)[0]


def assert_loss(loss, logits, loss_and_gradient, divided_by=1):
    of_loss, of_gradient = TOLERANCE[logits.dtype]
    assert loss.dtype == torch.promote_types(logits.dtype, torch.float32)
    assert_close(of_loss, loss, loss_and_gradient[0] / divided_by)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.dtype == logits.dtype
    assert_close(of_gradient, gradient, loss_and_gradient[1] / divided_by)


@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape, ignored):
    logits, labels = draw(shape, dtype, ignored)
    labels[0, 1:2] = 0  # one that counts
    if shape[1] > 1:
        assert_loss(causal_lm_loss(logits, labels, shape[-1]), logits, expected(logits, shifted(labels)))
    labels[0, 0] = 0
    mean = causal_lm_loss(logits, None, shape[-1], shift_labels=labels)
    assert_loss(mean, logits, expected(logits, labels))
    for items in (7, torch.tensor(7)):
        loss = causal_lm_loss(logits, None, shape[-1], items, shift_labels=labels)
        assert_loss(loss, logits, expected(logits, labels, reduction="sum"), divided_by=7)


@pytest.mark.parametrize("chunk", [1, 29, 57, 58, 59, 29 * 17, 29 * 18, 10_000])
def test_chunks(chunk, monkeypatch):
    """A row longer than a chunk, a last chunk of one row, exactly one chunk: the same numbers, bit for bit."""
    logits, labels = draw((2, 9, 29), torch.bfloat16)
    many = causal_lm_loss(logits, labels, 29)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": chunk, "cuda": chunk})
    loss = causal_lm_loss(logits, labels, 29)
    assert_close("exact", loss, many)
    assert_close("exact", *(torch.autograd.grad(each, logits)[0] for each in (loss, many)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_at_least_as_near_as_the_stock_loss(dtype):
    logits, labels = draw((4, 65, 517), dtype)
    loss, gradient = expected(logits, shifted(labels))
    ours, stock = causal_lm_loss(logits, labels, 517), ForCausalLMLoss(logits, labels, 517)
    assert relative_error(ours, loss) <= max(relative_error(stock, loss), torch.finfo(torch.float32).eps)
    ours, stock = (torch.autograd.grad(each, logits)[0] for each in (ours, stock))
    # On average, since a largest error can go either way by one rounding.
    errors = [(each.double() - gradient).abs().mean().item() for each in (ours, stock)]
    assert errors[0] <= 1.001 * errors[1]


def test_another_ignore_index_and_arguments_of_others():
    logits, labels = draw((2, 9, 29), torch.bfloat16)
    labels[0, 3] = 4
    loss = causal_lm_loss(logits=logits, labels=labels.where(labels != -100, 4), vocab_size=29, ignore_index=4, to=1)
    assert_loss(loss, logits, expected(logits, shifted(labels.where(labels != 4, -100))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [1e4, -1e4, torch.inf, -torch.inf, torch.nan])
def test_extreme_logits(value, dtype):
    """In a column that is a target or not, in whole rows that count or do not: as cross_entropy in float32."""
    logits, labels = draw((2, 9, 29), dtype, ignored=0.0)
    labels[0, 2:6] = torch.tensor([-100, -100, 3, 4])
    with torch.no_grad():
        logits[1, 1, 7] = value
        logits[1, 2, labels[1, 2]] = value
        logits[0, 2, 5] = logits[0, 4, 3] = value
        logits[0, [3, 5]] = value
    for rows in (slice(0, 1), slice(1, 2)):
        part, target = logits[rows].detach().requires_grad_(), labels[rows]
        like = part.detach().float().requires_grad_()
        for reduction, items in (("mean", None), ("sum", 5)):
            loss = causal_lm_loss(part, None, 29, items, shift_labels=target)
            other = cross_entropy(like.flatten(0, 1), target.flatten(), reduction=reduction) / (items or 1)
            assert_close("loss", loss, other)
            gradient, theirs = torch.autograd.grad(loss, part)[0], torch.autograd.grad(other, like)[0]
            assert torch.equal(gradient.isnan(), theirs.isnan())
            assert_close("bfloat16 rounding" if dtype == torch.bfloat16 else "loss gradient", gradient, theirs)


def test_masked_vocabulary_entries():
    """-inf where no target is, as constrained vocabularies have it: finite, gradient 0 there."""
    logits, labels = draw((2, 9, 29), torch.float32)
    with torch.no_grad():
        logits[..., 20:] = -torch.inf
    labels %= 20
    loss = causal_lm_loss(logits, labels, 29)
    assert_loss(loss, logits, expected(logits, shifted(labels)))
    assert loss.isfinite()


def test_all_labels_ignored():
    logits, labels = draw((2, 9, 29), ignored=1.0)
    mean = causal_lm_loss(logits, labels, 29)
    total = causal_lm_loss(logits, labels, 29, num_items_in_batch=3)
    assert mean.isnan() and total == 0
    for loss in (mean, total):
        assert not torch.autograd.grad(loss, logits)[0].any()


def test_wrong_labels():
    logits, labels = draw((2, 9, 29))
    with pytest.raises(ValueError, match="labels has 16 tokens: allowed is one for each of the 18"):
        causal_lm_loss(logits, labels[:, 1:], 29)
    for wrong in (29, -1):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            causal_lm_loss(logits, labels.fill_(wrong), 29)


# What is held


class LargestFloat32(TorchDispatchMode):
    """The largest number of elements of a float32 tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("autocast", [False, True])
def test_no_float32_of_the_size_of_the_logits(autocast, monkeypatch):
    """Forward and backward hold no more than a chunk; Transformers' loss, under the same eyes, holds all."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": 1000, "cuda": 1000})
    logits, labels = draw((2, 64, 100), torch.bfloat16)
    found = {}
    for loss in (causal_lm_loss, ForCausalLMLoss):
        with LargestFloat32() as largest:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value = loss(logits, labels, 100)
            value.backward()
        found[loss] = largest.elements
    assert found == {causal_lm_loss: 1000, ForCausalLMLoss: 2 * 64 * 100}


def test_kept_for_the_backward_pass():
    """Logits, labels and the number of these; not the logits once more."""
    logits, labels = draw((2, 64, 100), torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        causal_lm_loss(logits, labels, 100)
    assert sorted(tensor.numel() for tensor in kept) == [1, 128, 12800]
    assert logits.untyped_storage().data_ptr() in [tensor.untyped_storage().data_ptr() for tensor in kept]


# Other ways to differentiate, and to run


@pytest.mark.parametrize("small", [0, 10**6])
def test_gradients_of_gradients(small, monkeypatch):
    monkeypatch.setattr(module, "SMALL_ELEMENTS", small)
    logits, labels = draw((1, 5, 4), torch.float64)
    labels[0, 3] = 1

    def loss(logits):
        return causal_lm_loss(logits, labels, 4, num_items_in_batch=3)

    torch.autograd.gradcheck(loss, logits)
    torch.autograd.gradgradcheck(loss, logits)
    hessian = torch.autograd.functional.hessian(loss, logits.detach())
    targets = shifted(labels).flatten()
    exact = torch.autograd.functional.hessian(
        lambda logits: cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / 3, logits.detach()
    )
    assert_close("loss float64", hessian, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 1)])
def test_torch_func(in_dims, dtype):
    """Values and gradients of each entry of a batch, of logits, labels or both."""
    logits, labels = draw((3, 3, 29), dtype)
    labels[:, 1], labels[1] = 2, 3

    def loss(logits, labels):
        return causal_lm_loss(logits[None], labels[None], 29)

    def argument(tensor, dim, row):
        return tensor[0] if dim is None else tensor.select(dim, row)

    arguments = [tensor[0] if dim is None else tensor for tensor, dim in zip((logits.detach(), labels), in_dims)]
    values = torch.vmap(loss, in_dims)(*arguments)
    gradients = torch.vmap(torch.func.grad(loss), in_dims)(*arguments)
    for row in range(3):
        part = argument(logits, in_dims[0], row).detach().requires_grad_()
        exact = expected(part, shifted(argument(labels, in_dims[1], row)[None]))
        assert_close("loss", values[row], exact[0])
        assert_close(TOLERANCE[dtype][1], gradients[row], exact[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_graph_break(dtype):
    torch._dynamo.reset()
    logits, labels = draw((2, 9, 29), dtype)
    compiled = torch.compile(causal_lm_loss, fullgraph=True, backend="aot_eager")
    assert_loss(compiled(logits, labels, 29), logits, expected(logits, shifted(labels)))
    loss = compiled(logits, labels, 29, num_items_in_batch=torch.tensor(7))
    assert_loss(loss, logits, expected(logits, shifted(labels), reduction="sum"), divided_by=7)


def test_gradient_checkpointing():
    logits, labels = draw((2, 9, 29), torch.bfloat16)
    plain = causal_lm_loss(logits, labels, 29)
    loss = torch.utils.checkpoint.checkpoint(lambda x: causal_lm_loss(x * 1, labels, 29), logits, use_reentrant=False)
    assert_close("exact", loss, plain)
    assert_close("exact", *(torch.autograd.grad(each, logits)[0] for each in (loss, plain)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype):
    logits, labels = draw((2, 9, 29), dtype)
    on_gpu = logits.detach().cuda().requires_grad_()
    assert_loss(causal_lm_loss(on_gpu, labels, 29), on_gpu, expected(logits, shifted(labels)))


@pytest.mark.gpu
def test_cuda_graph():
    """Captured and replayed with other logits and labels: nothing waits for the device, no shape depends on data."""
    logits, labels = (tensor.detach().cuda() for tensor in draw((2, 9, 29), torch.bfloat16))
    logits.requires_grad_()
    items = torch.tensor(7, device="cuda")

    def step():
        logits.grad = None
        loss = causal_lm_loss(logits, labels, 29, num_items_in_batch=items)
        loss.backward()
        return loss.detach(), logits.grad

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    other, targets = draw((2, 9, 29), torch.bfloat16)
    with torch.no_grad():
        logits.copy_(other)
    labels.copy_(targets)
    graph.replay()
    exact = expected(other, shifted(targets), reduction="sum")
    assert_close("loss", loss, exact[0] / 7)
    assert_close("bfloat16 rounding", gradient, exact[1] / 7)


# In the model


def test_the_model_takes_it(small_model, monkeypatch):
    """By itself; not where a user sets a loss, or where a subclass has one."""
    model, ids = small_model(), torch.randint(0, 29, (2, 9))
    assert model.loss_function is causal_lm_loss
    loss = model.bfloat16()(ids, labels=ids).loss
    exact = expected(model(ids).logits, shifted(ids))[0]
    assert_close("loss", loss, exact)
    calls = []

    def own_loss(logits, labels, vocab_size, **kwargs):
        calls.append((labels, vocab_size, kwargs["num_items_in_batch"]))
        return logits.sum()

    model.loss_function = own_loss
    output = model(ids, labels=ids, num_items_in_batch=5)
    assert torch.equal(output.loss, output.logits.sum()) and calls == [(ids, 29, 5)]
    model.loss_function = ForCausalLMLoss
    assert model.loss_function is ForCausalLMLoss

    class WithItsOwnForCausalLM(type(model)):
        def loss_function(self, logits, **kwargs):
            return logits.sum()

    assert WithItsOwnForCausalLM(model.config)(ids, labels=ids).loss.dim() == 0


def test_trained_in_chunks_and_whole(small_model, monkeypatch):
    """The gradients of all weights, through the cap, are those of PyTorch's own loss."""
    model, ids = small_model(final_logit_softcapping=3.0), torch.randint(0, 29, (2, 9))
    model(ids, labels=ids).loss.backward()
    chunked = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(module, "SMALL_ELEMENTS", 10**6)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close("gradient", chunked[name], parameter.grad, name)
