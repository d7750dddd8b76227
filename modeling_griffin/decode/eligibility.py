"""Which requests to `generate` the recorded step can honour exactly. Each check names what makes it ineligible."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import generation
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache

from ..gpu import no_kernels_reason


# Without a state and without reading values on the host, so that they can be called for a step that is then dropped.
PROCESSORS = tuple(
    getattr(generation, name)
    for name in (
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "RepetitionPenaltyLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    )
    if hasattr(generation, name)
)
CRITERIA = (generation.MaxLengthCriteria, generation.EosTokenCriteria)
CACHES = ("past_key_values", "cache")  # newer versions of Transformers call it cache
ARGUMENTS = ("attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position", *CACHES)
ATTENTIONS = ("eager", "sdpa", "flex_attention")
OWN_MODULES = __name__.rpartition(".decode")[0]
ACTIVATIONS = type(ACT2FN["gelu_pytorch_tanh"]).__module__
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def ineligible_reason(
    model,
    input_ids,
    *,
    logits_processor,
    stopping_criteria,
    generation_config,
    synced_gpus=False,
    streamer=None,
    **kwargs,
) -> str | None:
    """None for a request that the recorded step honours exactly, else what it cannot. Arguments of `_sample`."""
    reasons = (
        _in_request(logits_processor, stopping_criteria, generation_config, synced_gpus, kwargs),
        ineligible_model_reasons(model),
        _in_prompt(input_ids, kwargs),
    )
    return next((reason for group in reasons for reason in group), None)


def _in_request(logits_processor, stopping_criteria, generation_config, synced_gpus, kwargs) -> Iterator[str]:
    if synced_gpus:
        yield "synced_gpus"
    for name in ("return_dict_in_generate", "is_assistant", "compile_config", "cache_implementation"):
        if getattr(generation_config, name, None):
            yield name
    for cache in (kwargs[name] for name in CACHES if kwargs.get(name) is not None):
        if getattr(cache, "_is_user_defined", False) or type(cache) is not DynamicCache:
            yield f"a {type(cache).__name__} that was passed"
    if not kwargs.get("use_cache", True):
        yield "use_cache = False"
    yield from (name for name, value in kwargs.items() if name not in ARGUMENTS and value is not None)
    yield from (type(each).__name__ for each in logits_processor if type(each) not in PROCESSORS)
    yield from (type(each).__name__ for each in stopping_criteria if type(each) not in CRITERIA)


def ineligible_model_reasons(model) -> Iterator[str]:
    config, weight = model.config, model.lm_head.weight
    if weight.is_cuda and (reason := no_kernels_reason(weight.device)) is not None:
        yield reason
    if config.hidden_activation != "gelu_pytorch_tanh":
        yield f"hidden_activation = {config.hidden_activation!r}"
    if config._attn_implementation not in ATTENTIONS and not config._attn_implementation.startswith("flash_attention"):
        yield f"attn_implementation = {config._attn_implementation!r}"
    if model.training and config.attention_dropout:
        yield "attention_dropout in training mode"
    if torch.is_autocast_enabled(weight.device.type):
        yield "autocast"
    if weight.dtype not in DTYPES:
        yield f"the weights' {weight.dtype}"
    for name, module in model.named_modules():
        reason = _in_module(module, weight)
        if reason:
            yield f"{name or 'the model'} {reason}"


def _in_module(module: nn.Module, weight: torch.Tensor) -> str | None:
    """Anything that adds to what the module's own class computes, or keeps its weights elsewhere."""
    source = type(module).__module__
    is_known = source.rpartition(".")[0] in (OWN_MODULES, "torch.nn.modules") or source == ACTIVATIONS
    if not is_known:
        return f"is a {type(module).__name__}"
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    # Transformers leaves hooks behind that record outputs when they are asked for.
    if "forward" in vars(module) or any(hook.__module__ != "transformers.utils.output_capturing" for hook in hooks):
        return "has a hook or a forward of its own"
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            return f"has a {name} that is a {type(parameter.data).__name__}"
        if parameter.device != weight.device or not parameter.is_contiguous():
            return f"has a {name} that lies elsewhere"
        if parameter.dtype != weight.dtype and name != "lambda_bias":
            return f"has a {name} of another dtype"
    return None


def _in_prompt(input_ids: torch.Tensor, kwargs: dict) -> Iterator[str]:
    """Last, because it is the only check that reads values on the device."""
    if input_ids.shape[1] == 0 or input_ids.shape[0] == 0:
        yield "a prompt without tokens"
        return
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if not isinstance(mask, torch.Tensor) or mask.shape != input_ids.shape or mask.device != input_ids.device:
        yield "an attention_mask of another shape or device"
        return
    mask = mask.bool()
    is_left = mask[:, -1].all() & (mask[:, 1:] >= mask[:, :-1]).all()
    if positions is not None:
        expected = mask.long().cumsum(-1) - 1
        if positions.dim() != 2 or positions.shape[1] != input_ids.shape[1]:
            yield "position_ids of another shape"
            return
        is_left = is_left & ((positions == expected) | ~mask).all()
    if not bool(is_left):
        yield "padding that is not on the left, or position_ids that do not count"
