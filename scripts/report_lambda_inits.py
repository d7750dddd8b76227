"""Writes the page of a comparison of Λ initialisations: `python scripts/report_lambda_inits.py results/FOLDER`.

Reads FOLDER/runs.jsonl, which scripts/compare_lambda_inits.py leaves, finished or not. Writes FOLDER.md, with every
figure taken from the runs, and FOLDER_TASK.png for each task.
"""

import math
from pathlib import Path

import numpy as np
import spoken
from command_line import Parser, ShowDefaultsAndLines
from compare_lambda_inits import read_records
from lambda_study.figures import draw_task
from lambda_study.statistics import METRICS, Comparison, by_arm_and_seed, compare, metrics, pooled_deviation
from whole_files import write_whole


KINDS = {
    "selective_copying": "selective copying",
    "induction_heads": "induction heads",
    "delayed_recall": "associative recall at a distance",
    "language_modelling": "language modelling",
}
PRECISION = """\
On the GPU products were computed in TF32, those of language modelling in bfloat16; weights, Λ and the recurrence in
float32."""
STATISTICS = """Every arm was trained once with each learning rate of the grid under a seed used for nothing else, and
measured with the rate that had the lowest final validation loss, which is that of the same held-out rows as the figures
here. Runs of the same seed share the order of the data and all initial weights but Λ. Differences are therefore paired
by seed: their mean, and its 95% t interval with n - 1 degrees of freedom. p is of the paired t-test after Holm's
correction over the arms in that column; nothing corrects for the number of columns and tasks. The effect size is the
difference over the standard deviation of one arm's runs over seeds, pooled over arms. "Reliably" means a corrected p
under 0.05; with few seeds only large effects can be reliable. The mean loss while learning is that of the points of the
curve: how soon, not how far. Beyond the trained sizes is the mean over the longer sizes or later positions."""

Tables = dict[tuple[str, str], list[Comparison]]  # by task and metric


def page(name: str, records: list[dict], reference: str, pictures: dict[str, str]) -> str:
    tasks = {record["task"]: [r for r in records if r["task"] == record["task"]] for record in records}
    tables = {}
    for task, runs in tasks.items():
        for metric in METRICS:
            values = by_arm_and_seed(runs, metric)
            tables[task, metric] = compare(values, reference) if reference in values else []
    lines = ["# Which initialisation of Λ: the measured comparison", "", *provenance(records), ""]
    lines += [
        "## In plain words",
        "",
        "At the sizes, seeds and budgets given below, and no further:",
        "",
        *plain_words(tables, tasks, reference),
        "",
    ]
    lines += ["## How it was compared", "", STATISTICS, ""]
    if any(record["device"] == "cuda" for record in records):
        lines += [PRECISION, ""]
    for task, runs in tasks.items():
        lines += task_section(task, runs, tables, reference, pictures[task])
    lines += ["## What was not tested", "", *not_tested(records, tasks), ""]
    lines += [f"Every run, with its curve: [{name}/runs.jsonl]({name}/runs.jsonl).", ""]
    return "\n".join(lines)


def with_kept_note(path: Path, text: str) -> str:
    """The page, with the note that someone wrote above the figures of the old one: between its title and its origin.

    A correction stands there, and a page that is written anew must not drop it.
    """
    if not path.is_file():
        return text
    title, _, rest = text.partition("\n")
    old = path.read_text(encoding="utf-8").partition("\n")[2]
    note = old[: len(old) - len(old.lstrip("\n"))] + _up_to_origin(old.lstrip("\n"))
    return title + "\n" + note.rstrip("\n") + ("\n" if note.strip() else "") + rest


def _up_to_origin(text: str) -> str:
    """What stands before the paragraph that `provenance` writes, which begins with the command."""
    return "" if text.startswith("`") else text.partition("\n\n`")[0]


def provenance(records: list[dict]) -> list[str]:
    """Command, commit, hardware, versions and dates, each as often as it differs."""
    said = {}
    for field in ("command", "commit", "hardware"):
        said[field] = sorted({record[field] for record in records})
    versions = sorted({", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in records})
    days = sorted(record["finished"][:10] for record in records)
    span = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    commands = "; ".join(f"`{command}`" for command in said["command"])
    minutes = sum(record["seconds"] for record in records) / 60
    return [
        f"{commands}; commit {', '.join(said['commit'])}; {'; '.join(said['hardware'])}; {'; '.join(versions)}; {span}."
        f" {len(records)} runs, {sum(r['measured'] for r in records)} of them measured, the others to choose learning "
        f"rates; {minutes:.0f} minutes of training in all, one run after the other counted."
    ]


# Words


def plain_words(tables: Tables, tasks: dict, reference: str) -> list[str]:
    """Which to take, what made no difference; nothing but what the tables say."""
    arms = sorted({c.arm for table in tables.values() for c in table})
    better, worse = ({arm: _where(tables, arm, sign) for arm in arms} for sign in (-1, 1))
    lines = []
    if not any(better[arm] and not worse[arm] for arm in arms):
        lines.append(
            f"- **No reason found here to leave `{reference}`**: nothing was reliably better without being worse."
        )
    for arm in arms:
        if better[arm]:
            lines.append(f"- `{arm}` was reliably better than `{reference}`: {'; '.join(better[arm])}.")
        if worse[arm]:
            lines.append(f"- `{arm}` was reliably worse than `{reference}`: {'; '.join(worse[arm])}.")
    for arm in arms:
        if hints := _places(tables, arm, lambda c: not c.differs and abs(c.difference) > c.half_width):
            lines.append(
                f"- `{arm}`: a hint, its own interval leaves out 0 but the correction does not: {'; '.join(hints)}."
            )
    diverged = [run for runs in tasks.values() for run in runs if run["measured"] and run["status"] == "diverged"]
    known = [arm for arm in arms if all(arm != run["arm"] for run in diverged)]
    same = [f"`{arm}`" for arm in known if not better[arm] and not worse[arm]]
    if same:
        lines.append(
            f"- No reliable difference from `{reference}`: {', '.join(same)}. That does not prove them equal: the "
            "intervals below say how large a difference these runs could have missed."
        )
    for run in diverged:
        lines.append(f"- `{run['arm']}` diverged on {run['task']} with seed {run['seed']}.")
    return [*lines, *(f"- {task}: {_spread(tables[task, 'loss'], runs)}" for task, runs in tasks.items())]


def _where(tables: Tables, arm: str, sign: int) -> list[str]:
    """Each place where the arm is reliably higher (1) or lower (-1), with how much."""
    return _places(tables, arm, lambda c: c.differs and c.difference * sign > 0)


def _places(tables: Tables, arm: str, wanted) -> list[str]:
    return [
        f"{task}, {METRICS[metric]} by {c.difference:+.4f} nats ({_interval(c)})"
        for (task, metric), table in tables.items()
        for c in table
        if c.arm == arm and wanted(c)
    ]


def _spread(table: list[Comparison], runs: list[dict]) -> str:
    """How large the differences are beside the seed noise."""
    table = [c for c in table if math.isfinite(c.difference)]
    if not table:
        return "no pair of runs yet."
    noise = pooled_deviation(by_arm_and_seed(runs, "loss"))
    largest = max(table, key=lambda c: abs(c.difference))
    return (
        f"of the final losses, that of `{largest.arm}` differs most, by {largest.difference:+.4f} nats (95% interval "
        f"{_interval(largest)}), beside a seed noise of {f'{noise:.4f}' if noise == noise else 'unknown size'}."
    )


def not_tested(records: list[dict], tasks: dict) -> list[str]:
    kinds = {record["settings"]["kind"] for record in records}
    missing = [words for kind, words in KINDS.items() if kind not in kinds]
    layouts = sorted({record["settings"]["model"]["layout"] for record in records})
    seeds = len({record["seed"] for record in records if record["measured"]})
    largest = max(record["parameters"] for record in records)
    lines = [f"- Tasks: {', '.join(missing)}."] if missing else []
    return [
        *lines,
        f"- Models other than {', '.join(layouts)} of at most {largest:,} parameters; more seeds than {seeds}.",
        "- Longer training: an initialisation that only starts sooner is not told from one that ends better.",
        "- Other ranges than [0.9, 0.999], other c than listed (and only with `uniform`), other optimisers, schedules, "
        "batch sizes and weight decays.",
        *_short_tuning(tasks),
        *_edges(tasks),
    ]


def _short_tuning(tasks: dict) -> list[str]:
    lines = []
    for task, runs in tasks.items():
        short, long = (max((r["steps"] for r in runs if r["measured"] is whole), default=0) for whole in (False, True))
        if 0 < short < long:
            lines.append(
                f"- Whether the rates that were best after {short} steps are best after {long}, for {task}: where arms "
                "have different rates, a part of their difference may be the rate's."
            )
    return lines


def _edges(tasks: dict) -> list[str]:
    lines = []
    for task, runs in tasks.items():
        grid = sorted({run["learning_rate"] for run in runs if not run["measured"]})
        for arm, rate in sorted({(run["arm"], run["learning_rate"]) for run in runs if run["measured"]}):
            if len(grid) > 1 and rate in (grid[0], grid[-1]):
                lines.append((task, f"`{arm}` ({rate:g})"))
    return [
        f"- Learning rates beyond the grid, for {task}: the best one was at its edge for "
        f"{', '.join(arm for where, arm in lines if where == task)}."
        for task in dict.fromkeys(where for where, _ in lines)
    ]


# Tables


def task_section(task: str, runs: list[dict], tables: Tables, reference: str, picture: str) -> list[str]:
    measured = [run for run in runs if run["measured"]]
    lines = [f"## {task}", "", _sizes(runs), ""]
    lines += [f"![Curves, sizes, differences and memory of {task}]({picture})", "", *value_table(measured), ""]
    lines += [*difference_table({metric: tables[task, metric] for metric in METRICS}, reference), ""]
    lines += rate_table(runs)
    if any(run["evaluations"] for run in measured):
        lines += [*size_table(measured), ""]
    return [*lines, *lambda_table(measured), ""]


def rate_table(runs: list[dict]) -> list[str]:
    """What each arm's runs at each learning rate ended with: arms at one rate differ in Λ alone."""
    losses = {(run["arm"], run["learning_rate"]): run["curve"][-1]["loss"] for run in runs if not run["measured"]}
    rates = sorted({rate for _, rate in losses})
    if len(rates) < 2:
        return []
    steps = max(run["steps"] for run in runs if not run["measured"])
    lines = [f"| loss after {steps} steps at the rate | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    lines += ["|---" * (len(rates) + 1) + "|"]
    for arm in dict.fromkeys(arm for arm, _ in losses):
        cells = (f"{losses[arm, rate]:.4f}" if (arm, rate) in losses else "" for rate in rates)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return [*lines, "", "The runs that chose the rates, of one seed. In a column arms differ in Λ alone.", ""]


def _sizes(runs: list[dict]) -> str:
    run, settings = runs[0], runs[0]["settings"]
    seeds = len({each["seed"] for each in runs if each["measured"]})
    where = f"{KINDS[settings['kind']].capitalize()}, {settings['model']['layout']}, {run['parameters']:,} parameters"
    if settings["kind"] == "language_modelling":
        data = settings["data"]
        texts = ", ".join(settings["text"])
        return (
            f"{where}; {texts}: {data['train']['tokens']:,} training tokens, {data['held_out']['tokens']:,} held out; "
            f"rows of {settings['length']} tokens, {settings['rows']} a step, {_steps(runs)}; "
            f"seeds: {seeds}. Losses in nats a token."
        )
    return (
        f"{where}; trained at {', '.join(map(str, settings['sizes']))} tokens, {settings['rows']} rows a step, "
        f"{_steps(runs)}; seeds: {seeds}. Losses in nats an answer, over {settings['held_out_rows']} rows that no run "
        "trains on."
    )


def _steps(runs: list[dict]) -> str:
    steps = max(run["steps"] for run in runs if run["measured"])
    tuning = max((run["steps"] for run in runs if not run["measured"]), default=steps)
    return f"{steps} steps" + (f" ({tuning} where learning rates were chosen)" if tuning != steps else "")


def value_table(measured: list[dict]) -> list[str]:
    names = dict.fromkeys(name for run in measured for name in metrics(run) if "@" not in name)
    lines = [f"| arm | learning rate | seeds | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for arm, values in by_arm_and_seed(measured, "loss").items():
        rates = ", ".join(f"{rate:g}" for rate in sorted({r["learning_rate"] for r in measured if r["arm"] == arm}))
        figures = [_cell(measured, arm, name) for name in names]
        lines.append(f"| {arm} | {rates} | {len(values)} | {' | '.join(figures)} |")
    return [*lines, "", "Means over seeds, with the standard deviation over seeds in brackets."]


def difference_table(tables: dict[str, list[Comparison]], reference: str) -> list[str]:
    """A column for each metric: difference from the reference, interval, corrected p, effect size."""
    tables = {METRICS[metric]: {c.arm: c for c in table} for metric, table in tables.items() if table}
    lines = [f"| difference from `{reference}` | {' | '.join(tables)} |", "|---" * (len(tables) + 1) + "|"]
    for arm in dict.fromkeys(arm for table in tables.values() for arm in table):
        cells = [_difference(table[arm]) if arm in table else "" for table in tables.values()]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Nats, less is better: mean difference [95% interval], p after Holm's correction, effect size d.",
    ]


def _difference(c: Comparison) -> str:
    p = "" if math.isnan(c.p_holm) else f", p {c.p_holm:.3f}"
    effect = "" if math.isnan(c.effect) else f", d {c.effect:+.1f}"
    return f"{c.difference:+.4f} [{_interval(c)}]{p}{effect}"


def size_table(measured: list[dict]) -> list[str]:
    name = "accuracy" if "accuracy" in measured[0]["curve"][0] else "loss"
    sizes = [entry["size"] for entry in max((run["evaluations"] for run in measured), key=len)]
    lines = [f"| {name} at | {' | '.join(f'{size:,}' for size in sizes)} |", "|---" * (len(sizes) + 1) + "|"]
    for arm in by_arm_and_seed(measured, "loss"):
        cells = [_cell(measured, arm, f"{name} @ {size}") for size in sizes]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def lambda_table(measured: list[dict]) -> list[str]:
    """Memory length of the channels at r = 0.5: means over seeds and layers of the layers' quantiles."""
    lines = [
        "| Λ: memory at r = 0.5, tokens | median at the start | at the end | 5% to 95% at the end | mean change of Λ |",
        "|---|---|---|---|---|",
    ]
    for arm in by_arm_and_seed(measured, "loss"):
        runs = [run for run in measured if run["arm"] == arm]
        first, last = (
            np.mean([[q["memory"] for q in run["memory"][i]["layers"]] for run in runs], axis=(0, 1)) for i in (0, -1)
        )
        moved = np.mean([[layer["moved"] for layer in run["memory"][-1]["layers"]] for run in runs])
        lines.append(f"| {arm} | {first[2]:.1f} | {last[2]:.1f} | {last[0]:.1f} to {last[4]:.1f} | {moved:.3f} |")
    return lines


def _cell(measured: list[dict], arm: str, name: str) -> str:
    """Mean over seeds, with the deviation in brackets; empty where no run of the arm has the figure."""
    values = list(by_arm_and_seed(measured, name).get(arm, {}).values())
    if not values:
        return ""
    deviation = f" ({np.std(values, ddof=1):.4f})" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{deviation}"


def _interval(c: Comparison) -> str:
    if not math.isfinite(c.half_width):
        return "not known"
    return f"{c.difference - c.half_width:+.4f} to {c.difference + c.half_width:+.4f}"


def check_fields(path: Path, records: list[dict], fields: tuple[str, ...], writer: str) -> None:
    """Raises ValueError for records of another study than the one whose page this is."""
    for record in records:
        if missing := [field for field in fields if field not in record]:
            raise ValueError(
                f"{path}: the run {record['key']} lacks {', '.join(missing)}: allowed are runs of `{writer}`"
            )


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__, formatter_class=ShowDefaultsAndLines)
    parser.add_argument("folder", type=Path, help="the --output of compare_lambda_inits.py")
    parser.add_argument("--reference", default="uniform", help="the arm that others are compared with")
    arguments = parser.parse_args(argv)
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} does not exist: allowed are folders of `{spoken.another('compare-lambda')}`")
    try:
        records = list(read_records(arguments.folder / "runs.jsonl").values())
        check_fields(arguments.folder / "runs.jsonl", records, ("task", "measured"), spoken.another("compare-lambda"))
    except ValueError as error:
        parser.error(str(error))
    if not any(record["measured"] and record["arm"] == arguments.reference for record in records):
        parser.error(
            f"{arguments.folder}/runs.jsonl holds no measured run of the reference {arguments.reference!r}: allowed "
            f"are folders of `{spoken.another('compare-lambda')}` in which it is finished"
        )
    with spoken.writing(__file__):
        write_page(arguments.folder, records, arguments.reference)


def write_page(folder: Path, records: list[dict], reference: str) -> None:
    """FOLDER.md, and a picture of each task beside it."""
    pictures = {}
    for task in dict.fromkeys(record["task"] for record in records if record["measured"]):
        path = folder.with_name(f"{folder.name}_{task}.png")
        draw_task([r for r in records if r["task"] == task and r["measured"]], reference, task, path)
        pictures[task] = path.name
    records = [record for record in records if record["task"] in pictures]
    text = page(folder.name, records, reference, pictures)
    output = folder.with_name(folder.name + ".md")
    write_whole(output, with_kept_note(output, text))
    print("written:", output, *(folder.with_name(name) for name in pictures.values()))


if __name__ == "__main__":
    main()
