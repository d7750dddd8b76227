"""Finds how the products of a decoding step divide their work fastest on a GPU, by timing whole steps.

    python scripts/tune_decoding.py                                  the 2.1-billion model, bfloat16, one row
    python scripts/tune_decoding.py --rows 64
    python scripts/tune_decoding.py --weights "torchao int8" --products "gate, up" down
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
from benchmarks.quantised import SCHEMES, quantise
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
LINES = ((16384, 0), (0, 5120), (4096, 0), (2561, 0), (0, 0))  # as the tables have them: the first that fits counts
GATED, RECURRENCE = "gate, up", "recurrence"
BFLOAT16 = "bfloat16"
# One row: outputs x warps x tiles ahead
TILES = ["4x2x3", "4x2x2", "2x2x3", "2x2x5", "2x2x2", "2x4x3", "2x4x2", "4x4x2", "8x2x2", "4x1x5", "2x1x5", "1x4x3",
         "1x2x5"]  # fmt: skip
# More rows: outputs x inputs x stages x warps x programs of a multiprocessor
TILES_OF_ROWS = ["64x128x4x4x1", "64x128x6x4x1", "64x128x8x4x1", "128x128x3x8x1", "128x128x4x8x1", "128x64x6x8x1",
                 "64x64x8x4x1", "64x64x5x4x2", "128x64x4x4x2", "64x256x3x4x1", "64x256x3x8x1", "32x256x4x4x1",
                 "32x128x5x4x2", "16x256x6x1x1"]  # fmt: skip
TILES_GATED = ["64x128x4x8x1", "64x64x6x8x1", "64x128x3x8x1", "64x64x4x4x2", "32x128x6x4x1", "32x128x4x4x2",
               "32x64x6x4x2", "32x256x3x8x1"]  # fmt: skip
# Of 8 bits: the same
TILES_OF_BYTES = ["4x2x3", "8x2x3", "4x2x5", "2x2x5", "8x2x2", "4x2x2", "4x4x2", "4x4x3", "8x4x2", "16x2x2", "4x1x5",
                  "8x1x5", "2x1x10"]  # fmt: skip
BYTES_OF_ROWS = ["64x128x4x4x1", "64x128x6x4x1", "64x128x8x4x1", "128x128x3x8x1", "128x128x5x8x1", "128x64x6x8x1",
                 "128x256x3x8x1", "64x64x8x4x1", "64x64x6x4x2", "128x64x4x4x2", "64x256x3x4x1", "64x256x4x8x1",
                 "64x128x4x4x2", "32x256x4x4x1"]  # fmt: skip
BYTES_GATED = ["64x128x4x8x1", "64x128x5x8x1", "64x64x6x8x1", "64x128x3x8x1", "64x256x3x8x1", "64x64x4x4x2",
               "64x64x8x8x1", "32x128x4x4x2", "32x128x6x4x1"]  # fmt: skip
# Of 4 bits, one row: warps that share the inputs x tiles ahead x programs of a multiprocessor; more rows as above
TILES_OF_NF4 = ["4x5x0", "8x4x2", "4x2x4", "4x3x4", "4x2x3", "4x5x3", "8x2x3", "8x3x3", "16x2x2", "2x5x0"]
NF4_OF_ROWS = ["64x128x3x4x2", "128x128x3x8x1", "64x128x4x4x1", "64x128x5x4x1", "64x128x3x8x1", "64x256x3x8x1",
               "128x64x4x8x1", "64x64x5x4x2"]  # fmt: skip
RECURRENT_TILES = ["32x4", "16x4", "16x2", "32x2", "8x2", "64x8", "32x8"]  # channels x warps
ALLOWED, REPLAYS, ROUNDS = 3e-2, 30, 5  # the error as a share of the largest logit
WORTH = 0.998  # of the time before: less is the machine's


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="2b", help="a configuration, or a size of benchmark_training.py")
    parser.add_argument("--rows", type=int, default=1, help="of a step, up to 64")
    parser.add_argument("--weights", choices=SCHEMES, default=BFLOAT16, help="of all products but the head's")
    products = [*PRODUCTS, RECURRENCE]
    parser.add_argument(
        "--products", nargs="+", choices=products, default=None, help="which, in this order; unset: all"
    )
    parser.add_argument("--tiles", nargs="+", default=None, help="instead of those listed, outputs x warps x ...")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile ahead")
    parser.add_argument("--part", type=int, nargs=2, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("build/decoding_tiles"), help="path without suffix")
    arguments = parser.parse_args(argv)
    config = _griffin_config(arguments.model) if arguments.model in SIZES else _read(arguments.model)
    parser.check_least(arguments, rows=1, jobs=1)
    rows, weights = arguments.rows, arguments.weights
    left_out = {RECURRENCE} if rows > 1 else set()
    if weights != BFLOAT16:
        left_out |= {RECURRENCE, "head"}  # which are as of bfloat16
    if refused := left_out & set(arguments.products or ()):
        allowed = ", ".join(name for name in products if name not in left_out)
        parser.error(f"--products {', '.join(sorted(refused))}: of {rows} rows over {weights} allowed are {allowed}")
    arguments.products = arguments.products or [name for name in products if name not in left_out]
    settings = [(name, tile) for name in arguments.products for tile in tiles_of(name, rows, weights, arguments.tiles)]
    if arguments.part is not None:
        index, count = arguments.part
        _compile(config, rows, weights, settings[index::count])
        return
    _compile_ahead(arguments, argv)
    lines = [f"{torch.cuda.get_device_name()}, {weights}, {rows} rows, {arguments.model}: ms a step", ""]
    print(lines[0], flush=True)
    for line in tune(_step(config, rows, weights), arguments.products, arguments.tiles, weights):
        lines.append(line)
        print(line, flush=True)
        write_whole(with_ending(arguments.output, ".md"), "\n".join(lines) + "\n")


def tiles_of(name: str, rows: int, weights: str, given: list[str] | None) -> list[str]:
    if given or name == RECURRENCE:
        return given or RECURRENT_TILES
    if weights.startswith("nf4"):
        return TILES_OF_NF4 if rows in tables.MATVEC_ROWS else NF4_OF_ROWS
    if weights != BFLOAT16:
        return TILES_OF_BYTES if rows == 1 else BYTES_GATED if name == GATED else BYTES_OF_ROWS
    return TILES if rows == 1 else TILES_GATED if name == GATED else TILES_OF_ROWS


def _table(name: str, rows: int, weights: str = BFLOAT16) -> dict:
    if weights.startswith("nf4") and rows in tables.MATVEC_ROWS:
        return (tables.MATVEC_GATED_NF4 if name == GATED else tables.MATVEC_NF4)[rows]
    if weights.startswith("nf4"):
        of_rows = tables.MATMUL_GATED_NF4 if name == GATED else tables.MATMUL_NF4
    elif weights != BFLOAT16:
        if rows == 1:
            return tables.GATED_BYTES if name == GATED else tables.PROJECT_BYTES
        of_rows = tables.MATMUL_GATED_BYTES if name == GATED else tables.MATMUL_BYTES
    elif rows == 1:
        return tables.GATED if name == GATED else tables.PROJECT
    else:
        of_rows = tables.MATMUL_GATED if name == GATED else tables.MATMUL
    return of_rows[next(size for size in of_rows if rows <= size)]


@contextlib.contextmanager
def taking(chosen: dict[str, str], rows: int, weights: str = BFLOAT16) -> Iterator[None]:
    """The launch code takes these tiles for these products."""
    with contextlib.ExitStack() as stack:
        for name, tile in chosen.items():
            numbers = tuple(map(int, tile.split("x")))
            if name == RECURRENCE:
                new = {**tables.RECURRENT_ROW, "BLOCK_C": numbers[0], "num_warps": numbers[1]}
                stack.enter_context(patch.object(tables, "RECURRENT_ROW", new))
            else:
                table = _table(name, rows, weights)
                new = dict.fromkeys(table, numbers) if name == GATED else _with_line(table, PRODUCTS[name], numbers)
                stack.enter_context(patch.dict(table, new, clear=True))
        yield


def _with_line(table: dict, line: tuple[int, int], numbers: tuple[int, ...]) -> dict:
    """Each product has a line of its own, in the order in which the launch code looks at them."""
    own = {each: tables._first_fit(table, *each) for each in LINES if table.keys() & {each, (0, 0)}}
    return {**{each: tile for each, tile in table.items() if each not in own}, **own, line: numbers}


def tune(step: DecodeStep, products: list[str], given: list[str] | None, weights: str = BFLOAT16) -> Iterator[str]:
    """Lines of a table, as they are measured."""
    expected, rows = _logits(step), len(step.token)
    chosen: dict[str, str] = {}
    best = _milliseconds(step)
    yield f"as the package takes them: {best:.4f}"
    for name in products:
        kept = None
        for tile in tiles_of(name, rows, weights, given):
            try:
                with taking({**chosen, name: tile}, rows, weights):
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
    with taking(chosen, rows, weights):
        yield f"all together: {_milliseconds(step):.4f}, {chosen}"
    yield f"as the package takes them, once more: {_milliseconds(step):.4f}"


def _read(model: str) -> GriffinConfig:
    return GriffinConfig.from_json_file(find_preset(model, "model"))


def _step(config: GriffinConfig, rows: int, weights: str) -> DecodeStep:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = quantise(GriffinForCausalLM(config).to(torch.bfloat16).eval(), weights)
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


def _compile(config: GriffinConfig, rows: int, weights: str, settings: list[tuple[str, str]]) -> None:
    """A layer of each kind launches all kernels."""
    config.num_hidden_layers, config.layer_types = 2, ["linear_attention", "sliding_attention"]
    step = _step(config, rows, weights)
    for name, tile in settings:
        with taking({name: tile}, rows, weights), contextlib.suppress(Exception):  # it is said where it is timed
            _logits(step)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
