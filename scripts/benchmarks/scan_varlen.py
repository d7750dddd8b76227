"""Sequences end to end in one row, each with a state, against the plain scan: `benchmark_scan.py --part varlen`.

Run it before a figure is believed: `tests/test_rg_lru_scan_varlen.py` and `tests/test_causal_conv1d_varlen.py`, -m gpu.
"""

import functools

import torch
from benchmark_scan import CACHE_BYTES
from benchmark_scan import _inputs as make_inputs
from benchmark_scan import _time as time_graph

from benchmarks.birth_certificate import birth_lines
from modeling_griffin.causal_conv1d import CausalConv1d
from modeling_griffin.kernels.convolution_varlen import causal_conv1d_varlen
from modeling_griffin.rg_lru_scan import rg_lru_scan


TOKENS, CHANNELS, SEQUENCES = (4096, 32768), 2560, (1, 16, 256)


def benchmark_varlen() -> list[dict]:
    """The scan over N sequences end to end, each with a state, against the plain scan with one, both ways; and the
    operator of a serving step, convolution and scan. Random lengths, the same for every seed; then one token each."""
    rows = []
    for tokens in TOKENS:
        plain = _times(tokens, None)
        rows.append({"tokens": tokens, "sequences": None, **plain})
        for number in SEQUENCES:
            cuts = torch.randint(0, tokens + 1, (number - 1,), generator=torch.Generator().manual_seed(number)).sort()
            ends = torch.cat([torch.zeros(1), cuts.values, torch.tensor([float(tokens)])]).to("cuda", torch.int32)
            times = _times(tokens, ends)
            ratios = {f"{k}_ratio": times[k]["median"] / plain[k]["median"] for k in ("forward", "backward")}
            rows.append({"tokens": tokens, "sequences": number, **times, **ratios})
            print(rows[-1], flush=True)
    for number in (1, 64, 256):
        ends = torch.arange(number + 1, dtype=torch.int32, device="cuda")
        rows.append({"tokens": number, "sequences": number, **_times(number, ends, backward=False)})
    return rows


def _times(tokens: int, cu_seqlens: torch.Tensor | None, backward: bool = True) -> dict:
    """Seconds of the scan both ways and of the convolution; the last with its states, as in serving."""
    number = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    copies = max(1, min(8, CACHE_BYTES // (8 * tokens * CHANNELS)))
    starts = None if cu_seqlens is None else torch.arange(number, device="cuda") % 2 == 0
    conv = CausalConv1d(CHANNELS, 4).to("cuda", torch.bfloat16)

    def scan(x, recurrence_gate, input_gate, log_decay, state):
        sequences = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens, "starts": starts}
        gates = (recurrence_gate, input_gate)
        return rg_lru_scan(x, *gates, log_decay, initial_state=state, backend="triton", **sequences)

    @torch.no_grad()
    def convolve(x, past):
        if cu_seqlens is None:
            return conv(x, past)
        return causal_conv1d_varlen(x, past, conv.weight, conv.bias, cu_seqlens, starts)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        sets = []
        for seed in range(copies):
            inputs, d_hidden = make_inputs((1, tokens, CHANNELS), seed)
            sets.append(([*inputs, torch.randn(number, CHANNELS, device="cuda").requires_grad_()], d_hidden))
        repeats = 4 if copies < 4 else 1
        times = {"forward": time_graph([functools.partial(scan, *inputs) for inputs, _ in sets] * repeats, side)}
        if backward:
            passes = []
            for inputs, d_hidden in sets:
                outputs = scan(*inputs)
                gradients = (d_hidden, torch.ones_like(outputs[1]))
                passes.append(functools.partial(torch.autograd.grad, outputs, inputs, gradients, retain_graph=True))
            times["backward"] = time_graph(passes * repeats, side)
        past = torch.randn(number, CHANNELS, 4, device="cuda", dtype=torch.bfloat16)
        times["convolution"] = time_graph(
            [functools.partial(convolve, inputs[0], past) for inputs, _ in sets] * repeats, side
        )
    return times


def varlen_text(report: dict) -> str:
    lines = [
        f"# Sequences end to end on a GPU, bfloat16, {CHANNELS} channels",
        "",
        *birth_lines(report["birth"]),
        "",
    ]
    lines += [
        "Medians of replays of a CUDA graph, us; in brackets as a multiple of the plain scan of as many tokens.",
        "",
    ]
    lines += ["| tokens | sequences | forward | backward | convolution |", "|---|---|---|---|---|"]
    for row in report["rows"]:
        cells = [str(row["tokens"]), "plain" if row["sequences"] is None else str(row["sequences"])]
        for key in ("forward", "backward", "convolution"):
            ratio = f" ({row[f'{key}_ratio']:.2f})" if f"{key}_ratio" in row else ""
            cells.append(f"{row[key]['median'] * 1e6:.1f}{ratio}" if key in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
