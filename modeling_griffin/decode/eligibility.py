"""Which path a request to `generate` takes, and what keeps it from a better one. One function decides: `decide`.

1. fused: the layers' arithmetic in kernels of our own, for a model whose modules are what the package made them.
2. forward: the model's own forward pass of one token over fixed buffers, whatever its modules are.
3. transformers: Transformers' own loop and cache; "uncached" the same without a cache.

Both steps are recorded as a CUDA graph on a GPU. The host runs ahead of a step where nothing of the user's runs between
two tokens; else it goes through Transformers' own loop, whose model is the step: `loop.py`.
`docs/generation_paths.md` has this as a table.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, generation
from transformers.cache_utils import DynamicCache
from transformers.generation import BaseStreamer, LogitsProcessorList, StoppingCriteriaList

from ..modeling_griffin import GriffinAttention, GriffinRecurrentBlock
from .fused_model import drops_attention, fused_obstacles
from .host_effects import global_effect, host_effect, watching_mode
from .original import PREFILL, patched_cache, patched_loop


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
ARGUMENTS = (
    *("attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position"),
    *("output_hidden_states", "tokenizer"),
    *CACHES,
)
MASKS = ("eager", "sdpa")  # attentions that take a mask of slots
LEAVE_OUT = "leave it out"
PLACES = "give each layer a temporal_block.layer_idx of its own, and make config.layer_types list their kinds"
STOCK_PREPARATION = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


class Obstacle(NamedTuple):
    """reason: what a path cannot honour. remedy: what the user can do about it."""

    reason: str
    remedy: str


class Path(NamedTuple):
    """step: "fused", "forward", "transformers" or "uncached". ahead: whether the host runs ahead of the tokens.

    obstacle: what kept the request from the fused step; None where it has it.
    """

    step: str
    ahead: bool = False
    obstacle: Obstacle | None = None


def decide(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    **kwargs: Any,
) -> Path:
    """The path of a request. Arguments of `_sample` and `_beam_search`."""
    cached = kwargs.get("use_cache", True)
    if cached and (obstacle := shared_places(model)) is not None:
        return Path("uncached", False, obstacle)
    obstacle = next(_in_request(model, generation_config, synced_gpus, kwargs), None)
    if obstacle is None and input_ids.device != model.device:
        obstacle = Obstacle(f"input_ids on {input_ids.device}", f"put them on the model's {model.device}")
    obstacle = obstacle or next(_in_prompt(input_ids, kwargs), None)
    if obstacle is not None:
        return Path("transformers", False, obstacle)
    ahead = _runs_ahead(logits_processor, stopping_criteria, generation_config)
    obstacle = next(ineligible_model_reasons(model), None)
    if obstacle is None and asks_for_hidden_states(generation_config) and _leaves_last_norm_out(model):
        obstacle = "output_hidden_states with config.tie_last_hidden_states = False"
    if obstacle is None:
        return Path("fused", ahead)
    return behind(Path("fused", ahead), model, obstacle)


def behind(path: Path, model: nn.Module, reason: str = "its step cannot be used, see above") -> Path:
    """The next best path behind one that cannot be taken for this reason."""
    if path.step == "forward":
        return Path("transformers", False, Obstacle(reason, "none"))
    obstacle = next(forward_obstacles(model), None)
    return (
        Path("forward", path.ahead, Obstacle(reason, "")) if obstacle is None else Path("transformers", False, obstacle)
    )


def asks_for_hidden_states(generation_config: GenerationConfig) -> bool:
    return bool(generation_config.return_dict_in_generate and generation_config.output_hidden_states)


def _leaves_last_norm_out(model) -> bool:
    """Whether the last of the hidden states is what stands in front of the final norm."""
    return getattr(model.model.config, "tie_last_hidden_states", None) not in (None, True)


def _runs_ahead(logits_processor, stopping_criteria, generation_config) -> bool:
    """Whether the next token can be found without the host, and a step too many leaves no trace."""
    return (
        all(type(each) in PROCESSORS for each in logits_processor)
        and all(type(each) in CRITERIA for each in stopping_criteria)
        and not generation_config.return_dict_in_generate
        and (generation_config.num_beams or 1) == 1
    )


def ineligible_model_reasons(model: nn.Module) -> Iterator[str]:
    """What keeps a model from the fused step, whatever the request: `fused_model.py`."""
    return fused_obstacles(model)


def shared_places(model: nn.Module) -> Obstacle | None:
    """Layers that a cache has no places for: two in the same, or one in another kind's.

    A cache has a place for each entry of config.layer_types, and a block knows its own by its number.
    """
    for name in ("layer_types", "attention_window_size"):  # what a cache is made by
        found, own = getattr(model.config, name), getattr(getattr(model.model, "config", model.config), name, None)
        if own != found:
            return Obstacle(f"model.model.config.{name} is {own}, not {found} as in model.config", "make them the same")
    kinds, used = model.config.layer_types, _used_places(model)
    places = [place for place, _ in used]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        return Obstacle(f"two of model.layers share place {twice} of the cache", PLACES)
    for place, kind in used:
        if place >= len(kinds) or kinds[place] != kind:
            return Obstacle(f"a {kind} layer has place {place} of the cache, which is another kind's", PLACES)
    return None


def unused_places(model: nn.Module) -> list[int]:
    """Places of a cache that no layer uses. Drafts cannot be undone there, and a state has nothing to put there."""
    used = {place for place, _ in _used_places(model)}
    return [place for place in range(len(model.config.layer_types)) if place not in used]


def _used_places(model) -> list[tuple[int, str]]:
    """The place in a cache and the kind of each block that keeps something there."""
    kinds: dict[type[nn.Module], str] = {
        GriffinAttention: "sliding_attention",
        GriffinRecurrentBlock: "linear_attention",
    }
    modules = [module for _, module in model.model.named_modules(remove_duplicate=False)]  # in wrappers too, and twice
    return [(block.layer_idx, kinds[cls]) for block in modules for cls in kinds if isinstance(block, cls)]


def check_places(model: nn.Module) -> None:
    """Raises ValueError where the model's layers cannot share a cache, which states and batches are made of."""
    obstacle, unused = shared_places(model), unused_places(model)
    if obstacle is None and unused:
        obstacle = Obstacle(f"no layer uses place {unused[0]} of the cache", PLACES)
    if obstacle is not None:
        raise ValueError(f"model.layers: {obstacle.reason}; {obstacle.remedy}")


def _in_request(model, generation_config, synced_gpus, kwargs) -> Iterator[Obstacle]:
    if synced_gpus:
        yield Obstacle("synced_gpus", LEAVE_OUT)
    if getattr(generation_config, "is_assistant", None):
        yield Obstacle("is_assistant", "drafts by prompt_lookup_num_tokens need no assistant model")
    for name in ("compile_config", "cache_implementation", "output_attentions", "low_memory"):
        if getattr(generation_config, name, None):
            yield Obstacle(f"{name} = {getattr(generation_config, name)!r}", LEAVE_OUT)
    for cache in (kwargs[name] for name in CACHES if kwargs.get(name) is not None):
        if getattr(cache, "_is_user_defined", False) or type(cache) is not DynamicCache:
            yield Obstacle(f"a {type(cache).__name__} that was passed", "keep states by model.prefill")
    if not kwargs.get("use_cache", True):
        yield Obstacle("use_cache = False", LEAVE_OUT)
    for name, value in kwargs.items():
        if name not in ARGUMENTS and value is not None:
            yield Obstacle(name, LEAVE_OUT)
    if (name := patched_loop()) is not None:
        yield Obstacle(f"{name} was replaced", "put it back")
    if type(model)._prefill is not PREFILL or "_prefill" in vars(model):
        yield Obstacle("_prefill is the model's own", "put into forward what it adds")
    for name in STOCK_PREPARATION:
        if getattr(type(model), name) is not getattr(generation.GenerationMixin, name) or name in vars(model):
            yield Obstacle(f"{name} is the model's own", "put into forward what it adds")


def _in_prompt(input_ids: torch.Tensor, kwargs: dict) -> Iterator[Obstacle]:
    """Last of all checks of a request, because it is the only one that reads values on the device."""
    if input_ids.shape[1] == 0 or input_ids.shape[0] == 0:
        yield Obstacle("a prompt without tokens", "give one token at least")
        return
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if not isinstance(mask, torch.Tensor) or mask.shape != input_ids.shape or mask.device != input_ids.device:
        yield Obstacle("an attention_mask of another shape or device", "give one as the tokens are")
        return
    mask = mask.bool()
    is_left = mask[:, -1].all() & (mask[:, 1:] >= mask[:, :-1]).all()
    if positions is not None:
        expected = mask.long().cumsum(-1) - 1
        if positions.dim() != 2 or positions.shape[1] != input_ids.shape[1]:
            yield Obstacle("position_ids of another shape", LEAVE_OUT)
            return
        is_left = is_left & ((positions == expected) | ~mask).all()
    if not bool(is_left):
        yield Obstacle("padding that is not on the left, or position_ids that do not count", "pad on the left")


def forward_obstacles(model: nn.Module) -> Iterator[Obstacle]:
    """What keeps a model's own forward pass from being recorded over fixed buffers."""
    if (attention := model.config._attn_implementation) not in MASKS:
        yield Obstacle(f"attn_implementation = {attention!r}", "load the model with 'sdpa'")
    dropouts = (module for module in model.modules() if isinstance(module, nn.Dropout))
    if drops_attention(model) or any(module.training and module.p > 0 for module in dropouts):
        yield Obstacle("dropout in training mode", "call model.eval() before")
    if (name := patched_cache()) is not None:
        yield Obstacle(f"{name} was replaced", "put it back")
    yield from _elsewhere(model)
    if model.device.type == "cpu":
        return  # where nothing is recorded, and everything runs at each token
    if torch.version.hip is not None:
        yield Obstacle("a GPU whose recordings were never tried", "none")
    if (mode := watching_mode()) is not None:
        yield Obstacle(f"a {mode}", "call generate outside of it")
    if (effect := global_effect()) is not None:
        yield Obstacle(f"a hook of every module {effect}", "remove it, or let it touch nothing but its tensors")
    if (name := waits_for_outliers(model)) is not None:
        yield Obstacle(f"{name}: bitsandbytes asks at each token for outliers", "load it with llm_int8_threshold=0.0")
    for name, module in model.named_modules():  # Python that has to run at each token
        if (effect := host_effect(module)) is not None:
            yield Obstacle(f"{name or 'the model'}: {effect}", "remove it, or let it touch nothing but its tensors")


def waits_for_outliers(model: nn.Module) -> str | None:
    """The name of a layer of LLM.int8() whose host waits to know which inputs it has to leave in 16 bits."""
    layers = ((name, vars(module).get("state")) for name, module in model.named_modules())
    return next((name for name, state in layers if (getattr(state, "threshold", None) or 0) > 0), None)


def _elsewhere(model) -> Iterator[Obstacle]:
    """Weights that are not all here."""
    for name, module in model.named_modules():
        if "_hf_hook" in vars(module):
            yield Obstacle(f"{name or 'the model'} is moved by accelerate", "load the whole model to one device")
    for name, parameter in model.named_parameters():
        if parameter.device != model.device:
            yield Obstacle(f"{name} is on {parameter.device}", "load the whole model to one device")
        if isinstance(parameter, DTensor):
            yield Obstacle(f"{name} is shared among ranks", "gather the model to generate")
