"""RecurrentGemma checkpoints, from Transformers and from DeepMind, as Griffins, and back to Transformers.

Names are the same in both but for the inside of `rg_lru`. Numbers differ where Transformers' port is off: a query of
DeepMind's window W sees W past tokens and itself, W + 1 keys; the port sees W keys. The result here follows DeepMind.

This file imports nothing of the package: the classes are handed in, so that they can have methods that call it.
"""

import copy
import os
import re
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, RecurrentGemmaConfig
from transformers.configuration_utils import PreTrainedConfig

from ..configuration_griffin import GriffinConfig
from ..modeling_griffin import GriffinForCausalLM


# Inside `rg_lru`: RecurrentGemma's name in Transformers, and ours.
RG_LRU_NAMES = {
    "recurrent_param": "decay.lambda_bias",
    "input_gate_weight": "input_gate.weight",
    "input_gate_bias": "input_gate.bias",
    "recurrent_gate_weight": "recurrence_gate.weight",
    "recurrent_gate_bias": "recurrence_gate.bias",
}
SAME_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "lru_width"),
    *("conv1d_width", "attention_dropout", "hidden_activation", "rms_norm_eps", "rope_parameters", "use_cache"),
    *("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "dtype"),
)
LAYER_TYPES = {"recurrent": "linear_attention", "attention": "sliding_attention"}

# DeepMind's names, below `blocks.N`, and ours, below `model.layers.N`.
DEEPMIND_NAMES = {
    "temporal_pre_norm.scale": "temporal_pre_norm.weight",
    "channel_pre_norm.scale": "channel_pre_norm.weight",
    **{
        f"recurrent_block.{linear}.{kind}": f"temporal_block.{linear}.{kind}"
        for linear in ("linear_x", "linear_y", "linear_out")
        for kind in ("weight", "bias")
    },
    "recurrent_block.conv_1d.w": "temporal_block.conv_1d.weight",
    "recurrent_block.conv_1d.b": "temporal_block.conv_1d.bias",
    "recurrent_block.rg_lru.a_param": "temporal_block.rg_lru.decay.lambda_bias",
    "recurrent_block.rg_lru.a_gate.w": "temporal_block.rg_lru.recurrence_gate.weight",
    "recurrent_block.rg_lru.a_gate.b": "temporal_block.rg_lru.recurrence_gate.bias",
    "recurrent_block.rg_lru.input_gate.w": "temporal_block.rg_lru.input_gate.weight",
    "recurrent_block.rg_lru.input_gate.b": "temporal_block.rg_lru.input_gate.bias",
    "attention_block.proj_q.weight": "temporal_block.q_proj.weight",
    "attention_block.proj_k.weight": "temporal_block.k_proj.weight",
    "attention_block.proj_v.weight": "temporal_block.v_proj.weight",
    "attention_block.proj_final.weight": "temporal_block.o_proj.weight",
    "attention_block.proj_final.bias": "temporal_block.o_proj.bias",
    "mlp_block.ffw_down.weight": "mlp_block.down_proj.weight",
    "mlp_block.ffw_down.bias": "mlp_block.down_proj.bias",
}
# What is taken apart here: how many dimensions it has, and how many branches of an MLP, if it holds them.
STACKED = {"mlp_block.ffw_up.w": (3, 2), "mlp_block.ffw_up.b": (4, 2), "recurrent_block.conv_1d.w": (2, None)}


def griffin_name(name: str) -> str:
    """The name here of an entry of RecurrentGemma's state dict, or of an adapter's."""
    return _rename(name, RG_LRU_NAMES)


def recurrent_gemma_name(name: str) -> str:
    """The inverse of `griffin_name`."""
    return _rename(name, {ours: theirs for theirs, ours in RG_LRU_NAMES.items()})


def _rename(name: str, names: dict[str, str]) -> str:
    prefix, found, rest = name.rpartition(".rg_lru.")
    return prefix + found + names.get(rest, rest)


def griffin_config_from_recurrent_gemma(config: PreTrainedConfig, config_class: type[GriffinConfig]) -> GriffinConfig:
    """A `config_class` (GriffinConfig) with the shapes and choices of a RecurrentGemmaConfig.

    Raises:
        ValueError: for a configuration of another model, and for `attention_bias=True`, which Griffin has not.
    """
    model_type = getattr(config, "model_type", None)
    if model_type != "recurrent_gemma":
        raise ValueError(f"config.model_type = {model_type!r}: allowed is 'recurrent_gemma'")
    if config.attention_bias:
        raise ValueError("attention_bias = True: allowed is False; Griffin's q_proj, k_proj and v_proj have no bias")
    if config.intermediate_size % 2:
        raise ValueError(
            f"intermediate_size = {config.intermediate_size}: allowed are even numbers, it counts two branches"
        )
    blocks = [config.block_types[i % len(config.block_types)] for i in range(config.num_hidden_layers)]
    return config_class(
        **{field: copy.deepcopy(getattr(config, field)) for field in SAME_FIELDS},
        intermediate_size=config.intermediate_size // 2,
        head_dim=config.head_dim,
        layer_types=[LAYER_TYPES[block] for block in blocks],
        attention_window_size=config.attention_window_size + 1,
        num_gate_blocks=config.num_attention_heads,
        final_logit_softcapping=config.logits_soft_cap or None,
        scale_embeddings=True,
        lambda_init="recurrent_gemma",
    )


def recurrent_gemma_config_from_griffin(config: GriffinConfig) -> RecurrentGemmaConfig:
    """The inverse of `griffin_config_from_recurrent_gemma`.

    Transformers' class then attends one key fewer than this model. Raises ValueError for what it cannot express.
    """
    check_expressible(config, "RecurrentGemma in Transformers", scale_embeddings=True)
    if config.final_logit_softcapping is None:
        raise ValueError("final_logit_softcapping = None: RecurrentGemma in Transformers always caps its logits")
    return recurrent_gemma_config(config, attention_window_size=config.attention_window_size - 1)


def recurrent_gemma_config(config: GriffinConfig, **fields: Any) -> RecurrentGemmaConfig:
    """A RecurrentGemmaConfig with the shapes of a GriffinConfig that passed `check_expressible`, and these fields."""
    theirs = {ours: block for block, ours in LAYER_TYPES.items()}
    return RecurrentGemmaConfig(
        **{field: copy.deepcopy(getattr(config, field)) for field in SAME_FIELDS},
        intermediate_size=config.intermediate_size * 2,
        block_types=_shortest_pattern([theirs[layer_type] for layer_type in config.layer_types]),
        architectures=["RecurrentGemmaForCausalLM"],
        **{"logits_soft_cap": config.final_logit_softcapping, **fields},
    )


def check_expressible(config: GriffinConfig, reader: str, **fields: Any) -> None:
    """Raises ValueError for a field that `reader` has no setting for: with the value that it has, and in `fields`."""
    heads = config.num_attention_heads
    allowed = {
        "model_type": "griffin",
        "num_gate_blocks": heads,
        "head_dim": config.hidden_size // heads,
        "rg_lru_c": 8,
        **fields,
    }
    for field, value in allowed.items():
        if getattr(config, field) != value:
            raise ValueError(f"{field} = {getattr(config, field)!r}: {reader} allows {value!r} only")


def _shortest_pattern(blocks: list[str]) -> list[str]:
    """The shortest list that, repeated, begins with `blocks`."""
    for length in range(1, len(blocks) + 1):
        if all(block == blocks[i % length] for i, block in enumerate(blocks)):
            return blocks[:length]
    return blocks


def check_weight(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError for a tensor that is no weight: integers, booleans, 8 bits without their scales, NaN."""
    allowed = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if tensor.dtype not in allowed or tensor.layout != torch.strided:
        what = tensor.dtype if tensor.layout == torch.strided else tensor.layout
        raise ValueError(f"{name} is {what}: allowed are dense tensors of float32, bfloat16, float16 or float64")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity: allowed are finite weights")


def griffin_tensors_from_recurrent_gemma(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """An entry of RecurrentGemma's state dict as ours: the same bits, Λ in float32."""
    name = griffin_name(name)
    return {name: tensor.float() if name.endswith("decay.lambda_bias") else tensor}


def recurrent_gemma_tensors_from_griffin(
    name: str, tensor: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """An entry of our state dict as RecurrentGemma's: Λ in `dtype`, or in its own where `dtype` would round it."""
    if name.endswith("decay.lambda_bias") and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
        tensor = tensor.to(dtype)
    return {recurrent_gemma_name(name): tensor}


def griffin_tensors_from_deepmind(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """An entry of the state dict of DeepMind's torch `Griffin` as ours: one entry, or the two branches of an MLP.

    Raises KeyError for a name that is none of DeepMind's.
    """
    if name == "embedder.input_embedding":
        return {"model.embed_tokens.weight": tensor}
    if name == "final_norm.scale":
        return {"model.final_norm.weight": tensor}
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if block is None or block[2] not in (*DEEPMIND_NAMES, "mlp_block.ffw_up.w", "mlp_block.ffw_up.b"):
        raise KeyError(f"{name}: not a parameter of DeepMind's recurrentgemma")
    layer, inside = f"model.layers.{block[1]}.", block[2]
    if inside in STACKED:
        _shape(name, tensor, STACKED[inside])
    if inside in ("mlp_block.ffw_up.w", "mlp_block.ffw_up.b"):  # (2, D, E) and (2, 1, 1, E), gate first
        kind, branches = ("weight", tensor.mT) if inside.endswith("w") else ("bias", tensor.flatten(1))
        return {
            f"{layer}mlp_block.gate_proj.{kind}": branches[0].contiguous(),
            f"{layer}mlp_block.up_proj.{kind}": branches[1].contiguous(),
        }
    if inside.endswith("conv_1d.w"):  # (taps, C) -> (C, 1, taps)
        tensor = tensor.T[:, None].contiguous()
    if inside.endswith("a_param"):
        tensor = tensor.float()
    return {layer + DEEPMIND_NAMES[inside]: tensor}


def griffin_config_from_deepmind(
    tensors: dict[str, torch.Tensor],
    config_class: type[GriffinConfig],
    attention_window_size: int = 2048,
    logits_soft_cap: float | None = 30.0,
    scale_embeddings: bool = True,
) -> GriffinConfig:
    """A `config_class` (GriffinConfig) for the state dict of DeepMind's torch `Griffin`; only its shapes are read.

    What shapes do not tell are arguments, in DeepMind's sense; the defaults are those of RecurrentGemma 2B and 9B.

    Raises:
        KeyError: for a tensor that is missing.
        ValueError: for an entry that is not a tensor, or not one of its dimensions, and for blocks with gaps.
    """
    if "embedder.input_embedding" not in tensors:
        raise ValueError("embedder.input_embedding is missing: allowed are state dicts of DeepMind's torch Griffin")

    def shape(name: str, dimensions: int) -> torch.Size:
        return _shape(name, tensors[name], (dimensions, None))

    vocab_size, hidden_size = shape("embedder.input_embedding", 2)
    layers = _count_layers(tensors)
    recurrent = [f"blocks.{i}.recurrent_block.rg_lru.a_gate.w" in tensors for i in range(layers)]
    first = f"blocks.{recurrent.index(True)}.recurrent_block" if any(recurrent) else None
    gates = shape(f"{first}.rg_lru.a_gate.w", 3) if first else None
    heads = gates[0] if first else None
    if not all(recurrent):
        heads = hidden_size // shape(f"blocks.{recurrent.index(False)}.attention_block.proj_k.weight", 2)[0]
    return config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=shape("blocks.0.mlp_block.ffw_down.weight", 2)[1],
        num_hidden_layers=layers,
        layer_types=[LAYER_TYPES["recurrent" if r else "attention"] for r in recurrent],
        num_attention_heads=heads,
        num_key_value_heads=1,
        attention_window_size=attention_window_size + 1,
        lru_width=gates[0] * gates[1] if first else hidden_size,
        num_gate_blocks=gates[0] if first else heads,
        conv1d_width=shape(f"{first}.conv_1d.w", 2)[0] if first else 4,
        final_logit_softcapping=logits_soft_cap or None,
        scale_embeddings=scale_embeddings,
        lambda_init="recurrent_gemma",
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        dtype=tensors["embedder.input_embedding"].dtype,
    )


def _count_layers(tensors: dict) -> int:
    """How many blocks there are; every entry is a tensor under a name."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} = {tensor!r:.60}: allowed are tensors, under the names of a state dict")
    found = {int(block[1]) for name in tensors if (block := re.match(r"blocks\.(\d{1,6})\.", name))}
    if not found or max(found) + 1 != len(found):
        numbers = ", ".join(map(str, sorted(found)[:8])) or "none"
        raise ValueError(f"blocks {numbers}: allowed are blocks from 0 on without a gap")
    return len(found)


def _shape(name: str, tensor, allowed: tuple[int, int | None]) -> torch.Size:
    """The shape of a tensor with so many dimensions, none of them empty, the first of them of the size allowed."""
    dimensions, first = allowed
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} = {tensor!r:.60}: allowed is a tensor")
    if tensor.ndim != dimensions or 0 in tensor.shape or (first is not None and tensor.shape[0] != first):
        size = "" if first is None else f", {first} of the first"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: allowed are {dimensions} dimensions{size}")
    return tensor.shape


def load_recurrent_gemma(
    source: str | os.PathLike | PreTrainedModel, model_class: type[GriffinForCausalLM], **kwargs: Any
) -> GriffinForCausalLM:
    """A `model_class` (GriffinForCausalLM) with the weights of RecurrentGemma.

    Args:
        source: a folder or Hub id of a Transformers checkpoint, or a loaded `RecurrentGemmaForCausalLM`.
        model_class: a Griffin class.
        kwargs: for `from_pretrained`, such as dtype, device_map, revision. The dtype is the source's when left out.
    """
    if isinstance(source, PreTrainedModel):
        config = griffin_config_from_recurrent_gemma(source.config, model_class.config_class)
        tensors = {}
        for name, tensor in source.state_dict().items():
            tensors.update(griffin_tensors_from_recurrent_gemma(name, tensor.clone()))  # or the two would share weights
        kwargs.setdefault("dtype", source.dtype)
        model = model_class.from_pretrained(None, config=config, state_dict=tensors, **kwargs)
        if model.can_generate():
            model.generation_config = copy.deepcopy(source.generation_config)
        return model
    hub = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
    config = AutoConfig.from_pretrained(source, **{key: kwargs[key] for key in hub if key in kwargs})
    config = griffin_config_from_recurrent_gemma(config, model_class.config_class)
    renamed = {rf"rg_lru\.{theirs}$": f"rg_lru.{ours}" for theirs, ours in RG_LRU_NAMES.items()}
    loaded = model_class.from_pretrained(source, config=config, key_mapping=renamed, **kwargs)
    # Otherwise `save_pretrained` would write the source's names again.
    (loaded[0] if isinstance(loaded, tuple) else loaded)._weight_conversions = None
    return loaded


__all__ = [
    "check_expressible",
    "check_weight",
    "griffin_config_from_deepmind",
    "griffin_config_from_recurrent_gemma",
    "griffin_name",
    "griffin_tensors_from_deepmind",
    "griffin_tensors_from_recurrent_gemma",
    "load_recurrent_gemma",
    "recurrent_gemma_config",
    "recurrent_gemma_config_from_griffin",
    "recurrent_gemma_name",
    "recurrent_gemma_tensors_from_griffin",
]
