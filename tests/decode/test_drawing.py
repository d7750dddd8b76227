"""Sampling by a recording behind the step: the same tokens under the same seed as where each operator is started.

On a CPU a stand-in runs the recording's operators where a GPU would replay them; `gpu` tests record.
"""

import pytest
import torch
from test_generation_paths import by_transformers, random_ids

from modeling_griffin.decode import drawing
from modeling_griffin.decode import generate as fast_generate
from modeling_griffin.decode.steps import STEPS


SETTINGS = [
    {},
    {"top_k": 9, "temperature": 0.8},
    {"top_p": 0.9, "temperature": 0.7, "top_k": 0},
    {"min_p": 0.05, "typical_p": 0.8, "epsilon_cutoff": 0.01},
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def replays(monkeypatch):
    """How often a recording was replayed; recordings begin at the third token of a call."""
    count = []

    class Replayed:
        def __init__(self, replay):
            self.real = replay

        def replay(self):
            count.append(1)
            self.real()

    real = drawing.record

    def record(compute, device):
        return Replayed(compute if device.type == "cpu" else real(compute, device).replay)

    monkeypatch.setattr(drawing, "record", record)
    is_recorded = drawing._is_recorded
    monkeypatch.setattr(drawing, "_is_recorded", lambda step: step.device.type == "cpu" or is_recorded(step))
    for module in (drawing, fast_generate):
        monkeypatch.setattr(module, "RECORD_BEHIND", 3)
    return count


def sampled(model, ids, **options):
    torch.manual_seed(3)
    return model.generate(ids, **{"max_new_tokens": 12, "do_sample": True, "pad_token_id": 0, **options})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("options", SETTINGS)
def test_the_same_tokens_under_the_same_seed(options, rows, device, small_model, replays, monkeypatch):
    """In the first call, which records, and in the second, which has the recording from its second token on."""
    model, ids = small_model().to(device), random_ids(rows, 6).to(device)
    for ends in ({}, {"eos_token_id": [7, 8]}):
        mask = (torch.arange(6) >= torch.arange(rows)[:, None] * 2).long().to(device)
        options = {**options, "attention_mask": mask, **ends}
        expected = by_transformers(monkeypatch, model, ids, do_sample=True, **options)
        for _ in range(2):
            before = len(replays)
            assert torch.equal(sampled(model, ids, **options), expected)
            if not ends:
                assert len(replays) - before == (9 if before == 0 else 11)
    (step,) = next(iter(STEPS[model].values()))
    assert len(step.drawings) == 2


def test_padding_as_a_tensor_of_one(small_model, replays, monkeypatch):
    """Which Transformers' loop takes as it takes a number."""
    model, ids = small_model(), random_ids(2, 6)
    options = {"eos_token_id": [7, 8, 9, 10], "pad_token_id": torch.tensor([3])}
    expected = by_transformers(monkeypatch, model, ids, do_sample=True, **options)
    assert (expected == 3).any()
    for _ in range(2):
        assert torch.equal(sampled(model, ids, **options), expected)
    assert replays


@pytest.mark.parametrize("device", DEVICES)
def test_random_numbers_go_on_behind_a_recording(device, small_model, replays):
    model, ids = small_model().to(device), random_ids(2, 6).to(device)
    ends = []
    for new in (3, 12, 3):  # without a recording, with one, with one from the second token on
        first, ends = sampled(model, ids, max_new_tokens=new), [*ends, []]
        ends[-1] += [first[:, :9].tolist(), sampled(model, ids, max_new_tokens=12).tolist()]
    assert ends[0] == ends[1] == ends[2] and replays


def test_what_reads_more_than_scores_is_not_recorded(small_model, replays):
    model, ids = small_model(), random_ids(2, 6)
    for options in ({"repetition_penalty": 1.3}, {"suppress_tokens": [7]}, {"eta_cutoff": 0.1}, {"do_sample": False}):
        sampled(model, ids, **options)
    assert replays == []


def test_a_function_that_was_replaced_is_recorded_anew(small_model, replays, monkeypatch):
    from transformers import TemperatureLogitsWarper

    model, ids = small_model(), random_ids(2, 6)
    before = sampled(model, ids, temperature=0.5)
    monkeypatch.setattr(TemperatureLogitsWarper, "__call__", lambda self, tokens, scores: -scores)
    expected = by_transformers(monkeypatch, model, ids, do_sample=True, temperature=0.5)
    assert torch.equal(sampled(model, ids, temperature=0.5), expected) and not torch.equal(expected, before)


def test_few_are_kept_and_a_failure_leaves_the_operators(small_model, replays, monkeypatch):
    model, ids = small_model(), random_ids(2, 6)
    for number in range(1, 9):
        sampled(model, ids, temperature=number / 4)
    (step,) = next(iter(STEPS[model].values()))
    assert len(step.drawings) == drawing.KEPT_DRAWINGS
    expected, said = sampled(model, ids, temperature=0.3), []

    def fails(compute, device):
        raise RuntimeError("no")

    monkeypatch.setattr(drawing, "record", fails)
    monkeypatch.setattr(drawing.logger, "warning_once", said.append)
    step.drawings.clear()
    for _ in range(2):
        assert torch.equal(sampled(model, ids, temperature=0.3), expected)
    assert len(said) == 1 and "sampling is not recorded" in said[0]


def test_large_logits_are_not_recorded(small_model, monkeypatch):
    model = small_model()
    sampled(model, random_ids(2, 6))
    (step,) = next(iter(STEPS[model].values()))
    step.graph = object()
    assert drawing._is_recorded(step)
    monkeypatch.setattr(drawing, "LARGEST", 2 * 29 - 1)
    assert not drawing._is_recorded(step)
