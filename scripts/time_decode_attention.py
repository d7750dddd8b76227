"""Times one query's attention over a ring, by how many splits share it, on a GPU.

    python scripts/time_decode_attention.py --output build/decode_attention

Each setting is first compared with plain PyTorch. Times are of one layer, medians of replays of a CUDA graph of 16
layers with rings of their own, so that keys come from memory as in a step. Writes OUTPUT.md and prints it: a row for a
model and a number of rows, a column for programs that the splits aim at; "now" is what the package takes.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from benchmark_scan import _time
from command_line import Parser
from whole_files import with_ending, write_whole

from modeling_griffin.decode.ops import Clock, KernelOps, PlainOps
from modeling_griffin.gpu import can_overlap
from modeling_griffin.kernels.device import decode


# name: query heads, head dimension, window
MODELS = {"RecurrentGemma 2B": (10, 256, 2049), "RecurrentGemma 9B": (16, 256, 2049), "test 2B": (20, 128, 1024)}
ROWS = (1, 64)
PROGRAMS = (16, 32, 64, 128)  # that the splits of all rows aim at; "now" is twice the multiprocessors
LAYERS, ALLOWED = 16, 2e-2  # of the largest output, in bfloat16


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/decode_attention_now"), help="path without suffix")
    arguments = parser.parse_args(argv)
    lines = [f"{torch.cuda.get_device_name()}, bfloat16, us a layer", ""]
    columns = ["model", "rows", "now", "4 warps", "8 warps", *map(str, PROGRAMS)]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, shape in MODELS.items():
        for rows in ROWS:
            cells = [_cell(shape, rows, None), _cell(shape, rows, None, warps=4), _cell(shape, rows, None, warps=8)]
            cells += [_cell(shape, rows, programs) for programs in PROGRAMS]
            lines.append(f"| {name} | {rows} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(with_ending(arguments.output, ".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))


@contextlib.contextmanager
def _aiming_at(programs: int | None, warps: int | None) -> Iterator[None]:
    names = ("ATTENTION_PROGRAMS", "multiprocessors", "ATTENTION_WARPS", "FEW_WARPS")
    before = {name: getattr(decode, name) for name in names}
    if warps is not None:
        decode.ATTENTION_WARPS = decode.FEW_WARPS = warps
    if programs is not None:
        decode.ATTENTION_PROGRAMS, decode.multiprocessors = 1, lambda device: programs
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(decode, name, value)


@torch.no_grad()
def _cell(shape: tuple[int, int, int], rows: int, programs: int | None, warps: int | None = None) -> str:
    (heads, head_dim, window), new = shape, {"dtype": torch.bfloat16, "device": "cuda"}
    q, k, v = (torch.randn(rows, n * head_dim, **new) for n in (heads, 1, 1))
    rings = [[torch.randn(rows, 1, window, head_dim, **new) for _ in range(2)] for _ in range(LAYERS)]
    angles = torch.rand(rows, head_dim // 4, device="cuda").repeat(1, 2)
    padding = torch.zeros(rows, dtype=torch.long, device="cuda")
    clock = Clock(torch.tensor([3 * window], device="cuda"), padding, angles.cos().to(**new), angles.sin().to(**new))
    kernels = KernelOps(can_overlap(q.device))

    def attend(ops, ring):
        return ops.attend(q, k, v, *ring, clock, head_dim**-0.5)

    with _aiming_at(programs, warps):
        splits = decode.attention_split(rows, heads, window, head_dim, 2, q.device)["SPLITS"]
        expected, found = (attend(ops, [x.clone() for x in rings[0]]) for ops in (PlainOps(), kernels))
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        if not error <= ALLOWED:
            return f"wrong by {error:.2g}"
        seconds = _time([lambda ring=ring: attend(kernels, ring) for ring in rings])["median"]
    return f"{seconds * 1e6:.1f} ({splits})"


if __name__ == "__main__":
    main()
