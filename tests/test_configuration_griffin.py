"""GriffinConfig: defaults, the refusal of bad values, and every way to write and read it back."""

import copy
import json
import time

import pytest
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_griffin import LAMBDA_INITS, GriffinConfig, GriffinForCausalLM


# case: (fields, what the message must name)
BAD_VALUES = {
    # numbers below what is allowed
    "vocab_size": ({"vocab_size": 0}, "vocab_size = 0"),
    "hidden_size": ({"hidden_size": -16}, "hidden_size = -16"),
    "intermediate_size": ({"intermediate_size": 0}, "intermediate_size = 0"),
    "num_hidden_layers": ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    "num_attention_heads": ({"num_attention_heads": 0}, "num_attention_heads = 0"),
    "num_key_value_heads": ({"num_key_value_heads": 0}, "num_key_value_heads = 0"),
    "head_dim": ({"head_dim": 0}, "head_dim = 0"),
    "lru_width": ({"lru_width": 0}, "lru_width = 0"),
    "num_gate_blocks": ({"num_gate_blocks": 0}, "num_gate_blocks = 0"),
    "conv1d_width": ({"conv1d_width": 0}, "conv1d_width = 0"),
    "window of none": ({"attention_window_size": 0}, "attention_window_size = 0"),
    "window of itself": ({"attention_window_size": 1}, "attention_window_size = 1"),
    "window by its alias": ({"sliding_window": 1}, "attention_window_size = 1"),
    "no window by its alias": ({"sliding_window": None}, "attention_window_size"),
    "rg_lru_c": ({"rg_lru_c": 0.0}, "rg_lru_c = 0.0"),
    "negative rg_lru_c": ({"rg_lru_c": -8.0}, "rg_lru_c = -8.0"),
    "endless rg_lru_c": ({"rg_lru_c": float("inf")}, "rg_lru_c = inf"),
    "rg_lru_c nan": ({"rg_lru_c": float("nan")}, "rg_lru_c = nan"),
    "rms_norm_eps": ({"rms_norm_eps": 0.0}, "rms_norm_eps = 0.0"),
    "final_logit_softcapping": ({"final_logit_softcapping": 0}, "final_logit_softcapping = 0"),
    "attention_dropout": ({"attention_dropout": 1.0}, "attention_dropout = 1.0"),
    "negative attention_dropout": ({"attention_dropout": -0.1}, "attention_dropout = -0.1"),
    # widths that do not divide
    "heads": ({"num_attention_heads": 7}, "num_attention_heads = 7.*hidden_size = 1024"),
    "key-value heads": ({"num_key_value_heads": 3}, "num_key_value_heads = 3.*num_attention_heads = 8"),
    "gate blocks": ({"num_gate_blocks": 7}, "num_gate_blocks = 7.*lru_width = 1024"),
    "gate blocks of lru_width": ({"lru_width": 1000}, "num_gate_blocks = 16.*lru_width = 1000"),
    # layers
    "attention as a layer type": ({"layer_types": ["attention"] * 12}, r"layer_types\[0\] = 'attention'"),
    "full attention": ({"layer_types": ["linear_attention"] * 11 + ["full_attention"]}, r"layer_types\[11\]"),
    "too few layer types": ({"layer_types": ["linear_attention"]}, "layer_types.*1"),
    "no layer types": ({"layer_types": []}, "layer_types.*0"),
    # Λ
    "lambda_init": ({"lambda_init": "gaussian"}, "lambda_init = 'gaussian'.*uniform.*register_lambda_init"),
    "bound of 0": ({"lambda_init_bounds": (0.0, 0.9)}, "lambda_init_bounds"),
    "bound of 1": ({"lambda_init_bounds": (0.9, 1.0)}, "lambda_init_bounds"),
    "bounds reversed": ({"lambda_init_bounds": (0.999, 0.9)}, "lambda_init_bounds = .*0.999.*0.9"),
    "bounds equal": ({"lambda_init_bounds": (0.9, 0.9)}, "lambda_init_bounds"),
    "one bound": ({"lambda_init_bounds": (0.9,)}, "lambda_init_bounds"),
    "three bounds": ({"lambda_init_bounds": (0.1, 0.2, 0.3)}, "lambda_init_bounds"),
    "bound of nan": ({"lambda_init_bounds": (float("nan"), 0.9)}, "lambda_init_bounds"),
    # the rest
    "hidden_activation": ({"hidden_activation": "foo"}, "hidden_activation = 'foo'"),
    "pad_token_id": ({"pad_token_id": 32000}, "pad_token_id = 32000"),
    "negative pad_token_id": ({"pad_token_id": -1}, "pad_token_id = -1"),
    "rope_type": ({"rope_parameters": {"rope_type": "foo"}}, "rope_type.*'foo'"),
    "scaled rotation": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type.*'yarn'"),
    "rope_theta": ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta.*-1.0"),
    "rotary factor of 0": ({"rope_parameters": {"partial_rotary_factor": 0.0}}, "partial_rotary_factor.* = 0.0"),
    "rotary factor of 2": ({"rope_parameters": {"partial_rotary_factor": 2.0}}, "partial_rotary_factor.* = 2.0"),
    "rotary factor that is no number": (
        {"rope_parameters": {"partial_rotary_factor": "a"}},
        "partial_rotary_factor.* = 'a'",
    ),
    "rotary factor of nan": (
        {"rope_parameters": {"partial_rotary_factor": float("nan")}},
        "partial_rotary_factor.*nan",
    ),
    "rotation of each kind of layer": (
        {"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}}},
        r"rope_parameters has \['sliding_attention'\]: allowed",
    ),
    "scaled rotation by an older name": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type.*'linear'"),
    # extremes: of tensors, of float32, of the vocabulary
    "vocab_size of 2^63": ({"vocab_size": 2**63}, "vocab_size = 9223372036854775808: allowed"),
    "hidden_size of 2^70": ({"hidden_size": 2**70}, "hidden_size = .*allowed"),
    "a million layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000: allowed"),
    "num_labels of 2^63": ({"num_labels": 2**63}, "num_labels = 9223372036854775808: allowed"),
    "negative num_labels": ({"num_labels": -1}, "num_labels = -1: allowed are whole numbers from 1 to 1048576"),
    "num_labels of another kind": ({"num_labels": "3"}, "num_labels = 3: allowed"),
    "huge rg_lru_c": ({"rg_lru_c": 1e300}, r"rg_lru_c = 1e\+300: allowed"),
    "tiny rg_lru_c": ({"rg_lru_c": 1e-300}, "rg_lru_c = 1e-300: allowed"),
    "huge softcapping": ({"final_logit_softcapping": 1e300}, r"final_logit_softcapping = 1e\+300: allowed"),
    "tiny rope_theta": ({"rope_theta": 1e-300}, "rope_theta.* = 1e-300: allowed"),
    "tiny rms_norm_eps": ({"rms_norm_eps": 1e-300}, "rms_norm_eps = 1e-300: allowed"),
    "bound that rounds to 1": ({"lambda_init_bounds": (0.9, 1 - 1e-9)}, "lambda_init_bounds"),
    "negative eos_token_id": ({"eos_token_id": -1}, "eos_token_id = -1: allowed"),
    "no eos_token_id in a list": ({"eos_token_id": []}, r"eos_token_id = \[\]: allowed"),
    "rope_scaling of another kind": ({"rope_scaling": [1]}, r"rope_scaling = \[1\]: allowed"),
    "one of several eos_token_id": ({"eos_token_id": [2, 32000]}, r"eos_token_id = \[2, 32000\]: allowed"),
    "bos_token_id": ({"bos_token_id": 32000}, "bos_token_id = 32000: allowed"),
    "odd rotary width": ({"head_dim": 6}, "partial_rotary_factor.*head_dim = 6"),
}
WRONG_TYPES = {
    "hidden_size": ["1024", 1024.0, True, None],
    "num_hidden_layers": [None, 12.0],
    "attention_window_size": [None, 8.0],
    "layer_types": ["linear_attention", [None] * 12],
    "rg_lru_c": [None, "8"],
    "lambda_init": [None, 3],
    "lambda_init_bounds": [None, 0.9, ("0.9", "0.99")],
    "final_logit_softcapping": ["30"],
    "rope_parameters": [[0.5]],
    "scale_embeddings": [None, 1],
    "tie_word_embeddings": ["yes"],
}


def test_defaults():
    config = GriffinConfig()
    assert config.vocab_size == 32000 and config.hidden_size == 1024 and config.num_hidden_layers == 12
    assert config.intermediate_size == 3 * 1024 and config.lru_width == 1024 and config.head_dim == 128
    assert config.layer_types == ["linear_attention", "linear_attention", "sliding_attention"] * 4
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 1)
    assert config.attention_window_size == 1024 and config.conv1d_width == 4 and config.num_gate_blocks == 16
    assert (
        config.rg_lru_c == 8.0 and config.lambda_init == "uniform" and tuple(config.lambda_init_bounds) == (0.9, 0.999)
    )
    assert config.final_logit_softcapping is None and config.scale_embeddings is False
    assert config.hidden_activation == "gelu_pytorch_tanh" and config.rms_norm_eps == 1e-6
    assert config.attention_dropout == 0.0 and config.tie_word_embeddings is True and config.use_cache is True
    expected = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert dict(config.rope_parameters) == expected


@pytest.mark.parametrize("depth", [1, 2, 3, 7])
def test_layer_pattern_of_any_depth(depth):
    pattern = ["linear_attention", "linear_attention", "sliding_attention"] * 3
    assert GriffinConfig(num_hidden_layers=depth).layer_types == pattern[:depth]


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values_raise(case):
    """At construction, naming the field, the value and what is allowed."""
    fields, message = BAD_VALUES[case]
    with pytest.raises(Exception, match=rf"(?s){message}") as error:
        GriffinConfig(**fields)
    assert isinstance(error.value, (ValueError, TypeError)) or "alidation" in type(error.value).__name__
    assert "allowed" in str(error.value) or "expected" in str(error.value)


@pytest.mark.parametrize("field, value", [(field, value) for field, values in WRONG_TYPES.items() for value in values])
def test_wrong_types_raise(field, value):
    with pytest.raises(Exception, match=field) as error:
        GriffinConfig(**{field: value})
    assert "expected" in str(error.value) or "allowed" in str(error.value)


def test_values_at_the_edge_are_taken():
    GriffinConfig(attention_window_size=2, conv1d_width=1, num_gate_blocks=1024, num_key_value_heads=8)
    GriffinConfig(
        hidden_size=10, num_attention_heads=3, head_dim=8, lru_width=16
    )  # a head_dim of its own: nothing divides
    GriffinConfig(lambda_init_bounds=(1e-6, 0.999999), final_logit_softcapping=30, rg_lru_c=1, pad_token_id=31999)
    for name in LAMBDA_INITS:
        assert GriffinConfig(lambda_init=name).lambda_init == name


def test_bad_values_are_refused_when_saving_and_loading_too(tmp_path):
    config = GriffinConfig()
    config.num_gate_blocks = 7
    with pytest.raises(Exception, match="num_gate_blocks = 7"):
        config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "griffin", "conv1d_width": 0}))
    for load in (GriffinConfig.from_json_file, AutoConfig.from_pretrained):
        with pytest.raises(Exception, match="conv1d_width = 0"):
            load(path)


def test_bad_values_are_refused_where_a_model_is_made(tmp_path, small_config):
    """Loading with other fields, and fields set after construction."""
    small_config().save_pretrained(tmp_path)
    GriffinForCausalLM(small_config()).save_pretrained(tmp_path)
    for fields in ({"attention_window_size": 1}, {"num_gate_blocks": 7}, {"lambda_init_bounds": (0.9, 0.8)}):
        with pytest.raises(ValueError, match=f"{next(iter(fields))} = .*allowed"):
            GriffinForCausalLM.from_pretrained(tmp_path, **fields)
        with pytest.raises(ValueError, match=f"{next(iter(fields))} = .*allowed"):
            AutoConfig.from_pretrained(tmp_path, **fields)
        config = AutoConfig.from_pretrained(tmp_path)
        for name, value in fields.items():
            setattr(config, name, value)
        with pytest.raises(ValueError, match=f"{next(iter(fields))} = .*allowed"):
            AutoModel.from_config(config)
    assert GriffinForCausalLM.from_pretrained(tmp_path, attention_window_size=3).config.sliding_window == 3


def test_sliding_window_is_an_alias():
    config = GriffinConfig(sliding_window=77)
    assert config.attention_window_size == config.sliding_window == 77
    config.sliding_window = 9
    assert config.attention_window_size == 9
    assert "sliding_window" not in config.to_dict() and config.to_dict()["attention_window_size"] == 9


@pytest.mark.parametrize("given", [{}, {"rope_theta": 500.0}, {"rope_type": "default"}])
def test_rotary_factor_stays_a_half(given, tmp_path):
    config = GriffinConfig(rope_parameters=given)
    config.save_pretrained(tmp_path)
    for one in (config, GriffinConfig.from_pretrained(tmp_path)):
        assert one.rope_parameters["partial_rotary_factor"] == 0.5
        assert all(one.rope_parameters[key] == value for key, value in given.items())
    assert given == dict(given) and "partial_rotary_factor" not in given  # the user's dict is left alone
    assert GriffinConfig(rope_parameters={"partial_rotary_factor": 1.0}).rope_parameters["partial_rotary_factor"] == 1.0


CONFIGURATIONS = {
    "default": {},
    "griffin": {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "lru_width": 96,
        "num_hidden_layers": 5,
        "pad_token_id": 3,
    },
    "hawk": {"layer_types": ["linear_attention"] * 12, "lambda_init": "hippogriff", "lambda_init_bounds": [0.5, 0.6]},
    "gemma": {"final_logit_softcapping": 30.0, "scale_embeddings": True, "eos_token_id": [1, 107], "vocab_size": 300},
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_round_trips(case, tmp_path):
    config = GriffinConfig(**CONFIGURATIONS[case])
    expected = config.to_dict()
    config.save_pretrained(tmp_path)
    config.to_json_file(tmp_path / "flat.json", use_diff=False)
    again = [
        GriffinConfig(**config.to_dict()),
        GriffinConfig.from_dict(config.to_dict()),
        GriffinConfig(**config.to_diff_dict()),
        GriffinConfig(**json.loads(config.to_json_string())),
        GriffinConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path / "flat.json"),
        GriffinConfig.from_json_file(tmp_path / "flat.json"),
        copy.deepcopy(config),
    ]
    ignored = {"transformers_version", "_name_or_path", "auto_map"}
    for one in again:
        assert type(one) is GriffinConfig
        actual = {key: value for key, value in one.to_dict().items() if key not in ignored}
        assert actual == {key: value for key, value in expected.items() if key not in ignored}


def test_round_trip_after_a_width_changed():
    config = GriffinConfig()
    config.hidden_size, config.intermediate_size = 64, 100
    for one in (GriffinConfig(**config.to_dict()), GriffinConfig(**config.to_diff_dict())):
        assert (one.hidden_size, one.intermediate_size, one.lru_width, one.head_dim) == (64, 100, 1024, 128)


def test_two_configurations_share_nothing():
    first, second = GriffinConfig(), GriffinConfig()
    first.layer_types[0] = "sliding_attention"
    first.rope_parameters["rope_theta"] = 1.0
    first.lambda_init_bounds[0] = 0.1
    assert second.to_dict() == GriffinConfig().to_dict()


def test_registered():
    assert CONFIG_MAPPING["griffin"] is GriffinConfig
    assert type(AutoConfig.for_model("griffin", hidden_size=32)) is GriffinConfig


def test_rotary_keywords_are_not_lost():
    rotary = GriffinConfig(rope_theta=500.0, partial_rotary_factor=1.0).rope_parameters
    assert (rotary["rope_theta"], rotary["partial_rotary_factor"]) == (500.0, 1.0)


def test_none_means_the_default():
    config = GriffinConfig(rope_parameters={"rope_theta": None}, partial_rotary_factor=None, num_key_value_heads=None)
    assert config.rope_parameters == GriffinConfig().rope_parameters
    assert config.num_key_value_heads == config.num_attention_heads == 8  # as in Transformers' models


def test_older_rotary_names(tmp_path):
    given = {"type": "default", "rope_theta": 7.0}
    for fields in (
        {"rope_scaling": given},
        {"rope_parameters": given},
        {"rope_scaling": {"type": "default"}, "rope_theta": 7.0},
    ):
        config = GriffinConfig(**fields)
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}
    assert given == {"type": "default", "rope_theta": 7.0}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "griffin", "rope_theta": 500, "rope_scaling": None})
    )
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 500


def test_fields_given_to_from_pretrained(tmp_path, small_config):
    """A field that other fields were made from, and None for what is made from others."""
    kinds = ["linear_attention", "linear_attention", "sliding_attention"] * 2
    GriffinForCausalLM(small_config(layer_types=kinds)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer_types has 6 entries: .* or None for the repeated pattern"):
        GriffinForCausalLM.from_pretrained(tmp_path, num_hidden_layers=3)
    model = GriffinForCausalLM.from_pretrained(tmp_path, num_hidden_layers=3, layer_types=None, rope_theta=500.0)
    assert len(model.model.layers) == 3 and model.config.layer_types == kinds[:3]
    assert model.model.rotary_emb.theta == 500.0 and model.config.rope_parameters["partial_rotary_factor"] == 0.5
    config, unused = AutoConfig.from_pretrained(tmp_path, sliding_window=5, foo=1, return_unused_kwargs=True)
    assert config.attention_window_size == 5 and unused == {"foo": 1}


def test_many_layers_are_configured_at_once():
    """Each assignment checks types: of a list of strings, every entry again."""
    begin = time.perf_counter()
    assert len(GriffinConfig(num_hidden_layers=2**16).layer_types) == 2**16
    assert time.perf_counter() - begin < 2  # 0.2 s; 8 s with every entry's type checked at each assignment
