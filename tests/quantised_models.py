"""For the tests of quantised weights: the schemes by name, small models in them, and the same weights dequantised."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fine_tuning_runs import LINEAR
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig


SIZES = {"hidden_size": 64, "intermediate_size": 128, "lru_width": 64, "head_dim": 32, "num_gate_blocks": 4}
BITSANDBYTES = ("nf4", "nf4, constants too", "int8")
TORCHAO = ("torchao int8", "torchao float8")
SCHEMES = (*BITSANDBYTES, *TORCHAO)


def make_scheme(name: str, compute_dtype=torch.float32):
    """The configuration of this name; skips the test only where the library is not installed."""
    if name in BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
        if name == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=name != "nf4",
            bnb_4bit_compute_dtype=compute_dtype,
        )
    quantization = pytest.importorskip("torchao.quantization")
    makers = {"int8": quantization.Int8WeightOnlyConfig, "float8": quantization.Float8WeightOnlyConfig}
    return TorchAoConfig(makers[name.removeprefix("torchao ")]())


def load_quantised(folder, name: str, dtype=torch.float32, device="cpu") -> nn.Module:
    """What lies in `folder` with the scheme's weights, computing in `dtype`."""
    scheme = make_scheme(name, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=scheme, dtype=dtype, device_map=device)
    for module in model.modules():  # a layout of some processors' own, which computes in bfloat16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def linears_of(model) -> dict[str, nn.Module]:
    """The layers that a scheme quantises: all linear ones but the head."""
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in LINEAR}


def dequantised_weight(module: nn.Module) -> torch.Tensor:
    """(N, D) float32, by what the library says its numbers mean."""
    weight = module.weight
    if type(weight.data) is not torch.Tensor:
        return weight.dequantize().float()
    if weight.dtype == torch.int8:
        scale = module.state.SCB if module.state.SCB is not None else weight.SCB
        return weight.float() * scale[:, None] / 127
    functional = pytest.importorskip("bitsandbytes.functional")
    return functional.dequantize_4bit(weight.data, weight.quant_state).float()


def dequantised(model) -> nn.Module:
    """A copy with plain linear layers that hold the scheme's own numbers."""
    plain = copy.deepcopy(model)
    for name, module in linears_of(model).items():
        weight = dequantised_weight(module).to(model.dtype)
        linear = nn.Linear(weight.shape[1], weight.shape[0], module.bias is not None, dtype=model.dtype)
        linear.weight.data = weight
        if module.bias is not None:
            linear.bias.data = module.bias.data.to(model.dtype)
        parent, _, last = name.rpartition(".")
        setattr(plain.get_submodule(parent), last, linear)
    return plain.eval()


def largest_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return F.l1_loss(found.float(), expected.float(), reduction="none").max().item() / expected.abs().max().item()
