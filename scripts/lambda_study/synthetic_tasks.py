"""Synthetic memory tasks: batches of tokens, and what a model must answer at which position.

Each function draws a batch on the generator's device and returns `tokens` and `targets`, both (B, T) int64. `targets`
holds what the output at that very position must be (nothing is shifted), and -100 where nothing is asked. All tasks
have a vocabulary of 16.

Sources: selective copying and induction heads are those of the Griffin paper (arXiv 2402.19427, section 6.2), defined
in Mamba (arXiv 2312.00752, section 4.1) after Jing et al. 2019 and Olsson et al. 2022.
"""

from collections.abc import Callable

import torch


VOCABULARY = 16
IGNORED = -100

Batch = tuple[torch.Tensor, torch.Tensor]


def selective_copying(rows: int, length: int, generator: torch.Generator, data_tokens: int = 16) -> Batch:
    """Data tokens (2 to 15) at random places among noise (0); at the end as many cues (1), answered by the data in
    their order. `length` is T, cues included.
    """
    body = length - data_tokens
    _check("length", length, 2 * data_tokens)
    device = generator.device
    places = torch.rand(rows, body, generator=generator, device=device).topk(data_tokens, dim=1).indices.sort(1).values
    data = torch.randint(2, VOCABULARY, (rows, data_tokens), generator=generator, device=device)
    tokens = torch.zeros(rows, length, dtype=torch.long, device=device).scatter_(1, places, data)
    tokens[:, body:] = 1
    targets = torch.full_like(tokens, IGNORED)
    targets[:, body:] = data
    return tokens, targets


def induction_heads(rows: int, length: int, generator: torch.Generator) -> Batch:
    """Random tokens (0 to 14), somewhere the trigger (15); the trigger again at the end, answered by the token that
    followed it. `length` is T.
    """
    _check("length", length, 3)
    device = generator.device
    tokens = torch.randint(0, VOCABULARY - 1, (rows, length), generator=generator, device=device)
    place = torch.randint(0, length - 2, (rows, 1), generator=generator, device=device)
    tokens.scatter_(1, place, VOCABULARY - 1)
    tokens[:, -1] = VOCABULARY - 1
    targets = torch.full_like(tokens, IGNORED)
    targets[:, -1:] = tokens.gather(1, place + 1)
    return tokens, targets


def needle(rows: int, distance: int, generator: torch.Generator, noise: int = 16) -> Batch:
    """Random tokens (0 to 14); among them the trigger (15) and the needle, and `distance` tokens behind that one the
    trigger again, answered by the needle. Of `noise` tokens some are before all this, the others behind it. T = noise +
    distance + 2.
    """
    _check("distance", distance, 1)
    device = generator.device
    tokens = torch.randint(0, VOCABULARY - 1, (rows, noise + distance + 2), generator=generator, device=device)
    place = torch.randint(0, noise + 1, (rows, 1), generator=generator, device=device)
    question = place + 1 + distance
    tokens.scatter_(1, place, VOCABULARY - 1).scatter_(1, question, VOCABULARY - 1)
    targets = torch.full_like(tokens, IGNORED).scatter_(1, question, tokens.gather(1, place + 1))
    return tokens, targets


KEYS, VALUES = 4, 8


def delayed_recall(rows: int, distance: int, generator: torch.Generator) -> Batch:
    """Associative recall at a distance: four pairs of a key (0 to 3) and a value (4 to 11), `distance` distractors (12
    to 15), then the four keys in another order, each answered by its value. T = distance + 12.
    """
    _check("distance", distance, 0)
    device = generator.device
    written, asked = (torch.rand(rows, KEYS, generator=generator, device=device).argsort(1) for _ in range(2))
    value_of = torch.randint(KEYS, KEYS + VALUES, (rows, KEYS), generator=generator, device=device)
    pairs = torch.stack([written, value_of.gather(1, written)], dim=2).flatten(1)
    distractors = torch.randint(KEYS + VALUES, VOCABULARY, (rows, distance), generator=generator, device=device)
    tokens = torch.cat([pairs, distractors, asked], dim=1)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, -KEYS:] = value_of.gather(1, asked)
    return tokens, targets


def _check(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} = {value}: allowed are whole numbers from {least}")


SYNTHETIC_TASKS: dict[str, Callable[..., Batch]] = {
    "selective_copying": selective_copying,
    "induction_heads": induction_heads,
    "delayed_recall": delayed_recall,
    "needle": needle,
}
