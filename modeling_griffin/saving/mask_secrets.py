"""Secrets in what a card is made of: values of tokens, keys and passwords in commands, settings and URLs, masked.

A name decides (`--hub_token X`, `HF_TOKEN=X`, {"api_key": "X"}), or the value's own shape (`hf_...`, a URL with
credentials). Rather too much is masked than too little: a masked command is still read, a token that got out is not
taken back.
"""

import functools
import json
import os
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .saved_files import read_json_object


logger = logging.get_logger(__name__)

MASK = "HIDDEN"  # needs no quotes in a shell and no escapes in a card
SECRET_WORDS = {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey"}
SECRET_WORDS |= {"authorization", "signature", "sig", "passwords", "cred", "creds", "cookies", "webhook"}
SECRET_LAST_WORDS = {"key", "auth", "bearer", "cookie", "pat", "pass", "pwd", "pw", "psw", "pswd", "tok", "jwt", "otp"}
SECRET_LAST_WORDS |= {"sas", "oauth"}
SECRET_ENDINGS = ("token", "apikey", "accesskey", "secretkey", "password", "secret")  # words written as one
SECRET_ENDINGS += (
    "passkey",
    "passcode",
    "privatekey",
    "sshkey",
    "authkey",
    "apikeys",
    "passphrase",
    "passwd",
    "dbpass",
)
# Of many tokens only these are secrets: `max_new_tokens` and `train_tokens` are numbers.
OF_TOKENS = {"access", "api", "auth", "bot", "hf", "hub", "refresh", "secret"}
# As argparse takes them, cut off anywhere: --hub_toke. Of train.py's options, --hub_t is one already.
ABBREVIATED = ("token", "password", "passphrase", "secret", "credential")
SHORTEST_ABBREVIATION = 4
OF_HUB_TOKEN = re.compile(r"-*hub[_-]to?", re.IGNORECASE)
# A short option says nothing by its name. `-p` is a path or a port more often; to these it is a password.
TAKE_PASSWORD = {"sshpass", "mysql", "mysqldump", "mysqladmin", "mariadb", "mongo", "mongosh", "login"}
TAKE_USER = ("-u", "-U", "--user", "--proxy-user")  # curl's, as name:password
USER_IN_WORD = re.compile(r"(-[uU]|--(?:proxy-)?user=)([^:=]+):(.*\D.*)")  # the same in one word; 1000:1000 is none
# `eos_token` and `text_key` are settings.
SETTINGS = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "special", "stop", "per"}
SETTINGS |= {"text", "label", "column", "sort", "metric"}

VALUE = r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\,])+"""
HIDDEN = rf"""["']?{MASK}(?:[\s"'&;,}}\])]|$)"""  # masked already
NAMED = re.compile(
    r"(?<![\w?&;.-])(?P<name>-{0,2}(?=[\w.-]*(?:tok|key|pass|ps?wd?|secr|cred|auth|bearer|cookie|pat|sig|jwt|otp|sas|oauth|hook|hub[_-]t))[a-z_][\w.-]*)"
    rf"""(?P<between>[\\"'\]]*\s*[=:]\s*|(?<=\w)\s+)(?!--|{HIDDEN})(?P<value>{VALUE})""",
    re.IGNORECASE,
)
IN_QUERY = re.compile(r"(?P<between>[?&;](?P<name>[\w.-]+)=)[^\s&;#'\"]+")
IN_HEADER = re.compile(r"(?i)(authorization[\"']?\s*[:=]\s*[\"']?(?:\w+\s+)?|\bbearer\s+)[^\s\"']{4,}")
IN_URL = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)(?!HIDDEN@)[^\s/?#'\"<>]+@")
WITHOUT_SCHEME = re.compile(r"(?<![\w.+/:-])([\w.+-]+:)(?!HIDDEN@)[^\s/?#'\"<>:@]+(?=@[\w.-])")  # of a proxy
# As the Hub, OpenAI, GitHub, GitLab, Slack, AWS, Google, SendGrid and others shape theirs; JSON web tokens; PEM.
SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{30,}|\b(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|sk-(?:\w+-)*\w{16,}[\w-]*|gh[opsur]_\w{16,}|github_pat_\w{16,}"
    r"|nvapi-[\w-]{20,}|npm_\w{30,}|pypi-[\w-]{40,}|gsk_\w{20,}|wandb_v\d_\w{20,}|sk_(?:live|test)_\w{16,}|hvs\.[\w-]{20,}"
    r"|xai-\w{40,}|fw_[A-Za-z0-9]{20,}|tgp_v1_[\w-]{20,}|rpa_[A-Za-z0-9]{30,}|dckr_[op]at_[\w-]{20,}|GOCSPX-[\w-]{20,}"
    r"|gl(?:dt|rt|ft|cbt|ptt|soat|imt|agent|oas|ffct)-[\w-]{16,}|xapp-\d-[\w-]{16,}|whsec_\w{20,}|shp(?:at|ca|pa|ss)_\w{20,}"
    r"|ATATT3[\w=-]{20,}|ntn_\w{20,}|lin_api_\w{20,}|nfp_\w{20,}|pscale_tkn_[\w-]{20,}|sntry[su]_[\w=-]{20,}"
    r"|AGE-SECRET-KEY-1[A-Z0-9]{20,}|(?:bot)?\d{8,10}:[\w-]{35}|\w+\.webhook\.office\.com/webhookb2/[\w/@-]+"
    r"|hooks\.slack\.com/services/[\w/-]+|discord(?:app)?\.com/api/webhooks/[\w/-]+"
    r"|SG\.[\w-]{16,}\.[\w-]{16,}|r8_\w{20,}|rk_(?:live|test)_\w{16,}|dapi[0-9a-f]{32}|do[opr]_v1_\w{32,}|pplx-\w{20,}"
    r"|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}|A(?:KIA|SIA)[A-Z0-9]{16}|AIza[\w-]{30,}|ya29\.[\w-]{20,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|\Z)",
    re.DOTALL,
)


def mask_secrets(value: Any) -> Any:
    """A copy of `value`, JSON of any depth, in which no secret is left.

    Args:
        value: dicts are masked by their keys, strings by what stands in them, lists of strings as the words of a
            command; `command` as a whole command line. Numbers, booleans and None stay as they are, unless the key is
            a secret's.
    """
    if isinstance(value, dict):
        names = (str(value.get(each)) for each in ("name", "key", "variable"))
        if "value" in value and any(map(is_secret_name, names)):  # a variable, as lists of them are written
            value = {**value, "value": MASK}
        return {mask_text(key): _mask_entry(key, entry) for key, entry in value.items()}
    if isinstance(value, list):
        return mask_words(value) if all(isinstance(entry, str) for entry in value) else [*map(mask_secrets, value)]
    return mask_text(value) if isinstance(value, str) else value


def _mask_entry(key: str, entry):
    if is_secret_name(key):
        return entry if entry is None or isinstance(entry, bool) or entry == "" else MASK
    return mask_command(entry) if key == "command" and isinstance(entry, str) else mask_secrets(entry)


def mask_command(text: str) -> str:
    """A command line without its secrets; word by word where a shell could read it."""
    try:
        words = shlex.split(text)
    except ValueError:
        return mask_text(text)
    masked = mask_words(words)
    return mask_text(text if masked == words else shlex.join(masked))


def mask_words(words: list[str]) -> list[str]:
    """The words of a command without their secrets: `--hub_token X`, `--hub_token=X`, `HF_TOKEN=X`."""
    masked, hidden = [], False
    for index, word in enumerate(words):
        if (without := _mask_short(words, index)) is not None:
            masked.append(without)
            continue
        name, equals, given = word.partition("=")
        if hidden and not word.startswith("--"):  # an option may have several values
            masked.append(MASK)
            continue
        secret = re.fullmatch(r"[\w.-]+", name) is not None and is_secret_name(name)
        hidden = secret and not given and word.startswith("-")
        masked.append(f"{name}={MASK}" if secret and given else word if hidden else mask_text(word))
    return masked


def _mask_short(words: list[str], index: int) -> str | None:
    """The word without the secret that it is by what stands before it: `curl -u me:X`, `sshpass -p X`, `mysql -pX`."""
    word, before = words[index], words[index - 1] if index else ""
    user, colon, password = word.partition(":")
    if before in TAKE_USER and colon and re.search(r"\D", password):  # not 1000:1000
        return word if password.startswith(MASK) else f"{user}:{MASK}"
    if (found := USER_IN_WORD.fullmatch(word)) is not None:
        return word if found[3].startswith(MASK) else f"{found[1]}{found[2]}:{MASK}"
    if _is_key_of_wandb(words, index):
        return MASK
    attached = re.match(r"-p[^=]", word)
    if not attached and (before != "-p" or word.startswith("-")):
        return None
    programs = {Path(each).name for each in words[:index]}
    if not programs & TAKE_PASSWORD or programs & {"python", "python3"}:  # whose own options come then
        return None
    return f"-p{MASK}" if attached else MASK


def _is_key_of_wandb(words: list[str], index: int) -> bool:
    """The first word behind `wandb login` that is no option."""
    options = [*reversed(words[:index])]
    number = next((n for n, word in enumerate(options) if not word.startswith("-")), len(options))
    return options[number : number + 2] == ["login", "wandb"] and not words[index].startswith("-")


@functools.lru_cache(maxsize=10000)
def mask_text(text: str) -> str:
    """Any text without the secrets in it."""
    text = SHAPES.sub(MASK, text)
    text = WITHOUT_SCHEME.sub(rf"\1{MASK}", IN_URL.sub(rf"\1{MASK}@", text))
    text = IN_HEADER.sub(rf"\1{MASK}", text)
    text = IN_QUERY.sub(lambda found: found["between"] + MASK if is_secret_name(found["name"]) else found[0], text)
    return NAMED.sub(_mask_named, text)


def _mask_named(found: re.Match) -> str:
    """Without a sign between them, only an option has a value: prose may say "token" and go on."""
    option = found["name"].startswith("-")
    if is_secret_name(found["name"]) and (option or found["between"].strip()):
        return found["name"] + found["between"] + MASK
    return found["name"] + found["between"] + mask_text(found["value"])


def holds_token(text: str) -> bool:
    """Whether something in it has the shape of a token or private key, or is a URL with credentials."""
    return SHAPES.search(text) is not None or IN_URL.search(text) is not None


@functools.lru_cache(maxsize=10000)
def is_secret_name(name: str) -> bool:
    """Whether an option, variable or field of this name holds a secret: hub_token, AWS_SECRET_ACCESS_KEY, apiKey."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    if not words or words[-1] in ("file", "path"):
        return False
    if words[-1] in ("header", "value", "string") and words[-2:-1] not in ([], ["key"]):  # auth_header
        words.pop()
    if SECRET_WORDS & set(words) or ({"key", "keys"} & set(words) and {"api", "access"} & set(words)):
        return True
    if len(words) > 1 and words[-2] in SETTINGS:
        return False
    if words[-1] == "tokens" and words[-2:-1] and words[-2] in OF_TOKENS:
        return True
    if OF_HUB_TOKEN.fullmatch(name):
        return True
    if len(words[-1]) >= SHORTEST_ABBREVIATION and any(each.startswith(words[-1]) for each in ABBREVIATED):
        return True
    return words[-1] in SECRET_LAST_WORDS or "".join(words).endswith(SECRET_ENDINGS)


def mask_file(path: Path) -> None:
    """Masks the JSON object in a file, in one step. A file without secrets is not touched, and there need be none."""
    if not path.is_file():
        return
    before = read_json_object(path)
    after = mask_secrets(before)
    if after == before:
        return
    logger.warning(f"{path} held a secret, which is masked now: revoke it where others could read this file")
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix="_masked_", delete=False) as beside:
        json.dump(after, beside, indent=2)
        beside.write("\n")
    os.chmod(beside.name, path.stat().st_mode & 0o777)
    os.replace(beside.name, path)
