"""All that four GPUs of one host are to be measured for, one part after the other, each within its time.

    python scripts/benchmark_four_gpus.py                                          # about 8 minutes on four H200s
    python scripts/benchmark_four_gpus.py --device cpu --output build/four_gpus    # does it run: tiny, four processes

One row of 1,048,576 tokens over four GPUs and over two, and the longest of a few lengths that fits; DDP and FSDP2 on 1,
2 and 4 GPUs; the deepest model that FSDP2 trains. A part that fails or takes too long is named at the end, and the
others run. Pages and JSON go to OUTPUT/sequence and OUTPUT/distributed.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from benchmarks.birth_certificate import short_device_name
from command_line import Parser


SCRIPTS = Path(__file__).parent
LENGTHS = {"cuda": [2_621_440, 2_359_296, 2_097_152], "cpu": [512, 256]}  # of the longest row, falling
ALLOCATOR = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"
}  # blocks of many sizes, and nothing reserved in vain


class Part(NamedTuple):
    """Its commands, of which the first that ends well is enough, and the seconds that they have together on GPUs."""

    name: str
    seconds: int
    commands: list[list[str]]


def parts(device: str, output: Path, commit: str | None) -> list[Part]:
    million, size, config = (2**20, "2b", "griffin-1b3") if device == "cuda" else (256, "tiny", "tiny")
    small = [] if device == "cuda" else ["--length", "32", "--warmup", "0", "--steps", "1"]
    born = ["--device", device] + (["--commit", commit] if commit else [])
    name = short_device_name(device)

    def row(gpus: int, length: int, *words: str) -> list[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
        command += [str(SCRIPTS / "benchmark_sequence.py"), *born, "--size", size, "--length", str(length), *words]
        return [*command, "--output", str(output / "sequence" / f"sequence_{name}_x{gpus}_{length}")]

    def engines(page: str, *words: str) -> list[str]:
        command = [sys.executable, str(SCRIPTS / "benchmark_distributed.py"), *born, "--config", config, *small, *words]
        return [*command, "--output", str(output / "distributed" / f"distributed_{name}_{page}")]

    timed = ["--engines", "ddp", "fsdp2", "--rows", "8", "--processes", "1", "2"]
    timed += ["4", "--warmup", "2", "--steps", "6"] if device == "cuda" else []
    deepest = ["--engines", "--largest", "--rows", "1", "--processes", "4"]
    return [
        Part("a row over four", 120, [row(4, million, "--repeats", "2")]),
        Part("DDP and FSDP2", 150, [engines("rows8", *timed)]),
        Part("a row over two", 110, [row(2, million, "--repeats", "1")]),
        Part("the longest row", 150, [row(4, each, "--repeats", "1", "--skip_alone") for each in LENGTHS[device]]),
        *([Part("the deepest model", 180, [engines("deepest", *deepest)])] if device == "cuda" else []),
    ]


def run(part: Part, seconds: float) -> str:
    """How it ended, in words. The commands share the seconds."""
    end, said = time.monotonic() + seconds, "no command"
    for command in part.commands:
        print("+", *command, flush=True)
        said = _run_one(command, max(1.0, end - time.monotonic()))
        if said == "done":
            break
        print(f"{part.name}: {said}", flush=True)
    return said


def _run_one(command: list[str], seconds: float) -> str:
    child = subprocess.Popen(command, env={**os.environ, **ALLOCATOR})
    try:
        code = child.wait(seconds)
        return "done" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        if child.poll() is None:
            child.terminate()  # torchrun then ends its workers, which are sessions of their own
            child.wait(60)


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_device()
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder")
    parser.add_argument("--seconds", type=float, default=480, help="of all parts together")
    parser.add_argument("--commit", default=None, help="the commit that runs, for a copy without its git history")
    arguments = parser.parse_args(argv)
    found = torch.cuda.device_count() if arguments.device == "cuda" else 4
    if found < 4:
        parser.error(f"{found} GPUs: allowed are hosts with 4 or more")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = read_arguments(argv)
    start, ended = time.monotonic(), {}
    for part in parts(arguments.device, arguments.output, arguments.commit):
        begin = time.monotonic()
        left = arguments.seconds - (begin - start)
        limit = part.seconds if arguments.device == "cuda" else left
        said = run(part, min(limit, left)) if left > 5 else "not begun, no time left"
        ended[part.name] = f"{said}, {time.monotonic() - begin:.0f} s"
    print(*(f"{name}: {said}" for name, said in ended.items()), sep="\n")
    if not all(said.startswith("done") for said in ended.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
