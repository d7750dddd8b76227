"""Agreement with DeepMind's own torch code, the package `recurrentgemma`, in float32 with the same random weights.

Its `__init__` files import JAX and a tokenizer, so they are stepped over; `pip install --no-deps recurrentgemma einops`
is enough. Without the package these tests are skipped, but on a CI machine they fail.
"""

import importlib
import importlib.util
import os
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from modeling_griffin import GriffinConfig, GriffinForCausalLM
from modeling_griffin.causal_conv1d import CausalConv1d
from modeling_griffin.conversion.recurrent_gemma import griffin_config_from_deepmind, griffin_tensors_from_deepmind
from modeling_griffin.documents import read_documents
from modeling_griffin.modeling_griffin import (
    GriffinAttention,
    GriffinMLP,
    GriffinRecurrentBlock,
    GriffinRMSNorm,
    GriffinRotaryEmbedding,
)
from modeling_griffin.rg_lru import RGLRU, BlockDiagonalLinear


TOLERANCE = 2e-5  # of the largest number compared
WINDOW = 6


def import_deepmind() -> SimpleNamespace | None:
    """The torch modules of `recurrentgemma`, or None when it is not installed."""
    found = importlib.util.find_spec("recurrentgemma")
    if found is None or importlib.util.find_spec("einops") is None:
        return None
    folder = found.submodule_search_locations[0]
    for name, path in {"recurrentgemma": folder, "recurrentgemma.torch": os.path.join(folder, "torch")}.items():
        package = types.ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package
    if importlib.util.find_spec("jaxtyping") is None:  # used for annotations only
        annotation = type("Annotation", (), {"__class_getitem__": classmethod(lambda cls, item: torch.Tensor)})
        sys.modules["jaxtyping"] = types.ModuleType("jaxtyping")
        sys.modules["jaxtyping"].__dict__.update(Float=annotation, Integer=annotation, Bool=annotation)
    names = {"common": "common", "griffin": "torch.griffin", "layers": "torch.layers", "modules": "torch.modules"}
    return SimpleNamespace(**{key: importlib.import_module(f"recurrentgemma.{name}") for key, name in names.items()})


DEEPMIND = import_deepmind()
ON_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
needs_deepmind = pytest.mark.skipif(DEEPMIND is None and not ON_CI, reason="recurrentgemma is not installed")


def test_deepmind_code_is_installed_on_ci():
    assert DEEPMIND is not None or not ON_CI, "pip install --no-deps recurrentgemma einops"


MODELS = {
    # recurrent or attention layers, D, heads, C, soft cap, scaled embeddings
    "griffin": ("rra", 32, 4, 32, 30.0, True),
    "griffin, no cap": ("rar", 32, 2, 32, None, False),
    "wider recurrence": ("rar", 24, 2, 40, 30.0, True),
    "narrower recurrence, one head": ("ra", 32, 1, 16, 30.0, True),
    "eight heads": ("ra", 64, 8, 64, None, True),
    "hawk": ("rr", 32, 4, 48, 30.0, True),
    "hawk, sixteen blocks": ("rr", 64, 16, 80, None, False),
    "attention only": ("aa", 32, 4, 32, 30.0, False),
}


def disturb(module: torch.nn.Module) -> torch.nn.Module:
    """Moves every parameter off its initial value, so that zeros hide nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def convert(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    converted = {}
    for name, tensor in state_dict.items():
        converted.update(griffin_tensors_from_deepmind(name, tensor))
    return converted


def make_pair(name: str):
    """DeepMind's model and ours with its weights."""
    layers, width, heads, lru_width, cap, scale = MODELS[name]
    block_types = {"r": DEEPMIND.common.TemporalBlockType.RECURRENT, "a": DEEPMIND.common.TemporalBlockType.ATTENTION}
    config = DEEPMIND.common.GriffinConfig(
        vocab_size=61,
        width=width,
        mlp_expanded_width=3 * width,
        num_heads=heads,
        block_types=tuple(block_types[kind] for kind in layers),
        embeddings_scale_by_sqrt_dim=scale,
        attention_window_size=WINDOW,
        logits_soft_cap=cap or 0.0,
        lru_width=lru_width,
    )
    torch.manual_seed(0)
    theirs = disturb(DEEPMIND.griffin.Griffin(config, gradient_checkpointing=False))
    weights = theirs.state_dict()
    config = griffin_config_from_deepmind(weights, GriffinConfig, WINDOW, cap, scale)
    ours = GriffinForCausalLM(config)
    missing, unexpected = ours.load_state_dict(convert(weights), strict=False)
    assert unexpected == [] and missing in ([], ["lm_head.weight"])
    return theirs, ours


def assert_agree(ours: torch.Tensor, theirs: torch.Tensor, what: str = "") -> None:
    assert ours.shape == theirs.shape
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= TOLERANCE * scale, f"{what}: largest error {error:.2e} where the largest value is {scale:.2e}"


def tokens(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, no padding among them, and positions; (batch, length) each."""
    torch.manual_seed(1)
    return torch.randint(1, 61, (batch, length)), torch.arange(length).expand(batch, -1).clone()


PACKED = torch.tensor([[*range(9), *range(1), *range(1), *range(14), *range(3)], [*range(2), *range(20), *range(6)]])


@needs_deepmind
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_from_one_token_to_several_windows(name):
    theirs, ours = make_pair(name)
    for length in (1, 2, WINDOW, WINDOW + 1, WINDOW + 2, 3 * WINDOW + 2):
        ids, positions = tokens(2, length)
        assert_agree(ours(ids).logits, theirs(ids, positions)[0], f"{length} tokens")


@needs_deepmind
@pytest.mark.parametrize("name", ["griffin", "wider recurrence", "hawk"])
@torch.no_grad()
def test_token_by_token_with_each_cache(name):
    theirs, ours = make_pair(name)
    ids, positions = tokens(2, 3 * WINDOW)
    their_cache = theirs.init_cache(2, torch.float32)
    our_cache = DynamicCache(config=ours.config)
    for t in range(ids.shape[1]):
        expected, their_cache = theirs(ids[:, t : t + 1], positions[:, t : t + 1], their_cache)
        found = ours(ids[:, t : t + 1], past_key_values=our_cache, position_ids=positions[:, t : t + 1])
        assert_agree(found.logits, expected, f"token {t}")


@needs_deepmind
@pytest.mark.parametrize("prompt", [2, WINDOW + 2, 3 * WINDOW])
@torch.no_grad()
def test_prompt_then_token_by_token(prompt):
    theirs, ours = make_pair("griffin")
    ids, positions = tokens(2, prompt + 3)
    expected, their_cache = theirs(ids[:, :prompt], positions[:, :prompt])
    found = ours(ids[:, :prompt])
    assert_agree(found.logits, expected)
    for t in range(prompt, ids.shape[1]):
        expected, their_cache = theirs(ids[:, t : t + 1], positions[:, t : t + 1], their_cache)
        found = ours(ids[:, t : t + 1], past_key_values=found.past_key_values)
        assert_agree(found.logits, expected, f"token {t}")


@needs_deepmind
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_packed_documents(name):
    theirs, ours = make_pair(name)
    ids, _ = tokens(*PACKED.shape)
    for use_cache in (False, True):
        found = ours(ids, position_ids=PACKED, use_cache=use_cache).logits
        assert_agree(found, theirs(ids, PACKED)[0], f"use_cache={use_cache}")


@needs_deepmind
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_every_parameter(name, packed):
    theirs, ours = make_pair(name)
    ids, positions = tokens(*PACKED.shape)
    positions = PACKED if packed else positions
    expected = theirs(ids, positions)[0]
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    (ours(ids, position_ids=positions).logits * weights).sum().backward()
    their_gradients = convert({name: parameter.grad for name, parameter in theirs.named_parameters()})
    our_gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert our_gradients.keys() == their_gradients.keys()
    for key, gradient in our_gradients.items():
        assert_agree(gradient, their_gradients[key], key)


@needs_deepmind
def test_gradient_of_the_padding_token():
    """It is a token like others where it is not masked: with `pad_token = eos_token` it ends every document."""
    theirs, ours = make_pair("griffin")
    ids, positions = tokens(1, 8)
    ids[0, 3] = ours.config.pad_token_id
    theirs(ids, positions)[0].sum().backward()
    ours(ids).logits.sum().backward()
    assert_agree(ours.model.embed_tokens.weight.grad, theirs.embedder.input_embedding.grad)


# One block alone, with any number of gate blocks.


def block_config(**kwargs) -> GriffinConfig:
    shapes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_gate_blocks": 4,
    }
    return GriffinConfig(**{**shapes, "attention_window_size": WINDOW + 1, **kwargs})


def load(module: torch.nn.Module, state_dict: dict[str, torch.Tensor], theirs: str, ours: str) -> torch.nn.Module:
    """Loads DeepMind's entries below `blocks.0.<theirs>` into our module, which lies below `model.layers.0.<ours>`."""
    converted = convert({f"blocks.0.{theirs}.{name}": tensor for name, tensor in state_dict.items()})
    module.load_state_dict({name.removeprefix(f"model.layers.0.{ours}."): tensor for name, tensor in converted.items()})
    return module


def random_inputs(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(2, PACKED.shape[1], width), PACKED


def assert_same_values_and_gradients(ours, theirs, our_inputs, their_inputs):
    """Outputs, and gradients of the first input."""
    x, y = our_inputs[0].clone().requires_grad_(), their_inputs[0].clone().requires_grad_()
    found, expected = ours(x * 1.0, *our_inputs[1:]), theirs(y * 1.0, *their_inputs[1:])
    found = found[0] if isinstance(found, tuple) else found
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert_agree(found, expected, "output")
    weights = torch.randn_like(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_agree(x.grad, y.grad, "gradient of the input")


@needs_deepmind
@pytest.mark.parametrize("blocks", [1, 2, 4, 16])
@pytest.mark.parametrize("width", [16, 80])
def test_block_rg_lru(width, blocks):
    torch.manual_seed(0)
    theirs = disturb(DEEPMIND.layers.RGLRU(width, blocks))
    ours = load(RGLRU(width, blocks, 8.0), theirs.state_dict(), "recurrent_block.rg_lru", "temporal_block.rg_lru")
    x, positions = random_inputs(width)
    assert_same_values_and_gradients(ours, theirs, (x, positions == 0), (x, positions))


@needs_deepmind
@torch.no_grad()
def test_block_rg_lru_continues_from_a_state():
    torch.manual_seed(0)
    theirs = disturb(DEEPMIND.layers.RGLRU(32, 4))
    ours = load(RGLRU(32, 4, 8.0), theirs.state_dict(), "recurrent_block.rg_lru", "temporal_block.rg_lru")
    x, _ = random_inputs(32)
    state, positions = torch.randn(2, 32), torch.arange(5, 5 + x.shape[1]).expand(2, -1)
    (found, last), (expected, expected_last) = ours(x, positions == 0, None, state), theirs(x, positions, state)
    assert_agree(found, expected)
    assert_agree(last, expected_last)


@needs_deepmind
@pytest.mark.parametrize("blocks", [1, 4])
def test_block_diagonal_linear(blocks):
    torch.manual_seed(0)
    theirs, ours = disturb(DEEPMIND.layers.BlockDiagonalLinear(32, blocks)), BlockDiagonalLinear(32, blocks)
    ours.load_state_dict({"weight": theirs.w, "bias": theirs.b})
    x, _ = random_inputs(32)
    assert_same_values_and_gradients(ours, theirs, (x,), (x,))


@needs_deepmind
@pytest.mark.parametrize("taps", [2, 4, 7])
def test_block_convolution(taps):
    torch.manual_seed(0)
    theirs = disturb(DEEPMIND.layers.Conv1D(32, taps))
    ours = load(CausalConv1d(32, taps), theirs.state_dict(), "recurrent_block.conv_1d", "temporal_block.conv_1d")
    x, positions = random_inputs(32)
    assert_same_values_and_gradients(ours, theirs, (x, None, positions == 0), (x, positions))


@needs_deepmind
@pytest.mark.parametrize("blocks", [1, 4, 16])
@pytest.mark.parametrize("lru_width", [16, 32, 48])
def test_block_recurrent(lru_width, blocks):
    torch.manual_seed(0)
    theirs = disturb(DEEPMIND.modules.RecurrentBlock(32, blocks, lru_width))
    ours = GriffinRecurrentBlock(block_config(lru_width=lru_width, num_gate_blocks=blocks), 0)
    load(ours, theirs.state_dict(), "recurrent_block", "temporal_block")
    x, positions = random_inputs(32)
    documents = read_documents(None, positions, 0, positions.shape[1])
    assert_same_values_and_gradients(ours, theirs, (x, documents), (x, positions))


@needs_deepmind
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_block_attention(heads):
    torch.manual_seed(0)
    theirs = disturb(DEEPMIND.modules.LocalAttentionBlock(32, heads, WINDOW))
    config = block_config(num_attention_heads=heads)
    config._attn_implementation = "eager"
    ours = load(GriffinAttention(config, 0), theirs.state_dict(), "attention_block", "temporal_block")
    x, positions = random_inputs(32)
    document = (positions == 0).cumsum(-1)
    age = torch.arange(positions.shape[1])[:, None] - torch.arange(positions.shape[1])
    seen = (age >= 0) & (age <= WINDOW) & (document[:, :, None] == document[:, None, :])
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
    rotary = GriffinRotaryEmbedding(config)(x, positions)
    assert_same_values_and_gradients(ours, theirs, (x, rotary, mask), (x, positions))


@needs_deepmind
def test_block_mlp():
    torch.manual_seed(0)
    theirs = disturb(DEEPMIND.modules.MLPBlock(32, 80))
    ours = load(GriffinMLP(block_config(intermediate_size=80)), theirs.state_dict(), "mlp_block", "mlp_block")
    x, _ = random_inputs(32)
    assert_same_values_and_gradients(ours, theirs, (x,), (x,))


@needs_deepmind
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_block_norm(scale):
    torch.manual_seed(0)
    theirs, ours = disturb(DEEPMIND.layers.RMSNorm(32)), GriffinRMSNorm(32, 1e-6)
    ours.load_state_dict({"weight": theirs.scale})
    x, _ = random_inputs(32)
    assert_same_values_and_gradients(ours, theirs, (x * scale,), (x * scale,))
