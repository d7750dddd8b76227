"""Times one training sequence over several GPUs beside one GPU with its share of it, alone.

    torchrun --nproc_per_node 2 scripts/benchmark_sequence.py --length 1048576           # 2.1B parameters, bfloat16
    torchrun --nproc_per_node 2 scripts/benchmark_sequence.py --device cpu --size tiny --length 512   # does it run

A step is forward and backward of one row of random tokens under activation checkpointing, gradients averaged by DDP, no
optimizer. Logits and the MLPs' activations are made piece by piece, shared or alone. Beside it, in the same run: each
GPU with a row of length / GPUs tokens of its own, no DDP; what a step sends between GPUs for the shared row, and the
time that this takes when nothing else runs. Rank 0 writes OUTPUT.json and OUTPUT.md.
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
from command_line import Parser
from torch.nn.parallel import DistributedDataParallel
from whole_files import with_ending, write_whole

from modeling_griffin.parallel import neighbours, parallelize_sequence
from modeling_griffin.parallel.sequence import SequenceParallel
from modeling_griffin.training.pieces import PIECE, mlp_in_pieces


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


def make_model(size: str, mlp_piece: int, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    with device:
        model = griffin(size).train()
    if device.type == "cuda":
        model = model.to(torch.bfloat16)
    model.gradient_checkpointing_enable()
    if mlp_piece:
        mlp_in_pieces(model, mlp_piece)
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


def measure(step: torch.nn.Module, ids: torch.Tensor, repeats: int) -> tuple[dict, Recorder]:
    """Seconds of each step, once warm; the loss; peak bytes of the fullest GPU, None on a CPU. What the first sent."""
    device, seconds = ids.device, []
    with Recorder() as recorder:
        _run(step, ids)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats):
        start = _now(device)
        loss = _run(step, ids)
        seconds.append(_now(device) - start)
    peak = torch.tensor(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return {"seconds": seconds, "loss": loss, "peak": peak.item() or None}, recorder


def _run(step: torch.nn.Module, ids: torch.Tensor) -> float:
    step.zero_grad(set_to_none=True)
    loss = step(ids)
    loss.backward()
    return loss.item()


def benchmark(arguments: argparse.Namespace, device: torch.device) -> dict:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    vocabulary = SIZES[arguments.size][4]
    found = {}
    alone = [] if arguments.skip_alone else [("alone", arguments.length // ranks)]
    for name, length in [*alone, ("shared", arguments.length)]:
        model = make_model(arguments.size, arguments.mlp_piece, device)
        over = dist.new_group([rank], use_local_synchronization=True) if name == "alone" else None
        shared = parallelize_sequence(model, over)
        step = Step(model, shared, arguments.piece)
        generator = torch.Generator().manual_seed(rank if name == "alone" else 0)
        ids = torch.randint(vocabulary, (1, length), generator=generator).to(device)
        if name == "shared":
            step = DistributedDataParallel(step, gradient_as_bucket_view=True)
        measured, recorder = measure(step, ids, arguments.repeats)
        found[name] = {"length": length, **measured}
        if name == "shared":
            found["sent"] = what_was_sent(recorder, shared, device)
        found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        del model, step, shared
        gc.collect()
    return found


def what_was_sent(recorder: Recorder, shared: SequenceParallel, device: torch.device) -> dict:
    """Of the rank that receives most: calls and bytes a step, the largest call, and the seconds of all of them."""
    received = recorder.received()
    most = torch.tensor([sum(received), max(received, default=0)], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    seconds = recorder.replay(shared.ranks.group, device)
    return {"calls": len(received), "bytes": most[0].item(), "largest": most[1].item(), "seconds": seconds}


def efficiency(report: dict) -> float | None:
    if "alone" not in report:
        return None
    alone, shared = (quantiles(report[name]["seconds"])["median"] for name in ("alone", "shared"))
    return alone / shared


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
        *([f"`PYTORCH_CUDA_ALLOC_CONF={run['allocator']}`.", ""] if run["allocator"] else []),
        "| | tokens | s a step, median (10%, 90%) | tokens/s a process | peak GB |",
        "|---|---|---|---|---|",
    ]
    for name, count in (("alone", 1), ("shared", ranks)):
        if name not in report:
            continue
        row, time_of = report[name], quantiles(report[name]["seconds"])
        peak = "" if row["peak"] is None else f"{row['peak'] / 1e9:.1f}"
        speed = row["length"] / time_of["median"] / count
        title = "one process, its share as a row of its own" if name == "alone" else f"one row over {ranks}"
        spread = f"{time_of['median']:.3f} ({time_of['10%']:.3f}, {time_of['90%']:.3f})"
        lines.append(f"| {title} | {row['length']:,} | {spread} | {speed:,.0f} | {peak} |")
    sent, median, efficiency = report["sent"], quantiles(report["shared"]["seconds"])["median"], report["efficiency"]
    return "\n".join(
        [
            *lines,
            "",
            *([f"Efficiency: {efficiency:.1%} of the tokens/s of a process alone.", ""] if efficiency else []),
            f"A step has {sent['calls']} exchanges for the shared row, gradients' averages not counted: a process "
            f"receives {sent['bytes'] / 2**20:.2f} MiB, {sent['largest'] / 2**20:.3f} MiB in the largest. Alone, "
            f"they take {sent['seconds'] * 1e3:.2f} ms, {sent['seconds'] / median:.2%} of a step.",
            "",
        ]
    )


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_device()
    parser.add_argument("--size", choices=SIZES, default="2b")
    parser.add_argument("--length", type=int, default=2**20, help="tokens of the row")
    parser.add_argument("--repeats", type=int, default=3, help="steps that are timed, behind one that is not")
    parser.add_argument("--piece", type=int, default=8192, help="tokens of which logits are held")
    parser.add_argument("--mlp_piece", type=int, default=PIECE, help="tokens of an MLP's activations; 0: all at once")
    parser.add_argument("--skip_alone", action="store_true", help="only the shared row")
    parser.add_argument("--output", type=Path, default=None, help="path without suffix; default results/sequence_...")
    parser.add_argument("--commit", default=None, help="the commit that runs, for a copy without its git history")
    arguments = parser.parse_args(argv)
    parser.check_least(arguments, repeats=1, piece=1, length=1, mlp_piece=0)
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
    if dist.get_rank() == 0:
        run = {name: getattr(arguments, name) for name in ("device", "size", "length", "repeats", "piece", "mlp_piece")}
        run["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
        birth = birth_certificate(arguments.device, arguments.commit)
        report = {"birth": birth, "run": run, "ranks": ranks, "efficiency": efficiency(report), **report}
        name = f"sequence_{short_device_name(arguments.device)}_x{ranks}_{arguments.length}"
        output = arguments.output or Path("results") / "sequence" / name
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(with_ending(output, ".json"), json.dumps(report, indent=1))
        write_whole(with_ending(output, ".md"), text_of(report))
        print(text_of(report), end="")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
