"""Shards: documents as JSON lines (kind, held_out, text), bzip2-compressed, small enough to be sent one by one."""

import bz2
import concurrent.futures
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path


SHARD_NAME = "text-{}.jsonl.bz2"


class ShardWriter:
    """Writes FOLDER/text-00.jsonl.bz2 and so on, each of `size` bytes before compression, which threads do."""

    def __init__(self, folder: Path, size: int, threads: int):
        self.folder, self.size = folder, size
        self.lines: list[bytes] = []
        self.filled, self.count = 0, 0
        self.pool = concurrent.futures.ThreadPoolExecutor(threads)  # bz2 releases the interpreter's lock
        self.written: list[concurrent.futures.Future] = []
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, document: dict) -> None:
        line = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        if self.filled and self.filled + len(line) > self.size:
            self._close_shard()
        self.lines.append(line)
        self.filled += len(line)

    def _close_shard(self) -> None:
        path = self.folder / SHARD_NAME.format(f"{self.count:02d}")
        self.written.append(self.pool.submit(_compress, self.lines, path))
        self.lines, self.filled, self.count = [], 0, self.count + 1

    def close(self) -> list[dict]:
        """File, bytes and SHA-256 of each shard."""
        if self.lines:
            self._close_shard()
        with self.pool:
            return [future.result() for future in self.written]


def _compress(lines: list[bytes], path: Path) -> dict:
    compressor = bz2.BZ2Compressor()  # xz -6 makes them a seventh smaller and takes six times as long
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in (*(compressor.compress(line) for line in lines), compressor.flush()):
            digest.update(part)
            size += file.write(part)
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def read_shard(path: Path) -> Iterator[dict]:
    lines = io.BytesIO(bz2.decompress(path.read_bytes()))  # at once, without the interpreter's lock
    yield from map(json.loads, lines)
