"""What the scripts' command lines have in common: the name they go by, help with defaults, errors in one line."""

import argparse
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import spoken
import torch


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds "(default: ...)" where the text does not say it; a switch is off by default.

    An option without a value by default says in its own words what happens then: a test looks.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS) or action.required or "default" in text:
            return text
        if action.default is False and action.nargs == 0:
            return f"{text} (default: off)"
        if isinstance(action.default, list | tuple):
            return f"{text} (default: {_as_typed(action.default)})"
        return super()._get_help_string(action)


class ShowDefaultsAndLines(ShowDefaults, argparse.RawDescriptionHelpFormatter):
    """The same, with the lines of the description as they are."""


class OneLineErrors(argparse.ArgumentParser):
    """Says what is wrong with the arguments without the usage above it, which for some scripts is a dozen lines."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (`{self.prog} --help` shows what there is)\n")


class Parser(OneLineErrors):
    """Of a script, given its `__file__`; named as it was called."""

    def __init__(self, script: str, **options: Any):
        super().__init__(prog=spoken.name(script), **{"formatter_class": ShowDefaults, **options})

    def add_device(self) -> None:
        """`--device` of a benchmark, which has settings for these two."""
        usual = "cuda" if torch.cuda.is_available() else "cpu"
        self.add_argument("--device", type=device, choices=["cuda", "cpu"], default=usual, help="where it runs")

    def make_folder_of(self, output: Path) -> None:
        """Of `--output`, a path without suffix. Ends with one line where nothing could be written there."""
        try:
            check_folder("folder of --output", output.parent)
        except ValueError as error:
            self.error(str(error))

    def check_least(self, arguments: argparse.Namespace, **least: int) -> None:
        """Ends with one line where an option that is set is smaller than `least` has it."""
        for name, smallest in least.items():
            value = getattr(arguments, name)
            if value is not None and value < smallest:
                self.error(f"--{name} {value}: allowed are whole numbers from {smallest}")


def device(name: str) -> str:
    """The type of `--device`: the CPU, or an accelerator of this machine. Nothing is put on it yet."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    places = {"cpu": 1} if accelerator is None else {"cpu": 1, accelerator.type: torch.accelerator.device_count()}
    try:
        wanted = torch.device(name)
    except RuntimeError:
        wanted = torch.device("meta")
    if (wanted.index or 0) >= places.get(wanted.type, 0):
        allowed = ", ".join(f"{kind} ({count} of it)" if kind != "cpu" else kind for kind, count in places.items())
        raise argparse.ArgumentTypeError(f"{name!r} is not here: allowed is {allowed}")
    return name


def check_folder(field: str, folder: Path) -> None:
    """Makes it. Raises ValueError where nothing could be written there: now, not when the work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        file = next((each for each in (folder, *folder.parents) if each.exists() and not each.is_dir()), None)
        reason = f"{file} is a file" if file else f"it cannot be written ({error.strerror})"
        raise ValueError(f"{field} = {str(folder)!r}: {reason}; allowed is a folder, new or not") from error


def _as_typed(words: list | tuple) -> str:
    """As on a command line: one that has a space, in quotes."""
    return " ".join(repr(word) if " " in str(word) else str(word) for word in words)
