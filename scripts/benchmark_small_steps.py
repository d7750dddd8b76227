"""Times small training steps on a GPU: plain, recorded as CUDA graphs, and a Llama of the same size beside them.

    python scripts/benchmark_small_steps.py                 2.1B parameters, bfloat16: 1 x 2048, 4 x 512, 1 x 512, LoRA
    python scripts/benchmark_small_steps.py --size 400m

A step is forward and backward over random tokens, no optimizer. Beside the wall time stands the time that the GPU is
busy, from PyTorch's profiler: what the wall time has beyond it is the host's. Nothing is timed unless the recorded step
gives the plain step's loss and gradients. Writes OUTPUT.json and OUTPUT.md after every row.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import spoken
import torch
from benchmark_training import OWN, PEAK_FLOPS, SIZES, _cell, _make, _with_lora
from benchmarks.birth_certificate import birth_certificate, birth_lines, quantiles, short_device_name
from benchmarks.host_time import host_table, host_time
from command_line import Parser
from whole_files import with_ending, write_whole

from modeling_griffin import record_training, stop_recording


LLAMA = "Llama with MQA, Transformers"
CELLS = [(1, 2048), (4, 512), (1, 512), (8, 2048)]
LORA_CELLS = [(1, 2048), (4, 512)]
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}  # of loss and gradient, plain against recorded


def _words(cells: list[tuple[int, int]]) -> str:
    return " ".join(f"{rows}x{length}" for rows, length in cells)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="2b", help="of the models' table in benchmark_training.py")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16", help="of weights and products")
    parser.add_argument(
        "--cells",
        type=_cell,
        nargs="*",
        default=CELLS,
        metavar="BxT",
        help=f"batch x tokens (default: {_words(CELLS)})",
    )
    lora = f"the same with LoRA (default: {_words(LORA_CELLS)})"
    parser.add_argument("--lora", type=_cell, nargs="*", default=LORA_CELLS, metavar="BxT", help=lora)
    parser.add_argument(
        "--models", nargs="+", choices=[OWN, LLAMA], default=[OWN, LLAMA], metavar="NAME", help="which models"
    )
    parser.add_argument("--repeats", type=int, default=8, help="timed steps of each row")
    parser.add_argument("--output", type=Path, help="path without suffix; default results/training/small_steps_DEVICE")
    parser.add_argument("--commit", default=None, help="the commit that runs; default: as git says")
    arguments = parser.parse_args(argv)
    parser.check_least(arguments, repeats=1)
    if not torch.cuda.is_available():
        spoken.stop(__file__, ValueError("a GPU is needed: CUDA graphs are what is timed"))
    name = short_device_name("cuda")
    output = arguments.output or Path("results") / "training" / f"small_steps_{name}"
    parser.make_folder_of(output)
    report = {"birth": birth_certificate("cuda", arguments.commit, []), "size": arguments.size, "rows": []}
    for model_name in arguments.models:
        for adapted, cells in ((False, arguments.cells), (True, arguments.lora)):
            for row in measure(model_name, adapted, cells, arguments):
                row["mfu"] = 6 * row["parameters"] * row["tokens_per_second"] / PEAK_FLOPS.get(name, float("nan"))
                report["rows"].append(row)
                print(line(row), flush=True)
                write_whole(with_ending(output, ".json"), json.dumps(report, indent=1))
                write_whole(with_ending(output, ".md"), text(report))


def measure(name: str, adapted: bool, cells: list[tuple[int, int]], arguments: argparse.Namespace) -> Iterator[dict]:
    """A row for each cell and way of one model."""
    if not cells:
        return
    model = _make(name, arguments.size, "cuda", getattr(torch, arguments.dtype))
    model = _with_lora(model) if adapted else model
    for cell in cells:
        ways = ["plain", "recorded"] if name == OWN else ["plain"]
        tokens = torch.randint(0, model.config.vocab_size, cell, device="cuda")
        expected = _outcome(model, tokens)
        for way in ways:
            start = time.perf_counter()
            if way == "recorded":
                record_training(model, lengths=[cell[1]])
                _check(expected, _outcome(model, tokens), TOLERANCE[arguments.dtype])
            first = time.perf_counter() - start
            row = {"model": name, "lora": adapted, "way": way, "batch": cell[0], "length": cell[1], "first": first}
            row |= {"parameters": sum(p.numel() for p in model.parameters())}
            row |= _time(model, tokens, arguments.repeats)
            if way == "plain" and cell == cells[0]:
                model.zero_grad()
                row["host"] = host_time(partial(_step, model, tokens))
            yield row
        if name == OWN:
            stop_recording(model)
        gc.collect()
        torch.cuda.empty_cache()
    del model
    gc.collect()
    torch.cuda.empty_cache()


def _step(model, tokens) -> torch.Tensor:
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss


def _outcome(model, tokens) -> tuple[float, torch.Tensor]:
    """The loss, and the gradients of a few parameters from all over the model."""
    model.zero_grad()
    loss = _step(model, tokens).item()
    trained = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    some = torch.cat([p.grad.flatten()[:4096].float() for p in trained[:: max(1, len(trained) // 40)]])
    model.zero_grad()
    return loss, some


def _check(expected, found, tolerance: float) -> None:
    errors = abs(found[0] - expected[0]) / expected[0], ((found[1] - expected[1]).norm() / expected[1].norm()).item()
    if not max(errors) <= tolerance:
        raise SystemExit(
            f"the recorded step is wrong: loss {errors[0]:.1e}, gradients {errors[1]:.1e}; nothing is timed"
        )


def _time(model, tokens, repeats: int) -> dict:
    seconds = []
    torch.cuda.reset_peak_memory_stats()
    for repeat in range(repeats + 2):
        model.zero_grad()
        torch.cuda.synchronize()
        start = time.perf_counter()
        _step(model, tokens)
        torch.cuda.synchronize()
        if repeat >= 2:
            seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated()
    model.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _step(model, tokens)
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in events) / 1e6
    return {
        "seconds": quantiles(seconds),
        "busy": busy,
        "operations": len(events),
        "memory": memory,
        "tokens_per_second": tokens.numel() / statistics.median(seconds),
    }


def line(row: dict) -> str:
    cell, what = f"{row['batch']} x {row['length']}", row["model"] + (" with LoRA" if row["lora"] else "")
    return (
        f"| {cell} | {what}, {row['way']} | {row['seconds']['median'] * 1e3:.1f} | {row['busy'] * 1e3:.1f} | "
        f"{row['operations']} | {row['tokens_per_second']:,.0f} | {row['mfu']:.1%} | {row['memory'] / 2**30:.1f} | "
        f"{row['first']:.1f} |"
    )


def text(report: dict) -> str:
    """The results page."""
    head = [f"# Small training steps, {report['size']}", "", *birth_lines(report["birth"]), ""]
    head += [
        "Forward and backward, no optimizer; medians. GPU busy: the sum of its kernels' times in a step, by PyTorch's",
        "profiler. First: seconds until the step was recorded, with what Triton had to compile. MFU: 6 * parameters *",
        "tokens over the time and the GPU's dense bfloat16 peak; with LoRA it counts the frozen weights too.",
        "",
        "| batch x T | model | step, ms | GPU busy, ms | GPU operations | tokens/s | MFU | peak, GiB | first, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    tables = [line for row in report["rows"] if "host" in row for line in host_of(row)]
    return "\n".join([*head, *(line(row) for row in report["rows"]), *tables]) + "\n"


def host_of(row: dict) -> list[str]:
    name = row["model"] + (" with LoRA" if row["lora"] else "")
    title = f"## Where the host's time goes: {name}, {row['batch']} x {row['length']}, plain, one step"
    return ["", title, "", "By PyTorch's profiler, which takes time itself.", "", *host_table(row["host"])]


if __name__ == "__main__":
    main()
