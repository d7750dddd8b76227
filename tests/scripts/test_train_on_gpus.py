"""train.py on two GPUs by DDP and FSDP2: what runs, the losses of one GPU, killed and resumed, on fewer GPUs too."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from _launch_helpers import FILES, launch, launch_command, launch_environment, losses
from _script_helpers import ROOT, made_once, make_text, write_run

from modeling_griffin import GriffinForCausalLM


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
STEPS, SAVED, ROWS = 40, 8, 8  # rows a step, over all GPUs
# Wide and long enough for the kernels: a GPU's four rows of 1024 tokens have 2^20 numbers.
MODEL = {"hidden_size": 256, "intermediate_size": 768, "lru_width": 256, "num_attention_heads": 2, "head_dim": 128}
# Relative, of a loss: other sums of bfloat16 products through 40 steps, 0.8% measured; FSDP2 has the residual stream
# and the sums of gradients in bfloat16 too, 1.8%. The same processes repeat every bit.
LOSS, LOSS_OF_FSDP2 = 0.02, 0.04


def settings_of(folder: Path, gpus: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [json.dumps({"text": make_text(200 + 7 * i, seed=i)}) for i in range(150)]
    (folder / "texts.jsonl").write_text("\n".join(texts) + "\n")
    settings = dict(train_data=str(folder / "texts.jsonl"), eval_fraction=0.1, sequence_length=1024, max_steps=STEPS)
    settings |= dict(per_device_train_batch_size=ROWS // gpus, save_strategy="steps", save_steps=SAVED, use_cpu=None)
    settings |= dict(config_overrides={**MODEL, "attention_window_size": 256}, learning_rate=1e-3, weight_decay=0.1)
    return write_run(folder, **settings, eval_strategy="steps", eval_steps=20, warmup_steps=4)


def train(file: str, folder: Path, gpus: int, *words: str) -> dict:
    """Launches train_program.py, which says in what the RG-LRU worked; returns `results_of`."""
    argv = [settings_of(folder, gpus), *words]
    (folder / "runs.json").write_text(json.dumps([{"name": "out", "argv": argv}]))
    program = ["--num_processes", str(gpus), "tests/scripts/train_program.py", str(folder / "runs.json")]
    process = launch(FILES[file], *program, CUDA_VISIBLE_DEVICES=",".join(map(str, range(gpus))))
    assert process.returncode == 0, process.stdout[-6000:]
    (folder / "log.txt").write_text(process.stdout)
    return results_of(folder)


def results_of(folder: Path) -> dict:
    (results,) = json.loads((folder / "runs.results").read_text())
    out = folder / "out"
    return results | {"log": (folder / "log.txt").read_text(), "losses": losses(out), "out": out}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Callable[..., dict]:
    """Of a whole run by that launcher."""

    def run(file: str, gpus: int = 2) -> dict:
        made = made_once(tmp_path_factory, f"{file}_on_gpus", lambda folder: train(file, folder / "run", gpus))
        return results_of(made / "run")

    return run


def assert_same_losses(found: list[float], expected: list[float], tolerance: float) -> None:
    assert len(found) == len(expected)
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected))
    print(f"largest difference of a loss: {worst:.1e}")
    assert worst <= tolerance


@pytest.mark.parametrize("file", ["ddp", "fsdp2", "fsdp2_activation_checkpointing"])
def test_two_gpus_give_the_losses_of_one(file, unbroken):
    found, alone = unbroken(file), unbroken("gpu", gpus=1)["losses"]
    kind = "DDP" if file == "ddp" else "FSDP2"
    assert f"2 processes on GPU ({kind}), bfloat16 with float32 weights" in found["log"]
    assert "RG-LRU scan: triton" in found["log"]
    assert found["dtypes"] == {"decay": ["torch.float32"], "x": ["torch.bfloat16"]}
    assert_same_losses(found["losses"], alone, LOSS if file == "ddp" else LOSS_OF_FSDP2)
    assert alone[0] > 1.3 * alone[STEPS - 1]  # it learns
    model = GriffinForCausalLM.from_pretrained(found["out"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("file", ["ddp", "fsdp2"])
def test_killed_and_resumed(file, unbroken, tmp_path):
    """kill -9 of all processes, some time after the second checkpoint."""
    out = tmp_path / "out"
    words = ["--num_processes", "2", "scripts/train.py", settings_of(tmp_path, 2)]
    command, environment = launch_command(FILES[file], *words), launch_environment(CUDA_VISIBLE_DEVICES="0,1")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (out / f"checkpoint-{2 * SAVED}" / "manifest.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        os.kill(each.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "metrics.json").exists()
    found = train(file, tmp_path, 2, "--resume")
    assert "torch.float32" in found["dtypes"]["decay"]
    assert_same_losses(found["losses"], unbroken(file)["losses"], tolerance=0)


def test_shards_of_two_gpus_resume_on_one(unbroken, tmp_path):
    whole = unbroken("fsdp2")
    shutil.copytree(whole["out"] / f"checkpoint-{SAVED}", tmp_path / "out" / f"checkpoint-{SAVED}")
    changed = ["--allow_changed", "processes", "per_device_train_batch_size"]
    found = train("fsdp2", tmp_path, 1, "--resume", *changed)
    assert "one process on GPU (FSDP2)" in found["log"]
    assert_same_losses(found["losses"], whole["losses"], LOSS_OF_FSDP2)
