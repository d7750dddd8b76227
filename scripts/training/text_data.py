"""From text to rows: documents out of files and data sets, a held-out part, tokens, packed rows.

A document is one text file, or one record of a jsonl, parquet or Hub data set.
"""

import glob
import hashlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import torch
from transformers import PreTrainedTokenizerBase

from training.hub_ids import require_on_hub
from training.text_files import check_columns, check_link, files_of, first_bad_line, in_file, read_bytes, read_records
from training.text_tokenizer import document_ends, encode


RECORD_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
IGNORED_LABEL = -100  # what Transformers' losses skip
LONG_TEXT_BYTES = 20_000_000  # from here on text and tokens lie in files, which processes and later runs share
BATCH = 250  # documents that are tokenised together


def load_documents(
    source: str, text_column: str = "text", split: str = "train", subset: str | None = None, field: str = "train_data"
) -> datasets.Dataset:
    """The documents of `source` as a data set with the one column "text".

    Args:
        source: a file or a glob pattern of files (.jsonl, .json, .parquet: records; anything else: text), a folder of
            text or source files (or of nothing but jsonl or nothing but parquet), or the id of a Hub data set.
        text_column: the column of a record that holds its text.
        split, subset: of a Hub data set.
        field: the argument that holds `source`, for the message where there is none.
    """
    path = Path(source).expanduser()
    check_link(path)
    if path.is_dir():
        files = files_of(path)
    elif path.is_file():
        files = [path]
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    if files:
        documents = _read_files(source, files, text_column, strict=not path.is_dir())
    else:
        documents = _select_text(source, _load_from_hub(field, source, split, subset), text_column)
    try:
        full = documents.filter(_has_text, desc="Dropping empty documents") if len(documents) else documents
    except UnicodeDecodeError as error:  # readers of records do not look
        raise ValueError(f"{first_bad_line(files, text_column) or source} is not UTF-8 text ({error})") from error
    if len(full) == 0:
        raise ValueError(f"{source!r} holds no text: allowed are sources with at least one document that is not empty")
    if empty := len(documents) - len(full):
        print(f"left out of {source}: {empty:,} of {len(documents):,} documents, which are empty")
    return full


def hold_out(documents: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(training, held-out) documents. Of a single document the last `fraction`, from the next line on, is held out."""
    if not 0 < fraction < 1:
        raise ValueError(f"eval_fraction = {fraction}: allowed are numbers between 0 and 1")
    if len(documents) > 1:
        count = min(len(documents) - 1, max(1, round(len(documents) * fraction)))
        order = np.random.default_rng(seed).permutation(len(documents))
        return documents.select(sorted(order[count:])), documents.select(sorted(order[:count]))
    text = documents[0]["text"]
    cut = int(len(text) * (1 - fraction))
    cut = text.find("\n", cut) + 1 or cut
    if not text[:cut] or not text[cut:]:
        raise ValueError(
            f"the only document, of {len(text)} characters, cannot be parted: give eval_data, or more text"
        )
    return datasets.Dataset.from_dict({"text": [text[:cut]]}), datasets.Dataset.from_dict({"text": [text[cut:]]})


def count_bytes(documents: datasets.Dataset) -> int:
    """UTF-8 bytes of the text: the unit in which figures of different tokenizers compare."""
    return sum(len(record["text"].encode()) for record in documents)


def tokenize(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None
) -> datasets.Dataset:
    """One record a document: `input_ids`, with a token before it and one after it (`document_ends`).

    Tokens of documents in files are kept beside them, and found there by the next call with the same tokenizer.
    num_proc: processes; None: this one, with the threads of the tokenizer. Documents in memory are copied to each.
    """
    first, last = document_ends(tokenizer)
    dtype = "uint16" if len(tokenizer) <= 2**16 else "int32"

    def to_tokens(batch: pyarrow.Table) -> pyarrow.Table:
        ids = encode(batch["text"].to_pylist(), tokenizer)
        ends = np.cumsum([0, *(len(each) + 2 for each in ids)])
        tokens = np.concatenate([part for each in ids for part in ([first], each, [last])])
        lists = pyarrow.ListArray.from_arrays(ends.astype(np.int32), tokens.astype(dtype))
        return pyarrow.table({"input_ids": lists})

    tokens = documents.with_format("arrow").map(
        to_tokens,
        batched=True,
        batch_size=BATCH,
        remove_columns=documents.column_names,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value(dtype))}),
        num_proc=num_proc,
        desc="Tokenizing",
    )
    return tokens.with_format(None)


class PackedRows(torch.utils.data.Dataset):
    """Documents laid end to end and cut into rows of `length` tokens, each with input_ids, position_ids and labels.

    Positions are 0 at the start of each document and at the start of each row. Each row begins with the last token of
    the row before: with labels that the model shifts, every token but a document's first is predicted exactly once.
    Nothing is predicted across a document's start. What is left of the last row is a document of end tokens without
    labels. The tokens stay where `datasets` keeps them, in memory-mapped files for large data.
    """

    def __init__(self, tokenized: datasets.Dataset, length: int, filler: int):
        """
        Args:
            tokenized: records of `input_ids`, at least two tokens each, as `tokenize` returns them.
            length: tokens in a row, at least 2.
            filler: the token that fills the last row.
        """
        if length < 2:
            raise ValueError(f"sequence_length = {length}: allowed are whole numbers from 2")
        self.length, self.filler = length, filler
        chunks = tokenized.with_format("arrow")[:]["input_ids"].chunks
        self.tokens = [chunk.flatten().to_numpy() for chunk in chunks]  # views of the Arrow buffers
        self.chunk_ends = np.cumsum([len(tokens) for tokens in self.tokens])
        lengths = np.concatenate([np.asarray(chunk.value_lengths()) for chunk in chunks])
        self.starts = np.cumsum(lengths, dtype=np.int64) - lengths  # where each document begins
        self.num_tokens = int(self.chunk_ends[-1])

    @property
    def num_predicted(self) -> int:
        """Tokens that carry a label."""
        return self.num_tokens - len(self.starts)

    def __len__(self) -> int:
        return -(-(self.num_tokens - 1) // (self.length - 1))

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row}: allowed are 0 to {len(self) - 1}")  # which ends `for row in rows`, too
        begin = row * (self.length - 1)
        end = min(begin + self.length, self.num_tokens)
        input_ids = torch.full((self.length,), self.filler, dtype=torch.long)
        input_ids[: end - begin] = torch.from_numpy(self._read(begin, end))
        inside = self.starts[np.searchsorted(self.starts, begin) : np.searchsorted(self.starts, end)] - begin
        labels = input_ids.clone()
        labels[end - begin :] = IGNORED_LABEL
        labels[[0, *inside]] = IGNORED_LABEL  # the row's first token is predicted in the row before
        is_start = torch.zeros(self.length, dtype=torch.bool)
        is_start[[0, *inside]] = True
        is_start[end - begin : end - begin + 1] = True  # the filler, where there is one
        index = torch.arange(self.length)
        position_ids = index - torch.where(is_start, index, 0).cummax(dim=0).values
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}

    def checksum(self) -> str:
        """SHA-256 of the rows: of the tokens, of where documents begin, and of how they are cut into rows."""
        digest = hashlib.sha256(f"{self.length} {self.filler} {self.num_tokens}".encode())
        for tokens in self.tokens:
            digest.update(np.ascontiguousarray(tokens, dtype="<i4"))
        digest.update(self.starts.astype("<i8"))
        return digest.hexdigest()

    def find(self, input_ids: torch.Tensor) -> int | None:
        """The first row with these tokens (`length`,), None if there is none. Reads all rows before it."""
        wanted = input_ids.numpy()
        for row in range(len(self)):
            begin = row * (self.length - 1)
            end = min(begin + self.length, self.num_tokens)
            if np.array_equal(self._read(begin, end), wanted[: end - begin]):
                return row
        return None

    def _read(self, begin: int, end: int) -> np.ndarray:
        """Tokens begin..end, over the borders of chunks."""
        pieces = []
        for chunk in range(np.searchsorted(self.chunk_ends, begin, side="right"), len(self.tokens)):
            offset = self.chunk_ends[chunk] - len(self.tokens[chunk])
            if offset >= end:
                break
            pieces.append(self.tokens[chunk][max(begin - offset, 0) : end - offset])
        return np.concatenate(pieces).astype(np.int64)


def _has_text(record) -> bool:
    return bool(record["text"])


def _read_files(source: str, files: list[Path], text_column: str, strict: bool) -> datasets.Dataset:
    formats = {RECORD_FORMATS.get(file.suffix.lower()) for file in files}
    if len(formats) == 1 and None not in formats:
        return _select_text(source, read_records(formats.pop(), files, text_column), text_column, files)
    texts = [text for file in files if (text := _read_text(file, strict)) is not None]
    documents = datasets.Dataset.from_dict(
        {"text": texts}, features=datasets.Features({"text": datasets.Value("large_string")})
    )
    if documents.data.nbytes < LONG_TEXT_BYTES:
        return documents
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} ".encode() + text.encode())
    return in_file(documents, Path(datasets.config.HF_DATASETS_CACHE) / "griffin_text" / digest.hexdigest())


def _read_text(file: Path, strict: bool) -> str | None:
    """The file's text; a file that is not UTF-8 text raises, or in a folder (not `strict`) is left out."""
    try:
        text = read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        if strict:
            raise ValueError(
                f"{file} is not UTF-8 text ({error}): allowed are UTF-8 text, jsonl and parquet"
            ) from error
        return None
    return None if "\0" in text and not strict else text


def _load_from_hub(field: str, source: str, split: str, subset: str | None) -> datasets.Dataset:
    require_on_hub(field, source, "dataset", "a file, a folder, a glob pattern, or a Hub data set's id")
    try:
        return datasets.load_dataset(source, subset, split=split)
    except Exception as error:  # the Hub client's errors have no common class
        reason = " ".join(str(error).split())
        raise ValueError(f"the Hub's data set {source!r} cannot be read, split {split!r}: {reason}") from error


def _select_text(
    source: str, records: datasets.Dataset, text_column: str, files: list[Path] | None = None
) -> datasets.Dataset:
    if text_column not in records.column_names:
        raise ValueError(f"text_column = {text_column!r}: {source!r} has the columns {sorted(records.column_names)}")
    records = records.select_columns([text_column])
    if files and RECORD_FORMATS[files[0].suffix.lower()] == "json" and records.data.column(text_column).null_count:
        check_columns(files, text_column)
    dtype = getattr(records.features[text_column], "dtype", None)
    if dtype == "null":  # of records that are all empty, or of none
        return datasets.Dataset.from_dict({"text": []})
    if dtype not in ("string", "large_string"):
        place = first_bad_line(files or [], text_column)
        raise ValueError(
            f"text_column = {text_column!r}: {source!r} holds {records.features[text_column]} there"
            f"{f' ({place})' if place else ''}, allowed is text"
        )
    return records if text_column == "text" else records.rename_column(text_column, "text")
