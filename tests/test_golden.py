"""What the models compute is what they computed when `golden_values.safetensors` was recorded."""

import json

import pytest
import torch
from golden import FILE, birthplace, golden_values
from safetensors import safe_open
from tolerances import assert_close


@pytest.fixture(scope="module")
def recorded():
    with safe_open(FILE, framework="pt") as file:
        return json.loads(file.metadata()["made"]), {name: file.get_tensor(name) for name in file.keys()}


def test_values_are_those_recorded(recorded):
    """To the last bit on the kind of processor and the PyTorch that recorded them, within rounding elsewhere."""
    made, expected = recorded
    actual = golden_values()
    assert actual.keys() == expected.keys()
    same_machine = made == birthplace()
    for name, value in expected.items():
        if same_machine or not value.is_floating_point():
            assert_close("exact", actual[name], value, name)
        elif ".training" in name:
            assert_close("golden training", actual[name], value, name)
        else:
            assert_close("gradient" if ".gradient." in name else "logits", actual[name], value, name)


def test_every_gradient_is_recorded_and_none_is_zero(recorded):
    _, expected = recorded
    gradients = {name: value for name, value in expected.items() if ".gradient." in name}
    assert len(gradients) > 80
    for name, value in gradients.items():
        assert torch.count_nonzero(value), name
