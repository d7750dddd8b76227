"""Writes the page of the long runs with several initialisations of Λ: `python scripts/report_lambda_long.py FOLDER`.

Reads FOLDER/runs.jsonl, which study_lambda_long.py leaves, finished or not. Writes FOLDER.md, with every figure taken
from the runs, and FOLDER.png: the lead against tokens, loss by position, recall by distance, memories by layer.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import spoken
from command_line import Parser, ShowDefaultsAndLines
from compare_lambda_inits import read_records
from lambda_study.figures import COLOURS
from lambda_study.run import QUANTILES
from lambda_study.statistics import interval
from report_lambda_inits import check_fields, provenance, with_kept_note
from whole_files import in_one_step, write_whole


Runs = list[dict]


def groups(records: Runs) -> dict[tuple[str, int], Runs]:
    """By size and length in tokens, in the order they come in: what may be compared with each other."""
    found: dict[tuple[str, int], Runs] = {}
    for record in records:
        found.setdefault((record["size"], record["tokens"]), []).append(record)
    return found


def curve(run: dict) -> dict[int, float]:
    """{tokens: held-out loss}."""
    return {point["step"] * run["tokens_a_step"]: point["loss"] for point in run["curve"] if point["step"]}


def pairs(runs: Runs, arm: str, reference: str) -> list[tuple[dict, dict]]:
    """(run of the arm, run of the reference) of the same phase and seed, or of one seed where phases differ."""
    own = {run["seed"]: run for run in runs if run["arm"] == arm}
    others = {run["seed"]: run for run in runs if run["arm"] == reference}
    return [(own[seed], others[seed]) for seed in sorted(own.keys() & others.keys())]


def lead(runs: Runs, arm: str, reference: str) -> list[tuple[int, float, float, int]]:
    """(tokens, mean difference of the held-out loss, half width of its 95% interval, pairs), arm minus reference."""
    curves = [(curve(own), curve(other)) for own, other in pairs(runs, arm, reference)]
    counts = sorted({tokens for own, other in curves for tokens in own.keys() & other.keys()})
    rows = []
    for tokens in counts:
        values = np.array([own[tokens] - other[tokens] for own, other in curves if tokens in own and tokens in other])
        mean, half_width, _ = interval(values)
        rows.append((tokens, mean, half_width, len(values)))
    return rows


def tokens_to_reach(points: dict[int, float], loss: float) -> float | None:
    """Tokens after which the curve first is at `loss`, log-linear between its points; None where it never is."""
    counts = sorted(points)
    for before, after in zip([None, *counts], counts):
        if points[after] <= loss:
            if before is None:
                return float(after)
            share = (points[before] - loss) / (points[before] - points[after])
            return float(before * (after / before) ** share)
    return None


def measured(runs: Runs) -> Runs:
    """Of a group, the runs that no learning rate was chosen by; of an arm with several rates, those at its best one."""
    kept = []
    for arm in dict.fromkeys(run["arm"] for run in runs if run["measured"]):
        own = [run for run in runs if run["measured"] and run["arm"] == arm]
        rate = best_rate(own)
        kept += [run for run in own if run["learning_rate"] == rate]
    return kept


def best_rate(runs: Runs) -> float:
    """The rate with the lowest mean loss after as many tokens as all of these runs have seen."""
    rates = sorted({run["learning_rate"] for run in runs})
    seen = set.intersection(*(set(curve(run)) for run in runs))
    if len(rates) == 1 or not seen:
        return rates[0]
    at_rate = {rate: [curve(run)[max(seen)] for run in runs if run["learning_rate"] == rate] for rate in rates}
    return min(at_rate, key=lambda rate: np.mean(at_rate[rate]))


def page(name: str, records: Runs, reference: str) -> str:
    lines = ["# Which Λ, to the end of a pretraining: the measured runs", "", *provenance(records), ""]
    unfinished = [record for record in records if record["status"] == "paused"]
    if unfinished:
        lines += [f"{len(unfinished)} of the runs are not at their end: {', '.join(r['key'] for r in unfinished)}.", ""]
    lines += [f"![Lead, loss by position, recall, memories]({name}.png)", "", *settings_lines(records), ""]
    for (size, tokens), runs in groups(records).items():
        lines += [f"## {size}, {tokens / 1e6:,.0f}M tokens", ""]
        lines += rate_table(runs)
        if own := measured(runs):
            lines += [*loss_table(own, reference), ""]
            lines += [*lead_table(own, reference), ""]
            lines += by_distance(own, "Loss, nats a token, from position", positions)
            lines += by_distance(own, "Nats saved a token of held-out text read again, by distance", recall_of("text"))
            lines += by_distance(own, "Share of random tokens copied, by distance", recall_of("random", "accuracy"))
            lines += [*spectrum_table(own), ""]
    lines += ["## What is not claimed", "", *limits(records), ""]
    lines += [f"Every run, with its curve: [{name}/runs.jsonl]({name}/runs.jsonl).", ""]
    return "\n".join(lines)


def settings_lines(records: Runs) -> list[str]:
    settings = records[0]["settings"]
    data = settings["data"]
    return [
        f"{data['train']['tokens']:,} training tokens of text and code ({data['train']['bytes']:,} bytes, each",
        f"paragraph once), {data['held_out']['tokens']:,} held out by document; a BPE of {settings['vocab_size']:,}. "
        f"Rows of {settings['length']:,} tokens, {settings['rows']} a step;",
        f"AdamW, betas 0.9 and 0.95, weight decay {settings['weight_decay']:g} on matrices alone, clipped at "
        f"{settings['max_grad_norm']:g}; a warmup of {settings['warmup']:.0%} and a cosine to zero.",
        "Runs of one seed share the order of the data and all initial weights but Λ. Losses are of the same held-out",
        "rows, in nats a token; differences are paired by seed, with the 95% t interval of n - 1 degrees of freedom.",
        "",
        f"A step of {records[0]['parameters']:,} parameters and {records[0]['tokens_a_step']:,} tokens took "
        f"{1000 * _seconds_a_step(records[0]):.1f} ms, evaluations on the way counted.",
    ]


def _seconds_a_step(run: dict) -> float:
    return run["seconds"] / max(1, run["curve"][-1]["step"])


def rate_table(runs: Runs) -> list[str]:
    """The final loss at each learning rate, of the seeds that ran at several; in a column arms differ in Λ alone."""
    ended = [run for run in runs if run["status"] != "paused"]
    rates_of: dict[int, set[float]] = {}
    for run in ended:
        rates_of.setdefault(run["seed"], set()).add(run["learning_rate"])
    found: dict[tuple[str, float], list[float]] = {}
    for run in ended:
        if len(rates_of[run["seed"]]) > 1:
            found.setdefault((run["arm"], run["learning_rate"]), []).append(curve_end(run))
    rates = sorted({rate for _, rate in found})
    if not rates:
        return []
    lines = [
        f"| final loss at the rate | {' | '.join(f'{rate:g}' for rate in rates)} |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for arm in dict.fromkeys(arm for arm, _ in found):
        cells = (f"{np.mean(found[arm, rate]):.4f}" if (arm, rate) in found else "" for rate in rates)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return [*lines, ""]


def curve_end(run: dict) -> float:
    return run["curve"][-1]["loss"]


def loss_table(runs: Runs, reference: str) -> list[str]:
    lines = [
        f"| arm | learning rate | seeds | final loss | minus `{reference}` | 95% interval | tokens to its loss |",
        "|---" * 7 + "|",
    ]
    ends = [run for run in runs if run["status"] == "finished"]
    for arm in dict.fromkeys(run["arm"] for run in ends):
        own = [run for run in ends if run["arm"] == arm]
        rates = ", ".join(f"{rate:g}" for rate in sorted({run["learning_rate"] for run in own}))
        cells = [arm, rates, str(len(own)), f"{np.mean([curve_end(run) for run in own]):.4f}", "", "", ""]
        both = pairs(ends, arm, reference)
        if arm != reference and both:
            mean, half, _ = interval(np.array([curve_end(a) - curve_end(b) for a, b in both]))
            cells[4], cells[5] = f"{mean:+.4f}", _interval(mean, half)
            needed = [tokens_to_reach(curve(a), curve_end(b)) for a, b in both]
            needed = [count / a["tokens"] for count, (a, _) in zip(needed, both) if count is not None]
            cells[6] = f"{np.mean(needed):.0%} of them ({len(needed)} of {len(both)} pairs)" if needed else "never"
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "The last column reads the arm's own curve, whose learning rate is still high there: it says too little, not "
        "too much, of what is saved.",
    ]


def _interval(mean: float, half_width: float) -> str:
    return f"{mean - half_width:+.4f} to {mean + half_width:+.4f}" if np.isfinite(half_width) else "one pair"


def lead_table(runs: Runs, reference: str) -> list[str]:
    arms = [arm for arm in dict.fromkeys(run["arm"] for run in runs) if arm != reference]
    leads = {arm: {row[0]: row for row in lead(runs, arm, reference)} for arm in arms}
    counts = sorted({tokens for rows in leads.values() for tokens in rows})
    lines = [f"| loss minus `{reference}` after | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    for tokens in counts:
        cells = [_lead(leads[arm].get(tokens)) for arm in arms]
        lines.append(f"| {tokens / 1e6:,.1f}M tokens | {' | '.join(cells)} |")
    return lines


def _lead(row: tuple | None) -> str:
    if row is None:
        return ""
    _, mean, half, count = row
    return f"{mean:+.4f} [{_interval(mean, half)}]" if count > 1 else f"{mean:+.4f}"


def positions(run: dict) -> dict[int, float]:
    return {entry["size"]: entry["loss"] for entry in run.get("evaluations", [])}


def recall_of(kind: str, figure: str = "saved") -> Callable[[dict], dict[int, float]]:
    return lambda run: {e["distance"]: e[figure] for e in run.get("recall", []) if e["kind"] == kind}


def means(runs: Runs, figures: Callable[[dict], dict[int, float]]) -> dict[str, dict[int, float]]:
    """{arm: {position or distance: mean over seeds}}."""
    table: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        for place, value in figures(run).items():
            table.setdefault(run["arm"], {}).setdefault(place, []).append(value)
    return {arm: {place: float(np.mean(values)) for place, values in row.items()} for arm, row in table.items()}


def by_distance(runs: Runs, title: str, figures: Callable[[dict], dict[int, float]]) -> list[str]:
    table = means(runs, figures)
    places = sorted({place for row in table.values() for place in row})
    if not places:
        return []
    lines = [f"| {title} | {' | '.join(f'{place:,}' for place in places)} |", "|---" * (len(places) + 1) + "|"]
    for arm, row in table.items():
        lines.append(f"| {arm} | {' | '.join(f'{row[p]:.3f}' if p in row else '' for p in places)} |")
    return [*lines, ""]


def spectrum_table(runs: Runs) -> list[str]:
    """Medians of each recurrent layer's memory at r = 0.5 at the start and at the end, and 5% and 95% quantiles."""
    low, middle, high = (QUANTILES.index(q) for q in (0.05, 0.5, 0.95))
    layers = max(len(run["memory"][-1]["layers"]) for run in runs)
    heads = " | ".join(f"layer {k + 1}" for k in range(layers))
    lines = [f"| memory at r = 0.5, tokens: median (5% to 95%) | {heads} |", "|---" * (layers + 1) + "|"]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm]
        for words, index in (("at the start", 0), ("at the end", -1)):
            values = np.mean([[layer["memory"] for layer in run["memory"][index]["layers"]] for run in own], axis=0)
            cells = (f"{v[middle]:.1f} ({v[low]:.1f} to {v[high]:,.0f})" for v in values)
            lines.append(f"| {arm}, {words} | {' | '.join(cells)} |")
    return lines


def limits(records: Runs) -> list[str]:
    largest, longest = max(r["parameters"] for r in records), max(r["tokens"] for r in records)
    seeds = len({record["seed"] for record in measured(records)})
    return [
        f"- Models of more than {largest:,} parameters, {longest / 1e6:,.0f}M tokens and {seeds} seeds.",
        "- Other optimisers, schedules, batch sizes, tokenizers and texts than these.",
        "- A lead in the middle of a run is one at a high learning rate; only the last point of each length is that of "
        "a trained model.",
    ]


# The picture


def draw(records: Runs, reference: str, path: Path) -> None:
    """Of the longest group of the first size: lead, loss by position, recall, memories by layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    arms = list(dict.fromkeys(record["arm"] for record in records))
    colours = {arm: COLOURS[index % len(COLOURS)] for index, arm in enumerate(arms)}
    size = records[0]["size"]
    lengths = {tokens: measured(runs) for (name, tokens), runs in groups(records).items() if name == size}
    lengths = {tokens: runs for tokens, runs in lengths.items() if runs} or {records[0]["tokens"]: records}
    longest = lengths[max(lengths)]
    figure, grid = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    _draw_lead(grid[0, 0], lengths, colours, reference)
    _draw_by_distance(grid[0, 1], longest, colours, positions, "loss (nats a token)", "by position in the document")
    _draw_by_distance(grid[1, 0], longest, colours, recall_of("text"), "nats saved a token", "a passage read again")
    _draw_memories(grid[1, 1], longest, colours)
    handles = [pyplot.Line2D([], [], color=colour, linewidth=2.5, label=arm) for arm, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(arms)), frameon=False, fontsize=10)
    with in_one_step(path) as half:
        figure.savefig(half, dpi=130)
    pyplot.close(figure)


def _draw_lead(axes, lengths: dict[int, Runs], colours: dict[str, str], reference: str) -> None:
    for index, tokens in enumerate(sorted(lengths, reverse=True)):
        runs = lengths[tokens]
        for arm, colour in colours.items():
            rows = lead(runs, arm, reference) if arm != reference else []
            if rows:
                x, mean, half, _ = map(np.array, zip(*rows))
                half = np.where(np.isfinite(half), half, 0)
                axes.plot(x, mean, color=colour, linewidth=1.8, linestyle="-" if index == 0 else ":", marker=".")
                axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(0, color="#222222", linewidth=1)
    axes.set_xscale("log")
    lowest = min(
        (row[1] for runs in lengths.values() for arm in colours for row in lead(runs, arm, reference)), default=0
    )
    axes.set_ylim(bottom=min(lowest * 1.1, -0.01))
    axes.set(xlabel="tokens seen", ylabel=f"held-out loss minus {reference} (nats)", title="lead; dotted: shorter runs")
    axes.grid(alpha=0.25)


def _draw_by_distance(axes, runs: Runs, colours: dict, figures: Callable, unit: str, title: str) -> None:
    for arm, row in means(runs, figures).items():
        places = sorted(place for place in row if place > 0)
        axes.plot(places, [row[place] for place in places], color=colours[arm], marker="o", markersize=3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="tokens", ylabel=unit, title=title)
    axes.grid(alpha=0.25)


def _draw_memories(axes, runs: Runs, colours: dict) -> None:
    middle = QUANTILES.index(0.5)
    for arm, colour in colours.items():
        for run in (run for run in runs if run["arm"] == arm):
            for layer in range(len(run["memory"][0]["layers"])):
                x = [max(1, point["step"]) * run["tokens_a_step"] for point in run["memory"]]
                y = [point["layers"][layer]["memory"][middle] for point in run["memory"]]
                axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlabel="tokens seen", ylabel="memory at r = 0.5 (tokens)", title="median of each layer")
    axes.grid(alpha=0.25)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__, formatter_class=ShowDefaultsAndLines)
    parser.add_argument("folder", type=Path, help="the --output of study_lambda_long.py")
    parser.add_argument("--reference", default="uniform", help="the arm that others are compared with")
    arguments = parser.parse_args(argv)
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} does not exist: allowed are folders of study_lambda_long.py")
    try:
        records = list(read_records(arguments.folder / "runs.jsonl").values())
        check_fields(arguments.folder / "runs.jsonl", records, ("size", "tokens", "curve"), "study_lambda_long.py")
    except ValueError as error:
        parser.error(str(error))
    records = [record for record in records if len(record["curve"]) > 1]
    if not any(record["arm"] == arguments.reference for record in records):
        parser.error(f"{arguments.folder}/runs.jsonl holds no run of the reference {arguments.reference!r}")
    folder = arguments.folder
    output = folder.with_name(folder.name + ".md")
    with spoken.writing(__file__):
        draw(records, arguments.reference, folder.with_name(folder.name + ".png"))
        write_whole(output, with_kept_note(output, page(folder.name, records, arguments.reference)))
    print("written:", output, folder.with_name(folder.name + ".png"))


if __name__ == "__main__":
    main()
