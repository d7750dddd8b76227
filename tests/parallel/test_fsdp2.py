"""FSDP2, of Transformers and of accelerate, also with tensor parallelism: the numbers of one process, Λ in float32."""

import re

import pytest

from modeling_griffin import LAMBDA_INITS, GriffinConfig, GriffinForCausalLM
from tests.parallel import fsdp2_program as program
from tests.ranks import run_program
from tests.tolerances import assert_close


CASES = [*program.ON_FOUR, *program.ON_TWO, *program.WITH_ACCELERATE]
ROUNDED = [name for name in CASES if "mixed" in name or "bfloat16" in name]
EXACT = [name for name in CASES if name not in ROUNDED]
NOT_KEPT = "accelerate, mixed, not kept"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_program("parallel.fsdp2_program", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", EXACT)
def test_gradients_and_steps_of_one_process(results, case):
    alone, parallel = results[case]["alone"], results[case]["parallel"]
    gradients = [name for name in alone if name.startswith("gradient of")]
    assert gradients and all(alone[name].any() for name in gradients) and alone.keys() == parallel.keys()
    for name, expected in alone.items():
        kind = "logits" if name == "logits" else "gradient" if name in gradients else "trained parameter"
        assert_close(kind, parallel[name], expected, name)


@pytest.mark.parametrize("case", ROUNDED)
def test_logits_in_bfloat16(results, case):
    assert_close("bfloat16 logits", results[case]["parallel"]["logits"], results[case]["alone"]["logits"])


@pytest.mark.parametrize("case", [case for case in CASES if case != NOT_KEPT])
def test_lambda_is_float32(results, case):
    """Inside its module's forward pass; in storage, gradient and optimizer."""
    assert results[case]["forward"] == {"torch.float32"}
    assert results[case]["kept"] == {"torch.float32"}


def test_lambda_would_be_rounded_by_accelerate(results):
    """What `keep_lambda_float32` is for: without it the forward pass sees a rounded Λ."""
    assert results[NOT_KEPT]["forward"] == {"torch.bfloat16"}


@pytest.mark.parametrize("case", CASES)
def test_saved_as_by_one_process(results, case):
    run = results[case]
    assert run["saved"]["files"] == run["files"]
    for name, trained in run["trained"].items():
        assert_close("exact", run["saved"][name], trained, name)
        assert run["saved"][name].dtype == trained.dtype


def test_a_missing_lambda_is_drawn(results):
    for drawn in [results[name] for name in ("drawn", "drawn by four") if name in results]:
        assert_close("exact", drawn, LAMBDA_INITS["hippogriff"](24, 8.0, 0.9, 0.999))


def test_no_rule_goes_unused(results):
    assert "match nothing" not in results["log"] and "not applied" not in results["log"]


def test_shards_for_resuming(results):
    """`save_pretrained(distributed_checkpoint=True)`, which every rank writes its part of, and loading it."""
    trained, resumed = results["float32"]["trained"], results["resumed"]
    assert trained.keys() == resumed.keys()
    for name, expected in trained.items():
        assert_close("exact", resumed[name], expected, name)


def test_the_plans_name_modules():
    model = GriffinForCausalLM(GriffinConfig(vocab_size=8, hidden_size=32, num_hidden_layers=3, head_dim=4))
    names = {re.sub(r"\.\d+", ".*", name) for name, _ in model.named_modules()}
    assert set(model.fsdp_plan) == {"model.embed_tokens", "model.layers.*", "model.final_norm", "lm_head"} <= names
    assert set(model.tp_plan) <= names
