"""What of a folder goes to the Hub: exactly the files of a saved model, checked before anything is sent."""

import json
import re
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from modeling_griffin.configuration_griffin import AUTO_MAP
from modeling_griffin.saving.mask_secrets import MASK, holds_token, is_secret_name, mask_secrets
from modeling_griffin.saving.save import code_files
from modeling_griffin.saving.saved_files import (
    INDEX,
    LICENCE_FILES,
    TOKENIZER_FILES,
    WEIGHTS,
    check_weights,
    read_json_object,
)


# Everything else in the folder stays at home: checkpoints, optimizer states, pickles, and what only sounds like these.
UPLOADED = ("config.json", "generation_config.json", "metrics.json", "loss_curve.png", *TOKENIZER_FILES, *LICENCE_FILES)
# Some tools write what they were called with into these, a token of the Hub among it.
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", INDEX, *LICENCE_FILES)
SETTINGS += ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")

OF_SERVICES = re.compile(r"^(token|.*(hf|hub|api|auth|access|bearer|refresh|secret|session).*token)$", re.IGNORECASE)


def list_files(folder: Path, trust_remote_code: bool) -> tuple[list[str], list[str]]:
    """(what is uploaded, what is left out). Raises ValueError for a folder that the Hub could not load."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} {'is a file' if folder.exists() else 'does not exist'}: allowed are folders of a model"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: allowed are folders that save_pretrained wrote")
    check_config(folder)
    code = list_code(folder, read_config(folder)["auto_map"])
    if not trust_remote_code and (foreign := code_that_differs(folder, code)):
        raise ValueError(
            f"{', '.join(foreign)} in {folder} differ from the installed package: save the model again, or pass "
            "--trust-remote-code to run them as they are"
        )
    weights = [path.name for path in check_weights(folder)]
    known = {*UPLOADED, *code, *weights, *([] if weights == [WEIGHTS] else [INDEX])}
    names = sorted(path.name for path in folder.iterdir())
    uploaded = [name for name in names if name in known]
    check_own_files(folder, [name for name in names if name in known or name == "README.md"])
    return uploaded, [name for name in names if name not in (*uploaded, "README.md")]


def read_config(folder: Path) -> dict:
    return read_json_object(folder / "config.json")


def check_config(folder: Path) -> None:
    """Raises ValueError, with the field's name, where config.json lacks what is needed to load and run the model."""
    config, path = read_config(folder), folder / "config.json"
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict):
        raise ValueError(f"auto_map = {auto_map!r} in {path}: allowed is an object; save the model again")
    if missing := sorted(set(AUTO_MAP) - set(auto_map)):
        raise ValueError(f"the auto_map in {path} lacks {', '.join(missing)}: save the model again")
    for auto_class, reference in auto_map.items():
        # A tokenizer has two, or one and None.
        names = [name for name in reference if name is not None] if isinstance(reference, list) else [reference]
        if not all(isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", name) for name in names):
            raise ValueError(f"auto_map.{auto_class} = {reference!r} in {path}: allowed is FILE.CLASS of a file here")
    if type(config.get("vocab_size")) is not int or config["vocab_size"] < 1:
        raise ValueError(f"vocab_size = {config.get('vocab_size')!r} in {path}: allowed are positive whole numbers")
    find_auto_class(folder)


def find_auto_class(folder: Path) -> tuple[str, str]:
    """(the model's class, the Auto class that loads it), by config.json."""
    config = read_config(folder)
    names = config.get("architectures") or []
    for auto_class, reference in config["auto_map"].items():
        if isinstance(names, list) and names and str(reference).endswith(f".{names[0]}"):
            return names[0], auto_class
    known = ", ".join(sorted(str(reference).split(".")[-1] for reference in config["auto_map"].values()))
    raise ValueError(f"architectures = {names} in {folder}/config.json: allowed is a class of its auto_map ({known})")


def list_code(folder: Path, auto_map: dict) -> list[str]:
    """Names of the Python files that the loader will look for; all of them are there, in the folder itself."""
    roots = {folder / f"{reference.split('.')[0]}.py" for reference in auto_map.values() if isinstance(reference, str)}
    try:
        paths = {Path(path) for root in roots for path in (root, *get_relative_import_files(root))}
        for path in paths:
            path.stat()
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing: save the model again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the code in {folder} is not UTF-8 text ({error}): save the model again") from error
    if outside := sorted(str(path) for path in paths if path.parent != folder):
        raise ValueError(f"the code in {folder} imports {', '.join(outside)}: allowed are files beside it")
    return sorted(path.name for path in paths)


def code_that_differs(folder: Path, names: list[str]) -> list[str]:
    ours = {path.name: path.read_bytes() for path in code_files()}
    return [name for name in names if (folder / name).read_bytes() != ours.get(name)]


def check_own_files(folder: Path, names: list[str]) -> None:
    """Raises ValueError for a link, whose target may be anything here, and for a token in settings or code."""
    for name in names:
        path = folder / name
        if path.is_symlink() or not path.is_file():
            what = "a link" if path.is_symlink() else "not a file"
            raise ValueError(f"{path} is {what}: allowed are files of the folder itself; `cp -rL` makes such a folder")
        if name in SETTINGS or name.endswith(".py"):
            check_no_token(path)
        if name in SETTINGS and name.endswith(".json") and (field := secret_field(read_json_object(path))):
            raise ValueError(f"{path} holds a secret by its name, {field}: take it out first")


def check_no_token(path: Path) -> None:
    """Raises ValueError where a token stands in a text that is sent as it is."""
    if holds_token(path.read_text(encoding="utf-8", errors="replace")):
        raise ValueError(f"{path} holds a token, a private key or a URL with credentials: take it out first")


def secret_field(value: Any) -> str | None:
    """The first field, at any depth, that holds a text and is called as secrets are.

    A tokenizer's fields are called `..._token` and hold none: such names count only where they are of a service.
    """
    if isinstance(value, list):
        return next(filter(None, map(secret_field, value)), None)
    if not isinstance(value, dict):
        return None
    for name, entry in value.items():
        is_token = name.lower().endswith("token") and not OF_SERVICES.search(name)
        if isinstance(entry, str) and entry not in ("", MASK) and is_secret_name(name) and not is_token:
            return name
        if (found := secret_field(entry)) is not None:
            return found
    return None


def content(folder: Path, name: str) -> Path | bytes:
    """What is sent of this file: the file, but of metrics.json that holds secrets the masked text."""
    path = folder / name
    if name == "metrics.json":
        metrics = read_json_object(path)
        if (masked := mask_secrets(metrics)) != metrics:
            return (json.dumps(masked, indent=2) + "\n").encode()
    return path
