"""Whether a model is, module by module, what the fused step computes: asked of what its modules are now.

Each check names what it found. Whatever the fused step is not made for runs by the recorded plain forward pass.

Legend: D width of the residual stream, F features of the MLP, C RG-LRU channels, N gate blocks, H heads, K head
dimension, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import nn

from ..causal_conv1d import CausalConv1d
from ..kernels.device import MATVEC_NF4_DTYPES, decode_refusal, float8_fits, properties
from ..kernels.dispatch import GELU_TANH, is_gelu_tanh
from ..kernels.hooks import forward_hooks, has_global_hooks
from ..modeling_griffin import (
    GriffinAttention,
    GriffinDecoderLayer,
    GriffinForCausalLM,
    GriffinMLP,
    GriffinModel,
    GriffinRecurrentBlock,
    GriffinRMSNorm,
    GriffinRotaryEmbedding,
)
from ..rg_lru import RGLRU, BlockDiagonalLinear, Decay
from . import packed
from .host_effects import watching_mode
from .original import (
    ATTENTIONS,
    CLASSES,
    own_function,
    patched_cache,
    patched_class,
    patched_function,
)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ASKS_FOR_GRADIENTS = ("make_inputs_require_grads", "make_inputs_require_grad")  # for gradient checkpointing
OUTPUT_CAPTURING = "transformers.utils.output_capturing"  # hooks that record outputs when a call asks for them


def fused_obstacles(model: nn.Module) -> Iterator[str]:
    """Why the fused step would not compute what `model(...)` does."""
    if not isinstance(model, GriffinForCausalLM):
        yield f"the model is a {type(model).__name__}"
        return
    if type(model.model) is not GriffinModel:
        yield f"model.model is a {type(model.model).__name__}, not a GriffinModel"
        return
    yield from _around_the_model(model)
    for name in (patched_function(), patched_cache()):
        if name is not None:
            yield f"{name} was replaced"
    for cls in CLASSES:
        if cls is not GriffinForCausalLM and (name := patched_class(cls, cls)) is not None:
            yield f"{cls.__name__}.{name} was replaced"
    if (name := patched_class(type(model), GriffinForCausalLM)) is not None:
        yield f"{type(model).__name__}.{name} is not GriffinForCausalLM's"
    weight = getattr(model.lm_head, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dtype not in DTYPES:
        yield f"lm_head is a {type(model.lm_head).__name__} of {getattr(weight, 'dtype', 'no dtype')}"
        return
    for name, module, cls, shape in _roles(model):
        is_packed = cls is nn.Linear and name != "lm_head" and packed.unpack(module) is not None
        reason = _in_packed(module, shape, weight) if is_packed else _in_module(module, cls, shape, weight)
        if reason:
            yield f"{name or 'the model'} {reason}"


def _around_the_model(model) -> Iterator[str]:
    config, device = model.config, model.device
    if device.type == "cuda" and (reason := decode_refusal(properties(device))) is not None:
        yield reason
    attention = config._attn_implementation
    if attention not in ("eager", *ATTENTIONS):
        yield f"attn_implementation = {attention!r}"
    if drops_attention(model):
        yield "attention_dropout in training mode"
    if torch.is_autocast_enabled(device.type):
        yield "autocast"
    if has_global_hooks():
        yield "hooks of every module"
    if (mode := watching_mode()) is not None:
        yield f"a {mode}"
    blocks = [getattr(layer, "temporal_block", layer) for layer in model.model.layers]
    if any(vars(part).get("config", config) is not config for part in (model.model, *blocks)):
        yield "a part of the model has a configuration of its own"
    if len(model.model.layers) != len(config.layer_types):
        yield f"model.layers has {len(model.model.layers)} layers and config.layer_types {len(config.layer_types)}"
    indices = [vars(block).get("layer_idx") for block in blocks]
    if indices != list(range(len(indices))):
        yield f"model.layers are in another order than made: {indices}"


def drops_attention(model: nn.Module) -> bool:
    """Asked of the blocks: one of them alone may be in training mode, or have a dropout of its own."""
    blocks = (module for module in model.modules() if isinstance(module, GriffinAttention))
    return any(block.training and block.attention_dropout for block in blocks)


def _roles(model) -> Iterator[tuple]:
    """Name, module, the class that it should be, and for those with weights their (weight, bias) shapes."""
    config, base = model.config, model.model
    width = config.hidden_size
    yield "", model, None, None
    yield "model", base, GriffinModel, None
    yield "embed_tokens", base.embed_tokens, nn.Embedding, ((None, width),)
    yield "layers", base.layers, nn.ModuleList, None
    yield "rotary_emb", base.rotary_emb, GriffinRotaryEmbedding, None
    yield "final_norm", base.final_norm, GriffinRMSNorm, ((width,),)
    yield "lm_head", model.lm_head, nn.Linear, ((None, width), None)
    for index, (layer, kind) in enumerate(zip(base.layers, config.layer_types)):
        for name, *role in _roles_of_layer(config, layer, kind):
            yield f"layers.{index}{name}", *role


def _roles_of_layer(config, layer, kind: str) -> Iterator[tuple]:
    width, features, channels = config.hidden_size, config.intermediate_size, config.lru_width
    yield "", layer, GriffinDecoderLayer, None
    if type(layer) is not GriffinDecoderLayer:
        return
    for name in ("temporal_pre_norm", "channel_pre_norm"):
        yield f".{name}", getattr(layer, name), GriffinRMSNorm, ((width,),)
    mlp, block = layer.mlp_block, layer.temporal_block
    yield ".mlp_block", mlp, GriffinMLP, None
    if type(mlp) is GriffinMLP:
        yield ".mlp_block.act_fn", mlp.act_fn, GELU_TANH, None
        yield ".mlp_block.gate_proj", mlp.gate_proj, nn.Linear, ((features, width), (features,))
        yield ".mlp_block.up_proj", mlp.up_proj, nn.Linear, ((features, width), (features,))
        yield ".mlp_block.down_proj", mlp.down_proj, nn.Linear, ((width, features), (width,))
    if kind == "sliding_attention":
        yield ".temporal_block", block, GriffinAttention, None
        if type(block) is GriffinAttention:
            queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
            yield ".temporal_block.q_proj", block.q_proj, nn.Linear, ((queries, width), None)
            yield ".temporal_block.k_proj", block.k_proj, nn.Linear, ((keys, width), None)
            yield ".temporal_block.v_proj", block.v_proj, nn.Linear, ((keys, width), None)
            yield ".temporal_block.o_proj", block.o_proj, nn.Linear, ((width, queries), (width,))
        return
    yield ".temporal_block", block, GriffinRecurrentBlock, None
    if type(block) is not GriffinRecurrentBlock:
        return
    yield ".temporal_block.act_fn", block.act_fn, GELU_TANH, None
    yield ".temporal_block.linear_x", block.linear_x, nn.Linear, ((channels, width), (channels,))
    yield ".temporal_block.linear_y", block.linear_y, nn.Linear, ((channels, width), (channels,))
    yield ".temporal_block.linear_out", block.linear_out, nn.Linear, ((width, channels), (width,))
    conv = (channels, 1, config.conv1d_width), (channels,)
    yield ".temporal_block.conv_1d", block.conv_1d, CausalConv1d, conv
    yield ".temporal_block.rg_lru", block.rg_lru, RGLRU, None
    if type(block.rg_lru) is RGLRU:
        blocks = config.num_gate_blocks
        gate = (blocks, channels // blocks, channels // blocks), (blocks, channels // blocks)
        yield ".temporal_block.rg_lru.input_gate", block.rg_lru.input_gate, BlockDiagonalLinear, gate
        yield ".temporal_block.rg_lru.recurrence_gate", block.rg_lru.recurrence_gate, BlockDiagonalLinear, gate
        yield ".temporal_block.rg_lru.decay", block.rg_lru.decay, Decay, ((channels,),)


def _in_module(module: nn.Module, cls: type | None, shapes: tuple | None, like: torch.Tensor) -> str | None:
    if cls is not None and type(module) is not cls:
        return f"is a {type(module).__name__}, not a {cls.__name__}"
    if (name := own_function(module)) is not None:
        return f"has a {name} of its own"
    if _has_a_hook(module):
        return "has a hook"
    if cls is GELU_TANH and not is_gelu_tanh(module):
        return "is another activation"
    if cls is nn.Embedding and module.max_norm is not None:
        return "has a max_norm"
    if cls is GriffinAttention and module.sliding_window != module.config.attention_window_size:
        return f"has sliding_window = {module.sliding_window}, not config.attention_window_size"
    if shapes is None:
        return None
    names = ("lambda_bias",) if cls is Decay else ("weight", "bias")
    return next(
        filter(None, (_in_parameter(module, name, shape, like) for name, shape in zip(names, shapes))),
        None,
    )


def _in_packed(module: nn.Module, shapes: tuple, like: torch.Tensor) -> str | None:
    """Of a linear layer whose weights a quantisation library has packed; shapes as of a plain one."""
    held, (shape, bias_shape), device = packed.unpack(module), shapes, like.device
    library = type(module).forward.__module__.split(".")[0]
    if library not in ("torch", "bitsandbytes") or own_function(module) is not None:
        return "has a forward of its own"
    if _has_a_hook(module):
        return "has a hook"
    if (reason := _without_kernels(held, like)) is not None:
        return reason
    if (module.out_features, module.in_features) != shape:
        return f"has a weight of shape {(module.out_features, module.in_features)}"
    if any(each.device != device or not each.is_contiguous() for each in packed.tensors_of(module)):
        return "has a weight that lies elsewhere"
    found = None if module.bias is None else tuple(module.bias.shape)
    return None if found == bias_shape else f"has a bias of shape {found}"


def _without_kernels(held: packed.Rows | packed.NF4, like: torch.Tensor) -> str | None:
    if like.device.type not in packed.ON or properties(like.device).vendor == "amd":
        return "has packed weights, which have kernels on an NVIDIA GPU alone"
    # One H200, 2.1 billion parameters, ms a token at 1 and 64 rows: 1.08 and 3.51 by matrix units; 5.35 and 35.9 by
    # kernels without, which other dtypes would get; bitsandbytes' in the recorded forward pass had 4.17 at one row.
    if isinstance(held, packed.NF4) and like.dtype not in MATVEC_NF4_DTYPES:
        return f"has NF4 weights and its model is in {like.dtype}, for which they have no fast kernels"
    on_a_gpu = like.device.type == "cuda"
    if held.data.dtype.is_floating_point and on_a_gpu and not float8_fits(properties(like.device)):
        return "has float8 weights, which this GPU cannot convert"
    return None


def _has_a_hook(module: nn.Module) -> bool:
    return not all(changes_nothing(hook) for hook in forward_hooks(module))


def changes_nothing(hook: object) -> bool:
    """Hooks of Transformers and PEFT that only look, or ask for the gradient of what they see."""
    module, name = getattr(hook, "__module__", "") or "", getattr(hook, "__name__", "")
    asks = name in ASKS_FOR_GRADIENTS and module.split(".")[0] in ("transformers", "peft")
    return module == OUTPUT_CAPTURING or asks


def _in_parameter(module: nn.Module, name: str, shape: tuple | None, like: torch.Tensor) -> str | None:
    """shape: of the parameter, None in it for any size; None where there should be no parameter."""
    parameter = module._parameters.get(name)
    if parameter is None or shape is None:
        return (
            None
            if parameter is None and shape is None and getattr(module, name, None) is None
            else (f"has {'no' if parameter is None else 'a'} {name}")
        )
    if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
        return f"has a {name} that is a {type(parameter.data).__name__}"
    if len(parameter.shape) != len(shape) or any(b is not None and a != b for a, b in zip(parameter.shape, shape)):
        return f"has a {name} of shape {tuple(parameter.shape)}"
    if parameter.device != like.device or not parameter.is_contiguous():
        return f"has a {name} that lies elsewhere"
    if parameter.dtype != like.dtype and name != "lambda_bias":
        return f"has a {name} of another dtype"
    return None
