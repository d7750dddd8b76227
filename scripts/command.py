"""The console command `griffin VERB ...`: the scripts of this folder by short names, wherever the package is installed.

A verb runs its script just as `python scripts/NAME.py` does. Help answers at once: it is stored in help/, because the
scripts themselves import PyTorch before they know what is asked. `python scripts/command.py --write-help` makes those
files anew; a test compares them.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # as for a script that Python runs: they import each other by short names

import presets  # noqa: E402
import spoken  # noqa: E402
from spoken import VERBS  # noqa: E402


WIDTH = "100"  # of help, in columns
# What only an extra brings, by the name that Python misses; README says what each of them is for.
EXTRAS = {"peft": "peft", "trl": "trl", "fastapi": "serve", "uvicorn": "serve", "openai": "serve"}
EXTRAS |= dict.fromkeys(("accelerate", "datasets", "matplotlib", "psutil", "scipy", "yaml"), "train")


def main(argv: list[str] | None = None) -> None:
    spoken.write_what_can_be_written()
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return
    verb, rest = words[0], words[1:]
    if verb == "presets" and set(rest) <= {"-h", "--help"}:
        print(presets.describe_presets())
    elif verb == "--write-help":
        write_help()
    elif verb == "presets":
        spoken.stop("griffin", ValueError(f"presets takes no arguments, not {' '.join(rest)}"))
    elif verb not in VERBS:
        allowed = ", ".join([*VERBS, "presets"])
        line = f"{verb!r} is no command: allowed are {allowed}; `griffin --help` says what they do"
        spoken.stop("griffin", ValueError(line))
    elif "-h" in rest or "--help" in rest:
        print(help_file(verb).read_text(encoding="utf-8"), end="")
    else:
        run(verb, rest)


def overview() -> str:
    """What `griffin --help` prints."""
    width = max(map(len, VERBS)) + 2
    lines = [f"  {verb:{width}}{what}" for verb, (_, what) in VERBS.items()]
    lines.append(f"  {'presets':{width}}ready-made models and trainings, with sizes")
    head = ["usage: griffin COMMAND [...]", "", "Griffin for Transformers: pretrain, fine-tune, generate, share.", ""]
    return "\n".join([*head, *lines, "", "`griffin COMMAND --help` shows a command's options."])


def help_file(verb: str) -> Path:
    return HERE / "help" / f"{verb}.txt"


def run(verb: str, words: list[str]) -> None:
    """As `python SCRIPT words` does, with the script as `__main__`."""
    if sys.stderr.isatty():  # imports take seconds, in which nothing else would be seen
        print(f"griffin {verb}: starting ...", file=sys.stderr)
    spoken.verb = verb
    sys.argv = [str(HERE / VERBS[verb][0]), *words]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in EXTRAS:
            raise
        extra = f"pip install 'modeling-griffin[{EXTRAS[missing]}]'"
        spoken.stop(verb, f"{missing} is not installed: {extra} brings it")
    except BrokenPipeError:
        if not spoken.is_output_closed():
            raise
        raise SystemExit(141) from None  # as a shell has it of programs that SIGPIPE ends
    except KeyboardInterrupt:
        print(f"\ngriffin {verb}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def write_help() -> None:
    """Stores what each script says for itself."""
    for verb in VERBS:
        help_file(verb).parent.mkdir(exist_ok=True)
        help_file(verb).write_text(own_help(verb), encoding="utf-8")
        print(help_file(verb))


def own_help(verb: str) -> str:
    """A script's own help, by its short name."""
    command = [sys.executable, str(HERE / VERBS[verb][0]), "--help"]
    environment = {**os.environ, "COLUMNS": WIDTH}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return in_verbs(done.stdout, verb)


def in_verbs(text: str, verb: str) -> str:
    """A script's help with the command's words for its files' names, and lines of usage below their beginning."""
    usage, gap, rest = text.partition("\n\n")
    old, new = f"usage: {VERBS[verb][0]}", f"usage: griffin {verb}"
    usage = usage.replace("\n" + " " * len(old), "\n" + " " * len(new)).replace(old, new, 1)
    for name, (script, _) in VERBS.items():
        rest = re.sub(rf"(python\s+)?(scripts/)?\b{re.escape(script)}", f"griffin {name}", rest)
    return usage + gap + rest


if __name__ == "__main__":
    main()
