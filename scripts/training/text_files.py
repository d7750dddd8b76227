"""Files of text: which of a folder are read, and which one, in which line, keeps a set of them from being read."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import datasets
from datasets.utils import logging


LONG_READ_BYTES = 200_000_000  # from here on reading takes seconds, and shows how far it is
BEGINNING_BYTES = 4096  # of a file, blank lines included
SNIPPET_BYTES = 60  # of a line that cannot be read
DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS}


def files_of(folder: Path) -> list[Path]:
    """Its files, sorted, those of folders in it too; hidden ones left out. Raises ValueError where there are none."""
    for _ in os.walk(folder, onerror=_refuse):
        pass
    paths = [path for path in sorted(folder.rglob("*")) if not _is_hidden(path, folder)]
    dangling = [path for path in paths if path.is_symlink() and not path.exists()]
    files = [path for path in paths if path.is_file()]
    if dangling:
        what = f"{_say_link(dangling[0])}{f' and {len(dangling) - 1} more such links' if len(dangling) > 1 else ''}"
        if not files:
            raise ValueError(f"the folder {str(folder)!r} holds no file but {what}")
        print(f"left out of {folder}: {what}")
    if not files:
        raise ValueError(f"the folder {str(folder)!r} holds no files, hidden ones aside: allowed is at least one")
    return files


def check_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise ValueError(_say_link(path))


def read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        _refuse(error)


def check_readable(files: list[Path]) -> None:
    """Raises ValueError that names the first file which cannot be opened."""
    for file in files:
        try:
            file.open("rb").close()
        except OSError as error:
            _refuse(error)


def in_file(documents: datasets.Dataset, folder: Path) -> datasets.Dataset:
    """The same documents out of an Arrow file in `folder`, which is made where it is not there, and mapped into memory.

    Processes that get them map the file too; of documents in memory each gets a copy of all, whatever its share is.
    """
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.{os.getpid()}")
        documents.save_to_disk(str(part))
        try:
            part.rename(folder)  # last: the folder is complete
        except OSError:
            shutil.rmtree(part)
            if not folder.is_dir():  # else another process was first
                raise
    return datasets.load_from_disk(str(folder))


def read_records(format: str, files: list[Path], text_column: str) -> datasets.Dataset:
    """The records of files of one format, "json" or "parquet"; ValueErrors name the file and, in jsonl, the line."""
    check_readable(files)
    files = [file for file in files if file.stat().st_size]  # an empty file has no records, and the reader fails on it
    if not files:
        return _no_records(text_column)
    if format == "json":
        _check_first_records(files)
    try:
        return _load(format, files)
    except Exception as error:  # the readers' errors have no common class
        if _is_of_disk(error):
            raise
        if "corresponds to no data" in str(error):
            return _no_records(text_column)
        place, cause = first_bad_line(files, text_column) or _first_bad_file(format, files), _innermost(error)
        if place is None:
            names = f"{files[0]} to {files[-1]}" if len(files) > 1 else files[0]
            raise ValueError(f"{names} cannot be read together as {format}: {cause}") from error
        raise ValueError(f"{place} cannot be read as {format}: {cause}") from error


def _check_first_records(files: list[Path]) -> None:
    """Raises ValueError for a file that begins with null: the reader ends the process, without a word."""
    for file in files:
        with file.open("rb") as opened:
            if opened.read(BEGINNING_BYTES).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"null"):
                raise ValueError(f"{file} begins with null: allowed are JSON records")


def _no_records(text_column: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({text_column: []}, datasets.Features({text_column: datasets.Value("string")}))


def first_bad_line(files: list[Path], text_column: str) -> str | None:
    """Where the first line of a jsonl file lies that is no JSON record, or whose text is none; else None."""
    for file in files:
        if file.suffix.lower() != ".jsonl":
            continue
        for number, line in enumerate(read_bytes(file).splitlines(), 1):
            if line.strip() and not _is_record(line, text_column):
                return f"{file}, line {number}: {line[:SNIPPET_BYTES]!r}"
    return None


def check_columns(files: list[Path], text_column: str) -> None:
    """Raises ValueError for the first record of JSON files without this column, where the reader puts null."""
    for file in files:
        for place, record in _records(file):
            if text_column not in record:
                raise ValueError(
                    f"{place} has no {text_column!r}: allowed are records that all have it, empty or null where there "
                    "is no text"
                )


def _records(file: Path) -> Iterator[tuple[str, dict]]:
    """(where it lies, the record), of a JSON file that the reader has read."""
    content = read_bytes(file)
    if content.lstrip().startswith(b"["):
        yield from ((f"{file}, record {number}", each) for number, each in enumerate(json.loads(content), 1))
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            yield f"{file}, line {number}", json.loads(line)


def _is_record(line: bytes, text_column: str) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and isinstance(record.get(text_column, ""), str | None)


def _first_bad_file(format: str, files: list[Path]) -> Path | None:
    """The first that cannot be read alone."""
    if len(files) == 1:
        return files[0]
    with _no_progress():
        return next((file for file in files if not _can_be_read(format, file)), None)


@contextmanager
def _no_progress(hidden: bool = True) -> Iterator[None]:
    """Without the reader's progress bar, where `hidden`: a bar that stops half-way stands beside the error."""
    if not (hidden and logging.is_progress_bar_enabled()):
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextmanager
def _no_log() -> Iterator[None]:
    """Without the reader's own lines: what it raises is said once, with the line, by who catches it."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _can_be_read(format: str, file: Path) -> bool:
    try:
        _load(format, [file])
    except Exception:
        return False
    return True


def _load(format: str, files: list[Path]) -> datasets.Dataset:
    is_quick = sum(file.stat().st_size for file in files) < LONG_READ_BYTES
    with _no_log(), _no_progress(is_quick):
        return datasets.load_dataset(format, data_files=[str(file) for file in files], split="train")


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


def _is_of_disk(error: BaseException | None) -> bool:
    """Whether the reader's own cache could not be written: the data are not at fault."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return True
        error = error.__cause__
    return False


def _refuse(error: OSError) -> NoReturn:
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error


def _say_link(path: Path) -> str:
    return f"the link {path} to {os.readlink(path)}, which does not exist"


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)
