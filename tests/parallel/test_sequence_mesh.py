"""Rows shared over ranks beside data parallelism, under torch.compile, read into states; what is refused."""

import pytest

from tests.ranks import run_program
from tests.tolerances import assert_close


EXACT = ["DDP", "FSDP2", "FSDP2, checkpointing", "compiled", "hidden states"]
EXACT += ["DDP, MLPs in pieces", "FSDP2, checkpointing, MLPs in pieces", "code of a repository", "layer twice"]
STATES = ["state", "one pass", "a short prompt", "behind a state"]
REFUSED = {
    "classifier": "model is a GriffinForSequenceClassification: allowed are GriffinForCausalLM and GriffinModel",
    "mesh": "the mesh has the dimensions ('data', 'sequence'): allowed is one",
    "loss": "model.loss_function was set: allowed is the model's own",
    "cache": "a cache with rows shared over ranks: allowed is none",
    "time": "rows have shape (2, 0): allowed is (batch, time) with time >= 1",
    "both": "input_ids and inputs_embeds: allowed is exactly one of them",
    "chunk_size": "chunk_size = 0: allowed are whole numbers from 1",
    "logits_to_keep": "labels has (2, 7) tokens of a rank: allowed is (2, 1), those of the model's output",
    "labels": "labels has shape (2, 25): allowed is (2, 26), that of the rows",
    "labels of a row": "labels has shape (1, 26): allowed is (2, 26)",
    "shift_labels": "labels has shape (2, 25): allowed is (2, 26)",
    "labels in pieces": "labels has (2, 5) tokens of a rank: allowed is (2, 7)",
    "labels of losses": "labels has (2, 5) tokens of a rank: allowed is (2, 7)",
    "no head": "the model has no language-model head: allowed is GriffinForCausalLM",
    "prompt": "input_ids has ids from 30 to 57: allowed are 0 to vocab_size - 1 = 28",
    "prompt of other rows": "input_ids has 1 rows: allowed are 2, the state's",
    "state": "state is a str: allowed is a GenerationState",
    "scan": "model.layers[1]: rg_lru.scan is mine: allowed is None, the model's own scan",
    "older scan": "model.layers[1]: rg_lru.scan is not there, as in code of an older release: allowed is None",
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
