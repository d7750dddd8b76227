"""How the program that runs was called, in words that a person can say again."""

import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
verb: str | None = None  # of the command `griffin`, which sets it


def program() -> list[str]:
    """["griffin", "train"], or ["python", "scripts/train.py"]: of a clone, its own path, wherever the clone lies."""
    if verb is not None:
        return ["griffin", verb]
    script = Path(sys.argv[0])
    own = script.is_absolute() and script.is_relative_to(HERE)
    return ["python", str(script.relative_to(HERE.parent)) if own else sys.argv[0]]
