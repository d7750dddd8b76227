"""Files that take the place of older ones whole: a full disk or a killed process leaves the older file as it was."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """Gives another path to write to: the file then takes the place of the older one, or leaves it as it is.

    Of a link, the file that it leads to. An OSError names the file.
    """
    path = path.resolve()
    half = path.with_name(f"{path.stem}.half{path.suffix}")
    try:
        yield half
        os.replace(half, path)
    except BaseException as error:
        half.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(half)):  # a full disk names none
            raise OSError(error.errno, f"{error.strerror}; an older file is as it was", str(path)) from error
        raise


def write_whole(path: Path, text: str) -> None:
    """`path.write_text(text)` in UTF-8, in one step."""
    with in_one_step(path) as half:
        half.write_text(text, encoding="utf-8")


def with_ending(output: str | Path, ending: str) -> Path:
    """OUTPUT.md of a path without suffix; `with_suffix` would take "c0.5" for a name with the suffix ".5"."""
    return Path(f"{output}{ending}")
