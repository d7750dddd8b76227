"""Rows shared over ranks: the logits, the loss and every gradient of one process."""

import pytest
from accelerate import big_modeling

from modeling_griffin import GriffinForCausalLM
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
