"""demo.py: an honest split, a trigram that is one, and the whole way in two steps of training."""

import collections
import itertools
import math
import random
from pydoc_data.topics import topics

import pytest
from _script_helpers import ROOT
from demo import PROMPT, demo, topic_documents
from lambda_study.trigram import END, SYMBOLS, trigram_bits_per_byte


def test_held_out_topics_share_no_paragraph_with_the_training_text():
    train, held_out = topic_documents()
    paragraphs = [{p.strip() for text in texts for p in text.split("\n\n")} - {""} for texts in (train, held_out)]
    assert not paragraphs[0] & paragraphs[1]
    sizes = [sum(map(len, texts)) for texts in (train, held_out)]
    assert sizes[1] > 0.05 * sum(sizes) and sizes[0] > 200_000


def test_trigram_is_interpolated_kneser_ney():
    """Against dictionaries and the formula, symbol by symbol; and its probabilities sum to one."""
    random.seed(1)
    train, held_out = (["".join(random.choices("abcé", (5, 3, 1, 1), k=n)) for n in ns] for ns in ((80, 50), (60,)))
    bits, discounts = trigram_bits_per_byte(train, held_out)

    counts = [collections.Counter() for _ in range(3)]  # uni-, bi-, trigrams
    for text in train:
        symbols = [END, END, *text.encode(), END]
        counts[2].update(zip(symbols, symbols[1:], symbols[2:]))
    counts[1] = collections.Counter(gram[1:] for gram in counts[2])
    counts[0] = collections.Counter(gram[1:] for gram in counts[1])

    def p(symbol, context, order=2):
        lower = 1 / SYMBOLS if order == 0 else p(symbol, context[1:], order - 1)
        followers = {gram[-1]: n for gram, n in counts[order].items() if gram[:-1] == context}
        if not followers:
            return lower
        d, total = discounts[order], sum(followers.values())
        return (max(followers.get(symbol, 0) - d, 0) + d * len(followers) * lower) / total

    for context in itertools.product((END, ord("a"), ord("z")), repeat=2):
        assert sum(p(symbol, context) for symbol in range(SYMBOLS)) == pytest.approx(1)
    expected = 0.0
    for text in held_out:
        symbols = [END, END, *text.encode(), END]
        expected -= sum(math.log2(p(c, (a, b))) for a, b, c in zip(symbols, symbols[1:], symbols[2:]))
    assert bits == pytest.approx(expected / sum(len(text.encode()) for text in held_out))


def test_the_whole_way(tmp_path, monkeypatch, capsys):
    """Two steps on a few topics: too few to win, so the demonstration says so; the reloaded logits are the same."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("demo.FOLDER", tmp_path)
    monkeypatch.setattr("demo.topics", dict(sorted(topics.items())[:12]))
    overrides = ["--max_steps=2", "--sequence_length=64", "--use_cpu", "--disable_tqdm"]
    with pytest.raises(SystemExit, match="the demonstration failed"):
        demo(overrides)
    printed = capsys.readouterr().out
    assert PROMPT in printed
    assert "new process: largest difference of logits 0\n" in printed
    for name in ("model.safetensors", "config.json", "tokenizer.json", "metrics.json", "loss_curve.png"):
        assert (tmp_path / "model" / name).is_file(), name
