"""Times fine-tuning on rows of many lengths by stock Trainer and SFTTrainer, a Llama of the same size beside it.

    python scripts/benchmark_fine_tuning.py                     2.1B parameters, bfloat16, 2,000 rows of 50 to 2,000
    python scripts/benchmark_fine_tuning.py --ways padded --models Griffin

End to end: collator, forward, backward, clipping and AdamW, as the trainers do them. Rows are pieces of this project's
pages and programs, a byte a token, of lengths drawn log-uniformly; they come in one order, so that all models see the
same ones, and a run of fewer steps sees the first of them. The loss is over all tokens. Not timed are the first steps:
four of the lengths that recorded steps are padded to, and more, in which kernels compile. Real tokens count, padding
does not. Writes OUTPUT.json and OUTPUT.md after every row.
"""

import argparse
import gc
import importlib.util
import json
import math
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmark_training import OWN, SIZES, _make
from benchmarks.birth_certificate import birth_certificate, birth_lines, short_device_name
from command_line import Parser
from training.text_tokenizer import byte_tokenizer
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainerState, TrainingArguments
from whole_files import with_ending, write_whole

from modeling_griffin import record_training


MODELS = {"Griffin": OWN, "Llama": "Llama with MQA, Transformers"}
WAYS = {  # trainer; whether rows are laid end to end; whether steps are recorded
    "padded": ("Trainer", False, False),
    "padded, recorded": ("Trainer", False, True),
    "end to end": ("Trainer", True, False),
    "end to end, recorded": ("Trainer", True, True),
    "padded, SFTTrainer": ("SFTTrainer", False, False),
    "end to end, SFTTrainer": ("SFTTrainer", True, False),
}
BUCKETS = 4  # lengths that recorded rows are padded to
ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("docs/**/*.md", "modeling_griffin/**/*.py", "scripts/**/*.py", "tests/**/*.py")


class Clock(TrainerCallback):
    """Time and steps after `warmup` steps; ends the run behind `most` of them, or once they took `limit` seconds."""

    def __init__(self, warmup: int, most: int, limit: float):
        self.warmup, self.most, self.limit, self.steps, self.seconds = warmup, most, limit, 0, 0.0
        self.start: float | None = None

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step < self.warmup:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.start = self.start or now
        self.steps, self.seconds = state.global_step - self.warmup, now - self.start
        control.should_training_stop |= self.steps >= self.most or self.seconds > self.limit


def text_bytes() -> bytes:
    """This project's pages and programs, one behind another."""
    files = sorted(path for pattern in TEXTS for path in ROOT.glob(pattern))
    return b"".join(path.read_bytes() for path in files)


def rows_of(arguments: argparse.Namespace) -> list[dict]:
    """Pieces of the text, one behind another and from its start again; those of the first steps have set lengths."""
    drawn, text, begin, rows = random.Random(0), text_bytes(), 0, []
    low, high = math.log(arguments.shortest), math.log(arguments.longest)
    first = [length for length in buckets(arguments.longest, False, 1) for _ in range(arguments.batch)]
    for length in [*first, *(round(math.exp(drawn.uniform(low, high))) for _ in range(arguments.rows))]:
        begin = 0 if begin + length > len(text) else begin
        rows.append({"input_ids": list(text[begin : begin + length])})
        begin += length
    return rows


def pad(examples: list[dict]) -> dict:
    """Rows with padding on the right, as collators of Transformers and TRL make them."""
    longest = max(len(each["input_ids"]) for each in examples)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for each in examples:
        ids, missing = each["input_ids"], longest - len(each["input_ids"])
        batch["input_ids"].append(ids + [0] * missing)
        batch["attention_mask"].append([1] * len(ids) + [0] * missing)
        batch["labels"].append(ids + [-100] * missing)
    return {key: torch.tensor(value) for key, value in batch.items()}


def buckets(longest: int, end_to_end: bool, batch: int) -> list[int]:
    """Lengths by doubling, up to the longest row, or to a batch of them end to end."""
    top = longest * (batch if end_to_end else 1)
    return [-(-top // 2**halvings) for halvings in reversed(range(BUCKETS))]


def make_trainer(
    way: str, model: torch.nn.Module, rows: list[dict], arguments: argparse.Namespace, folder: str, clock: Clock
) -> Trainer:
    name, end_to_end, recorded = WAYS[way]
    if recorded:
        record_training(model, lengths=buckets(arguments.longest, end_to_end, arguments.batch), kept=BUCKETS + 1)
    settings = dict(
        output_dir=folder, num_train_epochs=1000, per_device_train_batch_size=arguments.batch, learning_rate=1e-5,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch", bf16=False,
        use_cpu=not torch.cuda.is_available(), seed=0, train_sampling_strategy="sequential",
    )  # fmt: skip
    if name == "Trainer":
        collate = DataCollatorWithFlattening() if end_to_end else pad
        settings = TrainingArguments(**settings)
        return Trainer(model, settings, train_dataset=rows, data_collator=collate, callbacks=[clock])
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(**settings, max_length=None, padding_free=end_to_end, gradient_checkpointing=False)
    data, tokenizer = Dataset.from_list(rows), byte_tokenizer()
    return SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, callbacks=[clock])


def measure(model_name: str, way: str, arguments: argparse.Namespace) -> dict:
    """Tokens a second of one way of one model, over the timed steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _make(MODELS[model_name], arguments.size, device, getattr(torch, arguments.dtype))
    clock, seen = Clock(arguments.warmup, arguments.steps, arguments.seconds), []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(way, model, rows_of(arguments), arguments, folder, clock)
        collate = trainer.data_collator

        def counted(examples):
            seen.append(sum(len(each["input_ids"]) for each in examples))
            return collate(examples)

        trainer.data_collator = counted
        trainer.train()
    tokens = sum(seen[arguments.warmup : arguments.warmup + clock.steps])
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "model": model_name,
        "way": way,
        "steps": clock.steps,
        "tokens": tokens,
        "seconds": clock.seconds,
        "tokens_per_second": tokens / clock.seconds,
        "peak": peak,
    }


def text(report: dict) -> str:
    asked = report["asked"]
    lines = [f"# Fine-tuning on rows of many lengths, {asked['size']}", "", *birth_lines(report["birth"]), ""]
    lines += [
        f"{asked['rows']} rows of {asked['shortest']} to {asked['longest']} tokens, bytes of this project's text,",
        f"lengths log-uniform, {asked['batch']} a step, {asked['dtype']} weights, AdamW, clipping. Timed are "
        f"{asked['steps']} steps behind",
        f"{asked['warmup']}, over the same rows for all; real tokens count, padding does not.",
        "",
        "| model | way | steps | step, ms | tokens/s | against Llama, the same way | peak, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    speed = {(row["model"], row["way"]): row["tokens_per_second"] for row in report["rows"]}
    for row in report["rows"]:
        peer = speed.get(("Llama", row["way"].replace(", recorded", "")))
        against = "-" if peer is None else f"{row['tokens_per_second'] / peer:.2f}"
        peak = "-" if row["peak"] is None else f"{row['peak'] / 2**30:.1f}"
        cells = [row["model"], row["way"], row["steps"], f"{row['seconds'] / row['steps'] * 1e3:.0f}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['tokens_per_second']:,.0f}", against, peak])) + " |")
    return "\n".join([*lines, "", *report["left_out"]]).rstrip() + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="2b", help="of the models' table in benchmark_training.py")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which models")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="which trainers and batches")
    parser.add_argument("--rows", type=int, default=2000, help="rows of the data")
    parser.add_argument("--shortest", type=int, default=50, help="tokens")
    parser.add_argument("--longest", type=int, default=2000, help="tokens")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--warmup", type=int, default=12, help="steps before those that are timed")
    parser.add_argument("--steps", type=int, default=492, help="that are timed; the default: to the end of the rows")
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, of each line of the table")
    parser.add_argument("--output", type=Path, default=None, help="path without suffix")
    parser.add_argument("--commit", default=None, help="the commit that runs, for a copy without its git history")
    arguments = parser.parse_args(argv)
    parser.check_least(arguments, warmup=BUCKETS, steps=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = arguments.output or Path("results") / "training" / f"fine_tuning_{short_device_name(device)}"
    parser.make_folder_of(output)
    asked = {key: value for key, value in vars(arguments).items() if key not in ("output", "commit")}
    report: dict[str, Any] = {"birth": birth_certificate(device, arguments.commit), "asked": asked}
    report |= {"rows": [], "left_out": []}
    if importlib.util.find_spec("trl") is None and any(WAYS[way][0] == "SFTTrainer" for way in arguments.ways):
        report["left_out"].append("TRL is not installed: SFTTrainer was not run.")
        arguments.ways = [way for way in arguments.ways if WAYS[way][0] != "SFTTrainer"]
    for way in arguments.ways:
        for model_name in arguments.models:
            if model_name != "Griffin" and WAYS[way][2]:
                continue
            report["rows"].append(measure(model_name, way, arguments))
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            write_whole(with_ending(output, ".json"), json.dumps(report, indent=1))
            write_whole(with_ending(output, ".md"), text(report))
    print(text(report), end="")


if __name__ == "__main__":
    main()
