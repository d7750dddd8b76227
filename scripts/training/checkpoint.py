"""Checkpoints that can be trusted: a manifest of sizes and checksums is written last, and verified before a resume."""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from whole_files import in_one_step


MANIFEST = "manifest.json"  # of a checkpoint: its files, and the fingerprint of its run
FINAL = "final.json"  # beside it once the run is over: the files that the last save left in output_dir
STATE = "trainer_state.json"
# What torch.save's RuntimeError says when a file cannot be written.
WRITER_WORDS = ("PytorchStreamWriter", "inline_container", "iostream error", "No space left", "File too large")


class NotSaved(Exception):
    """A checkpoint or the model could not be written, in one line."""


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Turns what a full disk, a quota or a limit raises while `folder` is written into NotSaved."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        if isinstance(error, OSError):  # what the Hub's client raises has no number, or is of a connection
            of_disk = error.errno is not None and not isinstance(error, ConnectionError | TimeoutError)
        else:
            of_disk = not isinstance(error, RuntimeError)
        if not of_disk and not any(word in str(error) for word in WRITER_WORDS):
            raise
        raise NotSaved(f"{folder} cannot be written: {_disk_error(error)}; {_space_at(folder)}") from error


def find_checkpoint(resume: str | bool | None, output_dir: str, with_best: bool = False) -> str | None:
    """The checkpoint to continue from, or None. Refuses to mix a new run with another run's checkpoints.

    Args:
        resume: None, True (the newest whole checkpoint in output_dir), or a checkpoint's folder.
        with_best: whether the run is to end with its best model, which then has to be whole too.
    """
    if resume is None:
        if any(read_manifest(each) or read_state(each) for each in _checkpoints_in(output_dir)):
            raise ValueError(
                f"output_dir = {output_dir!r} holds checkpoints of another run: pass --resume to continue it, or "
                "another output_dir"
            )
        return None
    if isinstance(resume, bool):
        return _newest_whole(output_dir, with_best)
    if fault := fault_of(Path(resume), with_best):
        raise ValueError(f"--resume {resume}: {fault}; allowed are whole checkpoint folders")
    return resume


def _newest_whole(output_dir: str, with_best: bool) -> str:
    faults = []
    for checkpoint in _checkpoints_in(output_dir):
        fault = fault_of(checkpoint, with_best)
        if fault is None:
            if faults:
                print(f"passed over: {'; '.join(faults)}. {checkpoint.name} is whole, the run goes on from there")
            return str(checkpoint)
        faults.append(f"{checkpoint.name} ({fault})")
    found = f": {'; '.join(faults)}" if faults else ""
    raise ValueError(f"--resume: output_dir = {output_dir!r} holds no complete checkpoint{found}")


def _checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Newest first."""
    named = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(named, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def fault_of(checkpoint: Path, with_best: bool = False) -> str | None:
    """Why no run can go on from this folder, naming the file; None where every file is as it was written.

    with_best: whether the best model of the run so far is needed too.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    if not (checkpoint / MANIFEST).is_file():
        return f"no {MANIFEST}: the run ended while this was saved"
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return f"{MANIFEST} is damaged"
    if manifest.get("only_model"):
        return "it holds only the model (save_only_model), neither optimizer nor random state"
    fault = first_fault(checkpoint, manifest["files"])
    best = best_of(checkpoint) if with_best and fault is None else None
    if best is None or best == checkpoint or (of_best := fault_of(best)) is None:
        return fault
    return f"its best model, {best.name}: {of_best}; load_best_model_at_end = false does without"


def best_of(checkpoint: str | Path) -> Path | None:
    """The checkpoint of the best model so far, beside this one wherever the run's folder has been moved to."""
    recorded = (read_state(checkpoint) or {}).get("best_model_checkpoint")
    if recorded is None:
        return None
    beside = Path(checkpoint).parent / Path(recorded).name
    return beside if beside.is_dir() else Path(recorded)


def read_state(checkpoint: str | Path) -> dict | None:
    """The trainer's state in a checkpoint folder; None where there is none, or not all of it."""
    try:
        return json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_manifest(checkpoint: str | Path, name: str = MANIFEST) -> dict | None:
    """The manifest without its own checksum; None where it is not there or not as it was written."""
    try:
        manifest = json.loads((Path(checkpoint) / name).read_text(encoding="utf-8"))
        return manifest if manifest.pop("sha256") == _checksum_of(manifest) else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # not JSON, or JSON of another shape
        return None


def write_manifest(checkpoint: Path, **facts: Any) -> None:
    """What is in the folder, with `facts`. Appears whole or not at all."""
    names = [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()]
    _write(checkpoint / MANIFEST, {**facts, "files": describe_files(checkpoint, set(names) - {MANIFEST, FINAL})})


def write_final(checkpoint: Path, output_dir: Path) -> None:
    """Says that the run which ends with this checkpoint has left its model in output_dir. The card is a person's."""
    names = [path.name for path in output_dir.iterdir() if path.is_file() and path.name != "README.md"]
    _write(checkpoint / FINAL, {"files": describe_files(output_dir, names)})


def is_final(checkpoint: str | Path, output_dir: str | Path) -> bool:
    """Whether all that the last save left in output_dir is still there."""
    final = read_manifest(checkpoint, FINAL)
    return final is not None and first_fault(Path(output_dir), final["files"]) is None


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """{name: {"size": bytes, "sha256": hexadecimal}}."""
    names = sorted(names)
    with ThreadPoolExecutor() as threads:  # hashing and reading release the interpreter's lock
        sums = list(threads.map(_checksum, [folder / name for name in names]))
    return {name: {"size": (folder / name).stat().st_size, "sha256": sum} for name, sum in zip(names, sums)}


def first_fault(folder: Path, files: dict[str, dict]) -> str | None:
    """The first file that is not as `describe_files` found it, and how; sizes first, since checksums take longer."""
    for name, known in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != known["size"]:
            return f"{name} has {path.stat().st_size:,} bytes where {known['size']:,} were written"
    try:
        now = describe_files(folder, files)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return next((f"{name} holds other bytes than were written" for name in files if now[name] != files[name]), None)


def _write(path: Path, content: dict) -> None:
    with in_one_step(path) as half:
        half.write_text(json.dumps({**content, "sha256": _checksum_of(content)}, indent=1) + "\n", encoding="utf-8")


def _checksum_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return _digest(file)


def _digest(file) -> str:
    """hashlib.file_digest is not in Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _disk_error(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())[:200]


def _space_at(folder: Path) -> str:
    """What is free where the folder is or would be, and where to go on from."""
    there = next((path for path in (folder, *folder.parents) if path.is_dir()), Path("."))
    space = f"{shutil.disk_usage(there).free / 2**20:,.0f} MiB are free on its disk (limits of ulimit -f aside)"
    checkpoints = [*_checkpoints_in(folder), *_checkpoints_in(folder.parent)]  # of a run's folder, or of one of them
    whole = next((each.name for each in checkpoints if fault_of(each) is None), None)
    return space + (f"; --resume continues from {whole}" if whole else "")
