"""Chunks of the recurrence in two numbers a channel: by the definition, and the kernels under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_griffin.parallel import chunk_summary
from modeling_griffin.rg_lru_scan import rg_lru_scan
from tests.tolerances import assert_close


def draw(length: int, channels: int = 5, dtype=torch.float32, packed: bool = False) -> dict:
    generator = torch.Generator().manual_seed(length)
    x, recurrence_gate, input_gate, d_hidden = torch.randn(4, 2, length, channels, generator=generator).to(dtype)
    reset = torch.rand(2, length, generator=generator) < 0.02 if packed else None
    recurrence_gate = recurrence_gate.clone()
    recurrence_gate[0, : length // 3] = -torch.inf  # padding
    log_decay = -torch.rand(channels, generator=generator) * 0.3
    gates = {"recurrence_gate": recurrence_gate, "log_decay": log_decay, "reset": reset}
    return {"x": x, "input_gate": input_gate, "d_hidden": d_hidden, **gates}


def check(drawn: dict) -> None:
    """Against float64 autograd of the reference: last state, its slope in the initial state, and what that is owed."""
    wide = {name: x if name == "reset" or x is None else x.double() for name, x in drawn.items()}
    initial = torch.ones_like(wide["x"][:, 0]).requires_grad_()
    arguments = [wide[name] for name in ("x", "recurrence_gate", "input_gate", "log_decay")]
    hidden, last = rg_lru_scan(*arguments, initial_state=initial, reset=wide["reset"], backend="reference")
    (slope,) = torch.autograd.grad(last.sum(), initial, retain_graph=True)
    (owed,) = torch.autograd.grad(hidden, initial, wide["d_hidden"])
    arguments = [drawn[name] for name in ("x", "recurrence_gate", "input_gate", "log_decay")]
    product, state = chunk_summary.summarize(*arguments, drawn["reset"])
    found = chunk_summary.summarize_backwards(
        drawn["d_hidden"], drawn["recurrence_gate"], drawn["log_decay"], drawn["reset"]
    )
    assert_close("scan float32 gradient", product, slope, "product")
    assert_close("scan float32 gradient", state, last - slope, "state")
    assert_close("scan float32 gradient", found, owed, "owed")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_of_the_definition(monkeypatch, length, packed):
    monkeypatch.setattr(chunk_summary, "BLOCK", 16)
    check(draw(length, packed=packed))


def test_kernels():
    """In a process of its own, since the interpreter is chosen when the kernels are read."""
    pytest.importorskip("triton")
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["kernels"] * 2


if __name__ == "__main__":
    launched = chunk_summary._reduce_segments

    def counted(*arguments):
        counts.append(1)
        return launched(*arguments)

    chunk_summary._reduce_segments, chunk_summary.ROWS = counted, 4
    for length, packed in ((1, False), (11, True)):  # the interpreter is slow
        counts = []
        check(draw(length, packed=packed))
        print("kernels" if len(counts) == 2 else "no kernels")
