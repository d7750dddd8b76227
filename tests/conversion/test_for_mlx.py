"""What is written for mlx-lm, and what is refused; tests/tools/test_mlx.py loads it there."""

import convert_recurrent_gemma
import pytest
import torch

from modeling_griffin.conversion.mlx import mlx_config_from_griffin, mlx_differences, mlx_tensors_from_griffin


EXPRESSIBLE = {"lru_width": 16, "num_gate_blocks": 2}


def test_configuration_as_mlx_reads_it(small_config):
    config = small_config(**EXPRESSIBLE, scale_embeddings=True)
    written = mlx_config_from_griffin(config).to_dict()
    assert written["model_type"] == "recurrent_gemma"
    assert written["rope_theta"] == 10_000.0 and written["embeddings_scale_by_sqrt_dim"] is True
    assert written["attention_window_size"] == config.attention_window_size
    assert written["logits_soft_cap"] == 0.0 and written["intermediate_size"] == 2 * config.intermediate_size
    assert written["block_types"] == ["recurrent", "recurrent", "attention"]


@pytest.mark.parametrize(
    "field, fields",
    [
        ("lru_width = 24", {"lru_width": 24}),
        ("num_gate_blocks = 4", {"num_gate_blocks": 4}),
        ("num_key_value_heads = 2", {"num_key_value_heads": 2}),
        ("conv1d_width = 3", {"conv1d_width": 3}),
        ("rg_lru_c = 4", {"rg_lru_c": 4.0}),
        ("hidden_activation = 'silu'", {"hidden_activation": "silu"}),
        ("head_dim = 4", {"head_dim": 4}),
        (r"rope_parameters\['rope_theta'\] = 500", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        (
            r"rope_parameters\['partial_rotary_factor'\] = 1.0",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
        ),
        ("layer_types = all linear_attention", {"layer_types": ["linear_attention"]}),
    ],
)
def test_what_mlx_cannot_express_is_refused_by_name(field, fields, small_config):
    with pytest.raises(ValueError, match=f"{field}.*: mlx-lm allows"):
        mlx_config_from_griffin(small_config(**{**EXPRESSIBLE, **fields}))


def test_lambda_takes_the_dtype_of_the_weights():
    name = "model.layers.0.temporal_block.rg_lru.decay.lambda_bias"
    (written,) = mlx_tensors_from_griffin(name, torch.randn(4), torch.bfloat16).items()
    assert written[0] == "model.layers.0.temporal_block.rg_lru.recurrent_param" and written[1].dtype == torch.bfloat16


def test_differences_are_said(small_config):
    exact = small_config(rms_norm_eps=1e-5, scale_embeddings=True)
    assert mlx_differences(exact, torch.float32) == []
    assert len(mlx_differences(small_config(hidden_size=24, scale_embeddings=True), torch.float32)) == 2
    assert mlx_differences(exact, torch.bfloat16) == ["Λ is in bfloat16, as all weights are"]


def test_reader_without_reverse_is_refused(capsys):
    with pytest.raises(SystemExit):
        convert_recurrent_gemma.main(["there", "here", "--for", "mlx"])
    assert "--for mlx: allowed is with --reverse only" in capsys.readouterr().err
