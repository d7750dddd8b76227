"""The named initialisations of Λ: each distribution, on its own and through every way to make or load a model."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats

from modeling_griffin import LAMBDA_INITS, GriffinConfig, GriffinForCausalLM, register_lambda_init
from modeling_griffin.lambda_init import lambda_from_decay


WIDTH, C, LOW, HIGH = 4096, 8.0, 0.9, 0.999
NAMES = ("uniform", "recurrent_gemma", "hippogriff", "log_uniform_memory", "constant")
LAMBDA = "temporal_block.rg_lru.decay.lambda_bias"


def decays(stored, c=C):
    """a^c (or a, with c = 1) from the stored Λ, in float64."""
    return torch.exp(-c * torch.nn.functional.softplus(stored.double()))


def uniform_variable(name, stored, c=C, low=LOW, high=HIGH):
    """What the initialisation says is uniform, mapped to [0, 1]."""
    if name == "uniform":
        return (decays(stored, c) - low) / (high - low)
    if name == "recurrent_gemma":
        return (decays(stored, 2.0) - low**2) / (high**2 - low**2)
    if name == "log_uniform_memory":
        ends = [math.log(1 / (1 - bound)) for bound in (low, high)]
        return (-torch.log1p(-decays(stored, c)) - ends[0]) / (ends[1] - ends[0])
    ends = [math.log(math.expm1(-math.log(bound) / c)) for bound in (low, high)]
    return (stored.double() - ends[0]) / (ends[1] - ends[0])


def assert_distribution(name, stored, c=C, low=LOW, high=HIGH):
    assert stored.dtype == torch.float32 and stored.isfinite().all()
    if name == "constant":
        kept = decays(stored, c)
        assert kept.max() - kept.min() == 0
        assert kept[0].item() == pytest.approx(math.sqrt(low * high), rel=1e-6)
        return
    values = uniform_variable(name, stored, c, low, high)
    assert values.min() > -1e-4 and values.max() < 1 + 1e-4  # float32 near a = 1
    if name == "hippogriff":
        even = torch.linspace(0, 1, len(values), dtype=torch.float64)
        assert (values - even).abs().max() < 1e-6
        return
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3
    assert values.diff().abs().min() > 0 or len(values.unique()) > 0.9 * len(values)
    assert abs(stats.spearmanr(values, range(len(values))).statistic) < 0.1  # in no order


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("c, low, high", [(C, LOW, HIGH), (1.0, 0.5, 0.9), (14.0, 0.99, 0.99999)])
def test_distribution(name, c, low, high):
    assert_distribution(name, LAMBDA_INITS[name](WIDTH, c, low, high), c, low, high)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bounds", [(1e-6, 1e-3), (0.9, 1 - 1e-9), (0.4, 0.4000001)])
def test_extreme_bounds_stay_finite(name, bounds):
    assert LAMBDA_INITS[name](64, C, *bounds).isfinite().all()


def test_the_five_are_registered():
    assert set(NAMES) <= set(LAMBDA_INITS)


@pytest.mark.parametrize("name", NAMES)
def test_shape_dtype_and_seed(name):
    draw = lambda: LAMBDA_INITS[name](33, C, LOW, HIGH)  # noqa: E731
    torch.manual_seed(3)
    first = draw()
    again = draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert torch.equal(first, again) == (name in ("hippogriff", "constant"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(3)
        assert draw().dtype == torch.float32 and first.shape == (33,)
        torch.manual_seed(3)
        assert torch.equal(draw(), first)
    finally:
        torch.set_default_dtype(torch.float32)


def test_numbers_of_the_papers_and_the_code():
    """Where -4.323 and -9 come from, and what each initialisation means for a^c and for memory at r = 0.5."""
    low, high = lambda_from_decay(torch.tensor([LOW, HIGH], dtype=torch.float64), C).tolist()
    assert (round(low, 3), round(high, 3)) == (-4.323, -8.987)
    fixed = LAMBDA_INITS["hippogriff"](1001, C, LOW, HIGH)
    assert (round(fixed[0].item(), 3), round(fixed[-1].item(), 3)) == (-4.323, -8.987)
    assert decays(fixed).median().item() == pytest.approx(0.990, abs=5e-4)

    ends = lambda name: [  # noqa: E731
        LAMBDA_INITS[name](200_000, C, LOW, HIGH).double().sort().values[index].item() for index in (-1, 0)
    ]
    assert ends("uniform") == pytest.approx([-4.323, -8.987], abs=2e-2)
    assert ends("recurrent_gemma") == pytest.approx([-2.197, -6.907], abs=2e-2)

    memory = lambda stored: 1 / (1 - decays(stored, C * 0.5))  # noqa: E731
    paper, code = (LAMBDA_INITS[name](200_000, C, LOW, HIGH) for name in ("uniform", "recurrent_gemma"))
    assert memory(paper).median().item() == pytest.approx(39, rel=0.02)
    assert memory(paper).min().item() == pytest.approx(19.5, rel=0.01)
    assert memory(paper).max().item() == pytest.approx(2000, rel=0.05)
    assert memory(code).median().item() == pytest.approx(5.5, rel=0.02)
    assert memory(code).min().item() == pytest.approx(2.9, rel=0.02)
    assert memory(code).max().item() == pytest.approx(250, rel=0.02)
    assert decays(code).min().item() == pytest.approx(0.430, abs=1e-3)
    assert decays(code).max().item() == pytest.approx(0.992, abs=1e-3)


def test_inverse():
    kept = torch.linspace(0.01, 0.99999, 101, dtype=torch.float64)
    for c in (0.5, 1.0, 8.0):
        assert torch.allclose(decays(lambda_from_decay(kept, c), c), kept, rtol=1e-6, atol=0)


# Through the model: 4 recurrent layers of 512 channels each.


def lambdas(model):
    layers = [parameter for name, parameter in model.named_parameters() if name.endswith(LAMBDA)]
    assert len(layers) == 4
    return layers


@pytest.fixture
def wide_config(small_config):
    return lambda name="uniform", **fields: small_config(
        layer_types=["linear_attention"] * 4, lru_width=512, num_gate_blocks=16, lambda_init=name, **fields
    )


def assert_model(name, model, **fields):
    layers = [parameter.detach() for parameter in lambdas(model)]
    for layer in layers:
        assert_distribution(name, layer, **fields)
    if name not in ("hippogriff", "constant"):
        assert_distribution(name, torch.cat(layers), **fields)
        assert not torch.equal(layers[0], layers[1])


@pytest.mark.parametrize("name", NAMES)
def test_construction_and_from_config(name, wide_config):
    assert_model(name, GriffinForCausalLM(wide_config(name)))
    for dtype in (torch.bfloat16, torch.float16):
        model = GriffinForCausalLM._from_config(wide_config(name), dtype=dtype)
        assert model.dtype == dtype
        assert_model(name, model)


def test_bounds_and_exponent_of_the_configuration_are_used(wide_config):
    config = wide_config(rg_lru_c=4.0, lambda_init_bounds=(0.5, 0.8))
    assert_model("uniform", GriffinForCausalLM(config), c=4.0, low=0.5, high=0.8)


@pytest.mark.parametrize("name", NAMES)
def test_meta_device(name, wide_config):
    with torch.device("meta"):
        model = GriffinForCausalLM(wide_config(name))
    assert all(parameter.is_meta for parameter in lambdas(model))
    model.to_empty(device="cpu")
    model.init_weights()
    assert_model(name, model)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_missing_from_a_checkpoint(name, dtype, wide_config, tmp_path):
    """from_pretrained builds on the meta device and draws what the file lacks."""
    GriffinForCausalLM(wide_config(name)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "lambda" not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    assert_model(name, GriffinForCausalLM.from_pretrained(tmp_path, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_loaded_values_are_kept(dtype, stored, wide_config, tmp_path):
    model = GriffinForCausalLM._from_config(wide_config(), dtype=stored)
    model.save_pretrained(tmp_path)
    loaded = GriffinForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for actual, expected in zip(lambdas(loaded), lambdas(model), strict=True):
        assert actual.dtype == torch.float32 and torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["uniform", "recurrent_gemma", "log_uniform_memory"])
def test_seed_reproduces_the_model(name, wide_config):
    models = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        models.append(lambdas(GriffinForCausalLM(wide_config(name))))
    assert torch.equal(models[0][3], models[1][3]) and not torch.equal(models[0][3], models[2][3])


def test_register(wide_config):
    calls = []

    def ladder(width, c, low, high):
        calls.append((width, c, low, high))
        return torch.full((width,), -float(len(calls)))

    with pytest.raises(ValueError, match="lambda_init = 'ladder'.*register_lambda_init"):
        GriffinConfig(lambda_init="ladder")
    register_lambda_init("ladder", ladder)
    try:
        register_lambda_init("ladder", ladder)  # the same again is fine
        with pytest.raises(ValueError, match="'ladder' is taken"):
            register_lambda_init("ladder", lambda width, c, low, high: None)
        with pytest.raises(ValueError, match="allowed are a string and a function"):
            register_lambda_init("other", 3)
        config = wide_config("ladder", rg_lru_c=3.0, lambda_init_bounds=(0.1, 0.2))
        assert json.loads(config.to_json_string())["lambda_init"] == "ladder"
        model = GriffinForCausalLM(config)
        assert calls == [(512, 3.0, 0.1, 0.2)] * 4
        assert [parameter[7].item() for parameter in lambdas(model)] == [-1.0, -2.0, -3.0, -4.0]
    finally:
        del LAMBDA_INITS["ladder"]


def test_wrong_shape_from_a_registered_function_raises(wide_config):
    register_lambda_init("short", lambda width, c, low, high: torch.zeros(width - 1))
    try:
        with pytest.raises((ValueError, RuntimeError)):
            GriffinForCausalLM(wide_config("short"))
    finally:
        del LAMBDA_INITS["short"]


def test_docstring_answers_the_question():
    """What the paper says, what the code does, where the constants come from, which sign is stored."""
    text = __import__("modeling_griffin.lambda_init", fromlist=["_"]).__doc__
    for fact in (
        "-4.323",
        "-8.987",
        "-9",
        "softplus",
        "a^c is uniform in [0.9, 0.999]",
        "a^2 uniform",
        "0.430",
        "Sign",
    ):
        assert fact in text


def test_a_small_exponent_does_not_overflow():
    assert LAMBDA_INITS["uniform"](8, 1e-3, 0.1, 0.9).isfinite().all()


@pytest.mark.parametrize("name, fn", [("new", None), (None, len), ([], len), ({}, len)])
def test_register_takes_a_string_and_a_function(name, fn):
    with pytest.raises(ValueError, match="register_lambda_init.*: allowed are a string and a function"):
        register_lambda_init(name, fn)
