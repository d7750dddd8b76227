"""ONNX files in ONNX Runtime: a step for any rows generates 200 tokens, 25 windows, as the model does; files for any
rows and any tokens give its logits."""

import pytest
import torch
from _export_helpers import generate_greedily, random_rows, read_in_pieces

from modeling_griffin.export import StatefulGriffin, export_onnx, programs
from tests.tolerances import assert_close


pytestmark = pytest.mark.tools


def open_onnx(path):
    """The file as a function of tokens and state, as `StatefulGriffin` is one."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    outputs = [output.name for output in session.get_outputs()]

    def run(input_ids, state, attention_mask=None):
        padding = {} if attention_mask is None else {"attention_mask": attention_mask}
        feed = {"input_ids": input_ids, **state, **padding}
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


@pytest.mark.parametrize("kind, padded", [("griffin", True), ("hawk", False)])
@torch.no_grad()
def test_any_rows_and_any_tokens(kind, padded, small_model, tmp_path):
    """One file: prompts of any length whole or by pieces, beyond a block of its scan and many windows."""
    model = small_model(kind, "sdpa")
    export_onnx(model, tmp_path / "any.onnx", tokens=None, padded=padded)
    run, empty = open_onnx(tmp_path / "any.onnx"), StatefulGriffin(model).empty_state
    for rows, pieces in ((1, (1, 1, 5, 30)), (3, (4, 1, 9, 2)), (2, (150,)), (2, (129, 128, 127))):
        ids, mask = random_rows(rows, sum(pieces), 3 if padded else 0)
        expected = model(ids, attention_mask=mask).logits
        found = read_in_pieces(run, empty(rows), ids, mask, pieces, padded)
        assert_close("logits", found[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_last_logits_of_a_prompt_alone(small_model, tmp_path, monkeypatch):
    """With the weights in a file of their own, as a large model has them."""
    monkeypatch.setattr(programs, "_is_large", lambda model: True)
    model, ids = small_model("griffin", "sdpa"), random_rows(1, 20)[0]
    export_onnx(model, tmp_path / "prompt.onnx", rows=1, tokens=20, logits_to_keep=1)
    assert (tmp_path / "prompt.onnx.data").exists()
    logits, _ = open_onnx(tmp_path / "prompt.onnx")(ids, StatefulGriffin(model).empty_state(1))
    assert_close("logits", logits, model(ids).logits[:, -1:])


class Logits(torch.nn.Module):
    """The model without a state, as people trace it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def test_the_model_without_a_state(small_model, tmp_path):
    """By PyTorch's own functions alone."""
    import onnxruntime

    model, dims = Logits(small_model("griffin", "sdpa")), {0: torch.export.Dim("rows"), 1: torch.export.Dim("time")}
    program = torch.export.export(model, (random_rows(2, 12)[0],), dynamic_shapes=(dims,))
    torch.onnx.export(program, input_names=["ids"], output_names=["logits"]).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for rows, length in ((1, 1), (1, 40), (3, 130)):
        ids = random_rows(rows, length)[0]
        assert_close("logits", torch.from_numpy(session.run(None, {"ids": ids.numpy()})[0]), model(ids))
