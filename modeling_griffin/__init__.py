"""Griffin for Transformers: importing this package registers the model with the Auto classes.

The flat files of this folder are the model, which goes to the Hub with its weights. This file, which does not, fills
their slots with what lies in the folders: kernels, decoding, serving, saving, parallelism, conversion.
"""

import importlib.metadata

from torch.nn.modules.module import register_module_module_registration_hook
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_griffin import GriffinConfig
from .conversion.presets import config_from_preset
from .conversion.recurrent_gemma import griffin_config_from_recurrent_gemma, load_recurrent_gemma
from .decode.generate import beam_search, sample
from .decode.speculative.generate import decode_with_drafts
from .kernels import dispatch
from .kernels.attention import Visible
from .kernels.device import wanted_on_amd
from .kernels.flash_attention import Runs, flash_local_attention, visible_attention
from .kernels.launch import launch
from .kernels.scan_calls import backward_or_torch, scan_forward
from .kernels.scan_operator import rg_lru_scan_torch_or_operator
from .kernels.scan_sequences import launch_walk, lay_out_sequences
from .kernels.sequences import check_sequences, scan_sequences
from .lambda_init import LAMBDA_INITS, register_lambda_init
from .local_attention import OWN_ATTENTION
from .modeling_griffin import (
    LORA_TARGETS,
    GriffinForCausalLM,
    GriffinForSequenceClassification,
    GriffinForTokenClassification,
    GriffinModel,
    GriffinPreTrainedModel,
    decay_parameter_names,
)
from .parallel.fsdp import distribute_model, keep_lambda_float32, plans_without_lambda
from .rg_lru_scan import rg_lru_scan
from .saving.card import keep_model_card
from .saving.save import push_model, save_config, save_model
from .serving.batch import GeneratedToken, GenerationResult, generate_batch, stream_batch
from .serving.cached_rows import prefill
from .serving.request import GenerationRequest
from .serving.state import GenerationState, load_state, save_state
from .slots import fill_slots
from .training.compiled_name import name_compiled
from .training.pieces import run_in_pieces
from .training.record import record_training, stop_recording


fill_slots(**dispatch.SLOTS, wanted_on_amd=wanted_on_amd)
fill_slots(rg_lru_scan_by_torch=rg_lru_scan_torch_or_operator)
fill_slots(launch=launch, run_in_pieces=run_in_pieces)
fill_slots(run_forward=scan_forward, run_backward=backward_or_torch)
fill_slots(
    check_sequences=check_sequences,
    scan_sequences=scan_sequences,
    launch_walk=launch_walk,
    lay_out_sequences=lay_out_sequences,
)
fill_slots(sample=sample, beam_search=beam_search, decode_with_drafts=decode_with_drafts)
fill_slots(
    prefill=prefill,
    generate_batch=generate_batch,
    stream_batch=stream_batch,
    save_state=save_state,
    load_state=load_state,
)
fill_slots(save_config=save_config, save_model=save_model, push_model=push_model)
fill_slots(distribute_model=distribute_model, plans_without_lambda=plans_without_lambda)
fill_slots(config_from_preset=config_from_preset)
fill_slots(config_from_recurrent_gemma=griffin_config_from_recurrent_gemma, load_recurrent_gemma=load_recurrent_gemma)
register_module_module_registration_hook(name_compiled)
OWN_ATTENTION.update({Runs: flash_local_attention, Visible: visible_attention})


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
    "keep_model_card",
    "register_lambda_init",
    "record_training",
    "rg_lru_scan",
    "stop_recording",
]
