"""The pair of gates on a GPU against float64, with the two gate modules in the same dtype as the measure of error.

Without a GPU, the first test runs the others of this file in Triton's interpreter, in a process of its own, since
Triton asks for `TRITON_INTERPRET=1` when it is imported.

Legend: M rows, N gate blocks, W their width.
"""

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import modeling_griffin.kernels.gates as gates_triton
from modeling_griffin import rg_lru
from modeling_griffin.kernels import dispatch
from modeling_griffin.kernels.gates import gates_unavailable_reason, rg_lru_gates
from modeling_griffin.rg_lru import RGLRU, BlockDiagonalLinear
from tests.tolerances import TOLERANCES


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = [torch.bfloat16, torch.float16]
BLOCKS = [(3, 16), (2, 24), (16, 4), (3, 5), (2, 160), (1, 256)]
ROWS = [1, 7, 127, 129, 300]
MORE = 12  # tests in the interpreter beside all combinations of these
NAMES = ["r", "i", "x", "d_x", "d_weight_r", "d_bias_r", "d_weight_i", "d_bias_i"]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside of test_in_the_interpreter")
gpu = pytest.mark.gpu


@needs_triton
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="this process runs the kernels itself")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", "interpreted", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(DTYPES) * len(BLOCKS) * len(ROWS) + MORE} passed" in done.stdout.replace("\n", " "), done.stdout


def make_inputs(rows, blocks, width, dtype, device):
    """x, weight and bias of both gates; the gradients of both results and of x passed on."""
    generator = torch.Generator().manual_seed(rows * blocks * width)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    gates = [normal(blocks, width, *more) / width ** (len(more) / 2) for _ in range(2) for more in ([width], [])]
    channels = blocks * width
    return [normal(1, rows, channels), *gates], [normal(1, rows, channels) for _ in range(3)]


def two_modules(x, *parameters):
    """What is computed without the kernels."""
    results = []
    for weight, bias in (parameters[:2], parameters[2:]):
        gate = BlockDiagonalLinear(bias.numel(), len(bias))
        results.append(torch.func.functional_call(gate, {"weight": weight, "bias": bias}, (x,)))
    return *results, x * 1


def run(gates, inputs, d_results, dtype):
    """All results and all gradients."""
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    results = gates(*inputs)
    gradients = torch.autograd.grad(results, inputs, [d.to(dtype) for d in d_results])
    return [*(result.detach() for result in results), *gradients]


def error(actual, right):
    assert bool(actual.isfinite().all())
    return ((actual.double() - right).norm() / right.norm()).item()


@pytest.fixture
def poison():
    """NaN in all memory that is allocated and not yet written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_rounded_once(name, actual, right, unit):
    """Every element, up to what a sum in float32 cannot show."""
    allowed = unit * right.abs() + 2e-6 * right.abs().max()
    assert bool(((actual.double() - right).abs() <= allowed).all()), name


def check(rows, blocks, width, dtype, device):
    """No further from the truth than the two modules, and all but the weights' gradients rounded once.

    The modules round the product before the bias, and d_x of each gate before the sum. With few numbers they may be
    lucky: a quarter is allowed. The interpreter cuts to bfloat16 where a GPU rounds, which doubles that error.
    """
    inputs, d_results = make_inputs(rows, blocks, width, dtype, device)
    right = run(two_modules, inputs, d_results, torch.float64)
    plain = run(two_modules, inputs, d_results, dtype)
    actual = run(rg_lru_gates, inputs, d_results, dtype)
    cut = 2 if INTERPRETED and dtype == torch.bfloat16 else 1
    unit = TOLERANCES["bfloat16 rounding" if dtype == torch.bfloat16 else "float16 rounding"]
    for name, a, p, r in zip(NAMES, actual, plain, right, strict=True):
        assert a.shape == p.shape and a.dtype == p.dtype, name
        ours, theirs = error(a, r), error(p, r)
        assert ours <= 1.25 * cut * theirs, f"{name}: error {ours:.3g}, the two modules {theirs:.3g}"
        if "weight" not in name:
            assert_rounded_once(name, a, r, cut * unit)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks, width", BLOCKS)
@pytest.mark.parametrize("rows", ROWS)
def test_interpreted(rows, blocks, width, dtype, poison):
    check(rows, blocks, width, dtype, "cpu")


def check_gradients_of(used, needs_x, device):
    """Of some of the results, where those of the others are None; x may need none."""
    (x, *parameters), d_results = make_inputs(40, 2, 24, torch.float16, device)

    def outcome(gates, dtype):
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, *parameters)]
        inputs[0].requires_grad_(needs_x)
        results, leaves = gates(*inputs), inputs if needs_x else inputs[1:]
        d_used = [d_results[i].to(dtype) for i in used]
        return torch.autograd.grad([results[i] for i in used], leaves, d_used, allow_unused=True)

    right = outcome(two_modules, torch.float64)
    for found, r in zip(outcome(rg_lru_gates, torch.float16), right, strict=True):
        if r is None:
            assert found is None or not found.any()
        else:
            assert error(found, r) <= 1e-3


USED = [([0, 1], True), ([2], True), ([0, 2], True), ([1], True), ([0, 1], False), ([1], False)]


@interpreted
@pytest.mark.parametrize("used, needs_x", USED)
def test_some_gradients_interpreted(used, needs_x):
    check_gradients_of(used, needs_x, "cpu")


@gpu
@pytest.mark.parametrize("used, needs_x", USED)
def test_some_gradients_on_a_gpu(used, needs_x):
    check_gradients_of(used, needs_x, "cuda")


def check_layer(variant, device, monkeypatch):
    """The layer's values and gradients beside those of the layer that calls its modules, in float64."""
    monkeypatch.setattr(dispatch, "pays", lambda *tensors: tensors[0].dtype != torch.float64)
    layer = RGLRU(48, 2, 8.0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.uniform_(layer.decay.lambda_bias, -7, -2)
    layer, x = layer.bfloat16().to(device), torch.randn(2, 9, 48, device=device).bfloat16()
    real = torch.rand(2, 9, device=device) < 0.7 if variant == "padded" else None
    if variant == "frozen":
        layer.recurrence_gate.requires_grad_(False), layer.input_gate.requires_grad_(False)

    def outcome(layer, x):
        leaf = x.clone().requires_grad_()
        arguments = (leaf * 1, None, real)  # no leaf, as behind the convolution
        if variant == "checkpointed":
            hidden, _ = checkpoint(layer, *arguments, use_reentrant=False)
        else:
            hidden, _ = layer(*arguments)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        return [hidden.detach(), *torch.autograd.grad(hidden.square().sum(), [leaf, *trained])]

    found = outcome(layer, x)
    for f, r in zip(found, outcome(copy.deepcopy(layer).double(), x.double()), strict=True):
        assert error(f, r) <= 2e-2


VARIANTS = ["plain", "padded", "frozen", "checkpointed"]


@interpreted
@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_interpreted(variant, monkeypatch):
    check_layer(variant, "cpu", monkeypatch)


@gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_on_a_gpu(variant, monkeypatch):
    check_layer(variant, "cuda", monkeypatch)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_scan_reads_x_passed_on_interpreted(dtype, monkeypatch):
    """Unless autocast has rounded it: then the scan keeps the dtype that it has without the kernels."""
    read, scan = [], rg_lru.rg_lru_scan
    monkeypatch.setattr(dispatch, "pays", lambda *tensors: True)
    monkeypatch.setattr(rg_lru, "rg_lru_scan", lambda x, *rest, **more: read.append(x) or scan(x, *rest, **more))
    layer, x = RGLRU(48, 2, 8.0), torch.randn(1, 3, 48, dtype=dtype, requires_grad=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, _ = layer(x)
    assert hidden.dtype == read[0].dtype == dtype
    assert "Gates" in type(read[0].grad_fn).__name__ if dtype == torch.bfloat16 else read[0] is x


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks, width", [*BLOCKS, (16, 160), (16, 256), (2, 208)])
@pytest.mark.parametrize("rows", [*ROWS, 2048])
def test_on_a_gpu(rows, blocks, width, dtype, poison):
    check(rows, blocks, width, dtype, "cuda")


@gpu
def test_strided_input_and_gradients_on_a_gpu():
    inputs, d_results = make_inputs(300, 4, 32, torch.bfloat16, "cuda")
    expected = run(rg_lru_gates, inputs, d_results, torch.bfloat16)
    inputs[0] = inputs[0].mT.contiguous().mT
    d_results = [d.mT.contiguous().mT for d in d_results]
    for e, a in zip(expected, run(rg_lru_gates, inputs, d_results, torch.bfloat16), strict=True):
        assert torch.equal(e, a)


@gpu
def test_more_than_two_to_the_31_elements_on_a_gpu():
    """The last rows are what they are alone."""
    (x, *parameters), _ = make_inputs(128, 16, 160, torch.bfloat16, "cuda")
    rows = 2**31 // x.shape[-1] + 300
    results = rg_lru_gates(x.repeat(1, rows // 128 + 1, 1)[:, :rows], *parameters)
    for found, alone in zip(results, rg_lru_gates(x, *parameters), strict=True):
        assert torch.equal(found[:, rows // 128 * 128 :], alone[:, : rows % 128])


@gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_the_layer_takes_the_kernels_on_a_gpu(autocast, monkeypatch):
    """And they are its modules: the layer with a hook on one of them has nearly the same results and gradients."""
    layer = RGLRU(640, 4, 8.0).cuda()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layer.to(torch.float32 if autocast else torch.bfloat16)
    x = torch.randn(2, 1024, 640, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    calls = []
    monkeypatch.setattr(dispatch, "rg_lru_gates", lambda *inputs: calls.append(1) or rg_lru_gates(*inputs))

    def outcome():
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            hidden, _ = layer(x)
        return [hidden, *torch.autograd.grad(hidden.float().square().sum(), [x, *layer.parameters()])]

    found = outcome()
    times = len(calls)  # more than one where the kernels were tried forward and back first
    assert times
    layer.input_gate.register_forward_hook(lambda *arguments: None)
    for f, e in zip(found, outcome(), strict=True):
        assert f.dtype == e.dtype and (f - e).norm() <= 2e-2 * e.norm()
    assert len(calls) == times


class Called(Exception):
    pass


@pytest.fixture
def layer(monkeypatch):
    """One whose pair of gates, where it is chosen, raises `Called`: as if on a GPU that has Triton."""

    def called(*inputs):
        raise Called

    monkeypatch.setattr(dispatch, "pays", lambda *tensors: True)
    monkeypatch.setattr(dispatch, "rg_lru_gates", called)
    layer = RGLRU(12, 3, 8.0).bfloat16()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def x_of(dtype=torch.bfloat16):
    return torch.randn(2, 7, 12, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layer_chooses_the_pair(layer, dtype):
    with pytest.raises(Called):
        layer.to(dtype)(x_of(dtype))


def test_the_layer_chooses_the_pair_in_the_dtype_of_autocast(layer):
    layer.float()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Called):
        layer(x_of(torch.float32))
    layer(x_of(torch.float32))


def small(layer, monkeypatch):
    monkeypatch.setattr(dispatch, "pays", lambda *tensors: False)


def forward_hook(layer, monkeypatch):
    layer.input_gate.register_forward_hook(lambda *arguments: None)


def forward_pre_hook(layer, monkeypatch):
    layer.recurrence_gate.register_forward_pre_hook(lambda *arguments: None)


def backward_hook(layer, monkeypatch):
    layer.recurrence_gate.register_full_backward_hook(lambda *arguments: None)


def backward_pre_hook(layer, monkeypatch):
    layer.input_gate.register_full_backward_pre_hook(lambda *arguments: None)


def global_hook(layer, monkeypatch):
    monkeypatch.setitem(torch.nn.modules.module._global_forward_hooks, -1, lambda *arguments: None)


def forward_of_the_instance(layer, monkeypatch):
    """As Accelerate offloads."""
    layer.input_gate.forward = layer.input_gate.forward


def parametrized(layer, monkeypatch):
    torch.nn.utils.parametrize.register_parametrization(layer.input_gate, "weight", torch.nn.Identity())


def wrapped(layer, monkeypatch):
    layer.recurrence_gate = torch.nn.Sequential(layer.recurrence_gate)


def subclass(layer, monkeypatch):
    class Other(BlockDiagonalLinear):
        pass

    layer.input_gate.__class__ = Other


def too_wide(layer, monkeypatch):
    monkeypatch.setattr(gates_triton, "LARGEST_WIDTH", 3)


@pytest.mark.parametrize(
    "change",
    [
        small,
        forward_hook,
        forward_pre_hook,
        backward_hook,
        backward_pre_hook,
        global_hook,
        forward_of_the_instance,
        parametrized,
        wrapped,
        subclass,
        too_wide,
    ],
)
def test_the_layer_calls_the_modules(layer, monkeypatch, change):
    x = x_of()
    change(layer, monkeypatch)
    hidden, _ = layer(x)
    assert hidden.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_call_the_modules(layer, dtype):
    layer.to(dtype)(x_of(dtype))


def test_peft_adapters_call_the_modules(layer):
    from peft import LoraConfig, inject_adapter_in_model

    targets = ["rg_lru.recurrence_gate.weight"]
    model = torch.nn.ModuleDict({"rg_lru": layer})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[], target_parameters=targets), model)
    assert type(layer.recurrence_gate) is not BlockDiagonalLinear
    layer(x_of())


def test_says_why_it_cannot_run():
    x, weight, bias = torch.empty(2, 7, 600), torch.empty(2, 300, 300), torch.empty(2, 300)
    assert "float32" in gates_unavailable_reason(x, weight, bias)
    assert "float32" in gates_unavailable_reason(x.bfloat16(), weight.bfloat16(), bias)
    assert "300 wide" in gates_unavailable_reason(*(tensor.half() for tensor in (x, weight, bias)))
    assert gates_unavailable_reason(x.half(), weight[:, :160, :160].half(), bias[:, :160].half()) is None
