"""What test_train_failures.py starts: train.py in two processes, under torchrun's agent, with processes that die.

`failure_program.py CONFIG.yaml FOLDER`. Each job forks its two ranks from this process, which has imported everything;
the agent that watches them is the one of torchrun and `accelerate launch`. Writes FOLDER/results.json.
"""

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import _script_helpers  # noqa: F401  (puts scripts/ on the path)
import torch
import train
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


STEP = train.GriffinTrainer.training_step


def rank(argv: list[str], log: str, fault, step: int) -> None:
    """One process: train.py with `argv`, in which `fault(rank, inputs)` is called at the start of step `step`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    done = []

    def training_step(self, model, inputs, *arguments):
        if self.state.global_step >= step - 1 and not done:
            done.append(fault(self.args.process_index, inputs, self.model))
        return STEP(self, model, inputs, *arguments)

    train.GriffinTrainer.training_step = training_step
    sys.argv = ["train.py", *argv]
    try:
        train.main()
    except Exception:  # as the interpreter does that `accelerate launch` starts; a forked one only tells the agent
        traceback.print_exc()
        raise


def start(name: str, folder: Path, argv: list[str], fault=lambda *_: None, step: int = 1) -> dict:
    """Runs one job; how long it took, the exit codes of the ranks that the agent saw fail, what they printed."""
    config = LaunchConfig(
        1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", max_restarts=0
    )
    log, begun, failed = str(folder / f"{name}.log"), time.monotonic(), None
    try:
        elastic_launch(config, rank)(argv, log, fault, step)
    except ChildFailedError as error:
        failed = {rank: failure.exitcode for rank, failure in error.failures.items()}
    return {"seconds": time.monotonic() - begun, "failed": failed, "printed": Path(log).read_text()}


def kill(rank: int, *_) -> None:
    """SIGKILL at a moment that nobody chose, in this step or one of the next."""
    print(f"rank {rank} will be killed", flush=True)
    threading.Timer(random.uniform(0, 0.05), os.kill, (os.getpid(), signal.SIGKILL)).start()


def kill_one(rank: int, *_) -> None:
    if rank == 1:
        kill(rank)


def raise_on_one(rank: int, *_) -> None:
    if rank == 1:
        raise RuntimeError("the disk of rank 1 is full")


def tell_one(rank: int, *_) -> None:
    """SIGTERM, which `enable_jit_checkpoint` takes for serious when no SIGKILL has followed for three seconds."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3.5)


def spoil_on_one(rank: int, inputs, model) -> None:
    """An infinity in the activations of one row, of rank 1 only."""
    if rank == 1:
        model.model.layers[1].mlp_block.register_forward_hook(
            lambda module, arguments, output: output.index_fill(0, torch.tensor([1]), torch.inf)
        )


def main(config: str, folder: Path) -> None:
    run = [config, "--output_dir", str(folder / "broken")]
    results = {
        "whole": start("whole", folder, [config, "--output_dir", str(folder / "whole")]),
        "kill_one": start("kill_one", folder, run, kill_one, 7),
        "kill_all": start("kill_all", folder, [*run, "--resume"], kill, 14),
        "resumed": start("resumed", folder, [*run, "--resume"]),
        "told": start(
            "told", folder, [config, "--output_dir", str(folder / "told"), "--enable_jit_checkpoint"], tell_one, 3
        ),
        "raised": start("raised", folder, [config, "--output_dir", str(folder / "raised")], raise_on_one, 2),
        "spoiled": start("spoiled", folder, [config, "--output_dir", str(folder / "spoiled")], spoil_on_one, 3),
    }
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
