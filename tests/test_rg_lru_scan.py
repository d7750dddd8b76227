"""rg_lru_scan: every value and every gradient against float64 autograd of the sequential definition.

Legend: B batch, T time, C channels.
"""

import importlib
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import modeling_griffin
from modeling_griffin import rg_lru_scan
from modeling_griffin.rg_lru_scan import describe_backend
from tests.tolerances import assert_close, relative_error


B, C = 2, 5
NAMES = ("x", "recurrence_gate", "input_gate", "log_decay", "initial_state")
RESETS = ("none", "first", "inside", "everywhere")
LENGTHS = (0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 1000)


def make_inputs(length, dtype=torch.float32, batch=B, channels=C):
    """x, recurrence_gate, input_gate, log_decay, initial_state; channels from a long to a short memory."""
    x, r, i = (torch.randn(batch, length, channels).to(dtype) for _ in range(3))
    wide = torch.promote_types(dtype, torch.float32)
    log_decay = -torch.logspace(-4, 0.5, channels, dtype=wide)
    return x, r, i, log_decay, torch.randn(batch, channels, dtype=wide)


def make_reset(kind, length):
    if kind == "none":
        return None
    reset = torch.zeros(B, length, dtype=torch.bool)
    if kind == "first":
        reset[:, :1] = True
    elif kind == "inside":
        reset = torch.rand(B, length) < 0.2
    else:
        reset[:] = True
    return reset


def run(inputs, reset, backend, upstream):
    """hidden, last_state and the gradients by name of <hidden, upstream[0]> + <last_state, upstream[1]>."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    hidden, last_state = rg_lru_scan(*leaves[:4], initial_state=leaves[4], reset=reset, backend=backend)
    loss = (hidden * upstream[0].to(hidden)).sum() + (last_state * upstream[1].to(last_state)).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return {"hidden": hidden, "last_state": last_state} | {f"d {n}": g for n, g in zip(NAMES, gradients)}


def make_upstream(inputs, through="both"):
    hidden, last = torch.randn(inputs[0].shape, dtype=torch.float64), torch.randn(inputs[4].shape, dtype=torch.float64)
    return hidden * (through != "last_state"), last * (through != "hidden")


def truth(inputs, reset, upstream):
    return run([tensor.double() for tensor in inputs], reset, "reference", upstream)


def assert_right(inputs, reset=None, through="both", backend="torch"):
    upstream = make_upstream(inputs, through)
    actual, expected = run(inputs, reset, backend, upstream), truth(inputs, reset, upstream)
    kind = "float64" if inputs[0].dtype == torch.float64 else "float32"
    for name in expected:
        suffix = " gradient" if kind == "float32" and name.startswith("d ") else ""
        assert_close(f"scan {kind}{suffix}", actual[name], expected[name], name)


def test_reference_is_the_equation():
    """The definition itself, against the formula written out in Python's own floats."""
    x, r, i, log_decay, state = make_inputs(6, torch.float64)
    reset = torch.zeros(B, 6, dtype=torch.bool)
    reset[1, 3] = True
    hidden, last_state = rg_lru_scan(x, r, i, log_decay, initial_state=state, reset=reset, backend="reference")
    sigmoid = lambda value: 1 / (1 + math.exp(-value))  # noqa: E731
    for b in range(B):
        for c in range(C):
            h = state[b, c].item()
            for t in range(6):
                a = math.exp(log_decay[c].item() * sigmoid(r[b, t, c].item()))
                gated = sigmoid(i[b, t, c].item()) * x[b, t, c].item()
                h = gated if reset[b, t] else a * h + math.sqrt(1 - a * a) * gated
                assert hidden[b, t, c].item() == pytest.approx(h, rel=1e-10, abs=1e-12)
            assert last_state[b, c].item() == hidden[b, -1, c].item()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("through", ["hidden", "last_state"])
@pytest.mark.parametrize("resets", RESETS)
def test_values_and_gradients(length, through, resets):
    assert_right(make_inputs(length), make_reset(resets, length), through)


@pytest.mark.parametrize("length", [1, 9, 64])
@pytest.mark.parametrize("resets", RESETS)
def test_values_and_gradients_float64(length, resets):
    assert_right(make_inputs(length, torch.float64), make_reset(resets, length))


@pytest.mark.parametrize("channels", [1, 3, 17, 257])
def test_any_number_of_channels(channels):
    assert_right(make_inputs(9, channels=channels))


@pytest.mark.parametrize("log_decay", [0.0, -1e-20, -1e-9, -1e-5, -80.0])
@pytest.mark.parametrize("gate", [-40.0, 0.0, 40.0])
def test_extreme_decays_and_gates(log_decay, gate):
    x, r, i, _, state = make_inputs(17)
    inputs = (x, r + gate, i - gate, torch.full((C,), log_decay), state)
    assert all(value.isfinite().all() for value in run(inputs, None, "torch", make_upstream(inputs)).values())
    assert_right(inputs)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("log_decay", [-1e-6, -0.1, -80.0])
def test_padding_steps_carry_the_state(backend, log_decay):
    """x = 0 and recurrence_gate = -inf: as if the steps were not there, for values and gradients."""
    real = torch.tensor([0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0], dtype=torch.bool)
    x, r, i, _, state = make_inputs(int(real.sum()))
    log_decay = torch.full((C,), log_decay)
    spread = lambda tensor, fill: torch.full((B, len(real), C), fill).index_copy(1, real.nonzero()[:, 0], tensor)  # noqa: E731
    padded = (spread(x, 0.0), spread(r, -torch.inf), spread(i, 0.7), log_decay, state)
    upstream = make_upstream((x, r, i, log_decay, state))
    wide = (spread(upstream[0].float(), 0.0), upstream[1])
    short, long = run((x, r, i, log_decay, state), None, backend, upstream), run(padded, None, backend, wide)
    for name, expected in short.items():
        actual = long[name]
        assert actual.isfinite().all(), name
        if actual.dim() == 3:
            actual = actual[:, real]
        assert_close("scan float32 gradient", actual, expected, name)
    hidden = long["hidden"]
    assert torch.equal(hidden[:, 4], hidden[:, 3]) and torch.equal(hidden[:, 7], hidden[:, 5])
    assert torch.equal(hidden[:, 1], state)


def test_the_gradient_at_padding_is_finite():
    """Also where an upstream gradient arrives at padding itself."""
    x, r, i, log_decay, state = make_inputs(6)
    x[:, 2:4], r[:, 2:4] = 0.0, -torch.inf
    assert_right((x, r, i, log_decay, state))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_bounded_gradient_of_the_square_root(backend):
    """One step without a past: dh / d recurrence_gate = i x (-2 a^2) min(1 / (2 sqrt(y)), 1000) log_decay r (1 - r)."""
    log_decay = -torch.logspace(-12, 0, 13, dtype=torch.float64)
    x, i = torch.full((1, 1, 13), 3.0, dtype=torch.float64), torch.zeros(1, 1, 13, dtype=torch.float64)
    r = torch.full((1, 1, 13), 0.4, dtype=torch.float64, requires_grad=True)
    hidden, _ = rg_lru_scan(x, r, i, log_decay, backend=backend)
    (gradient,) = torch.autograd.grad(hidden.sum(), r)
    gate = torch.sigmoid(r.detach()[0, 0])
    y = -torch.expm1(2 * log_decay * gate)
    bound = (0.5 / y.sqrt()).clamp(max=1000.0)
    assert (bound == 1000.0).sum() == 6  # y < 2.5e-7
    expected = 0.5 * 3.0 * (-2 * (1 - y)) * bound * log_decay * gate * (1 - gate)
    assert_close("scan float64", gradient[0, 0] / expected, torch.ones(13))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("resets", ["none", "inside"])
def test_half_precision_is_as_good_as_plain_operations(dtype, resets):
    """At most twice the error of the reference loop in the same dtype, whose arithmetic is float32."""
    length = 65
    inputs, reset = make_inputs(length, dtype), make_reset(resets, length)
    upstream = tuple(tensor.to(dtype) for tensor in make_upstream(inputs))
    expected = truth(inputs, reset, upstream)
    plain, actual = run(inputs, reset, "reference", upstream), run(inputs, reset, "torch", upstream)
    assert actual["hidden"].dtype == actual["d x"].dtype == dtype
    assert actual["last_state"].dtype == actual["d log_decay"].dtype == torch.float32
    for name in expected:
        rounding = torch.finfo(dtype).eps / 2 if name[:3] == "d l" or name[:3] == "d r" else 2e-6
        assert relative_error(actual[name], expected[name]) <= 2 * max(
            relative_error(plain[name], expected[name]), rounding
        ), name


def test_mixed_dtypes():
    x, r, i, log_decay, state = make_inputs(9)
    inputs = (x.bfloat16(), r.half(), i, log_decay.double(), state.bfloat16())
    actual = run(inputs, None, "torch", make_upstream(inputs))
    assert actual["hidden"].dtype == torch.bfloat16 and actual["last_state"].dtype == torch.float32
    for tensor, name in zip(inputs, NAMES):
        assert actual[f"d {name}"].dtype == tensor.dtype
    plain = run(tuple(t.float() for t in inputs), None, "reference", make_upstream(inputs, "none"))
    assert_close("bfloat16 logits", actual["hidden"], plain["hidden"])
    assert_close("scan float32", actual["last_state"], plain["last_state"])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("state_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [0, 1, 5])
def test_last_state_is_float32(backend, state_dtype, length):
    x, r, i, log_decay, state = make_inputs(length)
    hidden, last = rg_lru_scan(x, r, i, log_decay, initial_state=state.to(state_dtype), backend=backend)
    assert hidden.dtype == last.dtype == torch.float32 and hidden.shape == (B, length, C) and last.shape == (B, C)
    if length == 0:
        assert_close("exact", last, state.to(state_dtype))


def test_non_contiguous_inputs():
    x, r, i, log_decay, state = make_inputs(9)
    stretched = lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0]  # noqa: E731
    awkward = (
        x.mT.contiguous().mT,
        stretched(r),
        i.flip(1).flip(1)[:, :, :],
        stretched(log_decay),
        state.T.contiguous().T,
    )
    upstream = make_upstream((x, r, i, log_decay, state))
    actual = rg_lru_scan(*awkward[:4], initial_state=awkward[4])
    assert_close("exact", actual[0], rg_lru_scan(x, r, i, log_decay, initial_state=state)[0])
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, r, i, log_decay, state)]
    hidden, last = rg_lru_scan(
        leaves[0].mT.contiguous().mT,
        stretched(leaves[1]),
        leaves[2].expand(B, 9, C),
        leaves[3],
        initial_state=leaves[4],
    )
    # a gradient that is itself not contiguous
    gradients = torch.autograd.grad([hidden.mT, last], leaves, [upstream[0].mT.float(), upstream[1].float()])
    expected = truth((x, r, i, log_decay, state), None, upstream)
    for name, gradient in zip(NAMES, gradients):
        assert_close("scan float32 gradient", gradient, expected[f"d {name}"], name)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (0, 0, 0)])
def test_empty_sizes(backend, shape):
    x = torch.zeros(shape, requires_grad=True)
    hidden, last = rg_lru_scan(x, x, x, -torch.ones(shape[2]), backend=backend)
    (hidden.sum() + last.sum()).backward()
    assert hidden.shape == x.grad.shape == shape and last.shape == (shape[0], shape[2])


BAD_ARGUMENTS = {
    "x": (lambda a: a.update(x=a["x"][0]), "x"),
    "x dtype": (lambda a: a.update(x=a["x"].int()), "x"),
    "recurrence_gate": (lambda a: a.update(recurrence_gate=a["recurrence_gate"][:, :1]), "recurrence_gate"),
    "recurrence_gate dtype": (lambda a: a.update(recurrence_gate=a["recurrence_gate"].long()), "recurrence_gate"),
    "input_gate": (lambda a: a.update(input_gate=a["input_gate"][..., :1]), "input_gate"),
    "input_gate dtype": (lambda a: a.update(input_gate=a["input_gate"].bool()), "input_gate"),
    "log_decay": (lambda a: a.update(log_decay=a["log_decay"][None]), "log_decay"),
    "log_decay dtype": (lambda a: a.update(log_decay=a["log_decay"].int()), "log_decay"),
    "log_decay above 0": (lambda a: a["log_decay"].__setitem__(2, 1e-3), "log_decay"),
    "initial_state": (lambda a: a.update(initial_state=a["initial_state"][:1]), "initial_state"),
    "initial_state dtype": (lambda a: a.update(initial_state=a["initial_state"].int()), "initial_state"),
    "reset": (lambda a: a.update(reset=a["reset"][:, :1]), "reset"),
    "reset dtype": (lambda a: a.update(reset=a["reset"].long()), "reset"),
    "backend": (lambda a: a.update(backend="cuda"), "backend"),
    "device": (lambda a: a.update(input_gate=a["input_gate"].to("meta")), "input_gate"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_raise_and_are_named(case):
    arguments = dict(zip(NAMES, make_inputs(4))) | {"reset": torch.zeros(B, 4, dtype=torch.bool)}
    rg_lru_scan(**arguments)
    change, named = BAD_ARGUMENTS[case]
    change(arguments)
    with pytest.raises(ValueError, match=rf"^{named} .*allowed"):
        rg_lru_scan(**arguments)


def test_triton_says_why_it_cannot_run():
    x, r, i, log_decay, _ = make_inputs(2)
    with pytest.raises(ValueError, match="backend = 'triton' cannot run: .+"):
        rg_lru_scan(x, r, i, log_decay, backend="triton")
    assert "torch on cpu" in describe_backend("cpu")


def test_no_gradient_where_none_is_asked_for():
    x, r, i, log_decay, state = make_inputs(9)
    hidden, _ = rg_lru_scan(x, r.requires_grad_(), i, log_decay, initial_state=state)
    (gradient,) = torch.autograd.grad(hidden.sum(), r)
    assert gradient.abs().min() > 0
    assert not rg_lru_scan(x, r.detach(), i, log_decay)[0].requires_grad


def as_function(reset=None, backend="torch"):
    return lambda x, r, i, log_decay, state: rg_lru_scan(
        x, r, i, log_decay, initial_state=state, reset=reset, backend=backend
    )


@pytest.mark.parametrize("resets", ["none", "inside"])
@pytest.mark.parametrize("length", [1, 6])
def test_gradcheck_and_double_backward(resets, length):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(length, torch.float64, channels=2)]
    function = as_function(make_reset(resets, length))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("transformed", [False, True])
def test_second_derivatives_at_padding(transformed):
    """Where a = 1 exactly, and at a reset there too: those of the definition, which bounds the root's derivative."""
    length = 9
    inputs = make_inputs(length, torch.float64)
    inputs[3][0] = 0.0  # a channel that forgets nothing
    padding = torch.rand(B, length, 1) < 0.4
    reset = make_reset("inside", length)

    def loss(backend, x, r, *others):
        x, r = x.masked_fill(padding, 0.0), r.masked_fill(padding, -torch.inf)
        hidden, last = as_function(reset, backend)(x, r, *others)
        return hidden.sin().sum() + last.cos().sum()

    def penalty(gradients):
        return sum(gradient.sin().square().sum() for gradient in gradients)

    def second(backend):
        if transformed:
            first = torch.func.grad(lambda *leaves: loss(backend, *leaves), argnums=tuple(range(5)))
            return torch.func.grad(lambda *leaves: penalty(first(*leaves)), argnums=tuple(range(5)))(*inputs)
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        first = torch.autograd.grad(loss(backend, *leaves), leaves, create_graph=True)
        return torch.autograd.grad(penalty(first), leaves)

    for found, expected in zip(second("torch"), second("reference")):
        assert_close("scan float64", found, expected)


@pytest.mark.parametrize("which", range(5), ids=NAMES)
def test_torch_func_vmap_and_grad(which):
    """vmap over each argument alone, of values and of every gradient, against a Python loop."""
    inputs = list(make_inputs(5, torch.float64))
    many = torch.stack([inputs[which] * scale for scale in (0.5, 1.0, 1.5)])
    in_dims = tuple(0 if index == which else None for index in range(5))

    def loss(*arguments):
        hidden, last = as_function()(*arguments)
        return hidden.sin().sum() + last.cos().sum()

    arguments = [many if index == which else tensor for index, tensor in enumerate(inputs)]
    for function in (loss, *(torch.func.grad(loss, argnums=index) for index in range(5))):
        one_by_one = [function(*inputs[:which], one, *inputs[which + 1 :]) for one in many]
        assert_close("scan float64", torch.vmap(function, in_dims)(*arguments), torch.stack(one_by_one))
    jacobian = torch.func.jacrev(lambda x: as_function()(x, *inputs[1:])[0])(inputs[0])
    assert (jacobian[0, 1, 0, 0, 2:] == 0).all() and (jacobian[0, 4, 0, 0, :, 0] != 0).all()


@pytest.mark.parametrize("length", [1, 9])
def test_compiles_without_a_graph_break(length):
    torch._dynamo.reset()
    inputs, reset = make_inputs(length), make_reset("inside", length)
    upstream = make_upstream(inputs)

    def step(*arguments):
        hidden, last = as_function(reset, None)(*arguments)
        return (hidden * upstream[0].float()).sum() + (last * upstream[1].float()).sum()

    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(*leaves), leaves, allow_unused=True, materialize_grads=True)
    expected = run(inputs, reset, "torch", upstream)
    for name, gradient in zip(NAMES, gradients):
        assert_close("scan float32", gradient, expected[f"d {name}"], name)


def test_autocast_changes_nothing():
    inputs = make_inputs(9)
    upstream = make_upstream(inputs)
    expected = run(inputs, None, "torch", upstream)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(inputs, None, "torch", upstream)
    for name in expected:
        assert_close("exact", actual[name], expected[name], name)


def test_activation_checkpointing():
    leaves = [tensor.requires_grad_() for tensor in make_inputs(9)]
    plain = torch.autograd.grad(as_function()(*leaves)[0].sin().sum(), leaves)
    hidden, _ = torch.utils.checkpoint.checkpoint(as_function(), *leaves, use_reentrant=False)
    for gradient, expected in zip(torch.autograd.grad(hidden.sin().sum(), leaves), plain):
        assert_close("exact", gradient, expected)


class CountElements(TorchDispatchMode):
    """Counts the elements that all operations write."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.elements += tensor.numel()
        return result


def test_work_is_linear_in_time():
    def work(length):
        inputs = make_inputs(length)
        with CountElements() as count:
            run(inputs, None, "torch", make_upstream(inputs))
        return count.elements

    short, long = work(256), work(4096)
    assert 15 < long / short < 17


def test_two_copies_in_one_process():
    """Installed, and loaded again under another name as the Hub's loader does."""
    folder = Path(modeling_griffin.__file__).parent
    results = []
    for name in ("copy_a", "copy_b"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
        scan = importlib.import_module(f"{name}.rg_lru_scan").rg_lru_scan
        assert scan is not rg_lru_scan
        torch.manual_seed(0)
        x, r, i, log_decay, _ = make_inputs(9)
        x.requires_grad_()
        hidden, _ = scan(x, r, i, log_decay)
        results.append(torch.autograd.grad(hidden.sin().sum(), x)[0])
    assert torch.equal(*results)
