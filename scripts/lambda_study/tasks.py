"""The tasks on which initialisations of Λ are compared: batches, losses, and evaluation beyond the trained length.

A task is made from its settings (a mapping of the sweep's YAML file) and a seed, which alone decides the order of the
data: every arm of a comparison sees the same batches. `batch` draws a training batch, `loss` is the model's on one,
`validate` the figures that curves and the choice of a learning rate rest on, `evaluate` the figures by size or position
at the end of a run. What only text needs (such as `datasets`) is imported where text is read, so that the synthetic
tasks run without it.
"""

import hashlib
import importlib.util
import json
import random
import sysconfig
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from lambda_study.synthetic_tasks import IGNORED, SYNTHETIC_TASKS, VOCABULARY


HELD_OUT_SEED = 10**6  # of the rows all runs are evaluated on; no training seed is that large
PACKAGE = "package:"  # before the name of one
LONGEST_DOCUMENT = 200_000  # characters; several times the longest rows that are evaluated
MOST_TOKENS = 2**16  # in one forward pass of an evaluation; bounds the memory


class SyntheticTask:
    """A task of synthetic_tasks.py. Each training batch has one size, drawn from `sizes` in equal shares.

    Settings: kind, sizes, rows, held_out_sizes, held_out_rows, options (further arguments of the generator).
    """

    vocab_size = VOCABULARY

    def __init__(self, settings: dict, seed: int, device: torch.device):
        self.settings, self.device = settings, device
        self.draw, self.options = SYNTHETIC_TASKS[settings["kind"]], settings.get("options", {})
        self.sizes = random.Random(seed)
        self.generator = torch.Generator(device).manual_seed(seed)

    def batch(self) -> dict[str, torch.Tensor]:
        size = self.sizes.choice(self.settings["sizes"])
        tokens, targets = self.draw(self.settings["rows"], size, self.generator, **self.options)
        return {"tokens": tokens, "targets": targets}

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean -log p of the answers, nats."""
        logits = _logits(model, batch["tokens"]).flatten(0, 1)
        return cross_entropy(logits, batch["targets"].flatten(), ignore_index=IGNORED)

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """loss (nats an answer) and accuracy (share of right answers), both means over the trained sizes."""
        return _mean_figures(self._held_out(model, size) for size in self.settings["sizes"])

    def evaluate(self, model: torch.nn.Module) -> list[dict[str, float]]:
        return [{"size": size, **self._held_out(model, size)} for size in self.settings["held_out_sizes"]]

    @torch.no_grad()
    def _held_out(self, model, size: int) -> dict[str, float]:
        generator = torch.Generator(self.device).manual_seed(HELD_OUT_SEED)
        tokens, targets = self.draw(self.settings["held_out_rows"], size, generator, **self.options)
        losses, right = [], []
        for part, answers in zip(*(each.split(max(1, MOST_TOKENS // each.shape[1])) for each in (tokens, targets))):
            asked = answers != IGNORED
            logits, answers = _logits(model, part)[asked], answers[asked]
            losses.append(cross_entropy(logits, answers, reduction="none"))
            right.append(logits.argmax(-1) == answers)
        return {"loss": torch.cat(losses).mean().item(), "accuracy": torch.cat(right).float().mean().item()}


def _logits(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits.float()


def _mean_figures(figures) -> dict[str, float]:
    figures = list(figures)
    return {name: sum(each[name] for each in figures) / len(figures) for name in figures[0]}


class LanguageTask:
    """Language modelling on what `prepare_text` left in settings["folder"].

    Settings: rows, length (tokens in a row), held_out_rows (of that length), long_length and long_rows.
    """

    LONG = ("held_out", "held_out_bytes.npy")  # what is read in long rows, and the bytes of its tokens

    def __init__(self, settings: dict, seed: int, device: torch.device):
        import datasets
        import numpy as np
        from training.text_data import PackedRows
        from training.text_tokenizer import document_ends, load_tokenizer

        folder = Path(settings["folder"])
        datasets.disable_progress_bars()
        tokenizer = load_tokenizer(str(folder / "tokenizer"), [], 0)
        self.settings, self.device = settings, device
        self.vocab_size, filler = len(tokenizer), document_ends(tokenizer)[1]
        self.num_bytes = np.load(folder / self.LONG[1])
        names = ("train", "held_out", self.LONG[0])
        train, held_out, long = (datasets.load_from_disk(str(folder / name)) for name in names)
        self.train_rows = PackedRows(train, settings["length"], filler)
        self.held_out_rows = PackedRows(held_out, settings["length"], filler)
        self.long_rows = PackedRows(long, settings["long_length"], filler)
        self.order = _endless_order(len(self.train_rows), np.random.default_rng(seed))

    def batch(self) -> dict[str, torch.Tensor]:
        return self._batch([self.train_rows[next(self.order)] for _ in range(self.settings["rows"])])

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """nats a token."""
        with self._autocast():
            return model(**batch, use_cache=False).loss

    @torch.no_grad()
    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """loss: nats a token, over the first held_out_rows rows of the held-out documents."""
        rows = [self.held_out_rows[i] for i in range(min(self.settings["held_out_rows"], len(self.held_out_rows)))]
        size = self.settings["rows"]
        batches = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
        predicted = [sum(int((row["labels"][1:] != IGNORED).sum()) for row in batch) for batch in batches]
        losses = (self.loss(model, self._batch(batch)) for batch in batches)
        nats = torch.stack([loss * count for loss, count in zip(losses, predicted)]).sum()
        return {"loss": nats.item() / sum(predicted)}

    def evaluate(self, model: torch.nn.Module) -> list[dict[str, float]]:
        """By position in the document, in rows of `long_length` tokens; `size` is the first position of a bucket."""
        from evaluate_text import bucket_losses, reader_of, summarize

        with self._autocast():
            reader = reader_of(model, 4 * self.settings["length"])
            entries = bucket_losses(reader, self.long_rows, self.num_bytes, self.settings["long_rows"])
        names = ("tokens", "loss", "bits_per_byte")
        return [{"size": e["from"], **{name: e[name] for name in names}} for e in summarize(entries)["by_position"]]

    def _batch(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        if self.device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _autocast(self):
        # Without a cache of cast weights: a recorded step would go on with those of its recording.
        on_gpu = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False)


def _endless_order(count: int, generator):
    while True:
        yield from generator.permutation(count).tolist()


def prepare_text(settings: dict, folder: Path) -> dict:
    """Tokenises the documents of settings["text"] into `folder`, once; returns the settings with what identifies them.

    text: files, folders and globs, as text_data.py reads them; "stdlib", the sources of Python's standard library; and
    "package:NAME", those of an installed package.
    Text that has changed is tokenised anew. Documents above LONGEST_DOCUMENT are cut into pieces. Every eighth by size,
    from the largest on, is held out, so that long documents are among them.
    """
    texts = [text for source in settings["text"] for text in _read_texts(source)]
    said = {"text": [Path(source).name for source in settings["text"]], "vocab_size": settings["vocab_size"]}
    said["text_sha256"] = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    facts = folder / "facts.json"
    done = json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}
    if said.items() <= done.items():
        return {**settings, **done, "folder": str(folder)}
    done = {**said, "data": _tokenize_into(folder, texts, settings["vocab_size"])}
    facts.write_text(json.dumps(done), encoding="utf-8")  # last: the folder is complete
    return {**settings, **done, "folder": str(folder)}


def _tokenize_into(folder: Path, texts: list[str], vocab_size: int) -> dict:
    """Writes tokenizer, train, held_out and held_out_bytes.npy; returns counts and a checksum of both parts."""
    import datasets
    import numpy as np
    from evaluate_text import count_token_bytes
    from training.text_data import tokenize
    from training.text_tokenizer import train_bpe_tokenizer

    datasets.disable_progress_bars()
    pieces = sorted((piece for text in texts for piece in cut(text)), key=len, reverse=True)
    parts = {"train": [piece for i, piece in enumerate(pieces) if i % 8], "held_out": pieces[::8]}
    tokenizer = train_bpe_tokenizer(parts["train"], vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    documents = {name: datasets.Dataset.from_dict({"text": part}) for name, part in parts.items()}
    np.save(folder / "held_out_bytes.npy", count_token_bytes(documents["held_out"], tokenizer).astype(np.int32))
    data = {}
    for name in parts:
        tokens = tokenize(documents[name], tokenizer)
        tokens.save_to_disk(str(folder / name))
        ids = [np.asarray(each, dtype=np.int32) for each in tokens["input_ids"]]
        checksum = hashlib.sha256(b"".join(each.tobytes() for each in ids)).hexdigest()[:16]
        data[name] = {"documents": len(ids), "tokens": sum(map(len, ids)), "sha256": checksum}
    return data


def cut(text: str, longest: int = LONGEST_DOCUMENT) -> list[str]:
    """Pieces of at most `longest` characters, each but the last up to the end of a line where it has one."""
    pieces, begin = [], 0
    while begin < len(text):
        end = begin + longest
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        pieces.append(text[begin:end])
        begin = end
    return pieces


def _read_texts(source: str) -> list[str]:
    from training.text_data import load_documents

    if source == "stdlib":
        files = Path(sysconfig.get_path("stdlib")).rglob("*.py")
        files = [file for file in files if not {"site-packages", "dist-packages"} & {*file.parts}]
    elif source.startswith(PACKAGE):
        files = _package_folder(source.removeprefix(PACKAGE)).rglob("*.py")
    else:
        return list(load_documents(source)["text"])
    texts = (file.read_bytes().decode("utf-8", errors="replace") for file in sorted(files))
    return [text for text in texts if text.strip()]


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"text = {PACKAGE}{name}: allowed are installed packages")
    return Path(spec.submodule_search_locations[0])


def make_task(settings: dict, seed: int, device: torch.device) -> SyntheticTask | LanguageTask:
    if settings["kind"] == "language_modelling":
        return LanguageTask(settings, seed, device)
    return SyntheticTask(settings, seed, device)
