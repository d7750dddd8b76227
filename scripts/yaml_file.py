"""Reads a YAML file of settings; what is wrong with it is said in one line, with its place."""

from pathlib import Path

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


def _place_in_yaml(error: yaml.YAMLError) -> str:
    """ ", line 3, column 5: mapping values are not allowed here"."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f" is not YAML: {' '.join(str(error).split())}"
    return f", line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
