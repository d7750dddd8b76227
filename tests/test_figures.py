"""Every figure that README and docs/ quote is compared with the page of results/ that it is from.

The comment at the end of a quoted line says where its numbers are to be found:

    <!-- from PAGE: KEY; KEY & 98.7 = 100 * 35332 / 35795 & besides 50 -->

PAGE is a file of results/, wherever it lies there, or designs/NAME.md of docs/. A KEY picks the lines of the page that
hold it (all of its parts, where it is `part + part`). Every number of the quoted line then has to be the rounding of a
number of those lines, or the value of a formula whose own numbers stand there, or be listed behind `besides` as no
figure of ours.
A comment `<!-- held by tests/FILE.py -->` names the test that holds a figure instead.
"""

import json
import re
from decimal import Decimal
from functools import cache

import pytest
from _docs import COMMENT, PAGES, ROOT, blocks_of, name_of, prose_of


NUMBER = re.compile(r"(?<![\w.,])(?P<sign>[-+−])?(?P<digits>\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)(?![\w,]*[A-Za-z_])")
# A number with a unit that only a measurement has: such a line has to say where it is from.
MEASURED = re.compile(
    r"\d\s?(?:%|(?:new )?tokens/s|ms\b|us\b|[GM]i?B\b|TB/s|nats\b|bits per byte)|\d times (?!the\b|seen\b)"
)
# Lines with such a unit that quote no measurement: sizes that are computed, names, thresholds.
UNMEASURED = {
    "README.md": ["PyTorch from PyPI brings"],
    "docs/lambda.md": ["Held-out loss against `uniform`"],
    "docs/performance.md": [
        "The GPU figures are of one H100 80GB",
        "The step repeats within 2%",
        "At one row a token is bound by reading 0.46 GB",
        "Times are medians with 10% and 90% quantiles",
    ],
}
CONSTANTS = {1, 2, 16, 100, 1000, 2048, 1_000_000}  # of formulas: percent, units, rows and tokens of a row


class Figure(str):
    """A number as it is written, without its thousands' commas."""

    @property
    def value(self) -> float:
        return float(self)

    def is_rounding_of(self, number: float) -> bool:
        """Whether `number`, rounded to the digits written here, is this one; without a sign, either sign will do."""
        exponent = Decimal(self).as_tuple().exponent
        unit = 10.0**exponent
        if not self.startswith(("+", "-")):
            number = abs(number)
        return abs(number - self.value) <= unit / 2 * (1 + 1e-9) + 1e-12 * abs(number)


def numbers_of(text: str) -> list[Figure]:
    text = re.sub(r"\]\([^)]*\)|`[^`]*`|<[^>]*>", " ", text)  # links' targets and code are no figures
    signs = {"−": "-", None: ""}
    found = []
    for match in NUMBER.finditer(text):
        before = text[: match.start()].rstrip()
        sign = signs.get(match["sign"], match["sign"])
        if sign and before[-1:].isalnum():  # a range or a difference, not a sign
            sign = ""
        found.append(Figure(sign + match["digits"].replace(",", "")))
    return found


@cache
def lines_of(name: str) -> tuple[str, ...]:
    """The lines of a page of results/; of a JSON file one for each dictionary: its path, then its numbers."""
    (path,) = [path for path in [*(ROOT / "results").rglob(name), ROOT / "docs" / name] if path.is_file()]
    text = path.read_text(encoding="utf-8")
    return tuple(_flat(json.loads(text), "")) if path.suffix == ".json" else tuple(text.splitlines())


def _flat(value, path: str):
    if isinstance(value, dict):
        plain = [f"{key} {entry}" for key, entry in value.items() if isinstance(entry, int | float)]
        if plain:
            yield f"{path.lstrip('.')} " + " ; ".join(plain)
        for key, entry in value.items():
            yield from _flat(entry, f"{path}.{key}")


def selected(name: str, keys: str) -> list[str]:
    """The lines of the page that one of the keys picks; each key has to pick one."""
    lines = []
    for key in keys.split(";"):
        parts = [part.strip() for part in key.split(" + ")]
        found = [line for line in lines_of(name) if all(_holds(line, part) for part in parts)]
        assert found, f"no line of {name} holds {key.strip()!r}"
        lines += found
    return lines


def _holds(line: str, part: str) -> bool:
    """`part` stands in the line; a number or a word as a whole one."""
    before = r"(?<![\w.,])" if part[0].isalnum() else ""
    after = r"(?![\w]|[.,]\d)" if part[-1].isalnum() else ""
    return re.search(before + re.escape(part) + after, line) is not None


def evaluate(formula: str, pool: list[float]) -> float:
    """The value of a formula in numbers that stand in the pool, or are constants."""
    words = re.findall(r"\d+(?:\.\d+)?|[-+*/()]", formula)
    assert "".join(words) == formula.replace(" ", ""), f"{formula!r} is no formula"
    for word in words:
        known = word in "+-*/()" or float(word) in CONSTANTS or float(word) in pool
        assert known, f"{word} of the formula {formula!r} does not stand in the page"
    return eval(formula, {"__builtins__": {}})  # digits, signs and brackets only, as asserted


def faults(text: str, source: str) -> list[str]:
    """The numbers of `text` that its comment's `source` does not have, with the whole check behind each."""
    pool, formulas, besides = [], {}, set()
    for clause in (part.strip() for part in source.split(" & ")):
        for part in re.split(r";\s*(?=[\w./]+\.(?:md|json):)", clause):
            if part.startswith("besides "):
                besides |= {Figure(number.strip().replace(",", "")) for number in part[8:].split(", ")}
            elif match := re.fullmatch(r"([\w./]+\.(?:md|json)): (.*)", part):
                pool += [n.value for line in selected(*match.groups()) for n in numbers_of(line)]
            else:
                figure, _, formula = part.partition(" = ")
                formulas[Figure(figure)] = formula
    found = []
    for number in numbers_of(text):
        plain = Figure(number.lstrip("+-"))
        if plain in besides or any(number.is_rounding_of(value) for value in pool):
            continue
        if plain in formulas and plain.is_rounding_of(evaluate(formulas[plain], [abs(n) for n in pool])):
            continue
        found.append(str(number))
    return found


def quoted_lines():
    """(page, line number, text, source) of every line with a comment that names a page."""
    for page in PAGES:
        for line, text in prose_of(page):
            for comment in COMMENT.findall(text):
                if comment.startswith("from ") and ":" in comment:
                    yield pytest.param(COMMENT.sub("", text), comment[5:], id=f"{name_of(page)}:{line}")


@pytest.mark.parametrize(("text", "source"), quoted_lines())
def test_quoted_figures(text, source):
    wrong = faults(text, source)
    assert not wrong, f"{', '.join(wrong)} of {text.strip()!r}: not in {source}"


def test_measured_lines_have_a_source():
    """A line with a measurement's unit names its page or its test, which is there."""
    missing, used = [], set()
    for page in PAGES:
        for line, text in prose_of(page):
            comments = COMMENT.findall(text)
            for test in (comment[8:] for comment in comments if comment.startswith("held by ")):
                assert (ROOT / test).is_file(), f"{name_of(page)}, line {line}: {test} is not there"
            said = any(comment.startswith(("from ", "held by ")) for comment in comments)
            if not MEASURED.search(COMMENT.sub("", text)) or said:
                continue
            known = [start for start in UNMEASURED.get(name_of(page), []) if text.startswith(start)]
            used.update(known)
            if not known:
                missing.append(f"{name_of(page)}, line {line}: {text.strip()}")
    assert not missing, "\n".join(missing)
    assert used == {start for starts in UNMEASURED.values() for start in starts}, "an entry of UNMEASURED is stale"


def test_quoted_samples():
    """A block under `<!-- from PAGE -->` stands in that page, word for word."""
    quoted = [block for page in PAGES for block in blocks_of(page) if block.mark.startswith("from ")]
    assert quoted
    for block in quoted:
        assert block.text in "\n".join(lines_of(block.mark[5:])) + "\n", f"{name_of(block.page)}, line {block.line}"


@pytest.mark.parametrize(
    ("text", "source", "wrong"),
    [
        ("43,486 tokens/s", "training_h100.md: 8 x 2048 + Griffin", []),
        ("43,487 tokens/s", "training_h100.md: 8 x 2048 + Griffin", ["43487"]),
        ("55% and 55.4%", "training_h100.md: 8 x 2048 + Griffin", ["55.4"]),
        ("+0.10 nats", "lambda_inits_h100.md: recurrent_gemma + -0.0965 + [", ["+0.10"]),
        ("2.5e-04 and 2.6e-04", "training_h100.md: Before timing", ["2.6e-04"]),
        ("98.6%", "training_h100.md: 64 x 2048; 1 x 131072 & 98.6 = 100 * 35332 / 35795", ["98.6"]),
        ("7 of ours", "training_h100.md: Before timing & besides 7", []),
    ],
)
def test_the_comparison(text, source, wrong):
    """It finds what is wrong by one digit, by a sign, or by a formula, and nothing else."""
    assert faults(text, source) == wrong
