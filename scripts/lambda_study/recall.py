"""What a trained language model still knows of a passage that it read `distance` tokens before.

A row is a passage, other text, and the passage again. The figures are of the second passage: its loss, and what it is
below the loss of the same passage after other text alone. Passages are held-out text, or random tokens, of which
nothing but the first reading says anything: copying these is what induction heads do.
"""

import numpy as np
import torch
from torch.nn.functional import cross_entropy


PASSAGE, ROWS = 64, 64  # tokens of a passage; rows for each distance
MOST_TOKENS = 2**17  # in one forward pass
SEED = 10**6


@torch.no_grad()
def recall_by_distance(model: torch.nn.Module, text: torch.Tensor, distances: list[int], vocab_size: int) -> list[dict]:
    """An entry for each kind of passage and distance: loss and saved (nats a token), accuracy of the second reading.

    text: (N,) held-out tokens on the model's device, N >= the longest distance + 2 passages.
    """
    entries = []
    for kind in ("text", "random"):
        for distance in distances:
            generator = np.random.default_rng(SEED + distance)
            first, between = _passages(kind, text, vocab_size, generator), _slices(text, distance, generator)
            other = _passages(kind, text, vocab_size, generator)
            again = _second_reading(model, torch.cat([first, between, first], dim=1))
            fresh = _second_reading(model, torch.cat([other, between, first], dim=1))
            saved = fresh[0] - again[0]
            entries.append({"kind": kind, "distance": distance, "loss": again[0], "saved": saved, "accuracy": again[1]})
    return entries


def _slices(text: torch.Tensor, length: int, generator) -> torch.Tensor:
    """(ROWS, length) pieces of the text from anywhere in it."""
    begin = torch.from_numpy(generator.integers(0, len(text) - length, size=(ROWS, 1))).to(text.device)
    return text[begin + torch.arange(length, device=text.device)]


def _passages(kind: str, text: torch.Tensor, vocab_size: int, generator) -> torch.Tensor:
    if kind == "text":
        return _slices(text, PASSAGE, generator)
    return torch.from_numpy(generator.integers(0, vocab_size, size=(ROWS, PASSAGE))).to(text.device)


def _second_reading(model, rows: torch.Tensor) -> tuple[float, float]:
    """(loss, accuracy) of the last PASSAGE tokens but their first, which nothing announces."""
    losses, right = [], []
    for part in rows.split(max(1, MOST_TOKENS // rows.shape[1])):
        logits = model(input_ids=part, use_cache=False).logits[:, -PASSAGE:-1].float()
        targets = part[:, -PASSAGE + 1 :]
        losses.append(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none"))
        right.append((logits.argmax(-1) == targets).flatten())
    return torch.cat(losses).mean().item(), torch.cat(right).float().mean().item()
