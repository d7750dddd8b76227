"""Rows shared over ranks: the logits, the loss and every gradient of one process."""

import contextlib

import pytest
import torch
from accelerate import big_modeling

from modeling_griffin import GriffinForCausalLM
from modeling_griffin.parallel.chunk_layout import read_chunk
from modeling_griffin.parallel.neighbours import Ranks
from tests.conftest import make_config
from tests.parallel import sequence_program as program
from tests.ranks import run_program
from tests.tolerances import assert_close


CASES = [f"{name}, {ranks} ranks" for ranks in (4, 2) for name in program.CASES]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_program("parallel.sequence_program", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_numbers_of_one_process(results, case):
    alone, parallel = results[case]["alone"], results[case]["parallel"]
    assert alone.keys() == parallel.keys()
    for name, expected in alone.items():
        assert_close("gradient" if "gradient" in name else name, parallel[name], expected, name)


@pytest.mark.parametrize("pair", [0, 1])
def test_deterministic_and_removable(results, pair):
    assert results[f"again {pair}"] == {"again": True, "removed": True}


@pytest.mark.parametrize("kind, window, refused", [("griffin", 8, True), ("griffin", 20, False), ("hawk", 8, False)])
def test_a_window_that_spans_padding_is_refused(kind, window, refused):
    """Counted in slots, as what is sent is, it would end too early. Padding behind the tokens spans nothing."""
    config = make_config(kind, attention_window_size=window)
    mask = program.mask("4+ 3- 6+", "2- 3+ 8-")
    like, ranks = torch.zeros(2, 7, config.hidden_size), Ranks(None, 1, 2)
    packing = dict.fromkeys(("position_ids", "cu_seq_lens_q", "seq_idx"))
    expected = pytest.raises(ValueError, match="padding between the tokens of a document longer than .* = 8: allowed")
    with expected if refused else contextlib.nullcontext():
        read_chunk(config, mask, like, ranks, 0, attention_mask=mask, **packing)


@pytest.mark.parametrize(
    "name, named",
    [
        ("_attach_context_parallel_hooks", "'linear_attention', 'sliding_attention'"),
        ("_refuse_recurrent_layers_under_sequence_parallelism", "'linear_attention'"),
    ],
    ids=["cp_size", "sp_size"],
)
def test_accelerate_refuses_the_layers(name, named):
    """Why rows are shared by functions of this package; where this fails, docs/sequence_parallel.md is out of date."""
    with pytest.raises(ValueError, match=rf"does not support attention layers of type \[{named}\]"):
        getattr(big_modeling, name)(GriffinForCausalLM(make_config("griffin")))
