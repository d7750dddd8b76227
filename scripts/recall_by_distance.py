"""How far back does a model remember? Trains small ones to recall a needle, and asks at distances far beyond.

    python scripts/recall_by_distance.py --output results/long_context/recall_h200             # a GPU
    python scripts/recall_by_distance.py --width 32 --layers 3 --window 8 --trained 32 --longest 2048 --steps 300 \
        --learning_rate 5e-3 --seeds 0 --output results/long_context/recall_cpu               # a CPU, minutes

A row is noise, a trigger, the needle, noise, the trigger again: what stood behind it the first time? Training mixes
distances up to --trained; evaluation doubles them up to --longest, reading each row in chunks with the state in
between. The attention window is shorter than most distances: what lies behind it is remembered by the recurrent states,
or, over several layers of attention, by relay. Writes OUTPUT.json, OUTPUT.md and OUTPUT.png after each run.
"""

import argparse
import json
import time
from pathlib import Path

import spoken
import torch
from benchmarks.birth_certificate import birth_certificate, birth_lines
from command_line import Parser, device
from lambda_study.run import make_config, make_model, make_optimizer, train
from lambda_study.synthetic_tasks import IGNORED, VOCABULARY, needle
from lambda_study.tasks import HELD_OUT_SEED, SyntheticTask
from whole_files import in_one_step, with_ending, write_whole

from modeling_griffin import GriffinForCausalLM


ARMS = {
    "griffin": {"layout": "griffin_middle"},
    "griffin-long": {"layout": "griffin_middle", "lambda_init": "log_uniform_memory"},
    "hawk": {"layout": "hawk"},
    "hawk-long": {"layout": "hawk", "lambda_init": "log_uniform_memory"},
    "attention": {"layout": "attention"},
}
TITLES = {
    "griffin": "Griffin, the third layer attention",
    "griffin-long": "the same, Λ by log_uniform_memory",
    "hawk": "Hawk",
    "hawk-long": "the same, Λ by log_uniform_memory",
    "attention": "local attention alone",
}
CHANCE = 1 / 15
TRAINING = {"weight_decay": 0.1, "warmup": 0.05, "max_grad_norm": 1.0}


def shared_by_arms(run: dict) -> dict:
    """What all models have, from the arguments of a run."""
    fields = {"hidden_size": "width", "num_hidden_layers": "layers", "attention_window_size": "window"}
    return {field: run[name] for field, name in fields.items()} | {"num_attention_heads": 4}


def distances(longest: int) -> list[int]:
    """4, 8, 16, ... up to `longest`."""
    return [2**power for power in range(2, longest.bit_length())]


@torch.no_grad()
def accuracy(model: GriffinForCausalLM, distance: int, rows: int, chunk: int) -> float:
    """Share of right answers over rows that no run trains on; a pass sees rows * chunk tokens at any distance."""
    tokens, answers = questions(distance, rows)
    return (model.prefill(tokens, chunk_size=chunk).logits.cpu().argmax(-1) == answers).float().mean().item()


def questions(distance: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (B, T) that end with the question, and its answers (B,): noise behind it is moved to the front."""
    tokens, targets = needle(rows, distance, torch.Generator().manual_seed(HELD_OUT_SEED + distance))
    row, place = (targets != IGNORED).nonzero(as_tuple=True)
    moved = [each.roll(tokens.shape[1] - 1 - int(end)) for each, end in zip(tokens, place)]
    return torch.stack(moved), targets[row, place]


def run_arm(name: str, seed: int, arguments: argparse.Namespace) -> dict:
    """Trains one model and asks it at all distances."""
    start, device = time.perf_counter(), torch.device(arguments.device)
    settings = {"kind": "needle", "sizes": distances(arguments.trained), "rows": arguments.rows}
    task = SyntheticTask(settings, seed, device)
    config = make_config(shared_by_arms(vars(arguments)), ARMS[name], task.vocab_size)
    model = make_model(config, seed).to(device).train()
    run = {"settings": TRAINING, "steps": arguments.steps, "learning_rate": arguments.learning_rate}
    optimizer = make_optimizer(model, arguments.learning_rate, TRAINING["weight_decay"])
    losses = [loss for _, loss in train(model, optimizer, task, run)][-100:]
    loss = torch.stack(losses).mean().item()
    seconds = time.perf_counter() - start
    model.eval()
    asked = distances(arguments.longest)
    found = {each: accuracy(model, each, arguments.held_out_rows, arguments.chunk) for each in asked}
    return {
        "arm": name,
        "seed": seed,
        "parameters": model.num_parameters(),
        "loss": loss,  # of the last 100 steps, nats
        "training_seconds": seconds,
        "evaluation_seconds": time.perf_counter() - start - seconds,
        "accuracy": found,
    }


# The page


def text_of(report: dict) -> str:
    run, runs = report["run"], report["runs"]
    asked = list(runs[0]["accuracy"])
    lines = ["# Recall of a needle, by its distance", "", *birth_lines(report["birth"]), ""]
    lines += [
        f"{run['layers']} layers of width {run['width']}, window {run['window']}; trained for {run['steps']} steps of "
        f"{run['rows']} rows at distances 4 to {run['trained']:,}, each with an equal share; AdamW, "
        f"{run['learning_rate']}. Accuracy over {run['held_out_rows']} rows that no run trains on; chance is "
        f"{CHANCE:.1%}. Mean over seeds, and the lowest.",
        "",
        "| distance | " + " | ".join(TITLES[name] for name in arms_of(runs)) + " |",
        "|---|" + "---|" * len(arms_of(runs)),
    ]
    for distance in asked:
        mark = " (not trained)" if int(distance) > run["trained"] else ""
        cells = []
        for name in arms_of(runs):
            values = [each["accuracy"][distance] for each in runs if each["arm"] == name]
            cells.append(f"{sum(values) / len(values):.1%} ({min(values):.1%})")
        lines.append(f"| {int(distance):,}{mark} | " + " | ".join(cells) + " |")
    lines += ["", "| model | parameters | seeds | loss at the end, nats | s of training | s of evaluation |"]
    lines += ["|---|---|---|---|---|---|"]
    for name in arms_of(runs):
        own = [each for each in runs if each["arm"] == name]
        means = [
            sum(each[key] for each in own) / len(own) for key in ("loss", "training_seconds", "evaluation_seconds")
        ]
        seeds = ", ".join(str(each["seed"]) for each in own)
        figures = f"{means[0]:.4f} | {means[1]:.0f} | {means[2]:.0f}"
        lines.append(f"| {TITLES[name]} ({name}) | {own[0]['parameters']:,} | {seeds} | {figures} |")
    return "\n".join(lines) + "\n"


def arms_of(runs: list[dict]) -> list[str]:
    return list(dict.fromkeys(each["arm"] for each in runs))


def plot(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name in arms_of(report["runs"]):
        own = [each["accuracy"] for each in report["runs"] if each["arm"] == name]
        x = [int(distance) for distance in own[0]]
        (line,) = axes.plot(x, [sum(each[d] for each in own) / len(own) for d in own[0]], marker=".", label=name)
        axes.fill_between(
            x,
            *([pick(each[d] for each in own) for d in own[0]] for pick in (min, max)),
            alpha=0.15,
            color=line.get_color(),
        )
    window = report["run"]["window"]
    axes.axvline(window, color="gray", linestyle="--", linewidth=1, label=f"attention window, {window}")
    axes.axvline(report["run"]["trained"], color="gray", linestyle="-", linewidth=1, label="longest trained distance")
    axes.axhline(CHANCE, color="gray", linestyle=":", linewidth=1, label="chance")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens between the needle and the question", ylabel="right answers", ylim=(0, 1.02))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    with in_one_step(path) as half:
        figure.savefig(half, dpi=150)
    pyplot.close(figure)


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=usual, help="where it runs")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each arm for each")
    parser.add_argument("--width", type=int, default=64, help="hidden size, a multiple of 16")
    parser.add_argument("--layers", type=int, default=5, help="of each model")
    parser.add_argument("--window", type=int, default=64, help="tokens that attention sees")
    parser.add_argument("--steps", type=int, default=4000, help="of training")
    parser.add_argument("--rows", type=int, default=64, help="of a training step")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="its peak")
    parser.add_argument("--trained", type=int, default=1024, help="longest distance of training, tokens")
    parser.add_argument("--longest", type=int, default=2**20, help="longest distance that is asked, tokens")
    parser.add_argument("--held_out_rows", type=int, default=64, help="of each distance")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a row in one pass; bounds the memory")
    parser.add_argument("--output", type=Path, default=Path("build/recall"), help="path without suffix")
    parser.add_argument("--commit", default=None, help="the commit that runs, for a copy without its git history")
    arguments = parser.parse_args(argv)
    parser.check_least(arguments, steps=1, rows=1, trained=4, longest=4, held_out_rows=1, chunk=1)
    for name in arguments.arms:
        try:
            make_config(shared_by_arms(vars(arguments)), ARMS[name], VOCABULARY)
        except ValueError as error:
            parser.error(f"--width {arguments.width} --layers {arguments.layers} --window {arguments.window}: {error}")
    parser.make_folder_of(arguments.output)
    return arguments


def main(argv: list[str] | None = None) -> dict:
    arguments = read_arguments(argv)
    if arguments.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32
    birth = birth_certificate(arguments.device, arguments.commit)
    names = (
        "device",
        "width",
        "layers",
        "window",
        "steps",
        "rows",
        "learning_rate",
        "trained",
        "longest",
        "held_out_rows",
        "chunk",
    )
    runs: list[dict] = []
    report = {"birth": birth, "run": {name: getattr(arguments, name) for name in names}, "runs": runs}
    for seed in arguments.seeds:
        for name in arguments.arms:
            runs.append(run_arm(name, seed, arguments))
            with spoken.writing(__file__):
                write_whole(with_ending(arguments.output, ".json"), json.dumps(report, indent=1))
                write_whole(with_ending(arguments.output, ".md"), text_of(report))
                plot(report, with_ending(arguments.output, ".png"))
    print(text_of(report), end="")
    print(f"wrote {arguments.output}.json, .md and .png")
    return report


if __name__ == "__main__":
    main()
