"""What a cache says of itself: tokens seen, order of keys, if it is ours."""  # SPDX-License-Identifier: Apache-2.0

import torch
from transformers.cache_utils import Cache, DynamicCache

from .cache_name import CACHE_NAME
from .configuration_griffin import GriffinConfig


def tokens_in_cache(config: GriffinConfig, past_key_values: Cache | None) -> int:
    """Tokens the cache has seen. Recurrent layers do not count them: 1 stands for "some", enough to know of a start."""
    if past_key_values is None:
        return 0
    layers = len(past_key_values.layers) if isinstance(past_key_values, Cache) else None
    if layers != config.num_hidden_layers:
        raise ValueError(
            f"past_key_values, a {type(past_key_values).__name__}, has {layers} layers: allowed are caches made for "
            "this model, for example DynamicCache(config=model.config)"
        )
    check_layers(config, past_key_values)
    if counts_tokens(config, past_key_values):
        return past_key_values.get_seq_length(attention_layer(past_key_values))
    recurrent = [index for index, kind in enumerate(config.layer_types) if kind == "linear_attention"]
    return int(any(past_key_values.has_previous_state(index) for index in recurrent))


def counts_tokens(config: GriffinConfig, past_key_values: Cache | None) -> bool:
    """Whether an attention layer says how many tokens there are: none of a Hawk, or of a model that has lost them."""
    if "sliding_attention" not in config.layer_types:
        return False
    if past_key_values is None or torch.compiler.is_compiling():
        return True
    if past_key_values.layers[attention_layer(past_key_values)].is_initialized:
        return True
    recurrent = [index for index, kind in enumerate(config.layer_types) if kind == "linear_attention"]
    return not any(past_key_values.has_previous_state(index) for index in recurrent)


def attention_layer(past_key_values: Cache) -> int:
    """The first attention layer that has seen tokens, if any has: the model may have lost layers that its cache has."""
    layers = [index for index, sliding in enumerate(past_key_values.is_sliding) if sliding]
    if torch.compiler.is_compiling():  # whether it has would be a guard, and another graph
        return layers[0]
    return next((index for index in layers if past_key_values.layers[index].is_initialized), layers[0])


def is_static(past_key_values: Cache | None) -> bool:
    """Whether attention gets the slots of a static cache, some of them empty.

    Asked of the attention layer: from Transformers 5.24 on the cache as a whole does not call itself compileable while
    a recurrent layer records its past.
    """
    return past_key_values is not None and past_key_values.layers[attention_layer(past_key_values)].is_compileable


def cache_for_stock_masks(past_key_values: Cache | None) -> Cache | None:
    """Stock masks ask the first attention layer, which a model that has lost layers may not have."""
    if past_key_values is None or (index := attention_layer(past_key_values)) == past_key_values.is_sliding.index(True):
        return past_key_values
    return Cache(layers=[past_key_values.layers[index]])


def check_layers(config: GriffinConfig, past_key_values: Cache) -> None:
    """Another model's cache may have as many layers, of other kinds or with another window."""
    if torch.compiler.is_compiling():
        return
    for index, (layer, kind) in enumerate(zip(past_key_values.layers, config.layer_types)):
        found = "sliding_attention" if getattr(layer, "is_sliding", False) else "linear_attention"
        window = getattr(layer, "sliding_window", None)
        if found != kind or window not in (None, config.attention_window_size):
            raise ValueError(
                f"past_key_values is of another model: its layer {index} is a {type(layer).__name__} with a window of "
                f"{window}: allowed is {kind} with {config.attention_window_size}, as DynamicCache(config=model.config)"
            )


def check_room(config: GriffinConfig, past_key_values: Cache, length: int) -> None:
    """A static cache shorter than the window forgets keys that the window still sees, without a word."""
    if any(getattr(layer, "record_past", False) for layer in past_key_values.layers):
        return  # the last draft may reach beyond the end; what does is dropped
    slots = min(getattr(layer, "max_cache_len", length) for layer in past_key_values.layers)
    if slots < min(length, config.attention_window_size):
        raise ValueError(
            f"past_key_values has room for {slots} tokens and would hold {length}: allowed is a max_cache_len of all "
            f"tokens, or of attention_window_size = {config.attention_window_size}"
        )


def read_in_chunks(model: torch.nn.Module, input_ids: torch.Tensor, chunk_size: int, model_kwargs: dict) -> dict:
    """For a Hawk, whose cache does not count its tokens: Transformers' `_prefill`.

    Returns the model's outputs for the last chunk of the prompt (B, T), behind the others.

    model_kwargs: as `generate` hands them over; the mask (B, T or more) and the positions of the whole prompt.
    """
    arguments = {name: value for name, value in model_kwargs.items() if name != CACHE_NAME}
    cache = model_kwargs.get(CACHE_NAME)
    cache = DynamicCache(config=model.config) if cache is None else cache
    mask, positions = arguments.pop("attention_mask", None), arguments.pop("position_ids", None)
    length, embeds = input_ids.shape[1], arguments.get("inputs_embeds")
    length = length if embeds is None else embeds.shape[1]
    for start in range(0, length, chunk_size):
        end = min(length, start + chunk_size)
        if mask is not None:
            arguments["attention_mask"] = mask[:, : mask.shape[1] - length + end]
        if positions is not None:
            arguments["position_ids"] = positions[:, positions.shape[1] - length :][:, start:end]
        if embeds is not None:
            arguments["inputs_embeds"] = embeds[:, start:end]
        inputs = model.prepare_inputs_for_generation(
            input_ids[:, start:end], is_first_iteration=True, **arguments, **{CACHE_NAME: cache}
        )
        outputs = model(**inputs, return_dict=True)
    return outputs
