"""Reading rows by pieces, with whatever runs an exported Griffin."""

from collections.abc import Callable

import torch


Run = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]


def random_rows(rows: int, length: int, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their mask; the first row begins with `padding`."""
    ids, mask = torch.randint(1, 29, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    mask[0, :padding] = 0
    return ids, mask


def read_in_pieces(run: Run, state, ids, mask, pieces, padded: bool) -> torch.Tensor:
    """The logits of all tokens; pieces: how many tokens each call reads."""
    logits, begin = [], 0
    for length in pieces:
        part = slice(begin, begin + length)
        extra = {"attention_mask": mask[:, part]} if padded else {}
        piece, state = run(input_ids=ids[:, part], state=state, **extra)
        logits.append(piece)
        begin += length
    return torch.cat(logits, dim=1)


def generate_greedily(run: Run, state, prompt: torch.Tensor, number: int) -> torch.Tensor:
    """The prompt and `number` tokens behind it, one token a call."""
    tokens = list(prompt.split(1, dim=1))
    for index in range(prompt.shape[1] + number - 1):
        logits, state = run(input_ids=tokens[index], state=state)
        if index + 1 == len(tokens):
            tokens.append(logits[:, -1:].argmax(-1))
    return torch.cat(tokens, dim=1)
