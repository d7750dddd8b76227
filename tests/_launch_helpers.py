"""For the tests of launchers: `accelerate launch` by a file of configuration/accelerate/, and what a run left."""

import json
import os
import subprocess
import sys
from pathlib import Path

from _script_helpers import ROOT, run_to_end


FILES = {path.stem: path for path in sorted((ROOT / "configuration" / "accelerate").glob("*.yaml"))}


def launch_command(file: str | Path, *words: str) -> list[str]:
    """`accelerate launch --config_file file words`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*command, *([] if "--main_process_port" in words else ["--main_process_port", "0"]), *words]


def launch(file: str | Path, *words: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """Without GPUs; all its processes end with it."""
    environment = {"CUDA_VISIBLE_DEVICES": "", **environment}
    return run_to_end(launch_command(file, *words), timeout, env=launch_environment(**environment), cwd=ROOT)


def launch_environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def losses(folder: Path) -> list[float]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return [entry["loss"] for entry in metrics["train"]] + [entry["eval_bits_per_byte"] for entry in metrics["eval"]]
