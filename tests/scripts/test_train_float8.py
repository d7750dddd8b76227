"""`float8` of train.py: what is converted, what is refused, and that a run trains, saves and resumes as any other.

Products in float8 need a GPU; here torchao emulates them, which rounds as they do.
"""

from functools import partial

import pytest
import torch
from _script_helpers import write_run
from safetensors.torch import load_file
from train import run
from training import float8
from training.float8 import check_float8, convert
from transformers import AutoModelForCausalLM

from modeling_griffin import LORA_TARGETS
from modeling_griffin.gpu import GPU


pytest.importorskip("torchao")
LINEAR = LORA_TARGETS["recurrent"] + LORA_TARGETS["attention"] + LORA_TARGETS["mlp"]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "lru_width": 32,
    "head_dim": 16,
    "num_gate_blocks": 4,
    "vocab_size": 48,
}


@pytest.fixture
def uncompiled(monkeypatch):
    """What a compiler makes of the casts is the GPU's affair."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)


@pytest.mark.parametrize("recipe", float8.RECIPES)
def test_what_is_converted(recipe, small_model, uncompiled):
    """All linear layers but the head; gates, convolution and Λ stay, and every weight keeps its name and its value."""
    from torchao.float8.float8_linear import Float8Linear

    model, ids = small_model("griffin", **SIZES), torch.randint(0, 48, (2, 16))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected = model(ids, labels=ids)
    gradients = torch.autograd.grad(expected.loss, list(model.parameters()))
    assert convert(model, recipe, emulate=True) == 3 * 3 + 2 * 3 + 4
    for name, module in model.named_modules():
        assert (type(module) is Float8Linear) == (name.rpartition(".")[2] in LINEAR), name
        # The hardware asks for tokens by 16 in the weights' gradients, which emulation on a CPU does not.
        assert type(module) is not Float8Linear or module.config.pad_inner_dim, name
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)
    found = model(ids, labels=ids)
    error = (found.logits - expected.logits).abs().max() / expected.logits.abs().max()
    assert 1e-3 < error < 0.2  # rounded, and no more than that
    rounded = torch.autograd.grad(found.loss, list(model.parameters()))
    for name, mine, theirs in zip(after, rounded, gradients):
        cosine = torch.nn.functional.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0)
        assert mine.dtype == torch.float32 and cosine > 0.95, name


def test_a_layer_whose_sides_the_hardware_does_not_take(small_model, uncompiled):
    model = small_model("griffin", **{**SIZES, "intermediate_size": 40})
    assert convert(model, "tensorwise", emulate=True) == 2 * 3 + 4


@pytest.mark.parametrize(
    "value, capability, says",
    [
        ("rowwise", None, "float8 = 'rowwise' on cpu: allowed is a GPU of compute capability 9.0 or newer; unset it"),
        ("tensorwise", (8, 0), "'tensorwise' on a GPU of compute capability 8.0: allowed is a GPU of compute"),
        ("e4m3", (9, 0), "float8 = 'e4m3': allowed are tensorwise and rowwise"),
    ],
)  # fmt: skip
def test_what_is_refused(value, capability, says, monkeypatch):
    if capability is not None:
        found = GPU("a GPU", "nvidia", capability)
        monkeypatch.setattr(float8, "properties", lambda device: found)
    with pytest.raises(ValueError) as error:
        check_float8(value, torch.device("cpu" if capability is None else "cuda"))
    assert says in str(error.value)


def test_a_library_that_is_not_there(monkeypatch):
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs torchao, which is not installed: pip install torchao"):
        check_float8("tensorwise", torch.device("cuda"))


def test_a_run_refuses_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="train.py: error: float8 = 'tensorwise' on cpu: allowed is a GPU"):
        run([write_run(tmp_path, float8="tensorwise")])


def test_a_run_trains_saves_and_resumes(tmp_path, monkeypatch, uncompiled):
    """With activation checkpointing; the folder is that of any other run."""
    monkeypatch.setattr("train.check_float8", lambda recipe, device: None)
    monkeypatch.setattr("train.convert", partial(convert, emulate=True))
    path = write_run(tmp_path, float8="rowwise", save_strategy="steps", save_steps=2, gradient_checkpointing=True)
    trainer, metrics = run([path])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] and metrics["float8_layers"] == 2 * 3 + 2  # the others have sides of 8 or 24
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(type(module).__name__ != "Float8Linear" for module in plain.modules())
    resumed = ["--output_dir", str(tmp_path / "again"), "--resume", str(tmp_path / "out" / "checkpoint-2")]
    run([path, *resumed])
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(SystemExit, match="float8 = 'rowwise' there, None now"):
        run([path, "--float8=", *resumed])
