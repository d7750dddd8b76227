"""configuration/model/*.json: every ready-made model builds on the meta device and has the right parameters."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_griffin import GriffinConfig
from scripts.list_model_sizes import count_parameters, size_table


FOLDER = Path(__file__).resolve().parents[2] / "configuration" / "model"
# D, D_RNN, depth, heads of the paper's table 1
PAPER = {
    "100m": (768, 1024, 12, 6),
    "200m": (1024, 1536, 12, 8),
    "400m": (1536, 2048, 12, 12),
    "1b3": (2048, 2560, 24, 16),
    "3b": (3072, 4096, 24, 24),
    "7b": (4096, 5632, 32, 32),
    "14b": (5120, 8192, 40, 40),
}
PARAMETERS = {
    "griffin-100m": 113_879_808,
    "griffin-200m": 195_806_208,
    "griffin-400m": 404_444_672,
    "griffin-1b3": 1_308_477_440,
    "griffin-3b": 2_932_952_064,
    "griffin-7b": 6_921_254_912,
    "griffin-14b": 13_927_781_376,
    "hawk-100m": 118_377_216,
    "hawk-200m": 206_484_480,
    "hawk-400m": 423_925_248,
    "hawk-1b3": 1_369_761_792,
    "hawk-3b": 3_094_760_448,
    "hawk-7b": 7_307_497_472,
    "hawk-14b": 14_975_063_040,
    "recurrentgemma-2b": 2_682_862_080,
    "recurrentgemma-9b": 8_579_977_216,
}


def load(name):
    return GriffinConfig.from_json_file(FOLDER / f"{name}.json")


def formula(c):
    """The parameters written out from the paper's description, and biases as in DeepMind's code."""
    d, lru, mlp = c.hidden_size, c.lru_width, c.intermediate_size
    heads, key_values = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    gates = 2 * (lru * lru // c.num_gate_blocks + lru)
    recurrent = 2 * (d * lru + lru) + (c.conv1d_width * lru + lru) + gates + lru + (lru * d + d)
    attention = d * heads + 2 * d * key_values + (heads * d + d)
    every_layer = 2 * (d * mlp + mlp) + (mlp * d + d) + 2 * d
    total = c.num_hidden_layers * every_layer + d + c.vocab_size * d * (1 if c.tie_word_embeddings else 2)
    return total + sum({"linear_attention": recurrent, "sliding_attention": attention}[kind] for kind in c.layer_types)


def test_all_files_are_here():
    assert {path.stem for path in FOLDER.glob("*.json")} == {"tiny", *PARAMETERS}


@pytest.mark.parametrize("name", [*PARAMETERS, "tiny"])
def test_parameters(name):
    config = load(name)
    assert count_parameters(config) == formula(config) == PARAMETERS.get(name, formula(config))


@pytest.mark.parametrize("name", PARAMETERS)
def test_loads_through_the_auto_classes(name):
    config = AutoConfig.from_pretrained(FOLDER / f"{name}.json")
    assert type(config) is GriffinConfig
    assert config.to_dict() | {"_name_or_path": ""} == load(name).to_dict()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("family", ["griffin", "hawk"])
def test_the_papers_table(family, size):
    config = load(f"{family}-{size}")
    shape = (config.hidden_size, config.lru_width, config.num_hidden_layers, config.num_attention_heads)
    assert shape == PAPER[size]
    assert config.intermediate_size == 3 * config.hidden_size
    assert (config.head_dim, config.num_key_value_heads, config.vocab_size) == (128, 1, 32000)
    assert (config.attention_window_size, config.conv1d_width, config.num_gate_blocks) == (1024, 4, 16)
    assert (config.rg_lru_c, config.lambda_init, config.lambda_init_bounds) == (8.0, "uniform", [0.9, 0.999])
    assert config.tie_word_embeddings and not config.scale_embeddings and config.final_logit_softcapping is None
    pattern = ["linear_attention", "linear_attention", "sliding_attention"]
    for index, kind in enumerate(config.layer_types):
        assert kind == ("linear_attention" if family == "hawk" else pattern[index % 3])


@pytest.mark.parametrize(
    "name, billions, depth, heads, blocks",
    [("recurrentgemma-2b", 2.68, 26, 10, 10), ("recurrentgemma-9b", 8.58, 38, 16, 16)],
)
def test_recurrentgemma(name, billions, depth, heads, blocks):
    config = load(name)
    assert round(PARAMETERS[name] / 1e9, 2) == billions
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_gate_blocks) == (depth, heads, blocks)
    assert config.lru_width == config.hidden_size and config.head_dim == 256 and config.num_key_value_heads == 1
    assert config.attention_window_size == 2049 and config.vocab_size == 256000
    assert config.scale_embeddings and config.final_logit_softcapping == 30.0
    assert config.lambda_init == "recurrent_gemma"
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, 2)


def test_table_in_the_readme_is_true():
    assert size_table() in (FOLDER.parent / "README.md").read_text()
