"""The Triton convolution against the eager one in float64, with the eager one in its dtype as the measure of error.

On a GPU everything runs. Without one, `TRITON_INTERPRET=1 pytest tests/kernels/test_convolution.py` runs small cases
in Triton's interpreter; tests/test_causal_conv1d.py does so in a process of its own.
"""

import os

import pytest
import torch

import modeling_griffin.causal_conv1d as conv
import modeling_griffin.kernels.convolution as triton_conv
from modeling_griffin.causal_conv1d import CausalConv1d
from modeling_griffin.kernels import dispatch
from modeling_griffin.kernels.convolution import Tile, causal_conv1d_triton


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16]
ALL = [(taps, dtype) for taps in (1, 2, 4) for dtype in DTYPES]
FEW = [(1, torch.float32), (2, torch.bfloat16), (4, torch.float32), (4, torch.bfloat16)]
if INTERPRETED:  # chunks of 8 and 4 steps, tiles of 16
    DOCUMENTS, STARTS = 36, [[0], [1, 4], [3, 8], [7, 9], [15, 17], [16, 31], [32, 35], range(36)]
else:
    DOCUMENTS, STARTS = 140, [[0], [1], [2], [31, 33], [15, 16, 17, 32, 64], [127, 129], [128], [139], range(140)]
each = pytest.mark.parametrize("taps, dtype", FEW if INTERPRETED else ALL)
NAMES = ["y", "d_x", "d_state", "d_weight", "d_bias"]
# Errors are shares of what the sums would be without signs. This much the dtype cannot show; the interpreter cuts to
# bfloat16 where a GPU rounds.
UNSEEN = {torch.float32: 1.2e-7, torch.bfloat16: 4e-3 if INTERPRETED else 1.6e-4, torch.float16: 2e-5}

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """In the interpreter every row of every program is Python; edges of tiles come sooner."""
    if INTERPRETED:
        monkeypatch.setattr(triton_conv, "CONVOLUTION_FORWARD", Tile(2, 8, 64, 1))
        monkeypatch.setattr(triton_conv, "CONVOLUTION_BACKWARD", Tile(4, 4, 64, 1))


def make_inputs(length, channels, taps, dtype, batch=2, starts=(), has_state=True, parameter_dtype=None):
    def normal(*shape):
        return torch.randn(*shape).to(DEVICE)

    start = torch.zeros(batch, length, dtype=torch.bool, device=DEVICE)
    for position in starts:
        start[:1, position : position + 1] = True  # in the first row; later ones have a single document
    return {
        "x": normal(batch, length, channels).to(dtype),
        "state": normal(batch, channels, taps).to(dtype) if has_state else None,
        "weight": normal(channels, 1, taps).to(parameter_dtype or dtype),
        "bias": normal(channels).to(parameter_dtype or dtype),
        "start": start if len(starts) else None,
        "d_y": normal(batch, length, channels).to(dtype),
    }


def eager(x, state, weight, bias, start):
    age = None if start is None else conv.tokens_since_start(start)
    return conv.convolve(conv.behind_state(x, state, weight.shape[-1])[:, 1:], weight, bias, age)


def poison():
    """NaN into the memory that the next outputs will get."""
    for size in (2**8, 2**12, 2**16, 2**20):
        [torch.full((size,), torch.nan, device=DEVICE) for _ in range(4)]


def outcome(function, inputs, upcast=None):
    """y and all gradients; `upcast`: in that dtype."""
    leaves = [inputs[name] for name in ("x", "state", "weight", "bias")]
    leaves = [None if leaf is None else leaf.detach().to(upcast or leaf.dtype).requires_grad_() for leaf in leaves]
    y = function(*leaves, inputs["start"])
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(y, wanted, inputs["d_y"].to(y.dtype), allow_unused=True)
    gradients = iter([torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, wanted)])
    return [y.detach(), *(None if leaf is None else next(gradients) for leaf in leaves)]


def share(actual, expected, scale):
    return (actual.double() - expected).norm().item() / (scale.norm().item() or 1.0)


def check(inputs):
    expected = outcome(eager, inputs, torch.float64)
    unsigned = {name: value if value is None or name == "start" else value.abs() for name, value in inputs.items()}
    scales = outcome(eager, unsigned, torch.float64)
    plain = outcome(eager, inputs)
    poison()
    actual = outcome(causal_conv1d_triton, inputs)
    for name, a, p, e, scale in zip(NAMES, actual, plain, expected, scales):
        if e is None:
            assert a is None
            continue
        assert a.shape == p.shape and a.dtype == p.dtype and a.is_contiguous(), name
        assert bool(a.isfinite().all()), f"{name}: NaN or inf"
        ours, theirs = share(a, e, scale), share(p, e, scale)
        assert ours <= 1.1 * theirs + UNSEEN[a.dtype], f"{name}: error {ours:.3g}, eager {theirs:.3g}"


@each
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 63, 64, 65, 200])
def test_lengths(length, taps, dtype):
    check(make_inputs(length, 16, taps, dtype))


@each
@pytest.mark.parametrize("channels", [1, 63, 130])
def test_channels(channels, taps, dtype):
    check(make_inputs(17, channels, taps, dtype, starts=[5]))


@each
@pytest.mark.parametrize("starts", STARTS, ids=str)
def test_documents(starts, taps, dtype):
    """At 0, inside, and on both sides of the edges of chunks and tiles."""
    check(make_inputs(DOCUMENTS, 16, taps, dtype, starts=starts))


@pytest.mark.parametrize("starts", [(), [8, 20]])
@pytest.mark.parametrize("length", [1, 48])
def test_without_state(length, starts):
    check(make_inputs(length, 64, 4, torch.float32, starts=starts, has_state=False))


@pytest.mark.parametrize("length", [1, 5, 16, 17])
def test_more_taps_than_a_program_has_rows(length, monkeypatch):
    monkeypatch.setattr(triton_conv, "CONVOLUTION_FORWARD", Tile(1, 2, 64, 1))
    monkeypatch.setattr(triton_conv, "CONVOLUTION_BACKWARD", Tile(2, 1, 64, 1))
    check(make_inputs(length, 16, 7, torch.float32, starts=[9]))


def test_inputs_that_are_not_contiguous():
    inputs = make_inputs(33, 24, 4, torch.float32, starts=[6])
    for name in ("x", "state", "d_y", "start"):
        inputs[name] = inputs[name].mT.contiguous().mT
    inputs["weight"] = inputs["weight"].transpose(0, 2).contiguous().transpose(0, 2)
    inputs["bias"] = inputs["bias"].repeat_interleave(2)[::2]
    assert not any(inputs[name].is_contiguous() for name in ("x", "state", "d_y", "start", "weight", "bias"))
    check(inputs)
    check({**inputs, "d_y": torch.ones((), device=DEVICE).expand(2, 33, 24)})


@pytest.mark.parametrize("frozen", [(), ("x",), ("state",), ("weight",), ("bias",), ("weight", "bias")])
def test_gradients_that_are_not_wanted(frozen):
    inputs = make_inputs(20, 16, 4, torch.float32, starts=[11])
    names = ("x", "state", "weight", "bias")
    expected = dict(zip(names, outcome(causal_conv1d_triton, inputs)[1:]))
    leaves = {name: inputs[name].clone().requires_grad_(name not in frozen) for name in names}
    causal_conv1d_triton(**leaves, document_start=inputs["start"]).backward(inputs["d_y"])
    for name, leaf in leaves.items():
        assert leaf.grad is None if name in frozen else torch.equal(leaf.grad, expected[name])


def test_parameters_in_float32_as_under_autocast():
    """Values take them in the dtype of x, as ever; their gradients are not rounded to it."""
    inputs = make_inputs(50, 16, 4, torch.bfloat16, parameter_dtype=torch.float32)
    for name in ("weight", "bias"):  # what bfloat16 can show, since the interpreter cuts
        inputs[name] = inputs[name].bfloat16().float()
    check(inputs)


def test_weights_are_rounded_to_the_dtype_of_x():
    inputs = make_inputs(50, 16, 4, torch.bfloat16, parameter_dtype=torch.float32)
    y = causal_conv1d_triton(inputs["x"], None, inputs["weight"], inputs["bias"], None)
    cut = make_inputs(1, 16, 4, torch.bfloat16)["weight"].dtype
    if INTERPRETED:  # towards zero
        rounded = [(inputs[n].view(torch.int32) & -65536).view(torch.float32).to(cut) for n in ("weight", "bias")]
    else:
        rounded = [inputs[n].to(cut) for n in ("weight", "bias")]
    assert torch.equal(y, causal_conv1d_triton(inputs["x"], None, *rounded, None))


def test_second_derivatives_raise():
    x = make_inputs(5, 16, 4, torch.float32)
    leaf = x["x"].requires_grad_()
    y = causal_conv1d_triton(leaf, None, x["weight"], x["bias"], None)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("states_to_keep", [None, 0, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("starts", [(), [4, 9]])
@pytest.mark.parametrize("length", [0, 4, 12])
def test_the_module_chooses_it_and_keeps_its_states(length, starts, padded, states_to_keep, monkeypatch):
    """y, the states and gradients through both, by the kernels and eagerly; padding moves to the end before."""
    inputs = make_inputs(length, 16, 4, torch.float32, starts=starts)
    real = (torch.rand(2, length) < 0.7).to(DEVICE) if padded else None
    start = inputs["start"] if real is None or inputs["start"] is None else inputs["start"] & real
    module = CausalConv1d(16, 4).to(DEVICE)
    module.load_state_dict({"weight": inputs["weight"], "bias": inputs["bias"]})
    results = []
    for on_gpu in (False, True):
        monkeypatch.setattr(dispatch, "pays", lambda *arguments, on_gpu=on_gpu: on_gpu)
        x, state = inputs["x"].clone().requires_grad_(), inputs["state"].clone().requires_grad_()
        y, states = module(x, state, start, real, states_to_keep)
        y = y if real is None else y[real]
        wanted = (x, state, *module.parameters())
        loss = y.sin().sum() + states.cos().sum()
        results.append([y, states, *torch.autograd.grad(loss, wanted, allow_unused=True)])
    for a, e in zip(*results, strict=True):
        assert (a is None) == (e is None) or (a if e is None else e).count_nonzero() == 0
        if a is not None and e is not None:
            assert a.shape == e.shape
            torch.testing.assert_close(a, e, rtol=2e-6, atol=2e-6)


@pytest.mark.gpu
def test_the_module_on_a_gpu(monkeypatch):
    """A large call runs the kernels, under autocast too; a small one does not."""
    calls = []
    monkeypatch.setattr(triton_conv, "causal_conv1d_triton", lambda *a: calls.append(1) or causal_conv1d_triton(*a))
    module = CausalConv1d(512, 4).cuda()
    for length, expected in ((1024, True), (8, False)):
        with torch.autocast("cuda", torch.bfloat16):
            y, state = module(torch.randn(4, length, 512, device="cuda", dtype=torch.bfloat16))
        assert y.dtype == state.dtype == torch.bfloat16 and bool(calls) == expected  # the first is tried as well
        calls.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("length, channels", [(2048, 2560), (1000, 2568), (1, 4096), (300, 1000)])
def test_shapes_of_models(length, channels, dtype):
    check(make_inputs(length, channels, 4, dtype, starts=[0, 77, 255, 256], parameter_dtype=torch.float32))


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    x = torch.zeros(2, 2**20, 1032, device="cuda", dtype=torch.bfloat16)
    x[1, -10:] = torch.randn(10, 1032)
    x.requires_grad_()
    inputs = make_inputs(1, 1032, 4, torch.bfloat16)
    y = causal_conv1d_triton(x, None, inputs["weight"], inputs["bias"], None)
    tail = x[1:, -20:].detach().requires_grad_()
    expected = causal_conv1d_triton(tail, None, inputs["weight"], inputs["bias"], None)
    assert torch.equal(y[1:, -20:], expected)
    d_y = torch.randn(1, 20, 1032, device="cuda", dtype=torch.bfloat16)
    (d_tail,) = torch.autograd.grad(expected, tail, d_y)
    whole = torch.zeros_like(y)
    whole[1:, -20:] = d_y
    (d_x,) = torch.autograd.grad(y, x, whole)
    assert torch.equal(d_x[1:, -20:], d_tail) and not d_x[0].any()


@pytest.mark.gpu
def test_gradients_are_the_same_every_time():
    inputs = make_inputs(4096, 640, 4, torch.bfloat16, starts=[100, 2000])
    first = outcome(causal_conv1d_triton, inputs)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, outcome(causal_conv1d_triton, inputs)))
