"""What a measured number needs to be believed: command, commit, hardware, versions, date, and quantiles."""

import datetime
import importlib.metadata
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import spoken
import torch


def birth_certificate(device: str, commit: str | None, packages: Sequence[str] = ()) -> dict:
    """Facts of this run. commit: for a copy without its git history. packages: versions to add."""
    return {
        "command": shlex.join(map(_without_place, [*_program(), *sys.argv[1:]])),
        "commit": commit or _commit(),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "python": platform.python_version(),
        "versions": _versions(["torch", "triton", "transformers", *packages]),
        "date": now(),
    }


def now() -> str:
    """The date and time, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def birth_lines(birth: dict) -> list[str]:
    """The certificate as a line of a results page."""
    versions = ", ".join(f"{name} {version}" for name, version in birth["versions"].items())
    place = f"{birth['hardware']}, Python {birth['python']}, {versions}"
    return [f"`{birth['command']}`, commit {birth['commit']}, {place}, {birth['date']}."]


def short_device_name(device: str) -> str:
    """For file names: cpu, or the GPU's model, such as h100."""
    if device == "cpu":
        return "cpu"
    words = torch.cuda.get_device_name().lower().split()
    return next((w for w in words if any(c.isdigit() for c in w)), words[0])


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """{"median", "10%", "90%"} of at least one value."""
    low, *_, high = statistics.quantiles([*values] * (2 if len(values) == 1 else 1), n=10, method="inclusive")
    return {"median": statistics.median(values), "10%": low, "90%": high}


def _program() -> list[str]:
    return [Path(sys.executable).name, sys.argv[0]] if spoken.verb is None else spoken.program()


def _without_place(word: str) -> str:
    """An absolute path, also behind `--option=`, as its last part: where things lay is the machine's own matter."""
    option, equals, path = word.rpartition("=") if word.startswith("-") else ("", "", word)
    return option + equals + (Path(path).name if Path(path).is_absolute() else path)


def _commit() -> str:
    """Of this file's repository, whatever folder the command runs in."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # git is not installed
        return "unknown"
    return git.stdout.strip() if git.returncode == 0 else "unknown"


def _cpu_name() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found
