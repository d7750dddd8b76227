"""Times the RG-LRU recurrence, forward and backward.

    python scripts/benchmark_scan.py --device cuda    the scan against a copy of the same bytes and against other scans
    python scripts/benchmark_scan.py --device cuda --part varlen    sequences end to end against one row
    python scripts/benchmark_scan.py --device cpu     the RG-LRU layer against RecurrentGemma's in Transformers

On a GPU it first checks values and gradients against the float64 reference and times nothing that fails. All run the
same work, from pre-activations and Λ to hidden and back to every gradient, and are timed as replays of a CUDA graph,
inputs changing where they would fit the cache. flash-linear-attention and accelerated-scan are timed where installed.
Writes OUTPUT.json and OUTPUT.md, on a GPU OUTPUT.png: time against T.
"""

import functools
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from benchmarks.birth_certificate import birth_certificate, birth_lines, quantiles, short_device_name
from command_line import Parser
from torch import nn
from whole_files import in_one_step, with_ending, write_whole

from modeling_griffin.rg_lru import RGLRU
from modeling_griffin.rg_lru_scan import rg_lru_scan


SHAPES = [(8, 4096, 2560), (4, 2048, 4096), (1, 32768, 2560), (1, 131072, 4096), (1, 2048, 2560)]
LENGTHS = [2**k for k in range(9, 18)]
FLOOR = {"forward": 8, "backward": 16}  # bytes an element in bfloat16: 4 and 8 tensors, each read or written once
CACHE_BYTES = 2**28  # several times any GPU's cache
OWN = {"this project": "triton", "torch backend": "torch"}  # and their backends
CURVES = ["this project", "flash-linear-attention chunk_hgrn"]
MAX_ERROR = 2e-2  # of a peer, as a share of the norm, in bfloat16


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_device()
    parser.add_argument("--part", choices=["scan", "varlen"], default="scan", help="varlen: on a GPU only")
    parser.add_argument(
        "--output", type=Path, default=None, help="path without suffix; default results/scan/PART_DEVICE"
    )
    parser.add_argument("--commit", default=None, help="the commit that runs; default: as git says")
    arguments = parser.parse_args(argv)
    name = short_device_name(arguments.device)
    if arguments.part == "varlen" and arguments.device != "cuda":
        parser.error("--part varlen: allowed on --device cuda only")
    output = arguments.output or Path("results") / "scan" / f"{arguments.part}_{name}"
    parser.make_folder_of(output)
    birth = birth_certificate(arguments.device, arguments.commit, ["flash-linear-attention", "accelerated-scan"])
    if arguments.part == "varlen":
        from benchmarks.scan_varlen import benchmark_varlen, varlen_text  # which imports this file

        report = {"birth": birth, "rows": benchmark_varlen()}
        write_whole(with_ending(output, ".json"), json.dumps(report, indent=1))
        write_whole(with_ending(output, ".md"), varlen_text(report))
        print(varlen_text(report))
        return
    for report in benchmark_cuda() if arguments.device == "cuda" else benchmark_cpu():
        report = {"birth": birth, **report}
        text = (_cuda_text if arguments.device == "cuda" else _cpu_text)(report)
        write_whole(with_ending(output, ".json"), json.dumps(report, indent=1))
        write_whole(with_ending(output, ".md"), text)
        if arguments.device == "cuda":
            _plot(report, with_ending(output, ".png"))
    print(text)


# On a GPU


def benchmark_cuda() -> Iterator[dict]:
    """A report after each scan, so that a run that is cut short leaves what it measured."""
    report: dict = {"copy_ceiling_bytes_per_s": _copy_ceiling(), "decode": _decode(), "shapes": [], "lengths": []}
    ceiling = report["copy_ceiling_bytes_per_s"]
    for name, scan in _scans():  # peers may compile for minutes: one is measured before the next is looked at
        errors = _errors(scan)
        print(f"{name}: errors {', '.join(f'{e:.1e}' for e in errors)}", flush=True)
        if not max(errors) <= MAX_ERROR:
            if name in OWN:
                raise SystemExit(f"{name} is wrong: nothing is timed")
            continue
        for shape in SHAPES:
            report["shapes"] += _measure(name, scan, shape, ceiling)
        if name in CURVES:
            for length in LENGTHS:
                report["lengths"] += _measure(name, scan, (1, length, 2560), ceiling)
        yield report


def _scans() -> Iterator[tuple[str, Callable]]:
    for name, backend in OWN.items():
        yield name, functools.partial(_own_scan, backend=backend)
    try:
        from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn
    except Exception as error:  # a peer may fail to import in many ways
        print("flash-linear-attention is left out:", error)
    else:
        for function in (chunk_hgrn, fused_recurrent_hgrn):
            yield f"flash-linear-attention {function.__name__}", functools.partial(_fla_scan, function=function)
    for module in ("warp", "scalar"):
        try:
            function = importlib.import_module(f"accelerated_scan.{module}").scan
        except Exception as error:
            print(f"accelerated-scan {module} is left out:", error)
        else:
            yield f"accelerated-scan {module}", functools.partial(_accelerated_scan, function=function)


def _own_scan(x, recurrence_gate, input_gate, log_decay, backend):
    return rg_lru_scan(x, recurrence_gate, input_gate, log_decay, backend=backend)[0]


@torch.compile
def _gates(x, recurrence_gate, input_gate, log_decay):
    """log a and the scaled input, float32: what peers leave to others."""
    log_a = log_decay * torch.sigmoid(recurrence_gate.float())
    return log_a, torch.sqrt(-torch.expm1(2 * log_a)) * torch.sigmoid(input_gate.float()) * x.float()


@torch.compile
def _transposed_gates(x, recurrence_gate, input_gate, log_decay):
    log_a = log_decay * torch.sigmoid(recurrence_gate.float())
    scaled = torch.sqrt(-torch.expm1(2 * log_a)) * torch.sigmoid(input_gate.float()) * x.float()
    return log_a.exp().transpose(1, 2).contiguous(), scaled.transpose(1, 2).contiguous()


def _fla_scan(x, recurrence_gate, input_gate, log_decay, function):
    log_a, scaled = _gates(x, recurrence_gate, input_gate, log_decay)
    return function(scaled, log_a)[0].to(x.dtype)


def _accelerated_scan(x, recurrence_gate, input_gate, log_decay, function):
    a, scaled = _transposed_gates(x, recurrence_gate, input_gate, log_decay)
    return function(a, scaled).transpose(1, 2).to(x.dtype)


def _inputs(shape, seed=0, dtype=torch.bfloat16, device="cuda"):
    """x, both gates, log_decay with gradients, and the gradient of hidden."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4)]
    log_decay = -8 * nn.functional.softplus(torch.randn(shape[2], generator=generator, device=device) - 5)
    return [t.requires_grad_() for t in (*tensors[:3], log_decay)], tensors[3]


def _errors(scan) -> list[float]:
    """Of hidden and each gradient, against the reference in float64; inf where it fails to run."""
    inputs, d_hidden = _inputs((2, 512, 256), seed=1)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = functools.partial(_own_scan, backend="reference")(*exact)
    expected = [expected, *torch.autograd.grad(expected, exact, d_hidden.double())]
    try:
        actual = scan(*inputs)
        actual = [actual, *torch.autograd.grad(actual, inputs, d_hidden)]
    except Exception as error:
        print(error)
        return [float("inf")]
    errors = [((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, expected)]
    return [e if e == e else float("inf") for e in errors]


def _copy_ceiling() -> float:
    """Bytes read and written a second by a large copy; not in a graph, where such a copy is slower."""
    source = torch.randint(2**31 - 1, (2**28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / _replay(lambda: target.copy_(source), torch.cuda.current_stream())["median"]


def _measure(name, scan, shape, ceiling) -> list[dict]:
    elements = shape[0] * shape[1] * shape[2]
    copies = max(1, min(8, CACHE_BYTES // (8 * elements)))
    repeats = 4 if copies < 4 else 1  # several calls a graph, so that its own launch does not show
    rows = []
    torch.cuda.empty_cache()
    try:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            sets = [_inputs(shape, seed) for seed in range(copies)]
            forward = _time([functools.partial(scan, *inputs) for inputs, _ in sets] * repeats, side)
            outputs = [scan(*inputs) for inputs, _ in sets]
            passes = [
                functools.partial(torch.autograd.grad, output, inputs, d_hidden, retain_graph=True)
                for output, (inputs, d_hidden) in zip(outputs, sets)
            ]
            backward = _time(passes * repeats, side)
        for direction, seconds in (("forward", forward), ("backward", backward)):
            share = FLOOR[direction] * elements / ceiling / seconds["median"]
            rows.append({"scan": name, "shape": shape, "direction": direction, "of_ceiling": share, **seconds})
            print(f"{shape} {direction:8} {name:40} {seconds['median'] * 1e6:9.1f} us {share:6.1%}", flush=True)
    except Exception as error:
        print(f"{shape} {name}: {str(error).splitlines()[0] if str(error) else repr(error)}", flush=True)
    return rows


def _time(functions, stream=None) -> dict[str, float]:
    """Seconds a call: quantiles over replays of a CUDA graph of all `functions`."""
    stream = stream or torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for function in functions * 2:
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for function in functions:
            function()
    return {key: seconds / len(functions) for key, seconds in _replay(graph.replay, stream).items()}


def _replay(function, stream, repeats: int = 25, longest: float = 2.0) -> dict[str, float]:
    """Quantiles of `repeats` replays, of fewer where they would take more than `longest` seconds; 7 at least."""
    times, begin = [], time.perf_counter()
    flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    for i in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            flush.zero_()  # empties the cache, and keeps the GPU busy until all below is launched
            start.record()
            function()
            end.record()
        end.synchronize()
        times += [start.elapsed_time(end) / 1e3] if i >= 3 else []
        if len(times) >= 7 and time.perf_counter() - begin > longest:
            break
    return quantiles(times)


def _decode() -> dict:
    """One decode step of (64, 1, 2560), against a kernel that does nothing."""
    import triton

    @triton.jit
    def nothing(p_x):
        pass

    (x, recurrence_gate, input_gate, log_decay), _ = _inputs((64, 1, 2560))
    state = torch.randn(64, 2560, device="cuda")

    @torch.no_grad()
    def step():
        rg_lru_scan(x, recurrence_gate, input_gate, log_decay, initial_state=state, backend="triton")

    launches = {"empty kernel": lambda: nothing[(640,)](x), "decode step": step}
    return {name: _time([function] * 50) for name, function in launches.items()}


# On a CPU


def benchmark_cpu(channels: int = 256, blocks: int = 8, length: int = 4096) -> Iterator[dict]:
    """One report: seconds of a step at lengths around `length`, of both layers, and their ratio at `length`."""
    torch.manual_seed(0)
    own = RGLRU(channels, blocks, c=8.0)
    for parameter in own.parameters():
        nn.init.normal_(parameter, std=0.1)
    nn.init.uniform_(own.decay.lambda_bias, -7.0, -4.0)
    lengths = [length // 8, length // 4, length // 2, length, 2 * length]
    curve = {t: statistics.median([_step_seconds(own, t, channels) for _ in range(12)][3:]) for t in lengths}
    peer = _recurrent_gemma_layer(channels, blocks)
    peer_lengths = (length // 4, length)
    peer_seconds = {t: statistics.median(_step_seconds(peer, t, channels) for _ in range(3)) for t in peer_lengths}
    yield {"own": curve, "recurrent_gemma": peer_seconds, "ratio": peer_seconds[length] / curve[length]}


def _recurrent_gemma_layer(channels: int, blocks: int):
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    config = RecurrentGemmaConfig(hidden_size=channels, lru_width=channels, num_attention_heads=blocks)
    layer = RecurrentGemmaRglru(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)

    def step(x):
        layer.recurrent_states = None  # the layer keeps its last state, and the graph behind it
        return layer(x, torch.arange(x.shape[1])[None])

    return step


def _step_seconds(layer, length: int, channels: int) -> float:
    """Forward and backward of one layer, batch 1."""
    x = torch.randn(1, length, channels, requires_grad=True)
    start = time.perf_counter()
    output = layer(x)
    (output[0] if isinstance(output, tuple) else output).sum().backward()
    return time.perf_counter() - start


# Reports


def _cuda_text(report: dict) -> str:
    ceiling = report["copy_ceiling_bytes_per_s"] / 1e12
    lines = ["# The RG-LRU scan on a GPU, bfloat16", "", *birth_lines(report["birth"]), ""]
    lines += [
        f"Copy ceiling, measured in the same run: {ceiling:.2f} TB/s, bytes read and written.",
        "Share of ceiling = the time to copy the fewest bytes (forward 8 an element, backward 16) / the time measured.",
        "Times are medians, with the 10% and 90% quantiles, of replays of a CUDA graph.",
        "",
        "| shape (B, T, C) | pass | scan | us | 10% | 90% | % of ceiling |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(
        report["shapes"], key=lambda row: (SHAPES.index(tuple(row["shape"])), row["direction"] == "backward")
    ):
        times = " | ".join(f"{row[key] * 1e6:.1f}" for key in ("median", "10%", "90%"))
        lines.append(
            f"| {tuple(row['shape'])} | {row['direction']} | {row['scan']} | {times} | {row['of_ceiling']:.1%} |"
        )
    decode = {name: seconds["median"] * 1e6 for name, seconds in report["decode"].items()}
    lines += ["", "One decode step of (64, 1, 2560): " + ", ".join(f"{n} {t:.2f} us" for n, t in decode.items()) + "."]
    return "\n".join(lines) + "\n"


def _cpu_text(report: dict) -> str:
    lines = ["# One RG-LRU layer on a CPU, float32, forward and backward, batch 1, 256 channels", ""]
    lines += [
        *birth_lines(report["birth"]),
        "",
        "| T | this project, ms | Transformers' RecurrentGemma, ms |",
        "|---|---|---|",
    ]
    for length, seconds in report["own"].items():
        peer = report["recurrent_gemma"].get(length)
        lines.append(f"| {length} | {seconds * 1e3:.1f} | {'' if peer is None else f'{peer * 1e3:.0f}'} |")
    shortest, longest = min(report["own"]), max(report["own"])
    growth = report["own"][longest] / report["own"][shortest]
    lines += [
        "",
        f"At T = {max(report['recurrent_gemma'])}: {report['ratio']:.0f} times faster. "
        f"From T = {shortest} to {longest}: {growth:.1f} times the time.",
    ]
    return "\n".join(lines) + "\n"


def _plot(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    series = sorted({(row["scan"], row["direction"]) for row in report["lengths"]})
    for scan, direction in series:
        rows = [r for r in report["lengths"] if (r["scan"], r["direction"]) == (scan, direction)]
        style = "-" if direction == "forward" else "--"
        axes.loglog(
            [r["shape"][1] for r in rows], [r["median"] * 1e6 for r in rows], style, label=f"{scan}, {direction}"
        )
    for direction, style in (("forward", "-"), ("backward", "--")):
        floor = [FLOOR[direction] * length * 2560 / report["copy_ceiling_bytes_per_s"] * 1e6 for length in LENGTHS]
        axes.loglog(LENGTHS, floor, style, color="gray", linewidth=0.8, label=f"copy of the same bytes, {direction}")
    axes.set(xlabel="T (tokens)", ylabel="time (us)")
    axes.set_title(f"RG-LRU scan, B = 1, C = 2560, bfloat16, {report['birth']['hardware']}", fontsize=10)
    axes.legend(fontsize=7)
    figure.tight_layout()
    with in_one_step(path) as half:
        figure.savefig(half, dpi=150)


if __name__ == "__main__":
    main()
