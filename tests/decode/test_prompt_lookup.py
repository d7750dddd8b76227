"""Drafts by prompt lookup: those of Transformers' generator, at every length of a text that grows."""

import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from modeling_griffin.decode.speculative.prompt_lookup import PromptLookup


def theirs(tokens, most, ngram, ends):
    generator = PromptLookupCandidateGenerator(
        eos_token_id=torch.tensor(ends) if ends else None,
        num_output_tokens=most,
        max_matching_ngram_size=ngram,
        max_length=10_000,
    )
    ids = torch.tensor([tokens])
    return generator.get_candidates(ids)[0][0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("most", [1, 3, 8])
@pytest.mark.parametrize("ngram", [1, 2, 4])
@pytest.mark.parametrize("ends", [[], [3], [0, 5]])
def test_the_candidates_are_those_of_transformers(ends, ngram, most):
    """Tokens come one or several at a time; a small vocabulary repeats itself often, a large one rarely."""
    found = 0
    for seed, vocabulary in enumerate([2, 4, 8, 60] * 3):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(0, vocabulary, (60,), generator=generator).tolist()
        lookup, end = PromptLookup(most, ngram, ends), 0
        while end < len(text):
            size = torch.randint(1, 6, (), generator=generator).item()
            lookup.accept(text[end : end + size])
            end = len(lookup.tokens)
            assert lookup.drafts(most) == theirs(text[:end], most, ngram, ends)
            found += bool(lookup.drafts(most))
    assert found > 20


def test_nothing_is_found_in_nothing():
    lookup = PromptLookup(3)
    assert lookup.drafts(3) == []
    lookup.accept([])
    lookup.accept([4])
    assert lookup.drafts(3) == []


@pytest.mark.parametrize("arguments, message", [((0, 2), "most = 0"), ((3, 0), "ngram = 0")])
def test_sizes_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptLookup(*arguments)
