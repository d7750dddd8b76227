"""Where the installed package puts faster and handier functions. In a copy from the Hub the slots stay empty.

The flat files are the model: complete and exact alone, and all that goes to a model repository. What only makes it
faster (kernels, recorded decoding) or handier (serving, saving) is found here by name, so that the flat files import
none of it. `modeling_griffin/__init__.py`, which does not go to a repository, fills the slots.

Each copy of this file has slots of its own: the installed package and copies from the Hub do not see each other's.
"""  # SPDX-License-Identifier: Apache-2.0

import functools
import importlib.util
from collections.abc import Callable

from transformers.utils import logging


logger = logging.get_logger()  # Transformers' own, so that several copies say the same thing once
PACKAGE = "modeling_griffin"
_FILLED: dict[str, Callable] = {}


def fill_slots(**functions: Callable) -> None:
    """Puts functions into the slots of these names."""
    _FILLED.update(functions)


def find_slot(name: str) -> Callable | None:
    """The function in this slot, or None."""
    return _FILLED.get(name)


def require_slot(name: str) -> Callable:
    """The function in this slot. Raises ImportError where only the installed package has one."""
    if name not in _FILLED:
        raise ImportError(f"{name} needs the installed package: {_remedy()}")
    return _FILLED[name]


def slot(definition: Callable) -> Callable:
    """Decorator: the function stays the definition; one of the same name in the slots is asked first.

    That one takes the same arguments and returns None where it does not take them, for example on a CPU.
    """
    name = definition.__name__

    @functools.wraps(definition)
    def choose(*args, **kwargs):
        faster = _FILLED.get(name)
        result = None if faster is None else faster(*args, **kwargs)
        return definition(*args, **kwargs) if result is None else result

    return choose


def say_what_is_missing() -> None:
    """Once: one line for the user of a copy from the Hub."""
    if not _FILLED:
        logger.warning_once(
            f"Griffin runs from a model repository's own code, exact but not at full speed: {_remedy()}"
        )


def _remedy() -> str:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is not None and spec.has_location and spec.submodule_search_locations:  # a mere folder has none
        return f"the package is installed, so `import {PACKAGE}` before loading runs it faster"
    return "`pip install modeling-griffin` adds training kernels, recorded decoding, serving and complete saving"
