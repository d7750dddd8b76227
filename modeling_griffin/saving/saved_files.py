"""Which files make up a saved model, and how they are read.

The folder may be anyone's: a name in it is taken only where it is exactly one of these, or where the index of the
weights gives it, and what a file holds is checked before it is used.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)
LICENCE_FILES = ("LICENSE", "NOTICE")
# Trainer's uploads leave out names that start with "_", so that what a killed save leaves behind stays at home.
STAGE_PREFIX = "_unfinished_save_"


@contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """Gives a path of the same name to write to, whose file then takes the place of `path`; a failure leaves nothing.

    Of several processes that do so at once the last one stays.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=STAGE_PREFIX) as stage:
        yield Path(stage) / path.name
        os.replace(Path(stage) / path.name, path)


def read_json_object(path: Path) -> dict:
    """What the file holds. Raises ValueError, with the file's name, for what is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}: allowed is a JSON object")
    return value


def is_of_its_folder(file: Path) -> bool:
    """Whether there is a file, and no link leads out of its folder: what others are given holds nothing else.

    The Hub's cache, whose files are links to its own blobs, is one folder.
    """
    folder = file.parent.resolve()
    root = folder.parents[1] if folder.parent.name == "snapshots" else folder
    return file.is_file() and file.resolve().is_relative_to(root)


def weight_files(folder: Path) -> list[Path]:
    """The files that Transformers' loader takes: `model.safetensors`, or where it is not there those of the index.

    Raises:
        ValueError: where one is missing, and for an index that is none or that names anything but files beside it.
    """
    names = [WEIGHTS]
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        names = sorted(set(_weight_map(folder).values()))
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing; allowed are checkpoints in safetensors")
    return [folder / name for name in names]


def check_weights(folder: Path) -> list[Path]:
    """`weight_files`, each of them whole and with the tensors that the index gives it; only headers are read.

    Raises:
        ValueError: as `weight_files`, and for a file that is damaged or holds other tensors.
    """
    paths = weight_files(folder)
    indexed = None if paths[0].name == WEIGHTS else _weight_map(folder)
    for path in paths:
        names = tensor_names(path)
        differs = set() if indexed is None else names ^ {name for name, file in indexed.items() if file == path.name}
        if differs:
            name = min(differs)
            what = "holds {}, which {} does not give it" if name in names else "lacks {}, which {} gives it"
            raise ValueError(f"{path} {what.format(name, INDEX)}: save the model again")
    return paths


def tensor_names(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file. Raises ValueError for a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): save the model again") from error


def weights_to_describe(folder: Path) -> list[Path]:
    """`weight_files`, or those of a variant (`model.fp16.safetensors`) where no others are there."""
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        pattern = re.compile(r"model\.\w+(-\d{5}-of-\d{5})?\.safetensors")
        if variants := sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name)):
            return variants
    return weight_files(folder)


def _weight_map(folder: Path) -> dict[str, str]:
    entries = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"weight_map = {entries!r} in {folder / INDEX}: allowed is an object, tensor to file")
    for name in entries.values():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
            raise ValueError(f"{folder / INDEX} names {name!r}: allowed are safetensors files beside it")
    return entries
