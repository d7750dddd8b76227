"""What `test_train_sequence.py` runs in four processes: train.py with rows shared over some of them, and without.

Leaves a folder for each run, and results.pt with what was refused.
"""

import importlib
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainingArguments, default_data_collator

from modeling_griffin import GriffinForCausalLM
from modeling_griffin.parallel import parallelize_trainer
from tests._script_helpers import write_run  # which puts scripts/ on the path
from tests.conftest import make_audible, make_config
from tests.parallel.sequence_program import tokens
from tests.ranks import join_group, start_ranks


run = importlib.import_module("train").run


def settings(folder: Path, rows: int, **changes) -> str:
    """Epochs whose last batch is not full, rows that two ranks cannot halve, documents packed into them."""
    settings = dict(sequence_length=61, max_steps=6, save_strategy="steps", save_steps=3, eval_strategy="steps")
    settings |= dict(eval_steps=3, weight_decay=0.1, warmup_steps=2, lr_scheduler_type="cosine", use_cpu=None)
    return write_run(folder, per_device_train_batch_size=rows, gradient_checkpointing=True, **settings, **changes)


def train(folder: Path, rows: int, sequence: int = 1, *words: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.distributed.barrier()
    run([settings(folder, rows), "--sequence_parallel_size", str(sequence), *words])


def train_stock(folder: Path, sequence: int) -> dict:
    """Stock Trainer over epochs whose last batch is not full: every loss, tokens counted, and the weights."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.distributed.barrier()
    rows = [{"input_ids": row, "labels": row.masked_fill(row < 4 * i, -100)} for i, row in enumerate(tokens(5, 21))]
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, per_device_eval_batch_size=2, use_cpu=True,
        learning_rate=1e-3, gradient_accumulation_steps=2, include_num_input_tokens_seen="all", report_to=[],
        save_strategy="no", eval_strategy="steps", eval_steps=2, logging_steps=1, prediction_loss_only=True,
        disable_tqdm=True,
    )  # fmt: skip
    model = make_audible(GriffinForCausalLM(make_config("griffin")))
    trainer = Trainer(model, settings, default_data_collator, rows, rows)
    shared = parallelize_trainer(trainer, sequence)
    trainer.train()
    shared.remove()
    log = trainer.state.log_history
    found = {name: [entry[name] for entry in log if name in entry] for name in ("loss", "grad_norm", "eval_loss")}
    return {**found, "tokens": trainer.state.num_input_tokens_seen, "weights": model.state_dict()}


def main(rank: int, folder: Path) -> None:
    os.environ.update(ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    join_group(folder / "store4", rank, 4)
    train(folder / f"four {rank}", 2, 2, "--output_dir", str(folder / "four"))
    join_group(folder / f"store2.{rank // 2}", rank % 2, 2)
    if rank < 2:
        train(folder / f"two {rank}", 3, 2, "--output_dir", str(folder / "two"))
        refused = refusal(folder / f"refused {rank}", 3)
        smoothed = refusal(folder / f"smoothed {rank}", 2, "--label_smoothing_factor", "0.1")
    else:
        train(folder / f"pair {rank}", 2, 1, "--output_dir", str(folder / "pair"))
        stock = train_stock(folder / "stock", 2)
    join_group(folder / f"store1.{rank}", 0, 1)
    if rank == 0:
        train(folder / "alone", 3)
        torch.save({"refused": refused, "smoothed": smoothed}, folder / "refused.pt")
    elif rank == 2:
        torch.save({"stock": stock, "stock alone": train_stock(folder / "stock", 1)}, folder / "stock.pt")
    elif rank == 1:
        checkpoint = str(folder / "two" / "checkpoint-3")
        train(
            folder / "two 1",
            3,
            1,
            "--output_dir",
            str(folder / "resumed"),
            "--resume",
            checkpoint,
            "--allow_changed",
            "processes",
        )


def refusal(folder: Path, sequence: int, *words: str) -> str:
    try:
        train(folder, 3, sequence, *words)
    except SystemExit as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    out = Path(sys.argv[1])
    start_ranks(main, 4, out)
    torch.save(torch.load(out / "refused.pt") | torch.load(out / "stock.pt"), out / "results.pt")
