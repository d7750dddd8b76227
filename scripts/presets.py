"""Ready-made configurations by name: in a clone those of configuration/, after `pip install` those of the package.

Imports nothing heavy, so that lists and help answer at once.
"""

import itertools
import textwrap
from pathlib import Path


HERE = Path(__file__).resolve().parent


def is_installed() -> bool:
    """A clone has configuration/ beside scripts/; a wheel has them as griffin_configuration, griffin_scripts."""
    return HERE.name == "griffin_scripts"


CONFIGURATION = HERE.parent / ("griffin_configuration" if is_installed() else "configuration")
SUFFIXES = {"model": ".json", "training": ".yaml", "accelerate": ".yaml"}


def find_preset(name: str, kind: str) -> str:
    """The path `name` where it exists; else the ready-made file of that name, with or without its folder and suffix.

    kind: "model", "training" or "accelerate", the folder. A name that is neither comes back as it is: who opens it says
    that it does not exist.
    """
    if Path(name).exists():
        return name
    inside = name.removeprefix("configuration/").removeprefix(f"{kind}/")
    for candidate in (inside, inside + SUFFIXES[kind]):
        if (path := CONFIGURATION / kind / candidate).is_file():
            return str(path)
    return name


def preset_names(kind: str) -> list[str]:
    """Names of all ready-made files of this kind."""
    return sorted(path.stem for path in (CONFIGURATION / kind).glob(f"*{SUFFIXES[kind]}"))


def describe_presets() -> str:
    """The table of models with their sizes, and the trainings with what their files say of themselves first."""
    return "\n".join(
        [
            "Models, for `griffin train ... --config_name NAME` and GriffinConfig.from_preset(NAME):",
            *_table_of_models(),
            "",
            "Trainings, for `griffin train NAME --train_data PATH`; `--config_name MODEL` takes another size:",
            *(line for name in preset_names("training") for line in _about(name)),
            "",
            f"The files lie in {CONFIGURATION}",
        ]
    )


def _table_of_models() -> list[str]:
    """The README's table of sizes, in columns."""
    readme = (CONFIGURATION / "README.md").read_text(encoding="utf-8").splitlines()
    lines = [line for line in readme if line.startswith("| `") and ".json` |" in line]
    head = next(line for line in readme if line.startswith("| file") and "parameters" in line)
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in (head, *lines)]
    rows = [["name", *rows[0][1:]], *([row[0].removesuffix(".json"), *row[1:]] for row in rows[1:])]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]


def _about(training: str) -> list[str]:
    """Its name, and the comment that opens its file: what it is for, its size and time."""
    lines = (CONFIGURATION / "training" / f"{training}.yaml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
    return textwrap.wrap(comment, 116, initial_indent=f"  {training:16}", subsequent_indent=" " * 18)
