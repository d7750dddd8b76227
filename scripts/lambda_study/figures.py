"""The picture of one task of a comparison of Λ initialisations: curves, sizes, paired differences, memory."""

from pathlib import Path

import numpy as np
from whole_files import in_one_step

from lambda_study.statistics import METRICS, by_arm_and_seed, compare


COLOURS = ("#2f6db5", "#c8472f", "#2d8a57", "#8059a8", "#7a7a7a", "#b0862b", "#3c8f9c", "#a8466f")


def draw_task(measured: list[dict], reference: str, task: str, path: Path) -> None:
    """Four panels of the measured runs of one task, as PNG; an arm has one colour in all of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    arms = list(by_arm_and_seed(measured, "loss"))
    colours = {arm: COLOURS[index % len(COLOURS)] for index, arm in enumerate(arms)}
    figure, grid = pyplot.subplots(2, 3, figsize=(16, 8.6), layout="constrained")
    for axes, draw in zip(grid[0], (_curves, _sizes, _memory)):
        draw(axes, measured, colours)
    for axes, (metric, words) in zip(grid[1], METRICS.items()):
        _differences(axes, measured, colours, reference, metric, words)
    handles = [pyplot.Line2D([], [], color=colour, linewidth=2.5, label=arm) for arm, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(arms), frameon=False, fontsize=10)
    seeds = len({run["seed"] for run in measured})
    title = f"{task}: lines are means over seeds ({seeds}), bands their range"
    figure.suptitle(f"{title}; below, differences paired by seed with 95% intervals, a tick for each seed", fontsize=11)
    with in_one_step(path) as half:
        figure.savefig(half, dpi=130)
    pyplot.close(figure)


def _runs(measured: list[dict], arm: str) -> list[dict]:
    return [run for run in measured if run["arm"] == arm and run["status"] == "finished"]


def _band(axes, x, values, colour) -> None:
    """values (seeds, points)."""
    axes.plot(x, np.mean(values, axis=0), color=colour, linewidth=1.6, marker="o", markersize=3)
    axes.fill_between(x, np.min(values, axis=0), np.max(values, axis=0), color=colour, alpha=0.12, linewidth=0)


def _figure_name(measured: list[dict]) -> str:
    return "accuracy" if "accuracy" in measured[0]["curve"][0] else "loss"


UNITS = {"accuracy": "accuracy (share of right answers)", "loss": "loss (nats a token)"}


def _curves(axes, measured: list[dict], colours: dict[str, str]) -> None:
    name = _figure_name(measured)
    for arm, colour in colours.items():
        if runs := _runs(measured, arm):
            first = 1 if name == "loss" else 0  # before training it is so high that nothing else would be seen
            steps = [point["step"] for point in runs[0]["curve"][first:]]
            _band(axes, steps, [[point[name] for point in run["curve"][first:]] for run in runs], colour)
    axes.set(xlabel="training steps", ylabel=UNITS[name], title="on the trained sizes, while it learns")
    axes.grid(alpha=0.25)


def _sizes(axes, measured: list[dict], colours: dict[str, str]) -> None:
    name = _figure_name(measured)
    trained = measured[0]["settings"].get("sizes", [measured[0]["settings"].get("length")])
    for arm, colour in colours.items():
        if runs := _runs(measured, arm):
            sizes = [entry["size"] for entry in runs[0]["evaluations"]]
            _band(axes, sizes, [[entry[name] for entry in run["evaluations"]] for run in runs], colour)
    axes.axvline(max(trained), color="#555555", linestyle=":", linewidth=1.2)
    axes.annotate(" trained up to here", (max(trained), 0.02), xycoords=("data", "axes fraction"), color="#555555")
    axes.set_xscale("log", base=2)
    label = "first position of the bucket, tokens" if name == "loss" else "length or distance, tokens"
    axes.set(xlabel=label, ylabel=UNITS[name], title="beyond the trained sizes, at the end")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)


def _differences(axes, measured: list[dict], colours: dict, reference: str, metric: str, words: str) -> None:
    table = by_arm_and_seed(measured, metric)
    rows = compare(table, reference) if reference in table else []
    for index, c in enumerate(rows):
        half = c.half_width if np.isfinite(c.half_width) else 0
        axes.errorbar(c.difference, index, xerr=half, color=colours[c.arm], fmt="o", capsize=4, linewidth=1.8)
        pairs = [table[c.arm][seed] - table[reference][seed] for seed in table[c.arm] if seed in table[reference]]
        axes.plot(pairs, [index + 0.25] * len(pairs), "|", color=colours[c.arm], markersize=9)
    axes.axvline(0, color="#222222", linewidth=1)
    axes.locator_params(axis="x", nbins=6)  # so that long numbers stay apart
    axes.set_yticks(range(len(rows)), [c.arm for c in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel=f"difference from {reference} (nats; left is better)", title=words)
    axes.grid(axis="x", alpha=0.25)


def _memory(axes, measured: list[dict], colours: dict[str, str]) -> None:
    for arm, colour in colours.items():
        if runs := _runs(measured, arm):
            steps = [point["step"] for point in runs[0]["memory"]]
            medians = [
                [np.mean([layer["memory"][2] for layer in point["layers"]]) for point in run["memory"]] for run in runs
            ]
            _band(axes, steps, medians, colour)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(
        xlabel="training steps",
        ylabel="median memory of a channel at r = 0.5 (tokens)",
        title="where Λ goes: medians of the layers, averaged",
    )
    axes.grid(alpha=0.25)
