"""scripts/profile_training.py: the whole chain at the smallest size, and that its parts are the model's."""

import json

import profile_training
import pytest
import torch
from benchmark_training import griffin


def test_the_chain_on_a_cpu(tmp_path, capsys):
    output = tmp_path / "profile"
    arguments = ["--device", "cpu", "--size", "tiny", "--cell", "2x24", "--repeats", "1", "--output", str(output)]
    profile_training.main(arguments)
    report = json.loads(output.with_suffix(".json").read_text())
    assert report["step_s"] > 0 and all(part["seconds"] > 0 for part in report["parts"])
    floors = {
        part["name"]: part["floor"] for part in report["parts"]
    }  # a CPU's peak is not known: products count nothing
    assert floors["scan"] > floors["convolution"] > 0 and min(floors.values()) == floors["attention"] == 0
    page = output.with_suffix(".md").read_text()
    assert page in capsys.readouterr().out
    total = sum(part["count"] * part["seconds"] for part in report["parts"]) * 1e3
    assert f"| all parts | | | {total:.1f} |" in page


def test_products_are_all_of_the_model():
    """6 * weights * tokens: every matrix is in exactly one part, as often as the model has it."""
    model = griffin("tiny").bfloat16()
    found = profile_training.parts(model, 2, 24)
    flops = sum(part.count * part.flops for part in found if part.name != "attention")
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1 and "conv_1d" not in n
    )
    assert flops == pytest.approx(6 * 48 * matrices)


def test_each_part_runs_forward_and_backward():
    model = griffin("tiny").bfloat16()
    for part in profile_training.parts(model, 1, 40):
        result = part.function(*part.inputs)
        result = result if isinstance(result, tuple) else (result,)
        torch.autograd.backward(result, [torch.ones_like(y) for y in result])
        assert all(x.grad is not None for x in part.inputs), part.name
