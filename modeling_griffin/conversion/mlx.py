"""Griffins for mlx-lm, which reads RecurrentGemma's names and shapes with settings of its own.

Read in mlx-lm 0.32: it takes no setting for the rotary embedding, the taps of the convolution, the epsilon of a layer's
norms, the RG-LRU's width and c, several key-value heads and attention biases; a window of W is W keys, as here; an
embedding is scaled by sqrt(hidden_size) not rounded to bfloat16; and Λ has to have the dtype of the other weights.
"""

import torch
from transformers import RecurrentGemmaConfig

from ..configuration_griffin import GriffinConfig
from .recurrent_gemma import check_expressible, recurrent_gemma_config, recurrent_gemma_name


READER = "mlx-lm"
ROPE_THETA, PARTIAL_ROTARY_FACTOR, LAYER_EPS = 10_000.0, 0.5, 1e-5


def mlx_config_from_griffin(config: GriffinConfig) -> RecurrentGemmaConfig:
    """What mlx-lm's loader reads of config.json, from a GriffinConfig.

    Raises:
        ValueError: naming the field, for what mlx-lm cannot express.
    """
    check_expressible(
        config,
        READER,
        lru_width=config.hidden_size,
        num_key_value_heads=1,
        conv1d_width=4,
        hidden_activation="gelu_pytorch_tanh",
    )
    rope = config.rope_parameters
    for name, allowed in (("rope_theta", ROPE_THETA), ("partial_rotary_factor", PARTIAL_ROTARY_FACTOR)):
        if rope[name] != allowed:
            raise ValueError(f"rope_parameters[{name!r}] = {rope[name]!r}: {READER} allows {allowed!r} only")
    if "sliding_attention" not in config.layer_types:
        raise ValueError(f"layer_types = all linear_attention: {READER} allows models with attention layers only")
    theirs = recurrent_gemma_config(
        config,
        attention_window_size=config.attention_window_size,
        logits_soft_cap=config.final_logit_softcapping or 0.0,
    )
    theirs.rope_theta = ROPE_THETA
    theirs.embeddings_scale_by_sqrt_dim = config.scale_embeddings
    return theirs


def mlx_tensors_from_griffin(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """An entry of our state dict under RecurrentGemma's name, Λ in the `dtype` of the other weights."""
    return {recurrent_gemma_name(name): tensor.to(dtype) if name.endswith("decay.lambda_bias") else tensor}


def mlx_differences(config: GriffinConfig, dtype: torch.dtype) -> list[str]:
    """Where mlx-lm computes other numbers than the model, one line each."""
    lines = []
    if config.rms_norm_eps != LAYER_EPS:
        lines.append(f"the norms of its layers add {LAYER_EPS}, not rms_norm_eps = {config.rms_norm_eps}")
    root = config.hidden_size**0.5
    if config.scale_embeddings and dtype == torch.float32 and torch.tensor(root).bfloat16().item() != root:
        lines.append(f"it scales embeddings by {root:.6g}, not by that number in bfloat16")
    if dtype != torch.float32:
        lines.append(f"Λ is in {str(dtype).removeprefix('torch.')}, as all weights are")
    return lines
