"""Griffin for Transformers: importing this package registers the model with the Auto classes."""

import importlib.metadata

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_griffin import GriffinConfig
from .distributed import keep_lambda_float32
from .generate_batch import GeneratedToken, GenerationRequest, GenerationResult
from .generation_state import GenerationState
from .lambda_init import LAMBDA_INITS, register_lambda_init
from .modeling_griffin import (
    LORA_TARGETS,
    GriffinForCausalLM,
    GriffinForSequenceClassification,
    GriffinForTokenClassification,
    GriffinModel,
    GriffinPreTrainedModel,
    decay_parameter_names,
)
from .rg_lru_scan import rg_lru_scan


try:
    __version__ = importlib.metadata.version("modeling-griffin")
except importlib.metadata.PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"

AutoConfig.register(GriffinConfig.model_type, GriffinConfig, exist_ok=True)
GriffinConfig.register_for_auto_class()
for auto_class, model_class in {
    AutoModel: GriffinModel,
    AutoModelForCausalLM: GriffinForCausalLM,
    AutoModelForSequenceClassification: GriffinForSequenceClassification,
    AutoModelForTokenClassification: GriffinForTokenClassification,
}.items():
    auto_class.register(GriffinConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)
del auto_class, model_class


__all__ = [
    "LAMBDA_INITS",
    "LORA_TARGETS",
    "GeneratedToken",
    "GenerationRequest",
    "GenerationResult",
    "GenerationState",
    "GriffinConfig",
    "GriffinForCausalLM",
    "GriffinForSequenceClassification",
    "GriffinForTokenClassification",
    "GriffinModel",
    "GriffinPreTrainedModel",
    "decay_parameter_names",
    "keep_lambda_float32",
    "register_lambda_init",
    "rg_lru_scan",
]
