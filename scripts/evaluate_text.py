"""Loss and bits per byte by position: `python scripts/evaluate_text.py MODEL DATA --length 1048576`.

Rows of any length are read in chunks with the model's state in between, so memory does not grow with the length. How a
model does beyond the length it was trained on shows in the last lines of the table. Writes evaluation.json, .md, .png.
Started by torchrun, the processes share each row, read at once.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import spoken
import torch
import torch.distributed as dist
from benchmarks.birth_certificate import birth_certificate, birth_lines
from command_line import Parser, check_folder, device
from generate import check_ids, load
from training.hub_ids import require_model
from training.report import bits_per_byte, versions
from training.text_data import IGNORED_LABEL, PackedRows, load_documents, tokenize
from training.text_tokenizer import document_ends
from transformers import PreTrainedTokenizerBase
from whole_files import in_one_step, write_whole

from modeling_griffin import GriffinForCausalLM
from modeling_griffin.cache_name import CACHE_NAME
from modeling_griffin.parallel import SequenceParallel, parallelize_sequence
from modeling_griffin.training.pieces import mlp_in_pieces


Row = dict[str, torch.Tensor]  # of `PackedRows`


def token_bytes(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """How many bytes of `text` each token brings, by the tokens' spans of characters; the sum is all of its bytes.

    A character that several tokens share counts for the first of them, and what no token covers for the next one.
    """
    characters = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (characters > 0x7F) + (characters > 0x7FF) + (characters > 0xFFFF)  # of UTF-8
    bytes_up_to = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    ends = np.maximum.accumulate([end for _, end in offsets])
    ends[-1] = len(text)
    return np.diff(bytes_up_to[ends], prepend=0).tolist()


def count_token_bytes(documents: Iterable[dict], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """For every token of `tokenize(documents)`, the documents' ends included.

    These have no bytes, but for the end of a document of which the tokenizer makes no token.
    """
    counts = []
    for record in documents:
        offsets = tokenizer(record["text"], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        counts += [0, *token_bytes(record["text"], offsets), 0] if offsets else [0, len(record["text"].encode())]
    return np.array(counts)


@torch.no_grad()
def row_losses(model: torch.nn.Module, row: Row, chunk: int) -> torch.Tensor:
    """-log p (T - 1,) in nats of one row of `PackedRows`, `chunk` tokens at a time; 0 where nothing is predicted."""
    input_ids, position_ids, labels = (
        row[name][None].to(model.device) for name in ("input_ids", "position_ids", "labels")
    )
    predicted = (labels[0] != IGNORED_LABEL).nonzero()
    last = int(predicted[-1]) if len(predicted) else 0  # behind it the row is only filled up
    cache, losses = None, [torch.empty(0, device=model.device)]
    for begin in range(0, last, chunk):
        end = min(begin + chunk, last)
        output = model(
            input_ids=input_ids[:, begin:end],
            position_ids=position_ids[:, begin:end],
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        cache = output[CACHE_NAME]
        next_tokens = labels[0, begin + 1 : end + 1]
        losses.append(torch.nn.functional.cross_entropy(output.logits[0].float(), next_tokens, reduction="none"))
    return torch.nn.functional.pad(torch.cat(losses).cpu(), (0, input_ids.shape[1] - 1 - last))


@torch.no_grad()
def shared_row_losses(shared: SequenceParallel, row: Row, chunk: int) -> torch.Tensor:
    """As `row_losses`, of all processes together, each with its part of the row; logits of `chunk` tokens at a time."""
    given = {name: tensor[None].to(shared.base.device) for name, tensor in row.items()}
    hidden = shared.base(given["input_ids"], position_ids=given["position_ids"], use_cache=False).last_hidden_state
    return shared.token_losses(hidden, given["labels"], chunk)[0].cpu()


def bucket_losses(
    losses_of: Callable[[Row], torch.Tensor], rows: PackedRows, num_bytes: np.ndarray, max_rows: int | None
) -> list[dict]:
    """One entry for the positions [1, 2), [2, 4), [4, 8), ...: tokens, bytes and summed loss (nats).

    The position of a token is how many tokens of its document, the start included, stand before it in the row.
    losses_of: of a row, -log p (T - 1,).
    """
    size = max(1, math.ceil(math.log2(rows.length)))
    totals = {name: np.zeros(size) for name in ("tokens", "bytes", "nats")}
    for index in range(min(len(rows), max_rows or len(rows))):
        row = rows[index]
        losses = losses_of(row).double().numpy()
        predicted = row["labels"][1:].numpy() != IGNORED_LABEL
        bucket = np.log2(row["position_ids"][1:].numpy()[predicted]).astype(int)
        begin = index * (rows.length - 1) + 1
        bytes_here = num_bytes[begin : begin + rows.length - 1]
        bytes_here = np.pad(bytes_here, (0, rows.length - 1 - len(bytes_here)))[predicted]
        for name, values in (("tokens", np.ones(len(bucket))), ("bytes", bytes_here), ("nats", losses[predicted])):
            totals[name] += np.bincount(bucket, weights=values, minlength=size)
    entries = [
        {"from": 2**k, "to": min(2 ** (k + 1), rows.length) - 1, **{name: float(totals[name][k]) for name in totals}}
        for k in range(size)
    ]
    return [entry for entry in entries if entry["tokens"]]


def summarize(entries: list[dict]) -> dict:
    """Loss and bits per byte of each entry and of all together."""
    for entry in entries:
        entry["loss"] = entry["nats"] / entry["tokens"]
        entry["bits_per_byte"] = bits_per_byte(entry["nats"], entry["bytes"]) if entry["bytes"] else None
    tokens, num_bytes, nats = (sum(entry[name] for entry in entries) for name in ("tokens", "bytes", "nats"))
    return {
        "tokens": int(tokens),
        "bytes": int(num_bytes),
        "loss": nats / tokens,
        "bits_per_byte": bits_per_byte(nats, num_bytes),
        "by_position": entries,
    }


def print_table(result: dict) -> None:
    print(f"{'position':>17} {'tokens':>10} {'loss':>8} {'bits/byte':>10}")
    for entry in [*result["by_position"], {**result, "from": "all", "to": ""}]:
        span = f"{entry['from']} - {entry['to']}" if entry["to"] else entry["from"]
        bits = "" if entry["bits_per_byte"] is None else f"{entry['bits_per_byte']:.4f}"
        print(f"{span:>17} {int(entry['tokens']):>10,} {entry['loss']:>8.4f} {bits:>10}")


def text_of(result: dict, birth: dict) -> str:
    """The page: where the figures come from, and what reading took."""
    length, memory = result["length"], result["peak_bytes"]
    lines = [f"# Loss by position, rows of {length:,} tokens", "", *birth_lines(birth), ""]
    many = result["processes"] > 1
    taken = f"{result['tokens']:,} tokens in {result['seconds']:.1f} s, "
    taken += f"a row over {result['processes']} processes" if many else f"{result['chunk']:,} in one forward pass"
    lines += [
        taken + ("." if memory is None else f"; at most {memory / 1e9:.2f} GB of GPU memory, weights included."),
        "",
    ]
    lines += ["| tokens of the document before it | tokens | loss, nats | bits per byte |", "|---|---|---|---|"]
    for entry in [*result["by_position"], result]:
        span = f"{entry['from']:,} to {entry['to']:,}" if "from" in entry else "all"
        bits = "" if entry["bits_per_byte"] is None else f"{entry['bits_per_byte']:.4f}"
        lines.append(f"| {span} | {int(entry['tokens']):,} | {entry['loss']:.4f} | {bits} |")
    return "\n".join(lines) + "\n"


def plot(path: Path, result: dict, window: int | None) -> None:
    """Bits per byte against position, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [entry for entry in result["by_position"] if entry["bits_per_byte"] is not None]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    middle = [(entry["from"] * (entry["to"] + 1)) ** 0.5 for entry in entries]
    axes.plot(middle, [entry["bits_per_byte"] for entry in entries], marker="o")
    if window:
        axes.axvline(window, color="gray", linestyle="--", linewidth=1, label=f"attention window, {window} tokens")
        axes.legend()
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of the document before it in the row (geometric middle of each bucket)")
    axes.set_ylabel("bits per byte")
    axes.set_title(f"{result['bits_per_byte']:.3f} bits per byte over {result['bytes']:,} bytes", fontsize=10)
    axes.grid(alpha=0.3)
    with in_one_step(path) as half:
        figure.savefig(half, dpi=150)
    pyplot.close(figure)


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__file__, description="Loss and bits per byte by position.")
    parser.add_argument("model", metavar="MODEL", help="a folder or Hub id")
    parser.add_argument("data", metavar="DATA", help="a text file, a folder, jsonl, parquet, or a Hub data set's id")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row (default: 2048)")
    parser.add_argument(
        "--chunk",
        type=int,
        default=2048,
        help="tokens in one forward pass; bounds the memory. Of rows shared by processes: tokens whose logits are held",
    )
    parser.add_argument("--max_rows", type=int, default=None, help="read only so many rows (default: all)")
    parser.add_argument("--text_column", default="text", help="column of a record that holds its text")
    parser.add_argument("--split", default="test", help="split of a Hub data set (default: test)")
    parser.add_argument("--subset", default=None, help="subset of a Hub data set (default: its own default)")
    parser.add_argument(
        "--output", type=Path, default=Path("build/evaluate"), help="folder for evaluation.json, .md, .png"
    )
    parser.add_argument("--commit", default=None, help="the commit that runs; default: as git says")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=usual, help="where it runs")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code of the model's repository")
    arguments = parser.parse_args(argv)
    parser.check_least(arguments, length=2, chunk=1, max_rows=1)
    return arguments


def join_processes(wanted: str) -> str:
    """This process's device; with torchrun's others it becomes a group."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return wanted
    on_gpu = torch.device(wanted).type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if not on_gpu:
        return wanted
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return f"cuda:{os.environ['LOCAL_RANK']}"


def reader_of(model: torch.nn.Module, chunk: int) -> Callable[[Row], torch.Tensor]:
    """What gives the losses of a row: this process alone, or all of them together, which takes a Griffin."""
    if not dist.is_initialized():
        return partial(row_losses, model, chunk=chunk)
    if isinstance(model, GriffinForCausalLM):  # by the code of its repository it has no pieces
        mlp_in_pieces(model)
    return partial(shared_row_losses, parallelize_sequence(model), chunk=chunk)


def main(argv: list[str] | None = None) -> dict:
    arguments = read_arguments(sys.argv[1:] if argv is None else argv)
    try:
        check_folder("--output", arguments.output)
        require_model("MODEL", arguments.model)  # before the text is read, and the text before the model is
        documents = load_documents(arguments.data, arguments.text_column, arguments.split, arguments.subset, "DATA")
        model, tokenizer = load(arguments.model, arguments.trust_remote_code, join_processes(arguments.device))
        if not tokenizer.is_fast:
            raise ValueError(
                f"MODEL = {arguments.model!r} has a tokenizer that does not say which characters its tokens stand for "
                f"({type(tokenizer).__name__}): allowed are fast tokenizers, with a tokenizer.json"
            )
    except ValueError as error:
        spoken.stop(__file__, error)
    try:
        reader = reader_of(model, arguments.chunk)
    except ValueError as error:
        spoken.stop(__file__, ValueError(f"MODEL = {arguments.model!r} with several processes: {error}"))
    rows = PackedRows(tokenize(documents, tokenizer), arguments.length, document_ends(tokenizer)[1])
    try:
        check_ids(max(int(chunk.max()) for chunk in rows.tokens if len(chunk)), model)
    except ValueError as error:
        spoken.stop(__file__, ValueError(f"MODEL = {arguments.model!r}: {error}"))
    num_bytes, start = count_token_bytes(documents, tokenizer), time.perf_counter()
    entries = bucket_losses(reader, rows, num_bytes, arguments.max_rows)
    facts = {name: getattr(arguments, name) for name in ("model", "data", "length", "chunk")}
    processes = dist.get_world_size() if dist.is_initialized() else 1
    facts |= {"device": str(model.device), "processes": processes, "seconds": time.perf_counter() - start}
    facts["peak_bytes"] = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else None
    result = {**facts, "versions": versions(), **summarize(entries)}
    if dist.is_initialized():
        first = dist.get_rank() == 0
        dist.destroy_process_group()
        if not first:
            return result
    print_table(result)
    page = text_of(result, birth_certificate(model.device.type, arguments.commit))
    with spoken.writing(__file__):
        write_whole(arguments.output / "evaluation.json", json.dumps(result, indent=2) + "\n")
        write_whole(arguments.output / "evaluation.md", page)
        plot(arguments.output / "evaluation.png", result, getattr(model.config, "attention_window_size", None))
    print(f"written to {arguments.output}")
    return result


if __name__ == "__main__":
    main()
