"""How the program that runs was called, in words that a person can say again; and how it ends with one line."""

import codecs
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from presets import is_installed


HERE = Path(__file__).resolve().parent
verb: str | None = None  # of the command `griffin`, which sets it
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
    "report-lambda": ("report_lambda_inits.py", "the page of what compare-lambda has trained"),
    "plan-memory": ("plan_memory.py", "memory and communication of a training step"),
    "benchmark-scan": ("benchmark_scan.py", "time the recurrence"),
    "benchmark-training": ("benchmark_training.py", "time training steps beside other models"),
    "benchmark-small-steps": ("benchmark_small_steps.py", "time small training steps, plain and recorded"),
    "benchmark-generation": ("benchmark_generation.py", "time generation beside other models"),
    "benchmark-distributed": ("benchmark_distributed.py", "time training steps on several processes"),
}


def name(script: str) -> str:
    """What messages call a script, given its `__file__`: "griffin train", or "train.py"."""
    return Path(script).name if verb is None else f"griffin {verb}"


def program() -> list[str]:
    """["griffin", "train"], or ["python", "scripts/train.py"]: of a clone, its own path, wherever the clone lies."""
    if verb is not None:
        return ["griffin", verb]
    script = Path(sys.argv[0])
    own = script.is_absolute() and script.is_relative_to(HERE)
    return ["python", str(script.relative_to(HERE.parent)) if own else sys.argv[0]]


def another(other: str) -> str:
    """Another verb, called in the way that this one was: "griffin push", or "python scripts/push_to_hub.py"."""
    if verb is not None or is_installed():
        return f"griffin {other}"
    return f"python {os.path.relpath(HERE / VERBS[other][0])}"


def stop(script: str, error: Exception | str, where: str = "") -> NoReturn:
    """Ends the process with one line; with argparse's code 2 for what was given and cannot be (ValueError), else 1."""
    line = f"{name(script)}: error{where}: {' '.join(str(error).split())}"
    print(line, file=sys.stderr)
    end = SystemExit(line)
    end.code = 2 if isinstance(error, ValueError) else 1  # the interpreter would print a line again
    raise end from (error if isinstance(error, Exception) else None)


@contextmanager
def writing(script: str) -> Iterator[None]:
    """Ends the process with one line where a file cannot be written."""
    try:
        yield
    except OSError as error:
        stop(script, error)


def is_output_closed() -> bool:
    """Whether who read our output, `head` for example, has gone; what is left of it is then dropped."""
    if not hasattr(select, "poll"):
        return False
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def write_what_can_be_written() -> None:
    """Has letters that a terminal does not know, such as Λ outside of UTF-8, replaced; they would end the process."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if hasattr(sys.stdout, "reconfigure") and codecs.lookup(encoding).name != "utf-8":
        sys.stdout.reconfigure(errors="replace")
