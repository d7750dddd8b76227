"""The scan of exported graphs against the definition, in float64."""

import pytest
import torch

from modeling_griffin import rg_lru_scan
from modeling_griffin.export.scan import BLOCK, rg_lru_scan_any_length
from tests.tolerances import assert_close


# Below, at and behind the edges of a block, and of a block of blocks.
@pytest.mark.parametrize("length", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK - 3, BLOCK**2 + 1])
@pytest.mark.parametrize("with_state", [False, True])
def test_against_the_loop(length, with_state):
    x, recurrence_gate, input_gate = torch.randn(3, 2, length, 3, dtype=torch.float64)
    recurrence_gate[0, length // 3] = -torch.inf  # padding
    x[0, length // 3] = 0.0
    log_decay = -0.1 * torch.rand(3, dtype=torch.float64)
    state = torch.randn(2, 3, dtype=torch.float64) if with_state else None
    reset = torch.rand(2, length) < 0.01
    hidden, last = rg_lru_scan_any_length(x, recurrence_gate, input_gate, log_decay, state, reset)
    expected, expected_last = rg_lru_scan(
        x, recurrence_gate, input_gate, log_decay, initial_state=state, reset=reset, backend="reference"
    )
    assert_close("scan float64", hidden, expected)
    assert_close("scan float64", last, expected_last)
