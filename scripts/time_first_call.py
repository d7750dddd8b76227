"""Times the first call of `generate` in a process: with kernels to compile, and with those that are on disk.

    python scripts/time_first_call.py                    2.1B parameters at 1 and 64 rows, RecurrentGemma-2B's settings

Each first call has a process of its own: a cold one, for which Triton's folder of kernels is empty, and behind it a
warm one, which finds there what the cold one has left. The processes load their models side by side and are then timed
one at a time, while the others wait. Random weights, bfloat16, greedy. Writes OUTPUT.json and OUTPUT.md after every
row.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmark_training import PRESETS, SIZES, config_of
from benchmarks.birth_certificate import birth_certificate, birth_lines, short_device_name
from benchmarks.checks import random_ids
from command_line import Parser
from whole_files import with_ending, write_whole

from modeling_griffin import GriffinForCausalLM


CASES = ["2b:1", "2b:64", "recurrentgemma-2b:1"]
PROMPT, NEW = 128, 32
READY = "ready"
KERNELS = ("compiled", "on disk")  # of a first call's two processes
CALLS = 3  # in one process


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_device()
    parser.add_argument("--cases", type=case, nargs="+", default=CASES, metavar="SIZE:ROWS", help="models and rows")
    parser.add_argument("--output", type=Path, default=None, help="path without suffix")
    parser.add_argument("--commit", default=None, help="the commit that runs, for a copy without its git history")
    parser.add_argument("--one", default=None, metavar="SIZE:ROWS", help="the process of one row, which main starts")
    arguments = parser.parse_args(argv)
    if arguments.one is not None:
        return first_calls(arguments.one, arguments.device)
    output = arguments.output or Path("results/generation") / f"first_call_{short_device_name(arguments.device)}"
    parser.make_folder_of(output)
    report: dict[str, Any] = {"birth": birth_certificate(arguments.device, arguments.commit), "rows": []}
    for row in measure(arguments.cases, arguments.device):
        report["rows"].append(row)
        write_whole(with_ending(output, ".json"), json.dumps(report, indent=1))
        write_whole(with_ending(output, ".md"), text(report))
    print(text(report), end="")


def case(word: str) -> str:
    size, _, rows = word.partition(":")
    if size not in (*SIZES, *PRESETS) or not rows.isdigit() or int(rows) < 1:
        raise argparse.ArgumentTypeError(f"{word!r}: allowed is SIZE:ROWS, for example 2b:64")
    return word


def measure(cases: list[str], device: str) -> Iterator[dict]:
    """A row for each case with an empty folder of kernels, and one with what is in it then."""
    with ExitStack() as stack:
        waiting = []
        for each in cases:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            waiting += [(each, kernels, stack.enter_context(started(each, device, folder))) for kernels in KERNELS]
        for _, _, process in waiting:
            answer(process, READY)
        for each, kernels, process in waiting:
            process.stdin.write("go\n")
            process.stdin.flush()
            size, rows = each.split(":")
            yield {"model": size, "rows": int(rows), "kernels": kernels, "seconds": json.loads(answer(process, "["))}


@contextmanager
def started(word: str, device: str, folder: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, __file__, "--one", word, "--device", device]
    environment = {**os.environ, "TRITON_CACHE_DIR": folder}
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def answer(process: subprocess.Popen, beginning: str) -> str:
    """The next line of the process that begins so: libraries write lines of their own."""
    for line in process.stdout:
        if line.startswith(beginning):
            return line
    raise RuntimeError(f"a process ended before it was timed, with exit status {process.wait()}")


def first_calls(word: str, device: str) -> None:
    """The process of one row: once it is told to, prints the seconds of each of its first calls."""
    size, rows = word.split(":")
    torch.manual_seed(0)
    with torch.device(device):
        model = GriffinForCausalLM._from_config(config_of(size), dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    ids, seconds = random_ids(model, int(rows), PROMPT), []
    print(READY, flush=True)
    sys.stdin.readline()
    for _ in range(CALLS):
        begin = time.perf_counter()
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        tokens.tolist()  # when they are here
        seconds.append(time.perf_counter() - begin)
    print(json.dumps(seconds), flush=True)


def text(report: dict) -> str:
    lines = ["# First calls of generate", "", *birth_lines(report["birth"]), ""]
    lines += [
        f"A prompt of {PROMPT} tokens and {NEW} new ones, greedy, bfloat16, random weights; each line is a process of",
        "its own. Compiled: Triton's folder of kernels was empty. On disk: it had what the line above has left.",
        "",
        "| model | rows | kernels | first call, s | second, s | third, s |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        seconds = " | ".join(f"{each:.2f}" for each in row["seconds"])
        lines.append(f"| {row['model']} | {row['rows']} | {row['kernels']} | {seconds} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
