"""Linear layers with LoRA adapters of PEFT as one node: numbers and gradients of their modules, and where these run.

PEFT's own modules are the definition, in float64 for gradients.
"""

import copy
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_griffin import slots
from modeling_griffin.elementwise import gated_linears, linears
from modeling_griffin.kernels import dispatch
from modeling_griffin.kernels.adapters import read_adapter
from modeling_griffin.kernels.dispatch import small_tensors_pay
from tests.tolerances import assert_close


@pytest.fixture
def paying(monkeypatch):
    monkeypatch.setattr(dispatch, "pays", lambda *x: True)


def adapted(count=2, dtype=torch.float64, bias=True, inputs=6, outputs=(4, 9, 5), **options) -> nn.ModuleList:
    """Frozen layers of one input with adapters whose products are not zero."""
    layers = nn.ModuleList(nn.Linear(inputs, outputs[i], bias=bias) for i in range(count)).to(dtype)
    options = {"r": 2, "lora_alpha": 3, "target_modules": [str(i) for i in range(count)], **options}
    holder = nn.ModuleDict({"layers": layers})
    wide = get_peft_model(holder, LoraConfig(**options), autocast_adapter_dtype=dtype != torch.float64)
    for name, parameter in wide.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return holder["layers"]


def outcome(outputs, x, layers) -> list[torch.Tensor]:
    parameters = [p for p in layers.parameters() if p.requires_grad]
    return [*outputs, *torch.autograd.grad([y.double().square().sum() for y in outputs], [x, *parameters])]


def is_one_node(outputs) -> bool:
    return all("AdaptedLinears" in type(y.grad_fn).__name__ and y.grad_fn is outputs[0].grad_fn for y in outputs)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(paying, count, bias):
    layers = adapted(count, bias=bias)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    found = linears(x, *layers)
    assert is_one_node(found)
    expected = outcome([layer(x) for layer in layers], x, layers)
    for f, e in zip(outcome(found, x, layers), expected, strict=True):
        assert f.shape == e.shape
        assert_close("scan float64", f, e)


def test_input_that_is_not_contiguous(paying):
    layers = adapted()
    x = torch.randn(5, 2, 6, dtype=torch.float64, requires_grad=True)
    expected = outcome([layer(x.transpose(0, 1)) for layer in layers], x, layers)
    for f, e in zip(outcome(linears(x.transpose(0, 1), *layers), x, layers), expected, strict=True):
        assert_close("scan float64", f, e)


def check_beside_modules(x, layers) -> None:
    """One node, with outputs and gradients in the modules' dtypes, and no further from float64 than the modules'."""
    found, modules = linears(x, *layers), [layer(x) for layer in layers]
    assert is_one_node(found)
    wide = copy.deepcopy(layers).double()
    x_wide = x.detach().double().requires_grad_()
    right = outcome([layer(x_wide) for layer in wide], x_wide, wide)
    for f, m, r in zip(outcome(found, x, layers), outcome(modules, x, layers), right, strict=True):
        assert f.dtype == m.dtype
        assert (f - r).norm() <= 1.1 * (m - r).norm() + 1e-6 * r.norm()


def test_dtypes_are_those_of_the_modules(paying):
    """Adapters in float32 on a base of bfloat16: the same numbers forward."""
    layers = adapted(3, torch.bfloat16, r=4, lora_alpha=2)
    x = torch.randn(2, 50, 6).bfloat16().requires_grad_()
    assert all(torch.equal(y, layer(x)) for y, layer in zip(linears(x, *layers), layers))
    check_beside_modules(x, layers)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 3])
def test_on_a_gpu(count):
    """Without being told that it pays."""
    layers = adapted(count, torch.bfloat16, inputs=1024, outputs=(1024, 256, 3072), r=16).cuda()
    check_beside_modules(torch.randn(1, 2048, 1024, device="cuda").bfloat16().requires_grad_(), layers)


@pytest.mark.parametrize("act_fn", [dispatch.GELU_TANH(), nn.ReLU()])
def test_in_front_of_a_gated_activation(paying, monkeypatch, act_fn):
    monkeypatch.setitem(slots._FILLED, "gated", lambda *x: None)  # which has no kernel here
    gate, up = layers = adapted(outputs=(4, 4))
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    read = []
    monkeypatch.setattr(dispatch, "read_adapter", lambda module: read.append(module) or read_adapter(module))
    found = gated_linears(act_fn, x, gate, up)
    assert read == [gate, up]
    expected = outcome([act_fn(gate(x)) * up(x)], x, layers)
    for f, e in zip(outcome([found], x, layers), expected, strict=True):
        assert_close("scan float64", f, e)


class Operators(TorchDispatchMode):
    """Names of those that compute, in order: one launch each on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not any(part in str(function) for part in ("view", "aten.t.", "permute")):
            self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "base, adapter, first, each",
    [
        (torch.float32, torch.float32, [], ["addmm_"]),
        (torch.bfloat16, torch.bfloat16, [], ["addmm_"]),
        (torch.bfloat16, torch.float32, ["_to_copy"], ["mm", "add_"]),
    ],
)
@torch.no_grad()
def test_operators_of_a_pass_that_is_recorded(base, adapter, first, each, bias, count):
    layers = adapted(count, base, bias=bias)
    for name, parameter in layers.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    x = torch.randn(2, 1, 6, dtype=base)
    with small_tensors_pay(), Operators() as seen:
        found = linears(x, *layers)
    assert seen.names == first + ["addmm" if bias else "mm", "mm", *each] * count
    tolerance = {torch.float32: "logits", torch.bfloat16: "bfloat16 logits"}[base]
    for f, layer in zip(found, layers, strict=True):
        assert f.dtype == base
        assert_close(tolerance, f, layer(x))


def test_only_this_thread_and_only_inside():
    layers = adapted()
    x = torch.randn(2, 1, 6, dtype=torch.float64)
    names = {}

    def look(where):
        with torch.no_grad(), Operators() as seen:
            linears(x, *layers)
        names[where] = len(seen.names)

    with small_tensors_pay():
        with small_tensors_pay():
            look("twice inside")
        look("inside")
        thread = threading.Thread(target=look, args=("in another thread",))
        thread.start()
        thread.join()
    look("outside")
    assert names["inside"] == names["twice inside"] == 6 < names["outside"] == names["in another thread"]


@pytest.mark.parametrize("change", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}])
@torch.no_grad()
def test_other_adapters_have_their_modules_called_where_a_pass_is_recorded(change):
    layers = adapted(**change).eval()
    called = []
    for layer in layers:
        layer.forward = lambda x, real=layer.forward: called.append(1) or real(x)
    with small_tensors_pay():
        linears(torch.randn(2, 1, 6, dtype=torch.float64), *layers)
    assert len(called) == 2


def test_only_what_is_trained_gets_a_gradient(paying):
    layers = adapted()
    layers[0].lora_A["default"].requires_grad_(False)
    layers[1].lora_B["default"].requires_grad_(False)
    x = torch.randn(2, 5, 6, dtype=torch.float64)  # as in the first layer, whose input needs none
    sum(layer(x).square().sum() for layer in layers).backward()
    expected = [p.grad for p in layers.parameters() if p.requires_grad]
    layers.zero_grad()
    sum(y.square().sum() for y in linears(x, *layers)).backward()
    trained = [p for p in layers.parameters() if p.requires_grad]
    for parameter, e in zip(trained, expected, strict=True):
        assert_close("scan float64", parameter.grad, e)
    assert all(p.grad is None for p in layers.parameters() if not p.requires_grad)


def test_one_output_is_not_used(paying):
    layers, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    linears(x, *layers)[1].sum().backward()
    found = x.grad.clone()
    x.grad = None
    layers[1](x).sum().backward()
    assert_close("scan float64", found, x.grad)


class OtherTensor(torch.Tensor):
    """As of a sharded or a quantised weight."""


def second_adapter(layers):
    layers[1].update_layer("other", r=2, lora_alpha=2, config=LoraConfig(r=2))
    layers[1].set_adapter(["default", "other"])


SPOILED = {
    "dropout": lambda: adapted(lora_dropout=0.5),
    "DoRA": lambda: adapted(use_dora=True),
    "a bias in the adapter": lambda: adapted(lora_bias=True),
    "a bias of one's own in A": lambda layers: setattr(
        layers[1].lora_A["default"], "bias", nn.Parameter(torch.ones(2).double())
    ),
    "several adapters": second_adapter,
    "no adapter": lambda layers: layers[1].set_adapter([]),
    "another adapter's name": lambda layers: setattr(layers[1], "_active_adapter", "other"),
    "switched off": lambda layers: layers[1].enable_adapters(False),
    "merged": lambda layers: layers[1].merge(),
    "scaling in a tensor": lambda layers: layers[1].scaling.update(default=torch.tensor(1.5)),
    "no casts": lambda layers: setattr(layers[1], "cast_input_dtype_enabled", False),
    "trained weight": lambda layers: layers[1].base_layer.weight.requires_grad_(),
    "trained bias": lambda layers: layers[1].base_layer.bias.requires_grad_(),
    "hook": lambda layers: layers[1].register_forward_hook(lambda *a: None),
    "hook on the base layer": lambda layers: layers[1].base_layer.register_forward_hook(lambda *a: None),
    "hook on A": lambda layers: layers[1].lora_A["default"].register_forward_pre_hook(lambda *a: None),
    "hook on B": lambda layers: layers[1].lora_B["default"].register_full_backward_hook(lambda *a: None),
    "hook on the dropout": lambda layers: layers[1].lora_dropout["default"].register_forward_hook(lambda *a: None),
    "weights of another class": lambda layers: setattr(
        layers[1].base_layer, "weight", nn.Parameter(layers[1].base_layer.weight.as_subclass(OtherTensor), False)
    ),
    "another forward": lambda layers: setattr(layers[1], "forward", layers[1].forward),
    "another base layer": lambda layers: setattr(layers[1], "base_layer", type("Own", (nn.Linear,), {})(6, 9).double()),
    "no adapter of PEFT": lambda layers: layers.__setitem__(1, layers[1].base_layer),
}


@pytest.mark.parametrize("what", SPOILED)
@pytest.mark.parametrize("order", [1, -1])
def test_modules_are_called(paying, what, order):
    """Where PEFT does anything else than one product beside another one."""
    spoil = SPOILED[what]
    if spoil.__code__.co_argcount:
        layers = adapted()
        spoil(layers)
    else:
        layers = spoil()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    layers = list(layers)[::order]
    torch.manual_seed(0)
    found = linears(x, *layers)
    assert not any("AdaptedLinears" in type(y.grad_fn).__name__ for y in found)
    torch.manual_seed(0)
    assert all(torch.equal(y, layer(x)) for y, layer in zip(found, layers))


def test_autocast_takes_the_modules(paying):
    layers, x = adapted(dtype=torch.float32), torch.randn(2, 5, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = linears(x, *layers), [layer(x) for layer in layers]
    assert not is_one_node(found) and all(torch.equal(f, e) for f, e in zip(found, expected))


def test_adapters_of_two_dtypes_take_the_modules(paying):
    layers, x = adapted(dtype=torch.bfloat16), torch.randn(2, 5, 6).bfloat16()
    layers[1].lora_A.bfloat16(), layers[1].lora_B.bfloat16()
    assert not any("AdaptedLinears" in type(y.grad_fn).__name__ for y in linears(x, *layers))


def test_a_layer_alone_is_called(paying):
    """Without adapters its own call is the fastest."""
    layer, x = nn.Linear(6, 4), torch.randn(2, 5, 6)
    (y,) = linears(x, layer)
    assert "Linear" not in type(y.grad_fn).__name__ and torch.equal(y, layer(x))


def test_scaling_is_read_at_each_call(paying):
    layers, x = adapted(1), torch.randn(2, 5, 6, dtype=torch.float64)
    layers[0].scale_layer(0.3)
    assert_close("scan float64", linears(x, *layers)[0], layers[0](x))
    assert read_adapter(layers[0]).scaling == pytest.approx(0.45)


@pytest.mark.parametrize("kind", ["griffin", "hawk"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_model(small_model, monkeypatch, kind, checkpointing):
    """Each adapted layer goes this way, and loss and gradients are those of the modules."""
    kept = ("linears", "gated_linears")
    monkeypatch.setattr(slots, "_FILLED", {name: dispatch.SLOTS[name] for name in kept})
    model = small_model(kind).double().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    config = LoraConfig(r=4, lora_alpha=3, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(2, 29, (2, 12))

    def result() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return [loss, *(p.grad for p in model.parameters() if p.requires_grad)]

    expected, read = result(), []
    monkeypatch.setattr(dispatch, "pays", lambda *x: True)
    monkeypatch.setattr(dispatch, "read_adapter", lambda module: read.append(module) or read_adapter(module))
    found = result()
    layers = {m for m in model.modules() if hasattr(m, "lora_A")}
    assert set(read) == layers and all(read_adapter(layer) is not None for layer in layers)
    for f, e in zip(found, expected, strict=True):
        assert_close("scan float64", f, e)
