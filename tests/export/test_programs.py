"""Exported programs against the model: any rows and tokens, padding, and generation over many windows."""

import subprocess
import sys

import pytest
import torch
from _export_helpers import generate_greedily, random_rows, read_in_pieces

from modeling_griffin import GriffinForSequenceClassification
from modeling_griffin.export import StatefulGriffin, export_program
from tests.tolerances import assert_close


# As on a machine that has PyTorch and nothing else: the program is loaded and generates.
GENERATE = """
import sys, torch
program, prompt, number = torch.export.load(sys.argv[1]).module(), torch.load(sys.argv[2]), int(sys.argv[3])
state, tokens = prompt["state"], list(prompt["tokens"].split(1, dim=1))
for index in range(len(tokens) + number - 1):
    logits, state = program(input_ids=tokens[index], state=state)
    if index + 1 == len(tokens):
        tokens.append(logits[:, -1:].argmax(-1))
assert not {"transformers", "modeling_griffin"} & sys.modules.keys()
torch.save(torch.cat(tokens, dim=1), sys.argv[4])
"""


@pytest.mark.parametrize("kind, padded", [("attention_first", True), ("hawk", False)])
@torch.no_grad()
def test_any_rows_and_any_tokens(kind, padded, small_model):
    model = small_model(kind, "sdpa")
    program = export_program(model, padded=padded)
    assert not {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")} - {"aten"}
    assert {(bound.lower, str(bound.upper)) for bound in program.range_constraints.values()} == {(1, "int_oo")}
    run, empty = program.module(), StatefulGriffin(model).empty_state
    for rows, pieces in ((1, (1, 1, 5, 30)), (3, (4, 1, 9, 2)), (2, (150,))):
        ids, mask = random_rows(rows, sum(pieces), 3 if padded else 0)
        expected = model(ids, attention_mask=mask).logits
        found = read_in_pieces(run, empty(rows), ids, mask, pieces, padded)
        assert_close("logits", found[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_one_token_program_generates_without_this_package(small_model, tmp_path):
    """200 tokens, 25 windows: those of `generate`, in a process that knows PyTorch alone."""
    model, prompt = small_model("griffin", "sdpa"), random_rows(2, 5)[0]
    torch.export.save(export_program(model, tokens=1), tmp_path / "step.pt2")
    torch.save({"tokens": prompt, "state": StatefulGriffin(model).empty_state(2)}, tmp_path / "prompt.pt")
    files = [str(tmp_path / name) for name in ("step.pt2", "prompt.pt")]
    command = [sys.executable, "-c", GENERATE, *files, "200", str(tmp_path / "tokens.pt")]
    subprocess.run(command, check=True, cwd=tmp_path)
    expected = model.generate(prompt, max_new_tokens=200, do_sample=False)
    assert expected.unique().numel() > 5, "a model that repeats itself tests nothing"
    assert torch.equal(torch.load(tmp_path / "tokens.pt"), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_stateful_model_itself(attention, small_model):
    model = small_model("griffin", attention)
    stateful, (ids, mask) = StatefulGriffin(model), random_rows(2, 40, 11)
    found = read_in_pieces(stateful, stateful.empty_state(2), ids, mask, (5, 9, 1, 25), padded=True)
    assert_close("logits", found[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(generate_greedily(stateful, stateful.empty_state(2), ids, 20), expected)


@torch.no_grad()
def test_last_logits_only_and_bfloat16(small_model):
    model, (ids, _) = small_model("griffin", "sdpa").bfloat16(), random_rows(1, 20)
    stateful = StatefulGriffin(model, logits_to_keep=1)
    logits, state = stateful(ids, stateful.empty_state(1))
    assert logits.shape == (1, 1, 29) and logits.dtype == torch.bfloat16
    assert {name: each.dtype for name, each in state.items() if each.dtype != torch.bfloat16} == {
        "recurrent_state.0": torch.float32,
        "recurrent_state.1": torch.float32,
        "count": torch.long,
    }
    assert_close("bfloat16 logits", logits, model(ids).logits[:, -1:])
    assert state.keys() == stateful.empty_state(1).keys()
    assert all(each.shape == state[name].shape for name, each in stateful.empty_state(1).items())


def test_what_is_refused(small_model):
    model = small_model("griffin", "sdpa")
    for field in ("rows", "tokens"):
        with pytest.raises(ValueError, match=f"{field} = 0: allowed are whole numbers from 1"):
            export_program(model, **{field: 0})
    with pytest.raises(ValueError, match="model is on meta: allowed is the CPU"):
        export_program(small_model("griffin", "sdpa").to("meta"))
    with pytest.raises(ValueError, match="training mode: allowed is model.eval"):
        export_program(model.train())
    with pytest.raises(ValueError, match="allowed are .*eager.*sdpa"):
        StatefulGriffin(small_model("griffin", "flex_attention"))
    with pytest.raises(ValueError, match="allowed is a GriffinForCausalLM"):
        StatefulGriffin(small_model("griffin", "sdpa", cls=GriffinForSequenceClassification))
