"""Takes secrets out of what a run writes down: the package's masking, and the values of this process's environment."""

import os
from typing import Any

from modeling_griffin.saving.mask_secrets import MASK, is_secret_name, mask_command, mask_words
from modeling_griffin.saving.mask_secrets import mask_secrets as mask_json


SHORTEST_VALUE = 8  # of an environment variable: a shorter one may stand anywhere by chance
NO_SECRETS = {"PWD", "OLDPWD"}  # of a shell: the folders it is and was in, with which most paths begin
is_secret = is_secret_name


def mask_secrets(command: str | list[str]) -> str | list[str]:
    """The command, a line for a shell or a list of words, with MASK in the place of every secret value."""
    return _without_environment(mask_command(command) if isinstance(command, str) else mask_words(command))


def mask_values(obj: Any) -> Any:
    """A copy of nested dicts, lists, tuples and strings, as JSON has them, without the secrets in it."""
    return _without_environment(mask_json(obj))


def _without_environment(obj):
    if isinstance(obj, dict):
        return {key: _without_environment(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return type(obj)(map(_without_environment, obj))
    if isinstance(obj, str):
        for value in sorted(_secrets_of_environment(), key=len, reverse=True):
            obj = obj.replace(value, MASK)
    return obj


def _secrets_of_environment() -> set[str]:
    named = {name: value for name, value in os.environ.items() if name not in NO_SECRETS and is_secret(name)}
    return {value for value in named.values() if len(value) >= SHORTEST_VALUE}
