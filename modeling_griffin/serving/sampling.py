"""The next token of every row at once, on the device: nothing of the logits goes to the host.

Each seat asks for its own: penalty, temperature, top-k, top-p and min-p are one number a seat, and what no seat asks
for is not computed. They mean what they mean in Transformers, in its order. A row's n-th token is drawn by a number
made of its seed and n alone, so that it is the same in any company, at any time, on a CPU and on a GPU.

Legend: S seats, N rows that choose now, V vocabulary.
"""

from collections.abc import Sequence

import torch

from ..decode.upload import upload
from .request import LARGEST


SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), as signed numbers.
GOLDEN, FIRST, SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Sampler:
    """What the rows in S seats ask for, and their choice. asked: the request of each seat, None where nobody sits.

    nothing (N,) bool: where the last choice had nothing to draw from, as logits are NaN or infinite; None: nowhere.
    """

    def __init__(self, seats: int, vocabulary: int, device: torch.device):
        self.asked: list = [None] * seats
        self.vocabulary, self.device = vocabulary, device
        self.settings = torch.zeros(len(SETTINGS), seats, device=device)
        self.key, self.drawn = torch.zeros(2, seats, dtype=torch.long, device=device)
        self.nothing: torch.Tensor | None = None
        self.seen: torch.Tensor | None = None  # (S, V) bool: tokens of each row's text, for repetition penalties

    @torch.no_grad()
    def seat(self, seats: Sequence[int], requests: Sequence) -> None:
        """Each request takes its seat, and begins there."""
        index = upload(list(seats), self.device)
        for seat, request in zip(seats, requests):
            self.asked[seat] = request
        most = {"top_k": self.vocabulary}  # which keeps all, as any larger number does
        settings = [[float(min(getattr(each, n), most.get(n, LARGEST))) for each in requests] for n in SETTINGS]
        self.settings[:, index] = upload(settings, self.device)
        self.key[index] = _mix(upload([_signed(request.seed) for request in requests], self.device))
        self.drawn.index_fill_(0, index, 0)
        if any(request.repetition_penalty != 1 for request in requests):
            self._remember(seats, requests)

    def leave(self, seat: int) -> None:
        self.asked[seat] = None

    @torch.no_grad()
    def choose(
        self, logits: torch.Tensor, best: torch.Tensor | None = None, seats: Sequence[int] | None = None
    ) -> torch.Tensor:
        """The next token (N,) of the rows in these seats; of all S where None.

        logits (N, V). best (N,): their argmax where it is known; it is returned itself where nobody asks for more.
        """
        asked = [each for each in (self.asked if seats is None else (self.asked[s] for s in seats)) if each is not None]
        penalty = any(each.repetition_penalty != 1 for each in asked)
        samples, self.nothing = any(each.temperature > 0 for each in asked), None
        if not penalty and not samples:
            return logits.argmax(-1) if best is None else best
        index = slice(None) if seats is None else upload(list(seats), self.device)
        settings = dict(zip(SETTINGS, self.settings[:, index, None]))  # each (N, 1)
        scores = logits.float()
        if penalty:
            scores = _penalised(scores, self.seen[index], settings["repetition_penalty"])
        token = scores.argmax(-1) if penalty or best is None else best
        if samples:
            sampled = settings["temperature"] > 0
            # From the largest down: at a temperature next to 0 the others go to -inf, and none to inf.
            highest = scores.amax(-1, keepdim=True)
            scores = (scores - highest) / torch.where(sampled, settings["temperature"], 1.0)
            drawn = draw(_kept(scores, settings, asked), uniform(self.key[index], self.drawn[index]))
            token = torch.where(sampled[:, 0], drawn, token)
            self.nothing = (sampled & ~highest.isfinite())[:, 0]
            self.drawn[index] += 1
        if penalty:
            rows = torch.arange(len(self.asked), device=self.device)[index]
            self.seen[rows, token] = True
        return token

    def _remember(self, seats: Sequence[int], requests: Sequence) -> None:
        if self.seen is None:
            self.seen = torch.zeros(len(self.asked), self.vocabulary, dtype=torch.bool, device=self.device)
        pairs = [(seat, token) for seat, request in zip(seats, requests) for token in request.prompt]
        self.seen[upload(list(seats), self.device)] = False
        rows, tokens = upload(pairs or [(seats[0], 0)], self.device).unbind(1)
        self.seen[rows, tokens] = bool(pairs)


def _penalised(scores: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """As `RepetitionPenaltyLogitsProcessor`: the penalty is 1 where none is asked for."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _kept(scores: torch.Tensor, settings: dict[str, torch.Tensor], asked: Sequence) -> torch.Tensor:
    """scores (N, V) of the tokens that may be drawn, -inf of the others: top-k, then top-p, then min-p."""
    nothing, most = -torch.inf, min(max((each.top_k for each in asked), default=0), scores.shape[-1])
    has_top_p = any(each.top_p < 1 for each in asked)
    if most or has_top_p:
        ordered = scores.sort(-1, descending=True).values if has_top_p else scores.topk(most).values
        k = settings["top_k"].long()
        least = torch.where(k > 0, ordered.gather(-1, (k - 1).clamp(0, ordered.shape[-1] - 1)), nothing)
        scores, ordered = (x.masked_fill(x < least, nothing) for x in (scores, ordered))
        if has_top_p:
            shares = ordered.softmax(-1)
            before = shares.cumsum(-1) - shares  # of all larger ones, so that the argmax always stays
            number = (before < settings["top_p"]).sum(-1, keepdim=True)
            least = ordered.gather(-1, (number - 1).clamp(min=0))
            scores = scores.masked_fill((scores < least) & (settings["top_p"] < 1), nothing)
    if any(each.min_p > 0 for each in asked):
        scores = scores.masked_fill(scores < scores.amax(-1, keepdim=True) + settings["min_p"].log(), nothing)
    return scores


def draw(scores: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """The token (N,) of each row of scores (N, V) at number (N,) float64 from 0 to below 1.

    By the distribution function in the order of the vocabulary: rounding that differs with the batch moves its steps by
    1e-7, where sorted probabilities could change places.
    """
    steps = scores.softmax(-1).double().cumsum(-1)
    found = torch.searchsorted(steps, number[:, None] * steps[:, -1:], right=True)[:, 0]
    return found.clamp(max=scores.shape[-1] - 1)


def uniform(key: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Number `count` (N,) of the stream of each key (N,): float64 from 0 to below 1, in steps of 2^-52."""
    return _shifted(_mix(key + (count + 1) * GOLDEN), 12).double() * 2.0**-52


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shifted(z, 30)) * FIRST
    z = (z ^ _shifted(z, 27)) * SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, as unsigned numbers."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63
