"""Text from other people's files, made harmless: in a card it is text, never markup and never code."""

import json
import re
import unicodedata


MARKUP = re.compile(r"[&<>\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")  # an underscore inside a word emphasises nothing
NAMED = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
MAX_LENGTH = 200


def inline(value: object) -> str:
    """`str(value)` in one line, at most `MAX_LENGTH` characters of it, with every sign of Markdown and HTML escaped."""
    text = one_line(str(value))
    text = text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH - 1]}…"
    return MARKUP.sub(lambda sign: NAMED.get(sign[0], f"&#{ord(sign[0])};"), text)


def literal(text: str) -> str:
    """A Python string literal of it, in double quotes and one line."""
    return json.dumps(one_line(text), ensure_ascii=False)


def one_line(text: str) -> str:
    """White space as single blanks; control characters, half surrogate pairs and changes of direction left out."""
    kept = "".join(sign for sign in text if sign.isspace() or unicodedata.category(sign) not in ("Cc", "Cf", "Cs"))
    return " ".join(kept.split())


def short_number(number: int) -> str:
    """1234567 -> 1.2M: two digits, three from 100 on."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= 0.9995 * size:
            return f"{number / size:.{2 if number < 99.5 * size else 3}g}{unit}"
    return str(number)
