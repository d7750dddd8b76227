"""What all tests share: seeds, threads, small models whose every path is audible, and the skipping of GPU tests."""

import contextlib
import os
import random

import pytest
import torch

from modeling_griffin import GriffinConfig, GriffinForCausalLM


VOCABULARY = 29
WINDOW = 8
LAYERS = {
    "griffin": ["linear_attention", "linear_attention", "sliding_attention"],
    "hawk": ["linear_attention", "linear_attention"],
    "attention": ["sliding_attention", "sliding_attention"],
    "attention_first": ["sliding_attention", "linear_attention"],
}


def pytest_configure(config):
    torch.set_num_threads(1)  # small tensors: more threads only get in each other's way
    worker, gpus = os.environ.get("PYTEST_XDIST_WORKER"), torch.cuda.device_count()
    if worker and gpus > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus_of(worker, gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))


def gpus_of(worker: str, count: int, visible: str | None) -> str:
    """All of them, for each worker of pytest-xdist ("gw0", "gw1", ...) from another on: most tests take the first."""
    gpus = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    first = int(worker.removeprefix("gw")) % count
    return ",".join(gpus[first:] + gpus[:first])


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture
def usual_four_bits(monkeypatch):
    """Without the layout of 4-bit weights that bitsandbytes has for some processors, not for narrow layers there."""
    with contextlib.suppress(ImportError):
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def transformers_loop(monkeypatch):
    """`generate` runs Transformers' own loop, as for a request that no step of ours can honour."""
    monkeypatch.setattr(GriffinForCausalLM, "_fast_generation_devices", ())


def make_config(kind: str = "griffin", **overrides) -> GriffinConfig:
    layer_types = overrides.pop("layer_types", LAYERS[kind])
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "num_attention_heads": 2,
        "head_dim": 8,
        "lru_width": 24,
        "num_gate_blocks": 3,
        "attention_window_size": WINDOW,
        "tie_word_embeddings": False,  # tied, a small random model only repeats its last token
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return GriffinConfig(**{**fields, **overrides})


def make_audible(model: torch.nn.Module) -> torch.nn.Module:
    """Weights under which a leak through any path shows: initial convolutions and biases are near zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lambda_bias"):
            parameter.data.uniform_(-7.0, -2.0, generator=generator)
            continue
        std = (
            0.3
            if parameter.dim() == 1 or name.endswith("bias")
            else parameter.shape[1 if "gate.w" in name else -1] ** -0.5
        )
        parameter.data.normal_(std=1.0 if "embed" in name else std, generator=generator)
    return model.eval()


@pytest.fixture
def small_config():
    """Factory: small_config(kind, **fields) -> GriffinConfig of kind griffin, hawk, attention or attention_first."""
    return make_config


@pytest.fixture
def small_model():
    """Factory: small_model(kind, attention="eager", cls=GriffinForCausalLM, **fields) -> a model in eval mode."""

    def make(kind="griffin", attention="eager", cls=GriffinForCausalLM, **overrides):
        return make_audible(cls._from_config(make_config(kind, **overrides), attn_implementation=attention))

    return make
