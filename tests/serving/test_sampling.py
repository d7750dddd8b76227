"""The choice of all rows at once is what Transformers' processors choose for each row."""

import itertools

import pytest
import torch
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modeling_griffin import GenerationRequest
from modeling_griffin.serving import sampling
from modeling_griffin.serving.sampling import Sampler, uniform


VOCABULARY = 40
CASES = list(itertools.product((0.3, 1.0, 1.7), (0, 1, 7, 99), (0.2, 0.9, 1.0), (0.0, 0.3), (1.0, 1.4)))


def by_transformers(logits, request):
    """Scores (V) behind Transformers' processors, in its order."""
    made = LogitsProcessorList()
    if request.repetition_penalty != 1:
        made.append(RepetitionPenaltyLogitsProcessor(request.repetition_penalty))
    made.append(TemperatureLogitsWarper(request.temperature))
    if request.top_k:
        made.append(TopKLogitsWarper(request.top_k))
    if request.top_p < 1:
        made.append(TopPLogitsWarper(request.top_p))
    if request.min_p:
        made.append(MinPLogitsWarper(request.min_p))
    return made(torch.tensor([request.prompt]), logits[None])[0]


@pytest.mark.parametrize("with_top_p", [True, False])
def test_rows_that_ask_for_different_things_keep_what_transformers_keeps(with_top_p, monkeypatch):
    requests = [
        GenerationRequest([number % VOCABULARY, 3], temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=r)
        for number, (t, k, p, m, r) in enumerate(CASES)
        if with_top_p or p == 1
    ]
    logits = 3 * torch.randn(len(requests), VOCABULARY)
    seen = []
    monkeypatch.setattr(sampling, "draw", lambda scores, number: seen.append(scores) or scores.argmax(-1))
    sampler = Sampler(len(requests), VOCABULARY, torch.device("cpu"))
    sampler.seat(range(len(requests)), requests)
    sampler.choose(logits)
    for scores, row, request in zip(seen[0], logits, requests, strict=True):
        expected = by_transformers(row, request)
        assert torch.equal(scores.isinf(), expected.isinf()), request
        torch.testing.assert_close(scores, expected - expected.amax())  # which draws the same


def test_the_penalty_counts_what_was_chosen():
    sampler = Sampler(2, 5, torch.device("cpu"))
    sampler.seat([1], [GenerationRequest([0], repetition_penalty=10.0)])
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]] * 2)
    chosen = [sampler.choose(logits)[1].item() for _ in range(5)]
    assert chosen == [1, 2, 3, 4, 0]
    sampler.seat([1], [GenerationRequest([4], repetition_penalty=10.0)])  # another row: nothing is left of the first
    assert [sampler.choose(logits)[1].item() for _ in range(2)] == [0, 1]


def test_greedy_rows_take_the_argmax_that_is_known():
    """Without a look at the logits, and beside rows that sample too."""
    sampler, best = Sampler(2, 5, torch.device("cpu")), torch.tensor([3, 4])
    sampler.seat([0], [GenerationRequest([1])])
    assert sampler.choose(None, best) is best
    sampler.seat([1], [GenerationRequest([1], temperature=1.0)])
    assert sampler.choose(torch.zeros(2, 5), best)[0] == 3
    sampler.leave(1)
    assert sampler.choose(None, best) is best


def test_the_numbers_are_splitmix64s():
    """Its published first numbers for seed 1234567; and evenly spread for seeds and places side by side."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for place, number in enumerate(published):
        found = uniform(torch.tensor([1234567]), torch.tensor([place])).item()
        assert found == (number >> 12) * 2.0**-52
    sampler = Sampler(400, 3, torch.device("cpu"))
    sampler.seat(range(400), [GenerationRequest([1], seed=seed, temperature=1.0) for seed in range(400)])
    grid = uniform(sampler.key.repeat_interleave(50), torch.arange(50).repeat(400)).view(400, 50)
    assert 0 <= grid.min() and grid.max() < 1
    assert abs(grid.mean() - 0.5) < 5 / (12 * 20_000) ** 0.5 and abs(grid.var() - 1 / 12) < 0.003
    for one, other in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:])):
        both = torch.stack([one.flatten(), other.flatten()])
        assert abs(torch.corrcoef(both)[0, 1]) < 5 / 19_000**0.5


@pytest.mark.parametrize("seed", [-1, 2**64, 2**70 + 5])
def test_any_whole_number_is_a_seed(seed):
    sampler = Sampler(1, 3, torch.device("cpu"))
    sampler.seat([0], [GenerationRequest([1], seed=seed, temperature=1.0)])
    assert 0 <= sampler.choose(torch.zeros(1, 3)).item() < 3


def test_a_temperature_next_to_0_is_greedy():
    """Not the last token, as where scores over it are infinite."""
    logits = torch.randn(3, VOCABULARY)
    sampler = Sampler(3, VOCABULARY, logits.device)
    sampler.seat(range(3), [GenerationRequest([1], temperature=t, top_p=0.9) for t in (1e-39, 1e-30, 1e-6)])
    assert torch.equal(sampler.choose(logits, seats=range(3)), logits.argmax(-1))
