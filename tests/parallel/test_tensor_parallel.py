"""Tensor parallelism: two and four processes give the numbers of one, and what cannot be split is refused."""

import importlib.util
from pathlib import Path

import pytest
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from modeling_griffin import LAMBDA_INITS, GriffinConfig, GriffinForCausalLM
from modeling_griffin.tensor_parallel import check_tensor_parallel
from tests.parallel.tensor_parallel_program import CASES_OF_SIZE, SHAPES, case_config
from tests.ranks import run_program
from tests.tolerances import assert_close


RUNS = [(name, size) for size, names in CASES_OF_SIZE.items() for name in names]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_program("parallel.tensor_parallel_program", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_loss_and_logits(results, run):
    alone, parallel = results[run]["alone"], results[run]["parallel"]
    assert_close("loss", parallel["loss"], alone["loss"])
    assert_close("logits", parallel["logits"], alone["logits"])


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_gradients_of_every_parameter(results, run):
    assert_same_gradients(results[run], len(list(GriffinForCausalLM(case_config(run[0])).parameters())))


def test_gradients_with_checkpointing_and_eager_attention(results):
    assert_same_gradients(results["checkpointing"], len(list(GriffinForCausalLM(case_config("griffin")).parameters())))


def assert_same_gradients(run: dict, parameters: int) -> None:
    gradients = {name: value for name, value in run["alone"].items() if name.startswith("gradient of")}
    assert len(gradients) == parameters and all(gradient.any() for gradient in gradients.values())
    for name, expected in gradients.items():
        assert_close("tensor parallel gradient", run["parallel"][name], expected, name)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_generation(results, run, cache):
    alone, parallel = results[run]["alone"], results[run]["parallel"]
    assert alone[f"{cache} tokens"].tolist() == parallel[f"{cache} tokens"].tolist()
    assert_close("logits", parallel[f"{cache} logits"], alone[f"{cache} logits"])


def test_a_rank_caches_its_channels_only(results):
    channels, blocks, block = 24 // 4, 4 // 4, 24 // 4
    expected = {"convolution": (2, channels, 4), "recurrence": (2, channels), "gate": (blocks, block, block)}
    assert results["widths"] == {**expected, "keys": (2, 1, 7, 8)}  # MQA: the one key-value head is everywhere


def test_lambda_and_state_stay_float32(results):
    run = results["bfloat16"]
    assert run["dtypes"] == {"torch.float32"} and run["others"] == {"torch.bfloat16"}
    assert_close("bfloat16 logits", run["logits"], run["expected"])


def test_saved_as_by_one_process(results):
    saved = dict(results["saved"])
    assert saved.pop("files") == results["files"] and saved.keys() == results["source"].keys()
    for name, expected in results["source"].items():
        assert_close("exact", saved[name], expected, name)


def test_a_save_that_fails_on_one_rank_fails_on_all(results):
    run = results["failing save"]
    assert run["same"] and run["raised"][0] == "OSError: No space left on device"
    other = "RuntimeError: failed on rank 0 with OSError: No space left on device"
    assert run["raised"][1:] == [other] * 3


def test_a_missing_lambda_is_drawn(results):
    assert_close("exact", results["drawn"], LAMBDA_INITS["hippogriff"](24, 8.0, 0.9, 0.999))


def test_the_shipped_code_beside_the_package(results):
    assert_close("exact", results["code"]["shipped"], results["code"]["package"])


def test_shapes_that_cannot_be_shared_are_refused_before_loading(results):
    fields = {"num_gate_blocks": 3, "num_attention_heads": 3, "intermediate_size": 25}
    expected = {f: f"{f} = {value}: allowed with tp_size = 2 are multiples of 2" for f, value in fields.items()}
    assert results["refusals"] == {"messages": expected, "begun": 0}


def test_no_rule_goes_unused(results):
    assert "match nothing" not in results["log"] and "not applied" not in results["log"]


def test_key_value_heads_are_split_or_shared():
    config = case_config("grouped heads")
    check_tensor_parallel(config, 2)
    with pytest.raises(ValueError, match="num_key_value_heads = 2: allowed with tp_size = 4 are 1 and multiples of 4"):
        check_tensor_parallel(config, 4)
    check_tensor_parallel(case_config("griffin"), 4)


def test_the_plan_follows_the_configuration():
    config = GriffinConfig(**SHAPES, hidden_size=16, num_hidden_layers=3)
    assert config.base_model_tp_plan["layers.*.temporal_block.k_proj"] == "griffin_shared_head"
    config.num_key_value_heads = 2
    assert config.base_model_tp_plan["layers.*.temporal_block.k_proj"] == "colwise"
    config.layer_types = ["linear_attention"] * 3
    assert not [name for name in config.base_model_tp_plan if "_proj" in name and "mlp" not in name]
    assert "base_model_tp_plan" not in config.to_dict()
    config.base_model_tp_plan = {"embed_tokens": "embedding_rowwise"}  # quantizers do
    assert config.base_model_tp_plan == {"embed_tokens": "embedding_rowwise"}
    assert "base_model_tp_plan" not in config.to_dict()


def test_styles_survive_being_registered_again():
    path = Path(__file__).parents[2] / "modeling_griffin" / "tensor_parallel.py"
    before = dict(ALL_PARALLEL_STYLES)
    spec = importlib.util.spec_from_file_location("loaded_again", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert set(ALL_PARALLEL_STYLES) == set(before) >= {"griffin_first_axis", "griffin_shared_head"}
    changed = {name for name, style in before.items() if ALL_PARALLEL_STYLES[name] is not style}
    assert changed == {"griffin_first_axis", "griffin_shared_head"}
