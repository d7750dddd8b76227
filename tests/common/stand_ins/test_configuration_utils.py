"""Stand-in: values, other than the defaults, for the fields that every configuration has."""

import torch
from transformers import PreTrainedConfig


def _other_value(name, default):
    if isinstance(default, bool):
        return not default
    special = {
        "dtype": torch.float16,
        "architectures": ["AnyModel"],
        "id2label": {0: "a", 1: "b", 2: "c"},
        "label2id": {"a": 0, "b": 1, "c": 2},
        "problem_type": "regression",
    }
    return special.get(name, default)


config_common_kwargs = {
    name: _other_value(name, getattr(PreTrainedConfig(), name))
    for name in (
        "return_dict",
        "output_hidden_states",
        "dtype",
        "architectures",
        "id2label",
        "label2id",
        "problem_type",
    )
}
