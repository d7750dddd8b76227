"""Times one training sequence over several GPUs beside one GPU with its share of it, alone.

    torchrun --nproc_per_node 2 scripts/benchmark_sequence.py --length 1048576           # 2.1B parameters, bfloat16
    torchrun --nproc_per_node 2 scripts/benchmark_sequence.py --device cpu --size tiny --length 512   # does it run

A step is forward and backward of one row of random tokens under activation checkpointing, gradients averaged by DDP, no
optimizer. The logits are made piece by piece, shared or alone. Beside it, in the same run: each GPU with a row of
length / GPUs tokens of its own, no DDP; what a step sends between GPUs for the shared row, and the time that this takes
when nothing else runs. Rank 0 writes OUTPUT.json and OUTPUT.md.
"""

import argparse
import gc
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from benchmark_training import SIZES, griffin
from benchmarks.birth_certificate import birth_certificate, birth_lines, quantiles, short_device_name
from torch.nn.parallel import DistributedDataParallel

from modeling_griffin.parallel import neighbours, parallelize_sequence
from modeling_griffin.parallel.sequence import SequenceParallel


class Recorder:
    """Every exchange of a step between the ranks of a row, by name: (shape, dtype, entries to and from each rank)."""

    def __init__(self):
        self.calls: list[tuple] = []
        self.exchange, self.gather = dist.all_to_all_single, neighbours._all_gather

    def __enter__(self) -> "Recorder":
        dist.all_to_all_single, neighbours._all_gather = self._exchange, self._gather
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_to_all_single, neighbours._all_gather = self.exchange, self.gather

    def _exchange(self, output, buffer, receives, sends, **options):
        self.calls.append((tuple(buffer.shape), tuple(output.shape), buffer.dtype, receives, sends))
        return self.exchange(output, buffer, receives, sends, **options)

    def _gather(self, output, buffer, **options):
        self.calls.append((tuple(buffer.shape), tuple(output.shape), buffer.dtype, None, None))
        return self.gather(output, buffer, **options)

    def received(self) -> list[int]:
        """Bytes that each call brings to this rank from others."""
        own = [0 if call[3] is not None else _bytes(call[0], call[2]) for call in self.calls]
        return [_bytes(call[1], call[2]) - less for call, less in zip(self.calls, own)]

    def replay(self, group: dist.ProcessGroup, device: torch.device) -> float:
        """Seconds of all calls one after another, with nothing beside them."""
        zeros = [
            [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes] for *shapes, dtype, _, _ in self.calls
        ]
        for _ in range(2):  # the first time warms up
            start = _now(device)
            for (buffer, output), (*_, receives, sends) in zip(zeros, self.calls):
                if receives is None:
                    self.gather(output, buffer, group=group)
                else:
                    self.exchange(output, buffer, receives, sends, group=group)
            seconds = _now(device) - start
        return seconds


def _bytes(shape, dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _now(device: torch.device) -> float:
    """When every rank has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
    return time.perf_counter()


def make_model(size: str, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    with device:
        model = griffin(size).train()
    if device.type == "cuda":
        model = model.to(torch.bfloat16)
    model.gradient_checkpointing_enable()
    return model


class Step(torch.nn.Module):
    """The loss of rows of tokens; DDP calls it as a whole."""

    def __init__(self, model: torch.nn.Module, shared: SequenceParallel, piece: int):
        super().__init__()
        self.model, self.piece = model, piece
        self.shared = [shared]  # in a list: it is no module

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.model.model(ids, use_cache=False).last_hidden_state
        return self.shared[0].loss_in_pieces(hidden, ids, self.piece)


def measure(step: torch.nn.Module, ids: torch.Tensor, repeats: int) -> dict:
    """Seconds of each step, once warm; the loss; peak bytes of the fullest GPU, None on a CPU."""
    device, seconds = ids.device, []
    for repeat in range(repeats + 1):
        step.zero_grad(set_to_none=True)
        if repeat == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = _now(device)
        loss = step(ids)
        loss.backward()
        if repeat:
            seconds.append(_now(device) - start)
        else:
            _now(device)
    peak = torch.tensor(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return {"seconds": seconds, "loss": loss.item(), "peak": peak.item() or None}


def benchmark(arguments: argparse.Namespace, device: torch.device) -> dict:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    vocabulary = SIZES[arguments.size][4]
    found = {}
    for name, length in (("alone", arguments.length // ranks), ("shared", arguments.length)):
        model = make_model(arguments.size, device)
        over = dist.new_group([rank], use_local_synchronization=True) if name == "alone" else None
        shared = parallelize_sequence(model, over)
        step = Step(model, shared, arguments.piece)
        generator = torch.Generator().manual_seed(rank if name == "alone" else 0)
        ids = torch.randint(vocabulary, (1, length), generator=generator).to(device)
        if name == "shared":
            step = DistributedDataParallel(step, gradient_as_bucket_view=True)
        found[name] = {"length": length, **measure(step, ids, arguments.repeats)}
        if name == "shared":
            with Recorder() as recorder:
                step(ids).backward()
            found["sent"] = what_was_sent(recorder, shared, device)
        found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        del model, step, shared
        gc.collect()
    return found


def what_was_sent(recorder: Recorder, shared: SequenceParallel, device: torch.device) -> dict:
    """Of the rank that receives most: calls and bytes a step, the largest call, and the seconds of all of them."""
    received = recorder.received()
    most = torch.tensor([sum(received), max(received)], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    seconds = recorder.replay(shared.ranks.group, device)
    return {"calls": len(received), "bytes": most[0].item(), "largest": most[1].item(), "seconds": seconds}


def text_of(report: dict) -> str:
    run, ranks = report["run"], report["ranks"]
    lines = [
        f"# One sequence over {ranks} processes",
        "",
        f"{report['parameters'] / 1e9:.2f} billion parameters, one row of {run['length']:,} tokens, forward and "
        "backward under activation checkpointing, no optimizer. Written by `scripts/benchmark_sequence.py`:",
        "",
        *birth_lines(report["birth"]),
        "",
        "| | tokens | s a step, median (10%, 90%) | tokens/s a process | peak GB |",
        "|---|---|---|---|---|",
    ]
    for name, count in (("alone", 1), ("shared", ranks)):
        row, time_of = report[name], quantiles(report[name]["seconds"])
        peak = "" if row["peak"] is None else f"{row['peak'] / 1e9:.1f}"
        speed = row["length"] / time_of["median"] / count
        title = "one process, its share as a row of its own" if name == "alone" else f"one row over {ranks}"
        spread = f"{time_of['median']:.3f} ({time_of['10%']:.3f}, {time_of['90%']:.3f})"
        lines.append(f"| {title} | {row['length']:,} | {spread} | {speed:,.0f} | {peak} |")
    sent, median = report["sent"], quantiles(report["shared"]["seconds"])["median"]
    return "\n".join(
        [
            *lines,
            "",
            f"Efficiency: {report['efficiency']:.1%} of the tokens/s of a process alone.",
            "",
            f"A step has {sent['calls']} exchanges for the shared row, gradients' averages not counted: a process "
            f"receives {sent['bytes'] / 2**20:.2f} MiB, {sent['largest'] / 2**20:.3f} MiB in the largest. Alone, "
            f"they take {sent['seconds'] * 1e3:.2f} ms, {sent['seconds'] / median:.2%} of a step.",
            "",
        ]
    )


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmark_sequence.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="2b")
    parser.add_argument("--length", type=int, default=2**20, help="tokens of the row")
    parser.add_argument("--repeats", type=int, default=3, help="steps that are timed, behind one that is not")
    parser.add_argument("--piece", type=int, default=8192, help="tokens of which logits are held")
    parser.add_argument("--output", type=Path, default=None, help="path without suffix; default results/sequence_...")
    parser.add_argument("--commit", default=None, help="the commit that runs, for a copy without its git history")
    arguments = parser.parse_args(argv)
    for name in ("repeats", "piece", "length"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: allowed are whole numbers from 1")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if arguments.length % ranks:
        parser.error(f"--length {arguments.length}: allowed are multiples of the {ranks} processes")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = read_arguments(argv)
    device = torch.device("cpu")
    if arguments.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    report = benchmark(arguments, device)
    ranks = dist.get_world_size()
    alone, shared = (quantiles(report[name]["seconds"])["median"] for name in ("alone", "shared"))
    if dist.get_rank() == 0:
        run = {name: getattr(arguments, name) for name in ("device", "size", "length", "repeats", "piece")}
        birth = birth_certificate(arguments.device, arguments.commit)
        report = {"birth": birth, "run": run, "ranks": ranks, "efficiency": alone / shared, **report}
        name = f"sequence_{short_device_name(arguments.device)}_{arguments.size}_{ranks}x{arguments.length // ranks}"
        output = arguments.output or Path("results") / name
        output.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{output}.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        Path(f"{output}.md").write_text(text_of(report), encoding="utf-8")
        print(text_of(report), end="")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
