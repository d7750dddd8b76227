"""Sums over rows in one launch. On a GPU, or without one by `TRITON_INTERPRET=1 pytest tests/kernels/test_sums.py`."""

import os

import pytest
import torch

from modeling_griffin.kernels.sums import sum_of_rows


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytest.importorskip("triton")
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.mark.parametrize("number", [0, 1, 256, 300])
@pytest.mark.parametrize("channels", [1, 16, 50])
def test_the_sum_is_rounded_once(number, channels):
    rows = torch.randn(number, channels, device=DEVICE)
    right = rows.double().sum(0)
    torch.testing.assert_close(sum_of_rows(rows, torch.float32).double(), right, rtol=1e-5, atol=1e-5)
    found = sum_of_rows(rows, torch.bfloat16)
    unit = 2**-7 if INTERPRETED else 2**-8  # the interpreter cuts
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), right, rtol=unit, atol=1e-5)
    assert torch.equal(found, sum_of_rows(rows, torch.bfloat16))
