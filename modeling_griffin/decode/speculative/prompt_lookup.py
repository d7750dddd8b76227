"""Drafts for prompt lookup: what followed the last few tokens where they stood first.

The candidates are those of Transformers' `PromptLookupCandidateGenerator`, which searches the whole text at each step;
here each token is entered once, so that a long context costs nothing more.
"""

from collections.abc import Iterable, Sequence


class PromptLookup:
    """Finds drafts of up to `most` tokens behind earlier occurrences of the last `ngram` tokens, or fewer.

    A draft ends before the first of the tokens `ends`.
    """

    def __init__(self, most: int, ngram: int = 2, ends: Iterable[int] = ()):
        for name, value in (("most", most), ("ngram", ngram)):
            if value < 1:
                raise ValueError(f"{name} = {value}: allowed is 1 or more")
        self.most, self.ends = most, frozenset(ends)
        self.tokens: list[int] = []
        self.behind: list[dict[tuple[int, ...], int]] = [{} for _ in range(ngram)]  # n-gram -> what stands behind it

    def accept(self, tokens: Sequence[int]) -> None:
        """Enters n-grams up to the last but one token: the last one's have nothing behind them yet."""
        start = max(0, len(self.tokens) - 1)
        self.tokens += tokens
        for size, behind in enumerate(self.behind, 1):
            for end in range(max(start + 1, size), len(self.tokens)):
                behind.setdefault(tuple(self.tokens[end - size : end]), end)

    def drafts(self, room: int) -> list[int]:
        """What is likely to follow, at most `room` tokens, or nothing.

        The longest n-gram that occurred counts, and its first occurrence.
        """
        for size in range(min(len(self.behind), len(self.tokens) - 1), 0, -1):
            start = self.behind[size - 1].get(tuple(self.tokens[-size:]))
            if start is not None:
                found = self.tokens[start : start + min(self.most, room)]
                return found[: next((i for i, token in enumerate(found) if token in self.ends), len(found))]
        return []

    def close(self) -> None:
        pass
