"""float8 products with FSDP2, activation checkpointing and compiled blocks: the numbers of one process."""

import pytest

from tests.parallel import float8_program as program
from tests.ranks import run_program
from tests.tolerances import assert_close, relative_error


pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_program("parallel.float8_program", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", program.CASES)
def test_gradients_and_steps_of_one_process(results, case):
    run = results[case]
    assert "Float8Linear" in run["kinds"]
    assert run["alone"].keys() == run["parallel"].keys()
    for name, expected in run["alone"].items():
        kind = "gradient" if name.startswith("gradient of") else "trained parameter"
        assert_close(kind, run["parallel"][name], expected, name)
    rounded = "gradient of model.layers.0.mlp_block.down_proj.weight"
    assert relative_error(run["alone"][rounded], run["plain"][rounded]) > 1e-3
