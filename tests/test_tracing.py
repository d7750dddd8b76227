"""Traced, compiled and exported for any length, and differentiated forwards: the numbers of the plain model."""

import shutil

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_griffin import rg_lru_scan
from tests.tolerances import assert_close


VOCABULARY = 29


def random_ids(rows, length):
    return torch.randint(1, VOCABULARY, (rows, length))


def gradients(run, model, ids):
    model.zero_grad()
    run(ids, labels=ids).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


class Logits(torch.nn.Module):
    """A model as people trace it: tensors in, one tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None):
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize(
    "layers, lengths",
    [(["linear_attention"], (12, 7, 20, 33, 70)), (["linear_attention", "sliding_attention"], (12, 33))],
    ids=["hawk", "griffin"],
)
@pytest.mark.parametrize("dynamic", [True, None])
def test_training_compiled_for_changing_lengths(layers, lengths, dynamic, small_model):
    """A recurrence makes no graph of its own for a length: one, and one more where the first was taken for the only."""
    model = small_model(attention="sdpa", layer_types=layers).train()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    for length in lengths:
        ids = random_ids(2, length)
        for found, expected in zip(gradients(compiled, model, ids), gradients(model, model, ids)):
            assert_close("gradient", found, expected)
    if len(layers) == 1:  # attention has guards on whether the window is reached
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if dynamic else 2)


@pytest.mark.parametrize("kind", ["hawk", "attention_first"])
def test_dimensions_marked_as_dynamic(kind, small_model):
    model = small_model(kind, "sdpa").train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for rows, length in ((2, 12), (3, 33)):
        ids = random_ids(rows, length)
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(ids, dim)
        for found, expected in zip(gradients(compiled, model, ids), gradients(model, model, ids)):
            assert_close("gradient", found, expected)


NEEDS_A_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@NEEDS_A_COMPILER
def test_training_by_inductor(small_model):
    """The default backend, whose C++ takes a minute: one graph for all rows and lengths."""
    model = small_model("attention_first", "sdpa").train()
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=True, fullgraph=True)
    for rows, length in ((2, 12), (3, 33), (4, 20)):
        ids = random_ids(rows, length)
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(ids, dim)
        for found, expected in zip(gradients(compiled, model, ids), gradients(model, model, ids)):
            assert_close("gradient", found, expected)


@pytest.mark.parametrize(
    "layers, backend",
    [
        (["sliding_attention", "linear_attention"], "aot_eager"),
        pytest.param(["linear_attention"], "inductor", marks=NEEDS_A_COMPILER),
    ],
    ids=["griffin-aot_eager", "hawk-inductor"],
)
def test_a_compiled_trainer_with_changing_lengths(layers, backend, small_model, tmp_path):
    """The weights that stock `Trainer` leaves with `torch_compile` are those that it leaves without.

    With smoothed labels, whose loss is computed outside of the model.
    """
    rows = [{"input_ids": row, "labels": row.clone()} for length in (12, 7, 20) for row in random_ids(1, length)]
    trained = []
    for compiler in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        torch._dynamo.reset()
        model = small_model(attention="sdpa", layer_types=layers)
        arguments = TrainingArguments(
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=1,
            learning_rate=0.01,
            label_smoothing_factor=0.1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            **compiler,
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        trained.append(list(model.parameters()))
    for found, expected in zip(*trained):
        assert_close("gradient", found, expected)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_export_for_any_rows_and_length(padded, small_model):
    """Of PyTorch's own operators, so that it runs and converts where this package is not."""
    model, ids, mask = Logits(small_model(attention="sdpa")), random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    dims = {0: torch.export.Dim("rows", min=1), 1: torch.export.Dim("time", min=1)}
    arguments = (ids, mask) if padded else (ids,)
    program = torch.export.export(model, arguments, dynamic_shapes=tuple(dims for _ in arguments))
    names = {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
    assert names <= {"aten", "higher_order"}  # both PyTorch's
    longer = tuple(torch.cat([each, each], dim=1) for each in arguments)
    for some in (longer, tuple(each[1:] for each in longer), tuple(each[:, -1:] for each in longer)):
        real = some[1].bool() if padded else torch.ones_like(some[0], dtype=torch.bool)
        assert_close("logits", program.module()(*some)[real], model(*some)[real])


@pytest.mark.parametrize("kind", ["griffin", "hawk"])
@torch.no_grad()
def test_jit_trace_with_a_mask(kind, small_model):
    model, ids, mask = Logits(small_model(kind, "sdpa")), random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    traced = torch.jit.trace(model, (ids, mask), check_trace=False)
    ids, mask = random_ids(2, 12), mask.flip(0)
    assert_close("logits", traced(ids, mask)[mask.bool()], model(ids, mask)[mask.bool()])


def scan_inputs():
    x, recurrence_gate, input_gate = torch.randn(3, 2, 9, 5, dtype=torch.float64)
    return x, recurrence_gate, input_gate, -torch.rand(5, dtype=torch.float64)


def test_forward_mode_derivatives_of_the_scan():
    """Against backward mode, whose gradients are tested: <tangent out, v> is <gradient of <out, v>, tangent in>."""
    inputs = scan_inputs()
    tangents = tuple(torch.randn_like(each) for each in inputs)
    (hidden, last), (d_hidden, d_last) = torch.func.jvp(rg_lru_scan, inputs, tangents)
    v_hidden, v_last = torch.randn_like(hidden), torch.randn_like(last)
    leaves = [each.clone().requires_grad_() for each in inputs]
    torch.autograd.backward(rg_lru_scan(*leaves), (v_hidden, v_last))
    backwards = sum((leaf.grad * tangent).sum() for leaf, tangent in zip(leaves, tangents))
    assert_close("scan float64", (d_hidden * v_hidden).sum() + (d_last * v_last).sum(), backwards)


def test_forward_mode_derivatives_of_the_model(small_model):
    model = small_model(attention="eager").double()
    embeds = model.get_input_embeddings()(random_ids(2, 9)).detach()
    tangent, v = torch.randn_like(embeds), torch.randn(2, 9, VOCABULARY, dtype=torch.float64)
    _, derivative = torch.func.jvp(lambda x: model(inputs_embeds=x, use_cache=False).logits, (embeds,), (tangent,))
    embeds.requires_grad_()
    (model(inputs_embeds=embeds, use_cache=False).logits * v).sum().backward()
    expected = (embeds.grad * tangent).sum()
    assert abs((derivative * v).sum() - expected) < 1e-5 * derivative.norm() * v.norm()


@pytest.mark.parametrize("name", ["x", "recurrence_gate", "input_gate", "log_decay", "initial_state", "reset"])
@pytest.mark.parametrize("value", [3.0, [[1.0]], "text"], ids=str)
def test_scan_of_something_that_is_no_tensor(name, value):
    arguments = {**dict(zip(("x", "recurrence_gate", "input_gate", "log_decay"), scan_inputs())), name: value}
    with pytest.raises(ValueError, match=f"{name} is a {type(value).__name__}: allowed is a tensor"):
        rg_lru_scan(**arguments)
