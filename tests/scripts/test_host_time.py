"""The table of host time: what runs in a step is in it, with its calls, and no time counts twice."""

import _script_helpers  # noqa: F401  (puts scripts/ on the path)
import torch
from benchmarks.host_time import host_table, host_time


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, d_y):
        return d_y * 2


def test_a_step():
    weight = torch.randn(200, 200, requires_grad=True)

    def step():
        x = weight
        for _ in range(3):
            x = Twice.apply(x) @ weight
        x.sum().backward()

    found = host_time(step, rows=50)
    calls = {each["name"]: each["calls"] for each in found}
    assert calls["Twice"] == calls["TwiceBackward"] == 3 and calls["aten::mm"] == 3 + 2 * 3
    times = [each["ms"] for each in found]
    assert times == sorted(times, reverse=True) and times[-1] >= 0
    assert len(host_time(step, rows=2)) == 2
    lines = host_table(found)
    assert any(line.startswith("| Twice | 3 | ") for line in lines) and len(lines) == 2 + len(found)
