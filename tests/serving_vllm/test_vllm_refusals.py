"""What vLLM cannot serve is refused by name, before anything is loaded. Run by `make test-vllm`."""

import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

import pytest
from engines import ENGINE, ENVIRONMENT, save_model


pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("griffin")
    save_model(folder)
    return folder


def configure(folder, monkeypatch, **engine):
    from vllm import EngineArgs

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return EngineArgs(model=str(folder), **{**ENGINE, **engine}).create_engine_config()


@pytest.mark.parametrize(
    "engine, message",
    [
        ({"hf_overrides": {"hidden_activation": "silu"}}, "hidden_activation = 'silu': allowed in vLLM is"),
        ({"hf_overrides": {"layer_types": ["sliding_attention"] * 3}}, "layer_types has no linear_attention"),
        ({"hf_overrides": {"attention_window_size": 1}}, "attention_window_size = 1: allowed are whole numbers from 2"),
        ({"tensor_parallel_size": 3}, "= 3 are"),
        ({"pipeline_parallel_size": 2}, "[Pp]ipeline"),
        ({"disable_sliding_window": True}, "sliding_window|attention_window_size"),
        ({"mamba_cache_dtype": "float32"}, "mamba_cache_dtype = 'float32': allowed are 'auto'"),
        ({"mamba_ssm_cache_dtype": "bfloat16"}, "mamba_ssm_cache_dtype = 'bfloat16': allowed are 'auto' and 'float32'"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}},
            "speculative_config: allowed is None",
        ),
    ],
)
def test_refuses_at_start(folder, monkeypatch, engine, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        configure(folder, monkeypatch, **engine)


def test_accepts(folder, monkeypatch):
    config = configure(folder, monkeypatch, mamba_ssm_cache_dtype="float32", tensor_parallel_size=2)
    assert config.model_config.is_hybrid and not config.cache_config.enable_prefix_caching


def test_adapters_on_a_gpu_need_a_16_bit_model(folder, monkeypatch):
    """vLLM has no float32 operators for adapters there. Only the plugin's check is told of a GPU."""
    from modeling_griffin.serving.vllm import eligibility

    platform = SimpleNamespace(is_cuda_alike=lambda: False)
    monkeypatch.setattr(eligibility, "current_platform", platform)
    configure(folder, monkeypatch, dtype="float32", enable_lora=True)
    platform.is_cuda_alike = lambda: True
    with pytest.raises(ValueError, match="dtype = 'float32': allowed with enable_lora on a GPU are 'bfloat16' and"):
        configure(folder, monkeypatch, dtype="float32", enable_lora=True)
    configure(folder, monkeypatch, dtype="bfloat16", enable_lora=True)
    configure(folder, monkeypatch, dtype="float32")


def test_vllm_finds_the_plugin():
    (entry,) = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "griffin"]
    assert entry.value == "modeling_griffin.serving.vllm:register"


def test_importing_the_package_imports_no_vllm():
    check = "import sys, modeling_griffin, modeling_griffin.serving.vllm; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
