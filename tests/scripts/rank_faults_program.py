"""What test_train_ranks.py starts: train.py in two processes, under torchrun's agent, of which one is not as it should.

`rank_faults_program.py CONFIG.yaml FOLDER`. Writes FOLDER/results.json: of each job the seconds, the exit codes of the
ranks that the agent saw fail, and what they printed.
"""

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import failure_program
import torch
import train
from failure_program import start


def stop_rank_1(rank: int, *_) -> None:
    """As a machine that hangs: it neither ends nor answers. Woken long after, so that the agent can end it."""
    if rank == 1:
        threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGSTOP)).start()


def with_other_words_on_rank_1(words: list[str]) -> None:
    """Rank 1 reads its command line as if these words were added to it."""
    read = train.read_arguments
    train.read_arguments = lambda argv: read([*argv, *words] if os.environ["RANK"] == "1" else argv)


def main(config: str, folder: Path) -> None:
    run = [config, "--output_dir", str(folder / "ended")]
    results = {"whole": start("whole", folder, run), "complete": start("complete", folder, [*run, "--resume"])}
    shutil.copytree(folder / "ended", folder / "killed")
    for name in ("model.safetensors", "metrics.json"):
        (folder / "killed" / name).unlink()
    results["last_save"] = start("last_save", folder, [config, "--resume", "--output_dir", str(folder / "killed")])
    silent = [config, "--output_dir", str(folder / "silent"), "--ddp_timeout", "5"]
    results["silent"] = start("silent", folder, silent, stop_rank_1, 3)
    read = train.read_arguments
    for name, words in {
        "other_seed": ["--split_seed", "5"],
        "other_saves": ["--save_steps", "3", "--per_device_eval_batch_size", "3"],
        "other_data": ["--train_data", str(folder / "other.jsonl")],
    }.items():
        with_other_words_on_rank_1(words)
        results[name] = start(name, folder, [config, "--output_dir", str(folder / name)])
        train.read_arguments = read
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    assert failure_program.STEP is not None
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
