"""ONNX files in ONNX Runtime: a step for any rows generates 200 tokens, 25 windows, as the model does."""

import pytest
import torch
from _export_helpers import generate_greedily, random_rows

from modeling_griffin.export import StatefulGriffin, export_onnx


pytestmark = pytest.mark.tools


def open_onnx(path):
    """The file as a function of tokens and state, as `StatefulGriffin` is one."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    outputs = [output.name for output in session.get_outputs()]

    def run(input_ids, state):
        feed = {"input_ids": input_ids, **state}
        found = session.run(None, {name: tensor.contiguous().numpy() for name, tensor in feed.items()})
        named = {name: torch.from_numpy(array) for name, array in zip(outputs, found)}
        return named["logits"], {name: named[f"new_{name}"] for name in state}

    return run


@torch.no_grad()
def test_one_token_step_generates(small_model, tmp_path):
    model, prompt = small_model("griffin", "sdpa"), random_rows(2, 5)[0]
    export_onnx(model, tmp_path / "step.onnx")
    found = generate_greedily(open_onnx(tmp_path / "step.onnx"), StatefulGriffin(model).empty_state(2), prompt, 200)
    assert torch.equal(found, model.generate(prompt, max_new_tokens=200, do_sample=False))
