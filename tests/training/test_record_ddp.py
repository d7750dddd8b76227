"""Recorded training under DDP: DDP's own gradients, bit for bit, whatever its options; FSDP2 is refused by name."""

import pytest
import torch

from tests.ranks import run_program
from tests.tolerances import assert_close
from tests.training.recorded_ddp_program import CASES


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_program("training.recorded_ddp_program", tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("case", CASES)
def test_gradients(results, case):
    plain, recorded = results[case]["plain"], results[case]["recorded"]
    assert plain.keys() == recorded.keys() and len(plain) > 90
    for name, gradient in plain.items():
        assert gradient.any(), name
        if case == "rows of other lengths":  # padded to the recorded length: other sums
            assert_close("gradient", recorded[name], gradient, name)
        else:
            assert torch.equal(recorded[name], gradient), name


def test_fsdp2(results):
    """Refused where the model is sharded; sharded later, its steps run as before, said once."""
    found = results["FSDP2"]
    assert "sharded by FSDP2" in found["refused"] and "one GPU and DDP" in found["refused"]
    assert len(found["said"]) == 1 and "sharded by FSDP2" in found["said"][0]
    for name, gradient in found["plain"].items():
        assert torch.equal(found["recorded"][name], gradient), name
