"""Leaves each paragraph in once: the first time, whatever its spacing, case, digits and punctuation."""

import hashlib
import string


IGNORED = (string.whitespace + string.digits + string.punctuation).encode()
SHORTEST = 40  # bytes that count; a shorter paragraph ("return NULL; }") may come again
MOST_LOST = 0.5  # of a document's characters; one that loses more is a near copy and goes as a whole


class Deduplicator:
    """Takes documents one after the other and remembers their paragraphs, by 64-bit hashes."""

    def __init__(self):
        self.seen: set[bytes] = set()

    def __call__(self, text: str) -> str | None:
        """The document without the paragraphs that came before; None where that leaves less than half of it."""
        kept, new = [], set()
        for paragraph in text.split("\n\n"):
            key = paragraph.encode().lower().translate(None, IGNORED)
            if len(key) >= SHORTEST:
                digest = hashlib.blake2b(key, digest_size=8).digest()
                if digest in self.seen or digest in new:
                    continue
                new.add(digest)
            kept.append(paragraph)
        left = "\n\n".join(kept)
        if len(left) < (1 - MOST_LOST) * len(text):
            return None
        self.seen.update(new)
        return left
