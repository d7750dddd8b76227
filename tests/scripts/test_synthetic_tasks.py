"""synthetic_tasks.py: answers recomputed from the tokens alone, row by row."""

import pytest
import torch
from lambda_study.synthetic_tasks import IGNORED, SYNTHETIC_TASKS, VOCABULARY


ROWS = 64
SIZES = {"selective_copying": 48, "induction_heads": 40, "delayed_recall": 20, "needle": 20}


def draw(kind, size, seed=0, rows=ROWS, **options):
    tokens, targets = SYNTHETIC_TASKS[kind](rows, size, torch.Generator().manual_seed(seed), **options)
    assert tokens.dtype == targets.dtype == torch.int64 and tokens.shape == targets.shape
    assert 0 <= tokens.min() and tokens.max() < VOCABULARY
    return tokens.tolist(), targets.tolist()


def asked(targets):
    return [position for position, target in enumerate(targets) if target != IGNORED]


@pytest.mark.parametrize("length, data_tokens", [(48, 16), (1024, 16), (32, 16), (9, 3)])
def test_selective_copying(length, data_tokens):
    tokens, targets = draw("selective_copying", length, data_tokens=data_tokens)
    places = set()
    for row, answers in zip(tokens, targets, strict=True):
        assert len(row) == length and asked(answers) == list(range(length - data_tokens, length))
        assert row[length - data_tokens :] == [1] * data_tokens
        data = [token for token in row[: length - data_tokens] if token != 0]
        assert answers[length - data_tokens :] == data and min(data) > 1
        places |= {position for position, token in enumerate(row[: length - data_tokens]) if token}
    assert len(places) > 0.5 * (length - data_tokens)  # anywhere, not in a fixed place
    noise = set() if length == 2 * data_tokens else {0}
    assert {token for row in tokens for token in row} == set(range(1, VOCABULARY)) | noise


def test_induction_heads():
    tokens, targets = draw("induction_heads", 40)
    for row, answers in zip(tokens, targets, strict=True):
        assert asked(answers) == [39] and row[39] == 15 and row.count(15) == 2
        assert answers[39] == row[row.index(15) + 1] != 15
    assert len({row.index(15) for row in tokens}) > 20
    first = draw("induction_heads", 3)
    assert all(row[0] == 15 and answers[2] == row[1] for row, answers in zip(*first, strict=True))


@pytest.mark.parametrize("distance, noise", [(1, 16), (2, 0), (64, 3)])
def test_needle(distance, noise):
    tokens, targets = draw("needle", distance, noise=noise)
    places = set()
    for row, answers in zip(tokens, targets, strict=True):
        first, second = [place for place, token in enumerate(row) if token == 15]
        assert len(row) == noise + distance + 2 and second == first + 1 + distance
        assert asked(answers) == [second] and answers[second] == row[first + 1] != 15
        places.add(first)
    assert places == set(range(noise + 1))
    assert len({answer for answers in targets for answer in answers}) > 10


@pytest.mark.parametrize("distance", [0, 1, 64])
def test_delayed_recall(distance):
    tokens, targets = draw("delayed_recall", distance)
    orders = set()
    for row, answers in zip(tokens, targets, strict=True):
        assert len(row) == distance + 12 and asked(answers) == list(range(distance + 8, distance + 12))
        value_of = dict(zip(row[0:8:2], row[1:8:2]))
        assert sorted(value_of) == [0, 1, 2, 3] and all(4 <= value < 12 for value in value_of.values())
        assert all(12 <= token < 16 for token in row[8 : distance + 8])
        assert sorted(row[-4:]) == [0, 1, 2, 3]
        assert answers[-4:] == [value_of[key] for key in row[-4:]]
        orders.add((tuple(row[0:8:2]), tuple(row[-4:])))
    assert len(orders) > 0.8 * ROWS  # neither the order of writing nor that of asking tells the answer


@pytest.mark.parametrize("kind", SYNTHETIC_TASKS)
def test_the_seed_decides(kind):
    assert draw(kind, SIZES[kind], seed=3) == draw(kind, SIZES[kind], seed=3)
    assert draw(kind, SIZES[kind], seed=3) != draw(kind, SIZES[kind], seed=4)


@pytest.mark.parametrize(
    "kind, size, message",
    [
        ("selective_copying", 31, "length = 31: allowed are whole numbers from 32"),
        ("induction_heads", 2, "length = 2: allowed are whole numbers from 3"),
        ("delayed_recall", -1, "distance = -1: allowed are whole numbers from 0"),
        ("needle", 0, "distance = 0: allowed are whole numbers from 1"),
    ],
)
def test_sizes_that_are_too_small(kind, size, message):
    with pytest.raises(ValueError, match=message):
        draw(kind, size)
