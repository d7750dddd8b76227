"""A cache by its old name and by its new one, in every version of Transformers."""

import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.utils import logging

from modeling_griffin import GriffinForSequenceClassification, GriffinForTokenClassification
from modeling_griffin.cache_name import CACHE_NAME
from modeling_griffin.documents import masks_for_generate


NAMES = ("past_key_values", "cache")


def random_ids(rows, length):
    return torch.randint(5, 29, (rows, length))


def models(small_model):
    causal = small_model()
    heads = [head(causal.config).eval() for head in (GriffinForSequenceClassification, GriffinForTokenClassification)]
    return [causal, causal.model, *heads]


@torch.no_grad()
def test_every_class_takes_both_names(small_model):
    for model in models(small_model):
        ids, found = random_ids(1, 9), []
        for name in NAMES:
            cache = DynamicCache(config=model.config)
            model(ids[:, :5], **{name: cache})
            output = model(ids[:, 5:], **{name: cache})
            assert cache.get_seq_length() == 9 and getattr(output, CACHE_NAME, cache) is cache  # of tokens: no cache
            found.append(output[0])
        assert torch.equal(*found)


def test_two_caches_are_refused(small_model):
    for model in models(small_model):
        caches = {name: DynamicCache(config=model.config) for name in NAMES}
        with pytest.raises(ValueError, match="past_key_values and cache: allowed is one of them"):
            model(random_ids(1, 3), **caches)


def test_masks_by_both_names(small_model):
    config = small_model().config
    found = [
        masks_for_generate(config, torch.empty(1, 3, 0), None, **{name: StaticCache(config=config, max_cache_len=6)})
        for name in NAMES
    ]
    assert found[0]["sliding_attention"].shape[-1] == 6
    assert torch.equal(found[0]["sliding_attention"], found[1]["sliding_attention"])


def test_what_transformers_reads_of_a_class(small_model):
    """Trainer leaves a cache out of its predictions, accelerate leaves it on its device."""
    model = small_model()
    assert CACHE_NAME in model.config.keys_to_ignore_at_inference
    assert CACHE_NAME in model._skip_keys_device_placement


@torch.no_grad()
def test_nothing_is_called_by_a_deprecated_name(small_model, monkeypatch):
    """Not by `generate`, dynamic, static, or with drafts, and not by the model itself."""
    said = []
    monkeypatch.setattr(logging.get_logger("transformers.utils.generic"), "warning_once", said.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for kind in ("griffin", "hawk"):
            model, ids = small_model(kind, "sdpa"), random_ids(1, 5)
            for options in ({}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
                model.generate(ids, max_new_tokens=6, do_sample=False, **options)
            model.prefill(ids)
            model(ids, labels=ids)
    assert not [text for text in said if "past_key_values" in text]
