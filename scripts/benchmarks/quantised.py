"""Models whose linear layers are quantised where they are, without a folder: what `benchmark_quantised.py` times.

Run as a program, it is train.py with emulated products.

Legend: N outputs of a layer, D inputs.
"""

import copy
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from modeling_griffin.decode import packed


SCHEMES = ("bfloat16", "bitsandbytes int8", "torchao int8", "torchao float8", "nf4", "nf4, constants too")


def quantise(model: nn.Module, scheme: str) -> nn.Module:
    """All linear layers but the head, in place, layer by layer; PEFT finds the marks that Transformers would set."""
    if scheme.startswith("torchao"):
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        config = Float8WeightOnlyConfig() if scheme.endswith("float8") else Int8WeightOnlyConfig()
        quantize_(model, config, lambda module, name: type(module) is nn.Linear and "lm_head" not in name)
        model.quantization_method = "torchao"
    elif scheme not in ("float32", "bfloat16"):
        names = [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"]
        for name in names:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _by_bitsandbytes(model.get_submodule(name), scheme))
        setattr(model, "is_loaded_in_8bit" if scheme.endswith("int8") else "is_loaded_in_4bit", True)
    return model


def _by_bitsandbytes(linear: nn.Linear, scheme: str) -> nn.Module:
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which warns at each product that it casts to float16
    sizes, weight = (linear.in_features, linear.out_features, linear.bias is not None), linear.weight
    if scheme.endswith("int8"):
        made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        made.weight = bnb.nn.Int8Params(weight.data.cpu(), has_fp16_weights=False, requires_grad=False)
    else:
        nested = scheme != "nf4"
        made = bnb.nn.Linear4bit(*sizes, compute_dtype=weight.dtype, compress_statistics=nested, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(
            weight.data, requires_grad=False, compress_statistics=nested, quant_type="nf4", module=made
        )
    made.bias = linear.bias
    return made.to(weight.device)  # where bitsandbytes packs


def dequantised(model: nn.Module) -> nn.Module:
    """A copy of plain layers that hold the scheme's own numbers, in the model's dtype."""
    plain = copy.deepcopy(model)
    for name, module in model.named_modules():
        if (held := packed.unpack(module)) is None:
            continue
        weight = held.dequantised(torch.float32).to(model.dtype)
        linear = nn.Linear(weight.shape[1], weight.shape[0], module.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, False)
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.data.to(model.dtype), False)
        parent, _, last = name.rpartition(".")
        setattr(plain.get_submodule(parent), last, linear)
    return plain.eval()


def bytes_of(model: nn.Module) -> int:
    """Of all that a step over one row reads of the weights: the embedding counts as the head, with which it is tied."""
    held = {id(p): p.numel() * p.element_size() for p in model.parameters() if type(p.data) is torch.Tensor}
    for module in model.modules():
        for tensor in packed.tensors_of(module) if isinstance(module, nn.Linear) else ():
            held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            held.pop(id(module.weight), None)
    return sum(held.values())


def without_kernels(call: Callable) -> Any:
    """The result of `call` where packed weights have no kernel: by the model's own forward pass, recorded."""
    before, packed.ON = packed.ON, ()
    try:
        return call()
    finally:
        packed.ON = before


def train_emulated(words: list[str]) -> None:
    """train.py with these words on a CPU, where torchao emulates products in float8: eager, and slow."""
    import train
    from training.float8 import convert

    emulated = partial(convert, compiled=False, emulate=True)
    with patch.object(train, "check_float8"), patch.object(train, "convert", emulated):
        train.run(words)


if __name__ == "__main__":
    train_emulated(sys.argv[1:])
