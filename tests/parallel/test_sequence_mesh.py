"""Rows shared over ranks beside data parallelism, under torch.compile, read into states; what is refused."""

import pytest

from tests.ranks import run_program
from tests.tolerances import assert_close


EXACT = ["DDP", "FSDP2", "FSDP2, checkpointing", "compiled", "hidden states"]
EXACT += ["DDP, MLPs in pieces", "FSDP2, checkpointing, MLPs in pieces"]
STATES = ["state", "one pass", "a short prompt", "behind a state"]
REFUSED = {
    "classifier": "model is a GriffinForSequenceClassification: allowed are GriffinForCausalLM and GriffinModel",
    "mesh": "the mesh has the dimensions ('data', 'sequence'): allowed is one",
    "loss": "model.loss_function was set: allowed is the model's own",
    "cache": "a cache with rows shared over ranks: allowed is none",
    "time": "rows have shape (2, 0): allowed is (batch, time) with time >= 1",
    "both": "input_ids and inputs_embeds: allowed is exactly one of them",
    "chunk_size": "chunk_size = 0: allowed are whole numbers from 1",
    "logits_to_keep": "labels has 7 tokens a rank, logits 1: allowed are as many",
    "twice": "the model is shared over ranks already: allowed is once, or after remove()",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_program("parallel.sequence_mesh_program", tmp_path_factory.mktemp("ranks"))


def assert_same(run, logits: str = "logits"):
    assert run["alone"].keys() == run["parallel"].keys()
    for name, expected in run["alone"].items():
        kind = "gradient" if "gradient" in name else "loss" if name == "loss" else logits
        assert_close(kind, run["parallel"][name], expected, name)


@pytest.mark.parametrize("case", EXACT)
def test_numbers_of_one_process(results, case):
    assert_same(results[case])


def test_mixed_precision(results):
    run = results["FSDP2, mixed"]
    assert_close("bfloat16 logits", run["parallel"]["loss"], run["alone"]["loss"])
    for name, expected in run["alone"].items():
        assert (run["parallel"][name] - expected).abs().max() <= 0.2 * expected.abs().max(), name


def test_one_rank_is_the_plain_model(results):
    for name, expected in results["one rank"]["alone"].items():
        assert_close("exact", results["one rank"]["parallel"][name], expected, name)


@pytest.mark.parametrize("kind", ["griffin", "hawk"])
@pytest.mark.parametrize("state", STATES)
def test_prompt_read_by_all_ranks(results, kind, state):
    """The state of one process, and the tokens that it generates from it."""
    run = results["prefill"][f"{kind}, {state}"]
    assert_same(run)
    assert run["generated"]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(results, name):
    assert REFUSED[name] in results["refusals"][name]
