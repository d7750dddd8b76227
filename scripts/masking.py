"""Takes secrets out of what is written down: tokens, keys, passwords, and URLs with credentials.

What tells a secret is the name before it (an option, a variable, a field, a part of a URL's query), the shape of the
value (the Hub's and other services' tokens), or that an environment variable with such a name holds it.
"""

import os
import re


MASK = "HIDDEN"  # needs no quotes in a shell
SHORTEST_VALUE = 8  # of an environment variable: a shorter one may stand anywhere by chance

# The last words of a name; "tokens" and "key_value_heads" name no secret, nor do the tokens of a tokenizer.
SECRET_ENDINGS = {"token", "key", "auth", "authorization", "bearer", "sig", "signature", "pat", "apikey", "cookie"}
SECRET_WORDS = {"password", "passwd", "passphrase", "pwd", "pass", "secret", "secrets", "credential", "credentials"}
NAMED_TOKENS = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "audio", "video", "per", "each", "a", "the"}
NAMED_KEYS = {"label", "text", "metric", "sort", "primary", "foreign", "per", "tokenizer"}

NAME = r"[A-Za-z_][\w.\-]*"
SHELL_WORD = r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\])+|\S+"""
OPTION = re.compile(rf"(?<!\S)(--?{NAME})(\s+)((?:{SHELL_WORD})(?:\s+(?!--)(?:{SHELL_WORD}))*)")
OPTION_WITH_EQUALS = re.compile(rf"(?<!\S)(--?{NAME}=)({SHELL_WORD})")
VALUE = r"""(?!//)(?:"(?:\\.|[^"\\])*"|'[^']*'|(?:(?:Bearer|Basic)\s+)?[^\s"'&;,}]+)"""  # not what follows https:
NAMED = re.compile(rf"""({NAME})(["']?\s*[=:]\s*)({VALUE})""")
USER_OF_URL = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")
BEARER = re.compile(r"\b(Bearer|Basic)(\s+)[\w.~+/=-]{8,}")
SHAPES = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{12,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}"
    r"|\bsk-[\w-]{16,}|\bxox[abprs]-[\w-]{10,}|\bA[KS]IA[A-Z0-9]{16}\b|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
)


def mask_secrets(command: str | list[str]) -> str | list[str]:
    """The command, a line for a shell or a list of words, with MASK in the place of every secret value."""
    if isinstance(command, str):
        return _mask_text(OPTION.sub(_mask_option, OPTION_WITH_EQUALS.sub(_mask_option_with_equals, command)))
    words, hidden = [], False
    for word in command:
        is_option = word.startswith("--") or (word.startswith("-") and not hidden)
        hidden = hidden and not is_option
        words.append(MASK if hidden else _mask_word(word))
        hidden = hidden or (is_option and "=" not in word and is_secret(word))
    return words


def mask_values(obj):
    """A copy of nested dicts, lists, tuples and strings, as JSON has them, without the secrets in it."""
    if isinstance(obj, dict):
        return {key: MASK if _hides(key, value) else mask_values(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        if obj and all(isinstance(each, str) for each in obj):
            return type(obj)(mask_secrets(list(obj)))  # it may be a command
        return type(obj)(map(mask_values, obj))
    return mask_secrets(obj) if isinstance(obj, str) else obj


def is_secret(name: str) -> bool:
    """Whether an option, variable or field of this name holds a secret."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)  # camelCase, AWSAccessKeyId
    words = re.findall(r"[a-z0-9]+", spaced.lower())
    if not words or words[-1] in ("file", "path", "name", "length", "size", "count"):
        return False
    if SECRET_WORDS & set(words) or words[-3:] == ["access", "key", "id"]:
        return True
    named = NAMED_TOKENS if words[-1] == "token" else NAMED_KEYS if words[-1] == "key" else ()
    return words[-1] in SECRET_ENDINGS and not (len(words) > 1 and words[-2] in named)


def _hides(name, value) -> bool:
    """Numbers count tokens and number keys; a password may be one."""
    if value is None or isinstance(value, bool) or value == "" or not is_secret(str(name)):
        return False
    is_number = isinstance(value, (int, float))
    return not is_number or bool(SECRET_WORDS & set(re.findall(r"[a-z0-9]+", str(name).lower())))


def _mask_word(word: str) -> str:
    name, equals, value = word.partition("=")
    if equals and value and re.fullmatch(rf"-*{NAME}", name) and is_secret(name):
        return f"{name}={MASK}"
    return _mask_text(word)


def _mask_option(match: re.Match) -> str:
    name, between, values = match.groups()
    if not is_secret(name):  # the values may hold the next option
        return name + between + OPTION.sub(_mask_option, values)
    return match[0] if values.startswith("--") else f"{name}{between}{MASK}"


def _mask_option_with_equals(match: re.Match) -> str:
    return match[1] + MASK if is_secret(match[1][:-1]) else match[0]


def _mask_text(text: str) -> str:
    """By names before = and :, by URLs, by shapes, by this process's environment; the rest stays as it is."""
    text = NAMED.sub(_mask_named, text)
    text = BEARER.sub(rf"\1\2{MASK}", USER_OF_URL.sub(MASK, text))
    text = SHAPES.sub(MASK, text)
    for value in sorted(_secrets_of_environment(), key=len, reverse=True):
        text = text.replace(value, MASK)
    return text


def _mask_named(match: re.Match) -> str:
    name, between, value = match.groups()
    if not is_secret(name):  # what seems to be the value may be a name: {"a": "b", token: x}
        return name + between + NAMED.sub(_mask_named, value)
    quote = value[0] if value[0] in "'\"" else ""
    return f"{name}{between}{quote}{MASK}{quote}"


def _secrets_of_environment() -> set[str]:
    return {value for name, value in os.environ.items() if len(value) >= SHORTEST_VALUE and is_secret(name)}
