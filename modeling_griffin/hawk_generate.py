"""`generate` for a Hawk, whose cache of recurrent states does not count its tokens.

Legend: B rows, T tokens of the prompt.
"""

from transformers.cache_utils import DynamicCache

from .cache_name import CACHE_NAME


def read_in_chunks(model, input_ids, chunk_size: int, model_kwargs: dict):
    """The model's outputs for the last chunk of the prompt (B, T), behind the others: Transformers' `_prefill`.

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
