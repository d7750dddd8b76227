"""Drafts that are right or wrong by arrangement: how many are, and that the page has a line for each way."""

import json
from argparse import Namespace

import pytest
import time_assistant_on_gpu
import torch
from benchmark_training import config_of
from time_assistant_on_gpu import WAYS, Way, generations, main, mistaken, pair


@pytest.fixture(scope="module")
def models():
    return pair(config_of("10m"), 3, "cpu")


@torch.no_grad()
def test_the_assistant_is_the_model(models):
    model, assistant = models
    ids = torch.randint(10, 4096, (1, 30), generator=torch.Generator().manual_seed(0))
    found, expected = assistant(ids).logits, model(ids).logits
    assert torch.equal(found, expected) and len(assistant.model.layers) == 3 < len(model.model.layers)
    assert len(expected.argmax(-1).unique()) > 20  # no two tokens in a row are the same one

    def agreeing(share):
        return (mistaken(assistant, share)(ids).logits.argmax(-1) == expected.argmax(-1)).float().mean()

    assert agreeing(0.0) == 1 and 0.2 < agreeing(0.5) < 0.8 and agreeing(1.0) == 0


@pytest.mark.parametrize(("wrong", "tokens"), [(0.0, 5), (1.0, 1)])
def test_tokens_of_a_pass(models, wrong, tokens):
    model, assistant = models
    asked = Namespace(prompts=1, new=11)
    seconds, size = generations(Way(4, wrong), model, mistaken(assistant, wrong), asked)
    assert len(seconds) == 1 and size == tokens and generations(Way(0, 0.0), model, assistant, asked)[1] is None


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(time_assistant_on_gpu, "WAYS", WAYS[:2])
    words = ["--device", "cpu", "--size", "tiny", "--new", "6", "--prompts", "1", "--rounds", "2"]
    main([*words, "--output", str(tmp_path / "page"), "--commit", "abc"])
    rows = json.loads((tmp_path / "page.json").read_text())["rows"]
    assert [(row["drafts"], row["wrong"], len(row["seconds"])) for row in rows] == [(0, 0.0, 2), (4, 0.0, 2)]
    page = (tmp_path / "page.md").read_text()
    assert "| greedy |  |" in page and "| 4 | 0% |" in page and "commit abc" in page
