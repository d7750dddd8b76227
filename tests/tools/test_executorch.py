"""One-token programs lowered to ExecuTorch and run there: the model's tokens over 25 windows."""

import pytest
import torch
from _export_helpers import generate_greedily, random_rows, read_in_pieces

from modeling_griffin.export import StatefulGriffin, export_program
from tests.tolerances import assert_close


pytestmark = pytest.mark.tools


def open_executorch(program, path, partitioners=()):
    """The program in ExecuTorch's runtime, as a function of tokens and state."""
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime, Verification

    with open(path, "wb") as file:
        to_edge_transform_and_lower(program, partitioner=list(partitioners)).to_executorch().write_to_file(file)
    method = Runtime.get().load_program(path, verification=Verification.Minimal).load_method("forward")

    def run(input_ids, state):
        # Results lie in memory that the next call overwrites.
        logits, *after = (tensor.clone() for tensor in method.execute([input_ids.contiguous(), *state.values()]))
        return logits, dict(zip(state, after))

    return run


@torch.no_grad()
def test_one_token_program_generates(small_model, tmp_path):
    model, prompt = small_model("griffin", "sdpa"), random_rows(1, 5)[0]
    run = open_executorch(export_program(model, rows=1, tokens=1), tmp_path / "step.pte")
    found = generate_greedily(run, StatefulGriffin(model).empty_state(1), prompt, 200)
    assert torch.equal(found, model.generate(prompt, max_new_tokens=200, do_sample=False))


@torch.no_grad()
def test_by_xnnpack(small_model, tmp_path):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    model, (ids, mask) = small_model("griffin", "sdpa"), random_rows(1, 60)
    program = export_program(model, rows=1, tokens=1)
    run = open_executorch(program, tmp_path / "step.pte", [XnnpackPartitioner()])
    found = read_in_pieces(run, StatefulGriffin(model).empty_state(1), ids, mask, [1] * 60, padded=False)
    assert_close("executorch xnnpack", found, model(ids).logits)


@torch.no_grad()
def test_why_transformers_own_wrapper_does_not_take_it(small_model):
    """docs/export.md says so; when this fails, it has to be looked at again."""
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    model = small_model("griffin", "sdpa")
    with pytest.raises(AttributeError, match="'LinearAttentionLayer' object has no attribute 'keys'"):
        TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=64)
