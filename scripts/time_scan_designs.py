"""Times designs of the scan's kernels against the one that is used, on a GPU; nothing that is wrong is timed.

    python scripts/time_scan_designs.py --output build/scan_designs        forward, backward, packed rows with resets

Each design is first compared with the float64 reference (at most twice the torch backend's error, in bfloat16) and run
50 times for equal bits. Times are medians of replays of a CUDA graph, as in `benchmark_scan.py`; the share is of the
copy ceiling of the same run. Writes OUTPUT.md and prints it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from benchmark_scan import FLOOR, _copy_ceiling, _inputs, _time
from command_line import Parser
from whole_files import with_ending, write_whole

from modeling_griffin import rg_lru_scan_triton as scan
from modeling_griffin.gpu import can_overlap, multiprocessors, register_limit
from modeling_griffin.rg_lru_scan import rg_lru_scan
from modeling_griffin.rg_lru_scan_triton import Tile


try:
    from benchmarks.scan_designs_kernels import persistent_forward_kernel
except ImportError:  # without Triton there is nothing to time, but its help is shown
    persistent_forward_kernel = None


SHAPES = [(8, 4096, 2560), (4, 2048, 4096), (1, 32768, 2560), (1, 131072, 4096)]
PACKED = [(1, 2048, 2560), (1, 8192, 2560), (1, 32768, 2560), (1, 131072, 2560)]
NOW, PARTS = "as it is", ["forward", "backward", "resets"]
FORWARD = {
    NOW: None,
    "4x8x64 at 72": Tile(4, 8, 64, 72),
    "2x16x64 at 96": Tile(2, 16, 64, 96),
    "8x8x64 at 80": Tile(8, 8, 64, 80),
}
PERSISTENT = {  # tile, blocks a multiprocessor, one reciprocal for both sigmoids
    "persistent 4x8x64 at 96": (Tile(4, 8, 64, 96), 5, False),
    "persistent 4x8x64 at 96, one reciprocal": (Tile(4, 8, 64, 96), 5, True),
    "persistent 8x8x64 at 96": (Tile(8, 8, 64, 96), 2, False),
}
BACKWARD = {NOW: None, "8x4x64 at 64": Tile(8, 4, 64, 64), "4x4x64 at 64": Tile(4, 4, 64, 64)}
NARROW_WITH_RESETS = {
    NOW: None,
    "128 registers, 8x16x32": Tile(8, 16, 32, 128),
    "half the rows, 16x8x32 at 96": Tile(16, 8, 32, 96),
}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/scan_designs_now"), help="path without suffix")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args(argv)
    ceiling = _copy_ceiling()
    lines = [f"{torch.cuda.get_device_name()}, copy ceiling {ceiling / 1e12:.2f} TB/s, bfloat16", ""]
    for part in arguments.only:
        lines += {"forward": _forward, "backward": _backward, "resets": _resets}[part](ceiling)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(with_ending(arguments.output, ".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))


def _forward(ceiling: float) -> list[str]:
    designs = {name: functools.partial(_by_tile, "_forward_tile", tile) for name, tile in FORWARD.items()}
    calls: dict[str, Callable] = {name: functools.partial(_scan, design) for name, design in designs.items()}
    calls |= {name: functools.partial(persistent, *options) for name, options in PERSISTENT.items()}
    return _table("forward", SHAPES, calls, lambda call, inputs, _: functools.partial(call, *inputs), ceiling)


def _backward(ceiling: float) -> list[str]:
    designs = {name: functools.partial(_by_tile, "_backward_tile", tile) for name, tile in BACKWARD.items()}

    def one(design, inputs, d_hidden):
        output = rg_lru_scan(*inputs, backend="triton")[0]

        def call(*_):
            with design():
                return torch.autograd.grad(output, inputs, d_hidden, retain_graph=True)

        return call

    return _table("backward", SHAPES, designs, one, ceiling)


def _resets(ceiling: float) -> list[str]:
    designs = {name: functools.partial(_by_tile, "_forward_tile", tile) for name, tile in NARROW_WITH_RESETS.items()}

    def one(design, inputs, _):
        reset = torch.rand(inputs[0].shape[:2], device="cuda") < 1 / 512
        return functools.partial(_scan, design, *inputs, reset=reset)

    return _table("forward", PACKED, designs, one, ceiling, "packed rows with resets, forward")


@contextlib.contextmanager
def _by_tile(name: str, tile: Tile | None) -> Iterator[None]:
    before = getattr(scan, name)
    if tile is not None:
        setattr(scan, name, lambda *shape: tile)
    try:
        yield
    finally:
        setattr(scan, name, before)


@torch.no_grad()
def _scan(design: Callable, *inputs, reset=None) -> torch.Tensor:
    with design():
        return rg_lru_scan(*inputs, reset=reset, backend="triton")[0]


@torch.no_grad()
def persistent(
    tile: Tile,
    blocks: int,
    one_reciprocal: bool,
    x: torch.Tensor,
    r: torch.Tensor,
    i: torch.Tensor,
    log_decay: torch.Tensor,
) -> torch.Tensor:
    """hidden (B, T, C) bfloat16 by `persistent_forward_kernel`; T and C in whole tiles."""
    batch, length, channels = x.shape
    tiles = batch * (length // tile.steps) * (channels // tile.channels)
    hidden, last = torch.empty_like(x), torch.empty(batch, channels, device=x.device)
    words = scan._cleared_words(x, tiles * tile.channels + 1)
    overlap = can_overlap(x.device)
    persistent_forward_kernel[(min(tiles, blocks * multiprocessors(x.device)),)](
        *(each.view(torch.int32) for each in (x, r, i)),
        *(log_decay, hidden.view(torch.int32), last, words, batch, length, channels // 2),
        SEGMENTS=tile.segments,
        ROWS=tile.rows,
        PAIRS=tile.channels // 2,
        ONE_RECIPROCAL=one_reciprocal,
        PDL=overlap,
        num_warps=tile.num_warps,
        **register_limit(tile.max_registers, x.device),
        **({"launch_pdl": True} if overlap else {}),
    )
    return hidden


def _table(direction: str, shapes, designs: dict, one: Callable, ceiling: float, title: str = "") -> list[str]:
    rule = "|---" * (1 + len(designs)) + "|"
    lines = [f"## {title or direction}", "", "| shape | " + " | ".join(designs) + " |", rule]
    refused = {name: reason for name, design in designs.items() if (reason := _wrong(direction, one, design))}
    for shape in shapes:
        cells = []
        for name, design in designs.items():
            if name in refused:
                cells.append("wrong")
                continue
            torch.cuda.empty_cache()
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                inputs, d_hidden = _inputs(shape)
                seconds = _time([one(design, inputs, d_hidden)] * 4, side)["median"]
            share = FLOOR[direction] * inputs[0].numel() / ceiling / seconds
            cells.append(f"{seconds * 1e6:.1f} us {share:.1%}")
            print(shape, direction, name, cells[-1], flush=True)
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return [*lines, *(f"{name}: {reason}" for name, reason in refused.items()), ""]


def _wrong(direction: str, one: Callable, design) -> str | None:
    """None where it is right and the same each time, else why not: nothing wrong is timed."""
    inputs, d_hidden = _inputs((2, 2048, 256), seed=1)
    torch.manual_seed(0)
    try:
        call = one(design, inputs, d_hidden)
        found = _several(call())
        expected, torch_s = (_judges(inputs, d_hidden, call, direction, backend) for backend in ("reference", "torch"))
        for exact, theirs, ours in zip(expected, torch_s, found):
            error, allowed = ((each.double() - exact).norm() for each in (ours, theirs))
            if not error <= 2 * allowed:
                return f"error {error:.3g}, the torch backend's is {allowed:.3g}"
        if any(not torch.equal(a, b) for _ in range(50) for a, b in zip(_several(call()), found)):
            return "other bits from one run to the next"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _several(outputs) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _judges(inputs, d_hidden, call, direction: str, backend: str) -> tuple[torch.Tensor, ...]:
    exact = [x.detach().double() if backend == "reference" else x.detach() for x in inputs]
    exact = [x.requires_grad_() for x in exact]
    hidden = rg_lru_scan(*exact, reset=getattr(call, "keywords", {}).get("reset"), backend=backend)[0]
    if direction == "forward":
        return (hidden.detach(),)
    return torch.autograd.grad(hidden, exact, d_hidden.to(hidden.dtype))


if __name__ == "__main__":
    main()
