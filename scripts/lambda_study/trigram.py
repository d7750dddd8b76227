"""A trigram model of bytes: the baseline of the demonstration.

Interpolated Kneser-Ney (1995): p(c | h) = max(n(hc) - d, 0) / n(h) + d * kinds(h) / n(h) * p(c | h without its first
symbol), down to uniform. n counts occurrences in the trigram; below it, how many different symbols precede.
"""

import itertools

import numpy as np


SYMBOLS = 257  # 256 bytes, and one that stands before and after each document
END = 256
DISCOUNTS = np.arange(0.2, 1.0, 0.1)


def trigram_bits_per_byte(train: list[str], held_out: list[str]) -> tuple[float, list[float]]:
    """Bits per byte of the held-out documents, their ends included, and the discounts of the uni-, bi- and trigram.

    The discounts are those that fit the held-out text best: a choice in the baseline's favour.
    """
    trigrams = np.zeros((SYMBOLS,) * 3, dtype=np.int32)
    np.add.at(trigrams, _windows(train), 1)
    bigrams = (trigrams > 0).sum(axis=0)
    unigrams = (bigrams > 0).sum(axis=0)
    windows = _windows(held_out)
    orders = [_look_up(counts, windows[-counts.ndim :]) for counts in (unigrams, bigrams, trigrams)]
    num_bytes = sum(len(text.encode()) for text in held_out)

    def bits(discounts) -> float:
        p = 1 / SYMBOLS
        for (count, total, kinds), discount in zip(orders, discounts):
            seen = (np.maximum(count - discount, 0) + discount * kinds * p) / np.maximum(total, 1)
            p = np.where(total > 0, seen, p)  # a context that never occurred says nothing
        return -np.log2(p).sum() / num_bytes

    best = min(itertools.product(DISCOUNTS, repeat=3), key=bits)
    return float(bits(best)), [round(float(discount), 1) for discount in best]


def _windows(documents: list[str]) -> tuple[np.ndarray, ...]:
    """Three arrays: for every byte and document's end, the symbol two before it, the one before it, and itself."""
    symbols = [np.array([END, END, *text.encode(), END]) for text in documents]
    return tuple(np.concatenate([s[k : len(s) - 2 + k] for s in symbols]) for k in range(3))


def _look_up(counts: np.ndarray, window: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each window: its count, its context's count, and how many symbols followed that context."""
    context = window[:-1]
    return counts[window], counts.sum(axis=-1)[context], (counts > 0).sum(axis=-1)[context]
