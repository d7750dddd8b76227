"""The text of long runs: shards of gather_text.py made into tokens once, and a task whose tokens lie on the device.

`prepare_shards` leaves what LanguageTask reads, and the documents that long contexts are judged on apart from the rest.
"""

import concurrent.futures
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from text_corpus.documents import share_of
from text_corpus.shards import SHARD_NAME, read_shard

from lambda_study.tasks import IGNORED, LanguageTask, cut


TOKENIZER_SAMPLE = 20_000_000  # characters that a tokenizer of a few thousand entries is trained on
LONG_DOCUMENT = 100_000  # characters; a row of 32,768 tokens asks for such


def prepare_shards(settings: dict, shards: Path, folder: Path, jobs: int) -> dict:
    """Tokenises the shards into `folder`, once; returns the settings with what identifies them, and `folder`.

    settings: vocab_size; shards (numbers of those that are read, default all).
    """
    files = sorted(shards.glob(SHARD_NAME.format("*")))
    if numbers := settings.get("shards"):
        files = [shards / SHARD_NAME.format(f"{number:02d}") for number in numbers]
    if missing := [file.name for file in files if not file.is_file()] or ([] if files else [SHARD_NAME.format("*")]):
        raise ValueError(f"{shards} has no {', '.join(missing)}: allowed are folders that gather_text.py wrote")
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    said = {"text": [file.name for file in files], "vocab_size": settings["vocab_size"]}
    said["text_sha256"] = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
    facts = folder / "facts.json"
    done = json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}
    if not said.items() <= done.items():
        done = {**said, "data": _tokenize_into(folder, _read_parts(files, jobs), settings["vocab_size"], jobs)}
        facts.write_text(json.dumps(done), encoding="utf-8")  # last: the folder is complete
    return {**settings, **done, "folder": str(folder)}


def _read_parts(files: list[Path], jobs: int) -> dict[str, list[str]]:
    """Pieces of documents: "train" and "held_out" in an order that the texts alone decide, "long" the longest first."""
    with concurrent.futures.ThreadPoolExecutor(min(jobs, len(files))) as pool:
        documents = [document for shard in pool.map(_shard_documents, files) for document in shard]
    documents.sort(key=lambda document: document[:2])
    train = [piece for _, _, held_out, text in documents if not held_out for piece in cut(text)]
    held_out = [piece for _, _, held_out, text in documents if held_out for piece in cut(text)]
    long = sorted((piece for piece in held_out if len(piece) >= LONG_DOCUMENT), key=len, reverse=True)
    return {"train": train, "held_out": held_out, "long": long or held_out}


def _shard_documents(file: Path) -> list[tuple[float, int, bool, str]]:
    return [(share_of(d["text"]), len(d["text"]), d["held_out"], d["text"]) for d in read_shard(file)]


def _tokenize_into(folder: Path, parts: dict[str, list[str]], vocab_size: int, jobs: int) -> dict:
    """Writes tokenizer, train, held_out, long and long_bytes.npy; returns counts and a checksum of each part."""
    import datasets
    from evaluate_text import count_token_bytes
    from training.text_data import tokenize
    from training.text_files import in_file
    from training.text_tokenizer import train_bpe_tokenizer

    datasets.disable_progress_bars()
    tokenizer = train_bpe_tokenizer(_sample(parts["train"]), vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    data = {}
    for name, pieces in parts.items():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            texts = datasets.Dataset.from_dict(
                {"text": pieces}, features=datasets.Features({"text": datasets.Value("large_string")})
            )
            texts = in_file(texts, Path(place) / "text")
            processes = min(jobs, len(pieces)) if name == "train" and jobs > 1 else None
            tokens = tokenize(texts, tokenizer, processes)
            tokens.save_to_disk(str(folder / name))
            if name == "long":
                np.save(folder / "long_bytes.npy", count_token_bytes(texts, tokenizer).astype(np.int32))
            counts = {"documents": len(pieces), "bytes": sum(len(piece.encode()) for piece in pieces)}
            data[name] = {**counts, **_count(tokens)}
    return data


def _sample(pieces: list[str]) -> list[str]:
    sample, size = [], 0
    for piece in pieces:
        if size >= TOKENIZER_SAMPLE:
            break
        sample.append(piece)
        size += len(piece)
    return sample


def _count(tokens) -> dict:
    """Tokens, and a checksum of them in their order."""
    digest, total = hashlib.sha256(), 0
    for chunk in tokens.with_format("arrow")[:]["input_ids"].chunks:
        values = np.ascontiguousarray(chunk.flatten().to_numpy(), dtype="<i4")
        digest.update(values)
        total += len(values)
    return {"tokens": total, "sha256": digest.hexdigest()[:16]}


class ResidentTextTask(LanguageTask):
    """LanguageTask with all training tokens on the device: a step's batch is the numbers of its rows.

    What the rows hold is gathered on the device, within the recorded step, so that the host has nothing to prepare.
    Settings besides LanguageTask's: steps, of all of which the order is laid out in advance.
    """

    LONG = ("long", "long_bytes.npy")

    def __init__(self, settings: dict, seed: int, device: torch.device):
        super().__init__(settings, seed, device)
        rows, pack = settings["rows"], self.train_rows
        tokens = np.concatenate(pack.tokens)
        is_start = np.zeros(len(tokens), dtype=bool)
        is_start[pack.starts] = True
        self.tokens = torch.from_numpy(tokens.astype(np.int16 if self.vocab_size <= 2**15 else np.int32)).to(device)
        self.is_start = torch.from_numpy(is_start).to(device)
        # Only whole rows: what is left at the end is less than one.
        whole = (len(tokens) - 1) // (pack.length - 1)
        generator = np.random.default_rng(seed)
        epochs = -(-settings["steps"] * rows // whole)
        order = np.concatenate([generator.permutation(whole) for _ in range(epochs)])
        self.order = torch.from_numpy(order[: settings["steps"] * rows]).to(device).view(settings["steps"], rows)
        self.offsets = torch.arange(pack.length, device=device)
        self.step = 0

    def batch(self) -> dict[str, torch.Tensor]:
        self.step += 1
        return {"rows": self.order[self.step - 1]}

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().loss(model, self._gather(batch["rows"]) if "rows" in batch else batch)

    def _gather(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """input_ids, position_ids and labels (B, T) of these rows, as PackedRows has them."""
        index = rows[:, None] * (len(self.offsets) - 1) + self.offsets
        input_ids = self.tokens[index].long()
        is_start = self.is_start[index]
        is_start = is_start | (self.offsets == 0)
        begin = (self.offsets * is_start).cummax(dim=1).values
        labels = input_ids.masked_fill(is_start, IGNORED)
        return {"input_ids": input_ids, "position_ids": self.offsets - begin, "labels": labels}
