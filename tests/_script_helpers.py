"""For the tests of scripts/: puts that folder on the path, and makes small texts, models and runs."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import torch
import yaml
from filelock import FileLock

from modeling_griffin import GriffinConfig, GriffinForCausalLM


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # scripts import each other as they do when one of them is run


MODEL = {
    "model_type": "griffin",
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "attention_window_size": 8,
    "lru_width": 16,
    "num_gate_blocks": 4,
}
WORDS = "the a of gate state decay window café layer übergang 状態 long\n".split(" ")


def make_text(words: int, seed: int = 0) -> str:
    """Words of one to several bytes a character."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def write_run(folder: Path, **settings) -> str:
    """A YAML file for a run of a few steps on a little text in `folder`; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(MODEL))
    records = [{"text": make_text(20 + 5 * i, seed=i)} for i in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = {
        "config_name": str(folder / "model.json"),
        "train_data": str(folder / "data.jsonl"),
        "output_dir": str(folder / "out"),
        "sequence_length": 64,
        "eval_fraction": 0.2,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **settings,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return str(path)


def made_once(factory, name: str, make) -> Path:
    """The folder that `make(folder)` has filled: once a test run, however many workers pytest-xdist has."""
    root = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder = root / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            folder.mkdir(parents=True)  # fails where it has failed before
            make(folder)
            (folder / "made").touch()
    return folder


def run_program(name: str, folder: Path, *words: str, timeout: float = 400) -> None:
    """Runs tests/`name` with `words` and `folder`, its output in folder/agent.log; all its processes end with it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with open(folder / "agent.log", "w") as log:
        command = [sys.executable, f"tests/{name}", *words, str(folder)]
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert process.returncode == 0, (folder / "agent.log").read_text()[-4000:]


def run_to_end(command: list[str], timeout: float, **options) -> subprocess.CompletedProcess:
    """subprocess.run with its output as text, both streams in one; after `timeout` seconds all descendants are killed.

    Not by their group: the workers of torchrun and `accelerate launch` are sessions of their own.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    try:
        printed, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
            process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, printed)


def save_model(folder: Path, **changes) -> GriffinForCausalLM:
    """A random model and a byte tokenizer in `folder`, as train.py leaves them."""
    from training.text_tokenizer import byte_tokenizer

    torch.manual_seed(1)
    config = GriffinConfig(**{**MODEL, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257, **changes})
    model = GriffinForCausalLM(config).eval()
    with torch.no_grad():  # louder than initial weights, so that contexts matter
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def document_nats(model: GriffinForCausalLM, tokens: list[int]) -> float:
    """-log p of tokens[1:] of one document, alone and in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1].double()
    log_p = logits.log_softmax(-1)
    return -log_p[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].sum().item()
