"""Reads a YAML file of settings; what is wrong with it is said in one line, with its place."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: Path, allowed: str) -> dict:
    """Its keys and values. Raises ValueError, in one line, with the place of an error.

    allowed: which files the path may name, for the message.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise ValueError(f"{path} {reason}: allowed are {allowed}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): allowed is YAML") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}{_place_in_yaml(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}: allowed is one mapping of keys to values")
    return settings


def check_shapes(path: Path, settings: dict, where: str = "", **needed: str) -> None:
    """Raises ValueError, with the file, the key and its value, for the first of these keys that is not of its shape.

    where: of the settings within the file, for the message, as " of task 'x'".
    needed: a key of `SHAPES` for each.
    """
    for key, shape in needed.items():
        if key not in settings:
            raise ValueError(f"{path} lacks {key}{where}: allowed is {shape}")
        if not SHAPES[shape](settings[key]):
            raise ValueError(f"{path}: {key} = {str(settings[key])[:60]}{where}: allowed is {shape}")


def _is_number(value: object) -> bool:
    """YAML reads 7.0e8 as a text."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _is_whole(value: object) -> bool:
    return type(value) is int


SHAPES: dict[str, Callable[[Any], bool]] = {
    "a mapping": lambda value: isinstance(value, dict),
    "names, each with a mapping": lambda value: isinstance(value, dict) and _all(dict, value.values()),
    "a list of mappings": lambda value: isinstance(value, list) and _all(dict, value),
    "a list of whole numbers, at least one": lambda value: _is_list(value, _is_whole),
    "a list of numbers, at least one": lambda value: _is_list(value, _is_number),
    "a list of names": lambda value: isinstance(value, list) and _all(str, value),
    "a whole number from 1": lambda value: _is_whole(value) and value >= 1,
    "a number": _is_number,
}


def _is_list(value: object, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and value != [] and all(map(of, value))


def _all(kind: type, values: Iterable) -> bool:
    return all(isinstance(each, kind) for each in values)


def _place_in_yaml(error: yaml.YAMLError) -> str:
    """ ", line 3, column 5: mapping values are not allowed here"."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f" is not YAML: {' '.join(str(error).split())}"
    return f", line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
