"""Times the products of a decoding step over quantised weights on a GPU, by how the kernels divide their work.

    python scripts/time_quantised_products.py --output build/quantised_products
    python scripts/time_quantised_products.py --rows 1 --schemes nf4 --tiles 4x5 8x3

The products of the 2.1-billion model, each in a CUDA graph of launches over copies of the weights that do not fit the
cache, so that bytes come from memory. A setting is first compared with float64 over the numbers that the weights stand
for. "now" is what the package takes; other tiles are, for 1 to 4 rows: of NF4 warps x tiles ahead [x programs a
multiprocessor], of 8 bits outputs x warps x tiles ahead; for more, outputs x inputs x stages x warps [x programs].
`library` is bitsandbytes' own kernel, where it is installed. A step is the sum over the model's layers.
Writes OUTPUT.md and prints it.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from command_line import Parser
from torch import nn
from whole_files import with_ending, write_whole

from modeling_griffin.decode import linear, packed
from modeling_griffin.gpu import can_overlap
from modeling_griffin.kernels.device import decode as tables
from modeling_griffin.kernels.device import decode_gemm_fits, properties
from modeling_griffin.modeling_griffin import GriffinRMSNorm


class Product(NamedTuple):
    sizes: tuple[int, ...]
    inputs: int
    kind: str  # norm, residual or gated
    times: int  # in a step


PRODUCTS = {
    "linear_x, linear_y": Product((2560, 2560), 2560, "norm", 18),
    "linear_out, o_proj": Product((2560,), 2560, "residual", 26),
    "q, k, v": Product((2560, 128, 128), 2560, "norm", 8),
    "gate, up": Product((7680, 7680), 2560, "gated", 26),
    "down": Product((2560,), 7680, "residual", 26),
}
SCHEMES = ("bfloat16", "nf4", "nf4, constants too", "int8", "float8", "library")
BYTES = {"bfloat16": 2.0, "nf4": 0.5 + 4 / 64, "nf4, constants too": 0.5 + 1 / 64 + 4 / 64 / 256, "int8": 1.0,
         "float8": 1.0, "library": 0.5 + 4 / 64}  # fmt: skip
TILES = {
    "few nf4": ["4x5", "4x5x3", "4x2x3", "4x2x4", "4x3x4", "8x2x3", "8x4x2"],
    "few bytes": ["4x2x3", "8x2x3", "4x2x5", "2x2x5"],
    "many": ["64x128x4x4", "128x128x3x8", "64x64x6x4", "64x128x3x8"],
}
NF4_CODE = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
            0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]  # fmt: skip
CACHE, ALLOWED = 192 << 20, 1e-2  # bytes of copies; error as a share of the largest output


class Layer(nn.Module):
    """A linear layer with packed weights: as a library's, without the library. held: Rows or NF4."""

    def __init__(self, held: Any, outputs: int, bias: torch.Tensor | None):
        super().__init__()
        self.held, self.out_features, self.bias, self.weight = held, outputs, bias, None


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64], help="rows of a step")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="how weights are stored")
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=list(PRODUCTS), help="which products")
    parser.add_argument("--tiles", nargs="+", default=None, help="beside what the package takes; 0: none")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile ahead")
    parser.add_argument("--part", type=int, nargs=2, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("build/quantised_products"), help="path without suffix")
    arguments = parser.parse_args(argv)
    settings = list(_settings(arguments))
    if arguments.part is not None:
        index, count = arguments.part
        for setting in settings[index::count]:
            _measure(*setting, timed=False)
        return
    _compile_ahead(arguments)
    lines = [f"{torch.cuda.get_device_name()}, us a product (GB/s of weights); copy {_copy_speed():,.0f} GB/s", ""]
    columns = ["rows", "weights", "tile", *arguments.products, "a step, ms", "largest error"]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    print("\n".join(lines), flush=True)
    found: dict[tuple, dict] = {}
    for rows, scheme, tile, name in settings:
        cells = found.setdefault((rows, scheme, tile), {})
        cells[name] = _measure(rows, scheme, tile, name, timed=True)
        if len(cells) == len(arguments.products):
            lines.append(_line(rows, scheme, tile, cells))
            print(lines[-1], flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(with_ending(arguments.output, ".md"), "\n".join(lines) + "\n")


def _line(rows: int, scheme: str, tile: str, cells: dict) -> str:
    texts, errors, total = [], [], 0.0
    for name, (microseconds, error) in cells.items():
        product = PRODUCTS[name]
        size = sum(product.sizes) * product.inputs * BYTES[scheme]
        texts.append(f"{microseconds:.2f} ({size / microseconds / 1e3:,.0f})" if microseconds else str(error))
        total += product.times * (microseconds or float("nan"))
        errors.append(error)
    worst = max((error for error in errors if isinstance(error, float)), default=float("nan"))
    return f"| {rows} | {scheme} | {tile} | " + " | ".join(texts) + f" | {total / 1e3:.3f} | {worst:.1e} |"


def _settings(arguments: argparse.Namespace) -> Iterator[tuple[int, str, str, str]]:
    for rows in arguments.rows:
        for scheme in arguments.schemes:
            if scheme == "library" and rows > 1:
                continue
            few = rows in tables.MATVEC_ROWS if scheme.startswith("nf4") else rows == 1
            kind = "many" if not few else "few nf4" if scheme.startswith("nf4") else "few bytes"
            others = TILES[kind] if arguments.tiles is None else [tile for tile in arguments.tiles if tile != "0"]
            # One of both kinds of NF4 tells which tile is best, and of 8 bits the one whose conversion is longer.
            sweeps = scheme in ("nf4, constants too", "int8") or arguments.tiles is not None
            for tile in ["now", *(others if sweeps and scheme not in ("bfloat16", "library") else [])]:
                for name in arguments.products:
                    yield rows, scheme, tile, name


def _compile_ahead(arguments: argparse.Namespace) -> None:
    command = [sys.executable, __file__, "--rows", *map(str, arguments.rows), "--schemes", *arguments.schemes]
    command += ["--products", *arguments.products]
    if arguments.tiles is not None:
        command += ["--tiles", *arguments.tiles]
    parts = [[*command, "--part", str(i), str(arguments.jobs)] for i in range(arguments.jobs)]
    for process in [subprocess.Popen(part) for part in parts]:
        process.wait()


@contextlib.contextmanager
def _with_tile(tile: str, rows: int, scheme: str) -> Iterator[None]:
    """The launch code takes this one for every product, and looks into our layers."""
    with contextlib.ExitStack() as stack:
        unpack = linear.unpack
        replaced = patch.object(linear, "unpack", lambda each: each.held if isinstance(each, Layer) else unpack(each))
        stack.enter_context(replaced)
        if tile != "now":
            numbers = _numbers(tile, rows, scheme)
            for table in _tables(rows, scheme):
                fixed = {(0, 0): numbers} if (0, 0) in table else {key: {(0, 0): numbers} for key in table}
                stack.enter_context(patch.dict(table, fixed, clear=True))
        yield


def _numbers(tile: str, rows: int, scheme: str) -> tuple[int, ...]:
    """What a tile leaves out: no limit to registers; 1 program of a GEMM."""
    numbers = tuple(map(int, tile.split("x")))
    few = rows in tables.MATVEC_ROWS if scheme.startswith("nf4") else rows == 1
    if few:
        return (*numbers, *(0,)[len(numbers) - 2 :]) if scheme.startswith("nf4") else numbers
    return (*numbers, *(1,)[len(numbers) - 4 :])


def _tables(rows: int, scheme: str) -> tuple[dict, dict]:
    """Of plain products and of gated ones."""
    if scheme.startswith("nf4"):
        few = rows in tables.MATVEC_ROWS
        return (tables.MATVEC_NF4, tables.MATVEC_GATED_NF4) if few else (tables.MATMUL_NF4, tables.MATMUL_GATED_NF4)
    if rows == 1:
        return tables.PROJECT_BYTES, tables.GATED_BYTES
    return tables.MATMUL_BYTES, tables.MATMUL_GATED_BYTES


@torch.no_grad()
def _measure(rows: int, scheme: str, tile: str, name: str, timed: bool) -> tuple[float | None, float | str]:
    """Microseconds and the largest error; None and why there is none."""
    try:
        with _with_tile(tile, rows, scheme):
            return _measured(rows, scheme, PRODUCTS[name], timed)
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"


def _measured(rows: int, scheme: str, product: Product, timed: bool) -> tuple[float | None, float | str]:
    torch.manual_seed(0)
    new = {"dtype": torch.bfloat16, "device": "cuda"}
    x, norm = torch.randn(rows, product.inputs, **new), GriffinRMSNorm(product.inputs, 1e-6).to(**new)
    norm.weight.data.normal_(0, 0.1)
    residual = torch.randn(rows, product.sizes[0], **new)
    size = sum(product.sizes) * product.inputs * BYTES[scheme]
    copies = max(2, int(CACHE / size) + 1) if timed else 1
    layers = [[_layer(scheme, outputs, product.inputs) for outputs in product.sizes] for _ in range(copies)]
    calls = [_call(scheme, product, x, norm, residual, each) for each in layers]
    found = torch.cat([each.double() for each in calls[0]()], 1)
    expected = _expected(scheme, product, x, norm, residual, layers[0])
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= ALLOWED:
        return None, f"wrong by {error:.2g}"
    return (_microseconds(calls) if timed else None), error


def _layer(scheme: str, outputs: int, inputs: int) -> nn.Module:
    """Random weights of about unit variance over their inputs."""
    bias, float32 = torch.randn(outputs, device="cuda", dtype=torch.bfloat16), {"device": "cuda"}
    if scheme == "bfloat16":
        made = nn.Linear(inputs, outputs, device="cuda", dtype=torch.bfloat16)
        made.bias = nn.Parameter(bias)
        return made
    scale = torch.rand(outputs, **float32) + 0.5
    if scheme == "int8":
        data = torch.randint(-127, 128, (outputs, inputs), device="cuda", dtype=torch.int8)
        return Layer(packed.Rows(data, scale / inputs**0.5, 1 / 127), outputs, bias)
    if scheme == "float8":
        data = torch.randn(outputs, inputs, **float32).to(torch.float8_e4m3fn)
        return Layer(packed.Rows(data, scale / inputs**0.5, 1.0), outputs, bias)
    data = torch.randint(0, 256, (outputs * inputs // 2,), device="cuda", dtype=torch.uint8)
    scales = outputs * inputs // packed.NF4_BLOCK
    code, nested = torch.tensor(NF4_CODE, **float32), (None, None, None)
    absmax = (torch.rand(scales, **float32) + 0.5) / inputs**0.5
    if scheme == "nf4, constants too":
        absmax = torch.randint(0, 256, (scales,), device="cuda", dtype=torch.uint8)
        shared = torch.rand(-(-scales // packed.NESTED_BLOCK), **float32) / inputs**0.5
        nested = torch.linspace(-1, 1, 256, **float32), shared, torch.tensor(1 / inputs**0.5, **float32)
    return Layer(packed.NF4(data, absmax, code, *nested, (outputs, inputs)), outputs, bias)


def _call(scheme: str, product: Product, x, norm, residual, layers: list[nn.Module]) -> Callable[[], list]:
    if scheme == "library":
        return lambda: [_by_the_library(x, each) for each in layers]
    overlap = can_overlap(x.device)
    launch = {"PDL": overlap, **({"launch_pdl": True} if overlap else {})}
    gemms = linear.Gemms(launch, decode_gemm_fits(properties(x.device)))
    if product.kind == "gated":
        return lambda: [gemms.gated(x, norm, *layers)]
    if product.kind == "norm":
        return lambda: gemms.project(x, norm, layers)
    return lambda: gemms.project(x, None, layers, residual)


def _by_the_library(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    import bitsandbytes.functional as library

    held = layer.held
    state = library.QuantState(held.scale, shape=torch.Size(held.shape), code=held.code, blocksize=packed.NF4_BLOCK,
                               quant_type="nf4", dtype=x.dtype)  # fmt: skip
    return library.gemv_4bit(x, held.data.view(-1, 1).t(), state=state)


def _expected(scheme: str, product: Product, x, norm, residual, layers: list[nn.Module]) -> torch.Tensor:
    """float64, over the numbers that the weights stand for; of the library without norm, bias and residual."""
    numbers = [
        each.weight.double() if scheme == "bfloat16" else each.held.dequantised(torch.float32).double()
        for each in layers
    ]
    if scheme == "library":
        return torch.cat([x.double() @ w.T for w in numbers], 1)
    y = x.double()
    if product.kind != "residual":
        y = y / (y.square().mean(1, keepdim=True) + norm.eps).sqrt() * (1 + norm.weight.double())
    ys = [y @ w.T + each.bias.double() for w, each in zip(numbers, layers)]
    if product.kind == "gated":
        return nn.functional.gelu(ys[0], approximate="tanh") * ys[1]
    return ys[0] + residual.double() if product.kind == "residual" else torch.cat(ys, 1)


def _microseconds(calls: list[Callable], replays: int = 12) -> float:
    """A call's share of a graph of all of them, the median of replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 1e3 * sorted(times)[replays // 2] / len(calls)


def _copy_speed() -> float:
    """GB/s, read and written."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / _microseconds([lambda: b.copy_(a)]) / 1e3


if __name__ == "__main__":
    main()
