"""The console command `griffin VERB ...`: the scripts of this folder by short names, wherever the package is installed.

A verb runs its script just as `python scripts/NAME.py` does. Help answers at once: it is stored in help/, because the
scripts themselves import PyTorch before they know what is asked. `python scripts/command.py --write-help` makes those
files anew; a test compares them.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # as for a script that Python runs: they import each other by short names

import presets  # noqa: E402


VERBS = {
    "train": ("train.py", "train or fine-tune from a YAML file or a ready-made training's name"),
    "generate": ("generate.py", "sample from a model and stream the text"),
    "serve": ("serve.py", "serve a model over HTTP with the interface of OpenAI's"),
    "evaluate": ("evaluate_text.py", "loss and bits per byte of a text, by position"),
    "convert": ("convert_recurrent_gemma.py", "RecurrentGemma's checkpoints to Griffin and back"),
    "push": ("push_to_hub.py", "check a saved model and push it to the Hub"),
    "demo": ("demo.py", "train, generate, save and reload a tiny model"),
    "plot-lambda": ("plot_lambda_init.py", "what each initialisation of Λ means, as a figure"),
    "compare-lambda": ("compare_lambda_inits.py", "train with several initialisations of Λ and compare"),
    "plan-memory": ("plan_memory.py", "memory and communication of a training step"),
    "benchmark-scan": ("benchmark_scan.py", "time the recurrence"),
    "benchmark-training": ("benchmark_training.py", "time training steps beside other models"),
    "benchmark-small-steps": ("benchmark_small_steps.py", "time small training steps, plain and recorded"),
    "benchmark-generation": ("benchmark_generation.py", "time generation beside other models"),
    "benchmark-distributed": ("benchmark_distributed.py", "time training steps on several processes"),
}
WIDTH = "100"  # of help, in columns


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return
    verb, rest = words[0], words[1:]
    if verb == "presets":
        print(presets.describe_presets())
    elif verb == "--write-help":
        write_help()
    elif verb not in VERBS:
        allowed = ", ".join([*VERBS, "presets"])
        raise SystemExit(f"griffin: {verb!r} is no command: allowed are {allowed}; `griffin --help` says what they do")
    elif "-h" in rest or "--help" in rest:
        print(help_file(verb).read_text(encoding="utf-8"), end="")
    else:
        run(VERBS[verb][0], rest)


def overview() -> str:
    """What `griffin --help` prints."""
    width = max(map(len, VERBS)) + 2
    lines = [f"  {verb:{width}}{what}" for verb, (_, what) in VERBS.items()]
    lines.append(f"  {'presets':{width}}ready-made models and trainings, with sizes")
    head = ["usage: griffin COMMAND [...]", "", "Griffin for Transformers: pretrain, fine-tune, generate, share.", ""]
    return "\n".join([*head, *lines, "", "`griffin COMMAND --help` shows a command's options."])


def help_file(verb: str) -> Path:
    return HERE / "help" / f"{verb}.txt"


def run(script: str, words: list[str]) -> None:
    """As `python script words` does, with the script as `__main__`."""
    sys.argv = [str(HERE / script), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


def write_help() -> None:
    """Stores what each script says for itself."""
    for verb in VERBS:
        help_file(verb).parent.mkdir(exist_ok=True)
        help_file(verb).write_text(own_help(verb), encoding="utf-8")
        print(help_file(verb))


def own_help(verb: str) -> str:
    """A script's own help, by its short name."""
    script = HERE / VERBS[verb][0]
    command = [sys.executable, str(script), "--help"]
    environment = {**os.environ, "COLUMNS": WIDTH}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout.replace(f"usage: {script.name}", f"usage: griffin {verb}", 1)


if __name__ == "__main__":
    main()
