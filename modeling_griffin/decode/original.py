"""What the package's classes and functions were when it was imported. A fused step stands for these and for no others.

Kernel libraries, steering and ablation tools and many a script replace a forward, of a class or of one module, or a
function that a forward calls. What is found in its place is not what the step computes.
"""

import inspect
from types import FunctionType

from torch import nn
from transformers import cache_utils
from transformers.generation import GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import causal_conv1d, documents, elementwise, local_attention, modeling_griffin, rg_lru, rg_lru_scan, slots
from ..kernels.dispatch import GELU_TANH, SLOTS


SOURCES = (causal_conv1d, documents, elementwise, local_attention, modeling_griffin, rg_lru, rg_lru_scan)
# Of PyTorch, what modules call for a token: libraries put attention or products of their own there.
FUNCTIONALS = ("linear", "embedding", "gelu", "scaled_dot_product_attention", "softmax", "softplus")
NOT_COMPUTED = ("__init__", "extra_repr")  # torchao gives a layer a description of its own
CALLED: dict[type, tuple[str, ...]] = {rg_lru.RGLRU: ("scan",)}  # takes the place of a function; none at import
CALLS = ("__call__", "_wrapped_call_impl", "_call_impl", "forward", "__getattr__")  # of every module
# A cache that forgets or rounds: a step keeps the same in buffers of its own.
CACHES = (
    cache_utils.Cache,
    cache_utils.DynamicCache,
    cache_utils.CacheLayerMixin,
    cache_utils.DynamicLayer,
    cache_utils.DynamicSlidingWindowLayer,
    cache_utils.LinearAttentionCacheLayerMixin,
    cache_utils.LinearAttentionLayer,
)
# Of `generate`, what a step stands for: its loops, and what they do before and behind a token.
LOOPS = ("_sample", "_beam_search", "_assisted_decoding", "_prefill")
LOOPS += ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
CLASSES = (
    modeling_griffin.GriffinForCausalLM,
    modeling_griffin.GriffinModel,
    modeling_griffin.GriffinDecoderLayer,
    modeling_griffin.GriffinAttention,
    modeling_griffin.GriffinRecurrentBlock,
    modeling_griffin.GriffinMLP,
    modeling_griffin.GriffinRMSNorm,
    modeling_griffin.GriffinRotaryEmbedding,
    rg_lru.RGLRU,
    rg_lru.BlockDiagonalLinear,
    rg_lru.Decay,
    causal_conv1d.CausalConv1d,
    GELU_TANH,
    nn.Linear,
    nn.Embedding,
    nn.Identity,  # the dropout of an adapter that has none
    nn.ModuleList,
)


def as_it_is(value: object) -> tuple[object, object]:
    """A function and what it runs: tools that reload edited files put new code into the functions that are there."""
    return value, getattr(value, "__code__", None)


def _functions_of(cls: type) -> dict[str, tuple]:
    own = [name for name, value in vars(cls).items() if isinstance(value, FunctionType) and name not in NOT_COMPUTED]
    if cls is modeling_griffin.GriffinForCausalLM:
        own = []  # a subclass may save, or prepare a batch, as it likes
    names = (*own, *CALLS, *CALLED.get(cls, ()))
    return {name: as_it_is(inspect.getattr_static(cls, name, None)) for name in names}


def _functions_in(module) -> dict[str, tuple]:
    return {name: as_it_is(value) for name, value in vars(module).items() if isinstance(value, FunctionType)}


OF_CLASSES = {cls: _functions_of(cls) for cls in (*CLASSES, *CACHES)}
OF_LOOPS = {name: as_it_is(getattr(GenerationMixin, name)) for name in LOOPS}
PREFILL = modeling_griffin.GriffinForCausalLM._prefill
IN_SOURCES = {module: _functions_in(module) for module in SOURCES}
IN_SOURCES[nn.functional] = {name: as_it_is(getattr(nn.functional, name)) for name in FUNCTIONALS}
ATTENTIONS = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS if "|" not in name}


def patched_class(cls: type, expected: type) -> str | None:
    """The name of a function that the class does not have any more as `expected` had it at import."""
    for name, function in OF_CLASSES[expected].items():
        if as_it_is(inspect.getattr_static(cls, name, None)) != function:
            return name
    return None


def patched_function() -> str | None:
    """The name of a function of the package that was replaced, in its module, in a slot, or as an attention."""
    for module, functions in IN_SOURCES.items():
        for name, function in functions.items():
            if as_it_is(vars(module).get(name)) != function:
                return f"{module.__name__.rpartition('.')[2]}.{name}"
    for name, function in SLOTS.items():
        if slots.find_slot(name) not in (None, function):
            return f"the slot {name}"
    for name, function in ATTENTIONS.items():
        if ALL_ATTENTION_FUNCTIONS.get(name) is not function:
            return f"the attention {name}"
    return None


def patched_cache() -> str | None:
    """The name of a function of Transformers' caches that was replaced."""
    return next((f"{cls.__name__}.{name}" for cls in CACHES if (name := patched_class(cls, cls)) is not None), None)


def patched_loop() -> str | None:
    """The name of a function of Transformers' `generate` that was replaced, in its class."""
    now = ((name, as_it_is(getattr(GenerationMixin, name))) for name in LOOPS)
    return next((f"GenerationMixin.{name}" for name, function in now if function != OF_LOOPS[name]), None)


def functions_now() -> tuple:
    """What stands now where `patched_function` and `patched_class` look: a recording holds what stood there then."""
    return (
        *(as_it_is(vars(module).get(name)) for module, functions in IN_SOURCES.items() for name in functions),
        *(slots.find_slot(name) for name in SLOTS),
        *(ALL_ATTENTION_FUNCTIONS.get(name) for name in ATTENTIONS),
        *(as_it_is(inspect.getattr_static(cls, name, None)) for cls, found in OF_CLASSES.items() for name in found),
    )


def own_function(module: nn.Module) -> str | None:
    """The name of a function that the module itself has in the place of its class's."""
    found = vars(module).keys() & OF_CLASSES.get(type(module), dict.fromkeys(CALLS)).keys()
    return min(found, default=None)
