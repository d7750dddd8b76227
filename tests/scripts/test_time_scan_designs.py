"""The designs of the scan that are tried: right in Triton's interpreter, so that a GPU's time goes to timing."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import torch
from time_scan_designs import Tile, persistent
from modeling_griffin.rg_lru_scan import rg_lru_scan

torch.manual_seed(0)
x, r, i = (torch.randn(2, 48, 128).bfloat16() for _ in range(3))
log_decay = -8 * torch.nn.functional.softplus(torch.randn(128) - 5)
r[:, 5] = float("-inf")  # padding: carried exactly
x[:, 5] = 0
expected = rg_lru_scan(*(t.double() for t in (x, r, i, log_decay)), backend="reference")[0]
allowed = (rg_lru_scan(x, r, i, log_decay, backend="torch")[0].double() - expected).norm()
for one_reciprocal in (False, True):
    for blocks in (1, 3):
        found = persistent(Tile(4, 4, 64), blocks, one_reciprocal, x, r, i, log_decay)
        # The interpreter cuts float32 off to bfloat16, where a GPU rounds: twice the error.
        assert (found.double() - expected).norm() <= 3 * allowed, (one_reciprocal, blocks)
        assert torch.equal(found[:, 5], found[:, 4])
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_persistent_kernel():
    """Several tiles a chain, one and several programs; padding leaves the state as it is."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
