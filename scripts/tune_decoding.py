"""Finds how the products of a decoding step divide their work fastest on a GPU, by timing whole steps.

    python scripts/tune_decoding.py                                  the 2.1-billion model, bfloat16, one row
    python scripts/tune_decoding.py --rows 64
    python scripts/tune_decoding.py --model configuration/model/recurrentgemma-2b.json --products "gate, up" head

What is fastest alone need not be in a step, whose kernels overlap. So one product after the other gets each tile that
is listed for it, the whole step is recorded and timed, and the best stays for the products behind. A tile's first step
must leave the logits of the tiles that the package takes. Weights are random. Writes OUTPUT.md and prints it as it
goes; the best belong into modeling_griffin/kernels/device/decode.py.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from benchmark_training import SIZES, _griffin_config
from command_line import Parser
from presets import find_preset
from whole_files import with_ending, write_whole

from modeling_griffin import GriffinConfig, GriffinForCausalLM
from modeling_griffin.decode.state import DecodeStep
from modeling_griffin.kernels.device import decode as tables


# name: its line of the tables in kernels/device/decode.py
PRODUCTS = {
    "gate, up": (0, 0),
    "down": (0, 5120),
    "linear_x, linear_y": (4096, 0),
    "linear_out, o_proj": (0, 0),
    "q, k, v": (2561, 0),
    "head": (16384, 0),
}
GATED, RECURRENCE = "gate, up", "recurrence"
# One row: outputs x warps x tiles ahead
TILES = ["4x2x3", "4x2x2", "2x2x3", "2x2x5", "2x2x2", "2x4x3", "2x4x2", "4x4x2", "8x2x2", "4x1x5", "2x1x5", "1x4x3",
         "1x2x5"]  # fmt: skip
# More rows: outputs x inputs x stages x warps x programs of a multiprocessor
TILES_OF_ROWS = ["64x128x4x4x1", "64x128x6x4x1", "64x128x8x4x1", "128x128x3x8x1", "128x128x4x8x1", "128x64x6x8x1",
                 "64x64x8x4x1", "64x64x5x4x2", "128x64x4x4x2", "64x256x3x4x1", "64x256x3x8x1", "32x256x4x4x1",
                 "32x128x5x4x2", "16x256x6x1x1"]  # fmt: skip
TILES_GATED = ["64x128x4x8x1", "64x64x6x8x1", "64x128x3x8x1", "64x64x4x4x2", "32x128x6x4x1", "32x128x4x4x2",
               "32x64x6x4x2", "32x256x3x8x1"]  # fmt: skip
RECURRENT_TILES = ["32x4", "16x4", "16x2", "32x2", "8x2", "64x8", "32x8"]  # channels x warps
ALLOWED, REPLAYS, ROUNDS = 3e-2, 30, 5  # the error as a share of the largest logit
WORTH = 0.998  # of the time before: less is the machine's


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="2b", help="a configuration, or a size of benchmark_training.py")
    parser.add_argument("--rows", type=int, default=1, help="of a step, up to 64")
    products = [*PRODUCTS, RECURRENCE]
    parser.add_argument("--products", nargs="+", choices=products, default=products, help="which, in this order")
    parser.add_argument("--tiles", nargs="+", default=None, help="instead of those listed, outputs x warps x ...")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile ahead")
    parser.add_argument("--part", type=int, nargs=2, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("build/decoding_tiles"), help="path without suffix")
    arguments = parser.parse_args(argv)
    config = _griffin_config(arguments.model) if arguments.model in SIZES else _read(arguments.model)
    parser.check_least(arguments, rows=1, jobs=1)
    rows, given = arguments.rows, arguments.tiles
    if rows > 1:
        arguments.products = [name for name in arguments.products if name != RECURRENCE]
    settings = [(name, tile) for name in arguments.products for tile in tiles_of(name, rows, given)]
    if arguments.part is not None:
        index, count = arguments.part
        _compile(config, rows, settings[index::count])
        return
    _compile_ahead(arguments, argv)
    lines = [f"{torch.cuda.get_device_name()}, bfloat16, {rows} rows, {arguments.model}: ms a step", ""]
    for line in tune(_step(config, rows), arguments.products, given):
        lines.append(line)
        print(line, flush=True)
        write_whole(with_ending(arguments.output, ".md"), "\n".join(lines) + "\n")


def tiles_of(name: str, rows: int, given: list[str] | None) -> list[str]:
    if given or rows == 1:
        return given or (RECURRENT_TILES if name == RECURRENCE else TILES)
    return TILES_GATED if name == GATED else TILES_OF_ROWS


def _table(name: str, rows: int) -> dict:
    if rows == 1:
        return tables.GATED if name == GATED else tables.PROJECT
    of_rows = tables.MATMUL_GATED if name == GATED else tables.MATMUL
    return of_rows[next(size for size in of_rows if rows <= size)]


@contextlib.contextmanager
def taking(chosen: dict[str, str], rows: int) -> Iterator[None]:
    """The launch code takes these tiles for these products."""
    with contextlib.ExitStack() as stack:
        for name, tile in chosen.items():
            numbers = tuple(map(int, tile.split("x")))
            if name == RECURRENCE:
                new = {**tables.RECURRENT_ROW, "BLOCK_C": numbers[0], "num_warps": numbers[1]}
                stack.enter_context(patch.object(tables, "RECURRENT_ROW", new))
            else:
                stack.enter_context(patch.dict(_table(name, rows), {PRODUCTS[name]: numbers}))
        yield


def tune(step: DecodeStep, products: list[str], given: list[str] | None) -> Iterator[str]:
    """Lines of a table, as they are measured."""
    expected, rows = _logits(step), len(step.token)
    chosen: dict[str, str] = {}
    best = _milliseconds(step)
    yield f"as the package takes them: {best:.4f}"
    for name in products:
        kept = None
        for tile in tiles_of(name, rows, given):
            try:
                with taking({**chosen, name: tile}, rows):
                    error = ((_logits(step) - expected).abs().max() / expected.abs().max()).item()
                    found = _milliseconds(step)
            except Exception as problem:
                yield f"{name}: {tile}: {type(problem).__name__}: {' '.join(str(problem).split())[:80]}"
                continue
            right = error <= ALLOWED
            yield f"{name}: {tile}: {found:.4f}" + ("" if right else f", wrong by {error:.2g}")
            if right and found < WORTH * best:
                kept, best = tile, found
        if kept is not None:
            chosen[name] = kept
            yield f"{name} takes {kept}"
    with taking(chosen, rows):
        yield f"all together: {_milliseconds(step):.4f}, {chosen}"
    yield f"as the package takes them, once more: {_milliseconds(step):.4f}"


def _read(model: str) -> GriffinConfig:
    return GriffinConfig.from_json_file(find_preset(model, "model"))


def _step(config: GriffinConfig, rows: int) -> DecodeStep:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = GriffinForCausalLM(config).to(torch.bfloat16).eval()
    return DecodeStep(model.model, model.lm_head, rows)


@torch.no_grad()
def _logits(step: DecodeStep) -> torch.Tensor:
    """Of the first token, after nothing."""
    for tensor in (*step.rings, *step.memories, step.token):
        tensor.zero_()
    step.start(0)
    step.logits.fill_(float("nan"))
    step._compute()
    return step.logits.float()


def _milliseconds(step: DecodeStep) -> float:
    """The median of rounds of replays, from a state that has filled its window."""
    step.record()
    step.start(step.config.attention_window_size)
    for _ in range(3):
        step.run()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            step.run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / REPLAYS)
    return sorted(times)[ROUNDS // 2]


def _compile_ahead(arguments: argparse.Namespace, argv: list[str] | None) -> None:
    command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]
    parts = [[*command, "--part", str(i), str(arguments.jobs)] for i in range(arguments.jobs)]
    for process in [subprocess.Popen(part) for part in parts]:
        process.wait()


def _compile(config: GriffinConfig, rows: int, settings: list[tuple[str, str]]) -> None:
    """A layer of each kind launches all kernels."""
    config.num_hidden_layers, config.layer_types = 2, ["linear_attention", "sliding_attention"]
    step = _step(config, rows)
    for name, tile in settings:
        with taking({name: tile}, rows), contextlib.suppress(Exception):  # it is said where it is timed
            _logits(step)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
