"""`float8` of train.py: products of the linear layers in float8, by torchao through accelerate's conversion.

Weights stay float32 in storage, in checkpoints and in the optimizer; each product casts its two operands, with a scale
for the whole tensor or one for each row. The head, the RG-LRU's gates, the convolution and Λ compute as before.
"""

import dataclasses
import importlib.util
from typing import Any

import torch
from torch import nn

from modeling_griffin.kernels.device import properties


RECIPES = ("tensorwise", "rowwise")
LEAST_CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0)}  # of the GPU, as PyTorch's float8 products ask for
MULTIPLE = 16  # of both sides of a matrix, as the hardware asks for


def check_float8(recipe: str | None, device: torch.device) -> None:
    """Raises ValueError, before any text is read, where the recipe, the library or the GPU is not there."""
    if recipe is None:
        return
    if recipe not in RECIPES:
        raise ValueError(f"float8 = {recipe!r}: allowed are {' and '.join(RECIPES)}, or nothing for none")
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f"float8 = {recipe!r} needs torchao, which is not installed: pip install torchao, or unset it")
    least = LEAST_CAPABILITY[recipe]
    found = properties(device).capability  # (0, 0) of anything but an NVIDIA GPU
    if found < least:
        name = device.type if found == (0, 0) else f"a GPU of compute capability {found[0]}.{found[1]}"
        allowed = f"a GPU of compute capability {least[0]}.{least[1]} or newer"
        raise ValueError(f"float8 = {recipe!r} on {name}: allowed is {allowed}; unset it to train here")


def is_converted(module: nn.Module, name: str) -> bool:
    """Whether a linear layer of this name is converted."""
    sides = (module.in_features, module.out_features)
    return name.rpartition(".")[2] != "lm_head" and all(side % MULTIPLE == 0 for side in sides)


def convert(model: nn.Module, recipe: str, compiled: bool = True, **changes: Any) -> int:
    """Converts the linear layers of the residual blocks in place, and compiles each block; returns how many layers.

    Eager, a cast reads and writes its tensor several times over and costs more than the product saves. Names of
    weights stay, so that saves and checkpoints are those of any other run. changes: to torchao's configuration.
    """
    from accelerate.utils.ao import convert_model_to_fp8_ao
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    # Padded: the weights' gradients sum over tokens, of which a batch may have any number.
    changes = {"pad_inner_dim": True, **changes}
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), **changes)
    convert_model_to_fp8_ao(model, config, is_converted)
    if compiled:
        compile_blocks(model)
    return sum(isinstance(module, Float8Linear) for module in model.modules())


def compile_blocks(model: nn.Module) -> None:
    """Each residual block in place, so that blocks of a kind share what was compiled."""
    for layer in model.model.layers:
        layer.compile()
