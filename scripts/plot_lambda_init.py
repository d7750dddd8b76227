"""Draws what each initialisation of Λ means: `python scripts/plot_lambda_init.py [--checkpoint MODEL]`.

For every registered initialisation, for Mamba's, and for each recurrent layer of a trained model if one is given: the
distribution over channels of a^c, of a_t at the gate's start, and of memory length. Writes OUTPUT.png, OUTPUT.svg and
OUTPUT.md with the figures.

At the start the gates' biases are 0, so r is near 0.5: the figure takes r = 0.5 exactly, for trained layers too, whose
gates by then depend on the input. Memory length is 1 / (1 - a_t), tokens: how far back the input weighs on average.
"""

import math
from pathlib import Path
from typing import NamedTuple

import matplotlib
import spoken
import torch
from benchmarks.birth_certificate import birth_certificate, birth_lines
from command_line import Parser, ShowDefaultsAndLines
from training.hub_ids import require_model
from whole_files import in_one_step, with_ending, write_whole

from modeling_griffin import LAMBDA_INITS
from modeling_griffin.rg_lru import Decay


CHANNELS = 2**17  # drawn of each initialisation, enough for smooth histograms
START_GATE = 0.5
PANELS = (
    ("gate wide open", "$a^c$: share of the state kept in a step at r = 1"),
    ("gate at its start", "$a_t$: share of the state kept in a step at r = 0.5"),
    ("memory at the gate's start", "memory length 1 / (1 − $a_t$) at r = 0.5 (tokens, log scale)"),
)
NOTES = {
    "uniform": "the paper: $a^c$ uniform in {bounds}",
    "recurrent_gemma": "released code: $a$, not $a^c$, in {bounds}",
    "hippogriff": "Λ evenly spaced between the paper's ends",
    "log_uniform_memory": "every time scale equally often",
    "constant": "a control: no spread",
}
HEIGHTS = "height: share of channels, to each peak's scale"
COLOURS = ("#2f6db5", "#c8472f", "#2d8a57", "#8059a8", "#7a7a7a", "#b0862b", "#3c8f9c", "#a8466f")
MAMBA_COLOUR, LAYER_COLOUR = "#3b3b3b", "#d08a1d"


class Row(NamedTuple):
    """One line of the figure. log_decay: log(a^c), (channels,), or None where there is no open gate (Mamba);
    log_start: log(a_t) at the gate's start."""

    name: str
    note: str
    colour: str
    log_decay: torch.Tensor | None
    log_start: torch.Tensor


def initialisation_rows(c: float, low: float, high: float) -> list[Row]:
    """A row for each entry of LAMBDA_INITS."""
    torch.manual_seed(0)
    rows = []
    for index, (name, draw) in enumerate(LAMBDA_INITS.items()):
        log_decay = -c * torch.nn.functional.softplus(draw(CHANNELS, c, low, high).double())
        note = NOTES.get(name, "registered").format(bounds=f"[{low:g}, {high:g}]")
        rows.append(Row(name, note, COLOURS[index % len(COLOURS)], log_decay, START_GATE * log_decay))
    return rows


def mamba_row() -> Row:
    """a = exp(-n dt) over the states n = 1 to 16 of a channel, dt log-uniform in [0.001, 0.1] (arXiv 2312.00752)."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(CHANNELS, generator=generator, dtype=torch.float64)
    dt = torch.exp(math.log(1e-3) + draw * (math.log(1e-1) - math.log(1e-3)))
    state = torch.randint(1, 17, (CHANNELS,), generator=generator)
    return Row("Mamba", "$e^{-n\\,dt}$, n = 1…16, dt log-uniform", MAMBA_COLOUR, None, -dt * state)


def checkpoint_rows(source: str) -> list[Row]:
    """A row for each recurrent layer of a saved model, a folder or a Hub id of this project's kind."""
    from transformers import AutoModelForCausalLM

    require_model("--checkpoint", source, "a folder or Hub id with a Griffin")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, Decay):
            log_decay = module().detach().double()
            number = name.split("layers.")[-1].split(".")[0]
            note = f"{len(log_decay)} channels; began as {model.config.lambda_init}"
            rows.append(Row(f"trained, layer {number}", note, LAYER_COLOUR, log_decay, START_GATE * log_decay))
    if not rows:
        raise ValueError(f"{source!r} has no recurrent layer: allowed are models with linear_attention layers")
    return rows


def memory(log_decay: torch.Tensor) -> torch.Tensor:
    """1 / (1 - a), tokens."""
    return -1 / torch.expm1(log_decay)


def values(row: Row) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """What the three panels show."""
    open_gate = None if row.log_decay is None else row.log_decay.exp()
    return open_gate, row.log_start.exp(), memory(row.log_start)


def table(rows: list[Row]) -> list[str]:
    """Smallest, median and largest value over channels, as lines of Markdown."""
    lines = ["| min / median / max | $a^c$ | $a_t$ at r = 0.5 | memory at r = 0.5, tokens |", "|---|---|---|---|"]
    for row in rows:
        cells = []
        for data, digits in zip(values(row), (4, 4, 1)):
            ends = () if data is None else (data.min(), data.median(), data.max())
            cells.append(" / ".join(f"{end.item():.{digits}f}" for end in ends))
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return lines


def page(rows: list[Row], text: str, picture: str) -> str:
    return "\n".join(
        [
            "# What each initialisation of Λ means",
            "",
            *birth_lines(birth_certificate("cpu", None)),
            f"{CHANNELS:,} channels drawn of each; of a trained layer its own.",
            "",
            text.replace("\n", " "),
            "",
            f"![Distributions of a^c, of a_t and of memory length]({picture})",
            "",
            *table(rows),
            "",
        ]
    )


def caption(rows: list[Row], low: float, high: float) -> str:
    """What to see, in figures of this very drawing; of the three that the question is about."""
    medians = {row.name: memory(row.log_start).median().item() for row in rows}
    return (
        f"What to see: the paper keeps $a^c$ in [{low:g}, {high:g}], the released code keeps $a$ there, so its typical "
        f"channel forgets {medians['uniform'] / medians['recurrent_gemma']:.0f} times sooner\n"
        f"(median memory {medians['recurrent_gemma']:.1f} tokens instead of {medians['uniform']:.0f}); hippogriff has "
        f"the paper's range, but all time scales equally often: half of its channels remember longer than "
        f"{medians['hippogriff']:.0f} tokens."
    )


def draw(rows: list[Row], text: str, output: Path) -> list[Path]:
    """One line of three histograms for each row, and the page with their figures; returns the files written."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text stays text in the SVG, and the same input gives the same file.
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lambda", "font.size": 9, "mathtext.default": "it"})
    bins = _bins(rows)
    height = 0.62 * len(rows) + 1.75
    figure, grid = pyplot.subplots(
        len(rows), 3, figsize=(12.5, height), squeeze=False, sharex="col", gridspec_kw={"width_ratios": (1, 1, 1.25)}
    )
    figure.subplots_adjust(left=0.215, right=0.985, top=1 - 0.95 / height, bottom=0.68 / height, hspace=0.1, wspace=0.1)
    for row, line in zip(rows, grid):
        for panel, (axes, data) in enumerate(zip(line, values(row))):
            _draw_panel(axes, data, bins[panel], row.colour, logarithmic=panel == 2)
        line[0].text(-0.04, 0.52, row.name, transform=line[0].transAxes, ha="right", color=row.colour, weight="bold")
        line[0].text(-0.04, 0.16, row.note, transform=line[0].transAxes, ha="right", color="#444444", fontsize=7.5)
    for axes, (title, _) in zip(grid[0], PANELS):
        axes.set_title(title, fontsize=10, weight="bold", loc="left", color="#222222", pad=8)
    for axes, (_, label) in zip(grid[-1], PANELS):
        axes.set_xlabel(label, fontsize=9)
        axes.tick_params(labelbottom=True)
    figure.text(0.012, 1 - 0.12 / height, text, va="top", fontsize=9.5, color="#222222", linespacing=1.35)
    figure.text(0.012, 0.14 / height, HEIGHTS, fontsize=7.5, color="#444444")
    paths = [with_ending(output, suffix) for suffix in (".png", ".svg")]
    output.parent.mkdir(parents=True, exist_ok=True)
    with in_one_step(paths[0]) as half:
        figure.savefig(half, dpi=150)
    with in_one_step(paths[1]) as half:
        figure.savefig(half, metadata={"Date": None})
    pyplot.close(figure)
    paths.append(with_ending(output, ".md"))
    write_whole(paths[-1], page(rows, text, paths[0].name))
    return paths


def _bins(rows: list[Row]) -> list[torch.Tensor]:
    """Edges for each panel, over all rows, so that heights compare within a column."""
    shown = list(zip(*map(values, rows)))
    lowest = [min(data.min().item() for data in column if data is not None) for column in shown]
    longest = max(data.max().item() for data in shown[2])
    ends = math.floor(math.log10(lowest[2]) * 4) / 4, math.ceil(math.log10(longest) * 4) / 4
    edges = [torch.linspace(math.floor(20 * low) / 20, 1, 121) for low in lowest[:2]]
    return [*edges, torch.logspace(*ends, 121)]


def _draw_panel(axes, data: torch.Tensor | None, edges: torch.Tensor, colour: str, logarithmic: bool) -> None:
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
    axes.set(yticks=[], ylim=(0, 1.32), xlim=(edges[0], edges[-1]))
    axes.tick_params(labelbottom=False, length=2, color="#999999", labelcolor="#333333")
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.tick_params(which="minor", length=0)
    if data is None:
        axes.text(0.5, 0.35, "no such bound", transform=axes.transAxes, ha="center", color="#777777", fontsize=8)
        return
    counts = torch.histogram(data.float(), edges.float()).hist
    axes.stairs(counts / counts.max(), edges, fill=True, color=colour, alpha=0.55, linewidth=0)
    axes.stairs(counts / counts.max(), edges, color=colour, linewidth=1)
    median = data.median().item()
    axes.plot([median, median], [0, 1.26], color="#111111", linewidth=1)
    # Beside the line, on the side with more room.
    position = axes.transAxes.inverted().transform(axes.transData.transform((median, 0)))[0]
    words = f"median {median:.3g}" if logarithmic else f"{median:.3f}"
    on_left = position > 0.6
    axes.annotate(
        words,
        (median, 1.18),
        xytext=(-4 if on_left else 4, 0),
        textcoords="offset points",
        ha="right" if on_left else "left",
        va="center",
        fontsize=7.5,
        color="#111111",
    )


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__, formatter_class=ShowDefaultsAndLines)
    parser.add_argument(
        "--checkpoint", default=None, help="a trained model, folder or Hub id: a row for each layer (default: none)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("results/lambda_init/lambda_init"), help="path without suffix"
    )
    parser.add_argument("--c", type=float, default=8.0, help="the exponent c (default: 8)")
    bounds, text = (0.9, 0.999), "range of a^c (default: 0.9 0.999)"
    parser.add_argument("--bounds", type=float, nargs=2, default=bounds, metavar=("LOW", "HIGH"), help=text)
    arguments = parser.parse_args(argv)
    (low, high), c = arguments.bounds, arguments.c
    if not (0 < low < high < 1 and c > 0):
        parser.error(f"--bounds {low} {high} --c {c}: allowed are 0 < LOW < HIGH < 1 and c > 0")
    parser.make_folder_of(arguments.output)
    rows = [*initialisation_rows(c, low, high), mamba_row()]
    text = caption(rows, low, high)
    if arguments.checkpoint is not None:
        try:
            rows += checkpoint_rows(arguments.checkpoint)
        except (OSError, ValueError) as error:
            spoken.stop(__file__, error)
    print("\n".join(table(rows)))
    with spoken.writing(__file__):
        print("written:", *draw(rows, text, arguments.output))


if __name__ == "__main__":
    main()
