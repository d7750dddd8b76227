"""The configuration of a Griffin or Hawk model."""  # SPDX-License-Identifier: Apache-2.0

from os import PathLike
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .lambda_init import find_lambda_init
from .slots import find_slot, require_slot
from .tensor_parallel import tensor_parallel_plan


# Two recurrent blocks, one attention block: the paper, section 3.
LAYER_PATTERN = ("linear_attention", "linear_attention", "sliding_attention")
LAYER_TYPES = ("linear_attention", "sliding_attention")
# For the Hub: which class each Auto class finds, in which file.
AUTO_MAP = {
    "AutoConfig": "configuration_griffin.GriffinConfig",
    "AutoModel": "modeling_griffin.GriffinModel",
    "AutoModelForCausalLM": "modeling_griffin.GriffinForCausalLM",
    "AutoModelForSequenceClassification": "modeling_griffin.GriffinForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_griffin.GriffinForTokenClassification",
}
OUR_CLASSES = {reference.split(".")[1] for reference in AUTO_MAP.values()}


OLDER_ROTARY_NAMES = ("rope_theta", "partial_rotary_factor", "rope_scaling")
# Beyond these no tensor can be made, or float32 has no such number and the model would compute NaN.
LARGEST = {"num_hidden_layers": 2**16, "num_labels": 2**20}  # Transformers names each label
LARGEST_SIZE = 2**31 - 1
RANGES = {
    "rg_lru_c": (1e-6, 1e6),
    "rms_norm_eps": (1e-30, 1.0),
    "final_logit_softcapping": (1e-6, 1e6),
    "rope_theta": (1.0, 1e15),
    "lambda_init_bounds": (1e-30, 1 - 2**-24),
}


@strict
class GriffinConfig(PreTrainedConfig):
    r"""Shapes and choices of a Griffin model (De et al. 2024, arXiv 2402.19427). Bad values raise at construction.

    Args:
        vocab_size: tokens in the vocabulary.
        hidden_size: width D of the residual stream.
        intermediate_size: width of each of the two branches of the gated MLP; None means 3 * hidden_size (the paper).
        num_hidden_layers: residual blocks.
        layer_types: `"linear_attention"` (an RG-LRU block) or `"sliding_attention"` (local attention) for each layer;
            None repeats two recurrent blocks and one attention block. All `"linear_attention"` is Hawk.
        num_attention_heads, num_key_value_heads, head_dim: of the local attention; one key-value head is MQA, None as
            many as num_attention_heads. head_dim None means hidden_size // num_attention_heads.
        attention_window_size: keys a query sees, itself included; at least 2. `sliding_window` is an alias.
        lru_width: channels C of the RG-LRU (the paper's D_RNN); None means hidden_size.
        num_gate_blocks: diagonal blocks of each of the two gates; must divide lru_width. Tensor parallelism shares out
            whole blocks, whole heads and features of the MLP, so that `tp_size` must divide their numbers.
        conv1d_width: taps of the temporal convolution.
        rg_lru_c: the exponent c of the recurrence, > 0.
        lambda_init: name of the initialisation of Λ, a key of `LAMBDA_INITS`.
        lambda_init_bounds: (low, high) handed to it, 0 < low < high < 1.
        final_logit_softcapping: logits become cap * tanh(logits / cap); None leaves them. 30.0 in RecurrentGemma.
        scale_embeddings: multiply embeddings (`inputs_embeds` too) by sqrt(hidden_size) rounded to bfloat16; True in
            RecurrentGemma.
        rope_parameters: `rope_theta` (10000) and `partial_rotary_factor` (0.5) of the rotary embedding; what is left
            out keeps its default. Older names are taken too: both as fields of their own, and `rope_scaling`.
        bos_token_id, eos_token_id, pad_token_id: tokens of the vocabulary or None; eos_token_id also a list of them.

    Raises:
        ValueError: naming the field, its value and what is allowed; for wrong types, errors of `huggingface_hub`'s
            `@strict`, which name them too.

    Example:
        >>> config = GriffinConfig(hidden_size=768, lru_width=1024, num_attention_heads=6, lambda_init="uniform")
        >>> model = GriffinForCausalLM(config)
    """

    model_type = "griffin"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"sliding_window": "attention_window_size"}
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "layers.*": "free_full_weight",
        "final_norm": "keep_full_weight",
    }

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    layer_types: list | None = None  # of strings; declared so, `@strict` would spend a second on 10,000 of them
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 1
    head_dim: int | None = None
    attention_window_size: int = 1024
    attention_dropout: float | int = 0.0
    lru_width: int | None = None
    num_gate_blocks: int = 16
    conv1d_width: int = 4
    rg_lru_c: float | int = 8.0
    lambda_init: str = "uniform"
    lambda_init_bounds: list[float | int] | tuple[float | int, ...] = (0.9, 0.999)
    hidden_activation: str = "gelu_pytorch_tanh"
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float | int | None = None
    scale_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if "sliding_window" in kwargs:
            self.attention_window_size = kwargs.pop("sliding_window")
        _check_sizes(self, kwargs.get("num_labels"))
        if self.intermediate_size is None:
            self.intermediate_size = 3 * self.hidden_size
        if self.lru_width is None:
            self.lru_width = self.hidden_size
        if self.layer_types is None:
            self.layer_types = [LAYER_PATTERN[i % len(LAYER_PATTERN)] for i in range(self.num_hidden_layers)]
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if "sliding_attention" in self.layer_types:
                _check_divides(self, "num_attention_heads", "hidden_size")
            self.head_dim = max(1, self.hidden_size // self.num_attention_heads)
        self.lambda_init_bounds = list(self.lambda_init_bounds)  # as JSON gives it back
        self.rope_parameters = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,  # Differs: from the paper, which does not say; DeepMind's code rotates half
            **_rotary({name: kwargs.pop(name) for name in OLDER_ROTARY_NAMES if name in kwargs}),
            **_rotary(self.rope_parameters or {}),
        }
        # Called here too, so that a user sees a ValueError and not the wrapper that `@strict` puts around it.
        self.validate_architecture()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: Any) -> "GriffinConfig":
        """As in Transformers; fields among kwargs count as if they were in the file, so that None means the default."""
        names = {*GriffinConfig.__annotations__, *cls.attribute_map, *OLDER_ROTARY_NAMES}
        given = {name: kwargs.pop(name) for name in [*kwargs] if name in names}
        rotary = _rotary({name: given.pop(name) for name in OLDER_ROTARY_NAMES if name in given})
        if rotary:
            before = given.get("rope_parameters", config_dict.get("rope_parameters")) or {}
            given["rope_parameters"] = {**before, **rotary}
        return super().from_dict({**config_dict, **given}, **kwargs)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Tensor parallel rules of the layers that there are; what is assigned (quantizers do) replaces them."""
        return self.__dict__.get("base_model_tp_plan") or tensor_parallel_plan(self)

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str] | None) -> None:
        # Transformers 5.17 assigns at construction what it has just read, and the layers may change afterwards.
        self.__dict__["base_model_tp_plan"] = None if plan == tensor_parallel_plan(self) else plan

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "GriffinConfig":
        """A ready-made configuration by name, for example "griffin-100m"; `griffin presets` lists them.

        overrides: fields that differ from it. Raises ValueError for a name that there is none of.
        """
        return require_slot("config_from_preset")(name, cls, **overrides)

    @classmethod
    def from_recurrent_gemma(cls, config: PreTrainedConfig) -> "GriffinConfig":
        """The same shapes and choices as a RecurrentGemmaConfig; its window of W is W + 1 keys in DeepMind's code."""
        return require_slot("config_from_recurrent_gemma")(config, cls)

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Arguments as in Transformers; with an `auto_map` of all Auto classes, and the code beside it."""
        # What is not ours in it stays: a tokenizer's class, or a user's own model built on these.
        entries = (getattr(self, "auto_map", None) or {}).items()
        others = {auto: name for auto, name in entries if str(name).rsplit(".", 1)[-1] not in OUR_CLASSES}
        self.auto_map = {**AUTO_MAP, **others}
        save, stock = find_slot("save_config"), super().save_pretrained
        if save is None:
            stock(save_directory, push_to_hub=push_to_hub, **kwargs)
        else:
            save(self, stock, save_directory, push_to_hub, **kwargs)

    def validate_architecture(self) -> None:
        """Raises ValueError with the field, its value and what is allowed. Run at construction and at saving."""
        _check_sizes(self)
        _check_divides(self, "num_gate_blocks", "lru_width")
        _check_layer_types(self)
        _check_lambda_init(self)
        if "sliding_attention" in self.layer_types:
            _check_divides(self, "num_key_value_heads", "num_attention_heads")
            _check_rotary(self)
        if self.hidden_activation not in ACT2FN:
            raise ValueError(f"hidden_activation = {self.hidden_activation!r}: allowed are {sorted(ACT2FN)}")
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            _check_tokens(self, field)
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout = {self.attention_dropout}: allowed is [0, 1)")
        for field in ("rg_lru_c", "rms_norm_eps", "final_logit_softcapping"):
            if getattr(self, field) is not None:
                _check_range(field, getattr(self, field), field)


def _rotary(given: dict) -> dict:
    """Rotary parameters by their names of today, from fields of older configurations; what is None is left out."""
    if not isinstance(scaling := given.get("rope_scaling") or {}, dict):
        raise ValueError(f"rope_scaling = {scaling!r}: allowed are a dictionary and None")
    given = {**scaling, **{name: value for name, value in given.items() if name != "rope_scaling"}}
    if "type" in given:
        given.setdefault("rope_type", given["type"])
    return {name: value for name, value in given.items() if value is not None and name != "type"}


def _check_range(name: str, value, field: str) -> None:
    low, high = RANGES[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} = {value!r}: allowed are numbers above 0, from {low} to {high}")


def _check_tokens(config: GriffinConfig, field: str) -> None:
    tokens, largest = getattr(config, field), config.vocab_size - 1
    for token in (tokens or [-1]) if isinstance(tokens, list | tuple) else [tokens]:
        if token is not None and not 0 <= token <= largest:
            raise ValueError(f"{field} = {tokens}: allowed are None and 0 to vocab_size - 1 = {largest}")


def _check_sizes(config: GriffinConfig, num_labels: Any = None) -> None:
    # The stock cache keeps the last window - 1 keys, and "the last 0" means all of them.
    least = {"attention_window_size": 2}
    fields = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "attention_window_size", "lru_width", "num_gate_blocks", "conv1d_width"),
    )
    for field, value in (("num_labels", num_labels), *((field, getattr(config, field)) for field in fields)):
        low, high = least.get(field, 1), LARGEST.get(field, LARGEST_SIZE)
        if value is not None and not (isinstance(value, int) and low <= value <= high):
            raise ValueError(f"{field} = {value}: allowed are whole numbers from {low} to {high}")


def _check_divides(config: GriffinConfig, divisor: str, field: str) -> None:
    number, by = getattr(config, field), getattr(config, divisor)
    if number % by:
        raise ValueError(f"{divisor} = {by}: allowed are divisors of {field} = {number}")


def _check_layer_types(config: GriffinConfig) -> None:
    for index, layer_type in enumerate(config.layer_types):
        if layer_type not in LAYER_TYPES:
            raise ValueError(f"layer_types[{index}] = {layer_type!r}: allowed are {' and '.join(LAYER_TYPES)}")
    found, number = len(config.layer_types), config.num_hidden_layers
    if found != number:
        raise ValueError(f"layer_types has {found} entries: allowed are {number}, or None for the repeated pattern")


def _check_lambda_init(config: GriffinConfig) -> None:
    # A saved model names its class; its weights are drawn already, and who loads it need not know how.
    if not config.architectures:
        find_lambda_init(config.lambda_init)
    bounds = config.lambda_init_bounds
    low, high = RANGES["lambda_init_bounds"]
    if len(bounds) != 2 or not low <= bounds[0] < bounds[1] <= high:
        raise ValueError(f"lambda_init_bounds = {bounds}: allowed are two numbers, {low} <= low < high <= {high}")


def _check_rotary(config: GriffinConfig) -> None:
    names = ("rope_type", "rope_theta", "partial_rotary_factor")
    rope_type, theta, factor = map(config.rope_parameters.get, names)
    if rope_type != "default":
        # The window bounds every distance, so that scaled rotations have nothing to extend.
        raise ValueError(f"rope_parameters['rope_type'] = {rope_type!r}: allowed is 'default'")
    if kinds := [name for name, value in config.rope_parameters.items() if isinstance(value, dict)]:
        raise ValueError(f"rope_parameters has {kinds}: allowed are the numbers themselves, which all layers share")
    _check_range("rope_parameters['rope_theta']", theta, "rope_theta")
    rotated = int(config.head_dim * factor) if isinstance(factor, int | float) and 0 < factor <= 1 else 0
    if rotated == 0 or rotated % 2:
        raise ValueError(
            f"rope_parameters['partial_rotary_factor'] = {factor!r}: allowed are numbers in (0, 1] that rotate an "
            f"even, positive number of the head_dim = {config.head_dim} dimensions"
        )


__all__ = ["GriffinConfig"]
