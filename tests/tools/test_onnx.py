"""ONNX files in ONNX Runtime: any rows and tokens with padding, and 200 tokens of a one-token step."""

import pytest
import torch
from _export_helpers import generate_greedily, random_rows, read_in_pieces

from modeling_griffin.export import StatefulGriffin, export_onnx
from tests.tolerances import assert_close


pytestmark = pytest.mark.tools


def open_onnx(path):
    """The file as a function of tokens and state, as `StatefulGriffin` is one."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    outputs = [output.name for output in session.get_outputs()]

    def run(input_ids, state, **extra):
        feed = {"input_ids": input_ids, **state, **extra}
        found = session.run(None, {name: tensor.contiguous().numpy() for name, tensor in feed.items()})
        named = {name: torch.from_numpy(array) for name, array in zip(outputs, found)}
        return named["logits"], {name: named[f"new_{name}"] for name in state}

    return run


@torch.no_grad()
def test_any_rows_and_any_tokens(small_model, tmp_path):
    model = small_model("attention_first", "sdpa")
    export_onnx(model, tmp_path / "model.onnx", padded=True)
    run, empty = open_onnx(tmp_path / "model.onnx"), StatefulGriffin(model).empty_state
    for rows, pieces in ((1, (1, 1, 5, 30)), (3, (4, 1, 9, 2)), (2, (150,))):
        ids, mask = random_rows(rows, sum(pieces), 3)
        expected = model(ids, attention_mask=mask).logits
        found = read_in_pieces(run, empty(rows), ids, mask, pieces, padded=True)
        assert_close("logits", found[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_one_token_step_generates(small_model, tmp_path):
    model, prompt = small_model("griffin", "sdpa"), random_rows(2, 5)[0]
    export_onnx(model, tmp_path / "step.onnx", tokens=1)
    found = generate_greedily(open_onnx(tmp_path / "step.onnx"), StatefulGriffin(model).empty_state(2), prompt, 200)
    assert torch.equal(found, model.generate(prompt, max_new_tokens=200, do_sample=False))
