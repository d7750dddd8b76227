"""The two names of a cache: Transformers renamed `past_key_values` to `cache` in 5.24, as argument and in outputs.

Griffin's arguments are `past_key_values`, and `cache` is taken as the same one, with every version of Transformers. Its
outputs are Transformers' own, so that there the cache has the name of the installed version.
"""  # SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from dataclasses import fields
from functools import wraps

from transformers.modeling_outputs import BaseModelOutputWithPast


# The name that outputs and `generate` use.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def takes_cache_by_either_name(function: Callable) -> Callable:
    """Hands an argument `cache` over as `past_key_values`. Raises ValueError where both are given."""

    @wraps(function)
    def renaming(*args, cache=None, **kwargs):
        if cache is not None:
            if kwargs.get("past_key_values") is not None:
                raise ValueError("past_key_values and cache: allowed is one of them, they name the same argument")
            kwargs["past_key_values"] = cache
        return function(*args, **kwargs)

    return renaming
