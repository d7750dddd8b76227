"""Ready-made configurations by name: in a clone those of configuration/, after `pip install` those of the package.

Imports nothing heavy, so that lists and help answer at once.
"""

from pathlib import Path


HERE = Path(__file__).resolve().parent
# A clone has configuration/ beside scripts/; a wheel installs the two as griffin_configuration and griffin_scripts.
CONFIGURATION = HERE.parent / ("griffin_configuration" if HERE.name == "griffin_scripts" else "configuration")
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
    """The table of models with their sizes, and the names of the trainings."""
    readme = (CONFIGURATION / "README.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in readme if line.startswith("| ") and ".json" in line or line.startswith("| file")]
    trainings = ", ".join(preset_names("training"))
    return "\n".join(
        [
            "Models, for `config_name` and GriffinConfig.from_preset(NAME):",
            *(f"  {line}" for line in table),
            f"Trainings, for `griffin train NAME`: {trainings}",
            f"The files lie in {CONFIGURATION}",
        ]
    )
