"""What vLLM cannot serve is refused at start, by name, before any process or weight is loaded."""

from typing import Any

import torch
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from ...tensor_parallel import check_tensor_parallel


class GriffinEligibility(VerifyAndUpdateConfig):
    """vLLM calls this once, with everything that the user asked for."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        config = vllm_config.model_config.hf_config
        config.validate_architecture()  # `hf_overrides` sets fields after construction
        _check_model(config)
        check_tensor_parallel(config, vllm_config.parallel_config.tensor_parallel_size)
        _check_engine(vllm_config)


def _check_model(config) -> None:
    allowed = "gelu_pytorch_tanh"
    if config.hidden_activation != allowed:
        raise ValueError(f"hidden_activation = {config.hidden_activation!r}: allowed in vLLM is {allowed!r}")
    if "linear_attention" not in config.layer_types:
        raise ValueError("layer_types has no linear_attention: allowed in vLLM are models with a recurrent layer")


def _check_engine(vllm_config) -> None:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(f"pipeline_parallel_size = {parallel.pipeline_parallel_size}: allowed is 1")
    if vllm_config.speculative_config is not None:
        raise ValueError("speculative_config: allowed is None, states cannot be taken back token by token in vLLM")
    if vllm_config.model_config.disable_sliding_window:
        raise ValueError("disable_sliding_window = True: allowed is False, the window is part of the model")
    # vLLM's operators for adapters on a GPU take 16-bit numbers alone, which would show at the first pass only.
    dtype = vllm_config.model_config.dtype
    if vllm_config.lora_config is not None and dtype == torch.float32 and current_platform.is_cuda_alike():
        raise ValueError("dtype = 'float32': allowed with enable_lora on a GPU are 'bfloat16' and 'float16'")
    # The states' dtypes are the model's own: inputs of the convolution in its dtype, h in float32.
    for field, others in (("mamba_cache_dtype", ()), ("mamba_ssm_cache_dtype", ("float32",))):
        value = getattr(cache, field)
        if value not in ("auto", *others):
            raise ValueError(f"{field} = {value!r}: allowed are {' and '.join(map(repr, ('auto', *others)))}")
