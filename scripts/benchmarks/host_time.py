"""Where the host's time of a training step goes: operators and autograd's functions by the time of their own."""

from collections.abc import Callable

import torch


def host_time(step: Callable[[], object], rows: int = 25) -> list[dict]:
    """The `rows` names with most time of their own on the host in one step, by PyTorch's profiler, which adds some.

    Each has calls, and milliseconds without what it calls. Kernels are left out: they are the GPU's.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return [{"name": each.key, "calls": each.count, "ms": each.self_cpu_time_total / 1e3} for each in events[:rows]]


def host_table(found: list[dict]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| operator or function | calls | its own host time, ms | a call, us |", "|---|---|---|---|"]
    for each in found:
        name = each["name"].replace("|", " ")
        lines.append(f"| {name} | {each['calls']} | {each['ms']:.2f} | {1e3 * each['ms'] / each['calls']:.0f} |")
    return lines
