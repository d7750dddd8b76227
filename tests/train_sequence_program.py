"""What `test_train_sequence.py` runs in four processes: train.py with rows shared over some of them, and without.

Leaves a folder for each run, and results.pt with what was refused.
"""

import importlib
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from tests._script_helpers import write_run  # which puts scripts/ on the path
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


def main(rank: int, folder: Path) -> None:
    os.environ.update(ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    join_group(folder / "store4", rank, 4)
    train(folder / f"four {rank}", 2, 2, "--output_dir", str(folder / "four"))
    join_group(folder / f"store2.{rank // 2}", rank % 2, 2)
    if rank < 2:
        train(folder / f"two {rank}", 3, 2, "--output_dir", str(folder / "two"))
        refused = refusal(folder / f"refused {rank}", 3)
    else:
        train(folder / f"pair {rank}", 2, 1, "--output_dir", str(folder / "pair"))
    join_group(folder / f"store1.{rank}", 0, 1)
    if rank == 0:
        train(folder / "alone", 3)
        torch.save({"refused": refused}, folder / "results.pt")
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


def refusal(folder: Path, sequence: int) -> str:
    try:
        train(folder, 3, sequence)
    except SystemExit as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    start_ranks(main, 4, Path(sys.argv[1]))
