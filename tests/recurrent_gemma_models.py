"""Small RecurrentGemmas of Transformers, with weights under which a wrong number shows."""

import torch
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM


PORT_WINDOW = 6  # keys that Transformers' port sees; DeepMind's code, and the converted Griffin, see one more


def small_recurrent_gemma_config(**kwargs) -> RecurrentGemmaConfig:
    shapes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 192, "num_hidden_layers": 3, "lru_width": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "attention_window_size": PORT_WINDOW}
    return RecurrentGemmaConfig(**{**shapes, **heads, **kwargs})


def small_recurrent_gemma(**kwargs) -> RecurrentGemmaForCausalLM:
    """Every parameter moved off its initial value, and convolutions and gates to the size training gives them."""
    torch.manual_seed(0)
    model = RecurrentGemmaForCausalLM(small_recurrent_gemma_config(**kwargs)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "recurrent_param" not in name:
                parameter.add_(
                    (0.4 if "conv_1d" in name or "gate_weight" in name else 0.1) * torch.randn_like(parameter)
                )
    return model
