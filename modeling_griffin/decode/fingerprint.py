"""What a recorded step depends on, as one value that can be compared: another one means another step.

Weights are read where they lie, so that of a tensor only its place counts; everything else was written into the
recording: shapes, which modules there are, their settings, the configuration.
"""

from collections.abc import Iterator
from types import CellType, FunctionType, MethodType

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..kernels.hooks import global_forward_hooks
from ..modeling_griffin import GriffinAttention
from .original import functions_now
from .packed import tensors_of


FIELDS = (
    "layer_types",
    "attention_window_size",
    "scale_embeddings",
    "final_logit_softcapping",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "lru_width",
    "conv1d_width",
    "_attn_implementation",
)
SETTINGS = ("eps", "theta", "dim", "head_dim", "scaling", "sliding_window", "c", "embedding_scale", "layer_idx")
IGNORED = {GriffinAttention: ("num_key_value_groups",)}  # what a forward pass itself leaves there
SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def fused_fingerprint(model: nn.Module) -> tuple:
    """Of a model that the fused step can compute: its modules are known, and so are their settings."""
    config = tuple(value_of(getattr(model.config, name)) for name in FIELDS)
    settings = tuple(
        value for module in model.modules() for name in SETTINGS if (value := vars(module).get(name)) is not None
    )
    packed = (tensor for module in model.modules() if isinstance(module, nn.Linear) for tensor in tensors_of(module))
    return config, settings, tuple(_place(tensor) for tensor in (*model.parameters(), *packed))


def forward_fingerprint(model: nn.Module) -> tuple:
    """Of any model: every module, all that it holds, and the precision that the call asks for."""
    kind = model.device.type
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    config = tuple(value_of(getattr(model.config, name)) for name in FIELDS)
    around = value_of(global_forward_hooks()), functions_now(), torch.get_default_dtype()
    return config, autocast, around, tuple(_module(module) for module in model.modules())


def _module(module: nn.Module) -> tuple:
    ignored = IGNORED.get(type(module), ())
    held = ((name, value) for name, value in vars(module).items() if name not in ignored)
    return id(module), value_of(type(module).forward), tuple((name, value_of(value)) for name, value in held)


def value_of(value: object) -> object:
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, torch.Tensor):
        return _place(value)
    if isinstance(value, dict):
        return tuple((key if isinstance(key, SCALARS) else id(key), value_of(each)) for key, each in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(value_of(each) for each in value)
    if isinstance(value, PreTrainedConfig):  # a block's own
        return id(value), *(value_of(getattr(value, name, None)) for name in FIELDS)
    if isinstance(value, MethodType):
        return id(value.__self__), value_of(value.__func__)
    if isinstance(value, FunctionType):
        return id(value), id(value.__code__), tuple(value_of(each) for each in _read_by(value))
    return id(value)


def _read_by(function: FunctionType) -> Iterator:
    """The numbers and tensors that a function holds or finds by name: another one may lie there at the next call."""
    held = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    named = (function.__globals__.get(name) for name in function.__code__.co_names)
    for value in (*held, *(function.__defaults__ or ()), *named):
        if isinstance(value, (*SCALARS, torch.Tensor)):
            yield value


def _place(tensor: torch.Tensor) -> tuple:
    if hasattr(tensor, "__tensor_flatten__"):  # a tensor that wraps others, as torchao's weights do
        return type(tensor), tuple(_place(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    try:
        pointer = tensor.data_ptr()
    except RuntimeError:  # one that wraps others and does not say which
        pointer = id(tensor)
    return pointer, tensor.dtype, tuple(tensor.shape), tensor.stride()
