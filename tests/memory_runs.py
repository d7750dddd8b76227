"""Small models for the tests of memory and communication: sizes that all differ, so that no two can be mixed up."""

from modeling_griffin import GriffinConfig


R, A = "linear_attention", "sliding_attention"
TENSOR_PARALLEL = {"num_gate_blocks": 4, "vocab_size": 102}  # what two ranks can share out


def make_config(layer_types=(R, R, A), **changes) -> GriffinConfig:
    fields = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": len(layer_types),
        "layer_types": list(layer_types),
        "num_attention_heads": 2,
        "head_dim": 20,
        "lru_width": 48,
        "num_gate_blocks": 3,
        "attention_window_size": 8,
    }
    return GriffinConfig(**{**fields, **changes})
