"""configuration/accelerate/: each file by accelerate's own loader, what really runs, and the numbers of one process."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from _launch_helpers import FILES, launch, losses
from _script_helpers import made_once, run_to_end, write_run
from accelerate.commands.config import load_config_from_file
from accelerate.utils import DistributedType, merge_fsdp_weights
from safetensors.torch import load_file
from train import run

from modeling_griffin import GriffinForCausalLM


STEPS, SAVED = 20, 8
OTHER_SPLIT = ["--allow_changed", "processes", "per_device_train_batch_size"]
# Of float32 sums in another order through 20 steps of AdamW; measured 2.5e-7 and 1.8e-6 of the largest value.
LOSS, WEIGHT = 2e-6, 2e-5


def say(file: str | Path, *words: str) -> str:
    """What launch_program.py says of the launcher's file; `words` begin with options of `accelerate launch`."""
    options = [word for word in words if word not in ("true", "false")]
    values = [word for word in words if word in ("true", "false")]
    process = launch(str(file), *options, "tests/scripts/launch_program.py", *values, timeout=120)
    said = {line for line in process.stdout.splitlines() if line.startswith(("runs:", "refused:"))}
    assert len(said) == 1, process.stdout[-4000:]
    return said.pop()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def settings_of(folder: Path, rows: int, **changes) -> str:
    """A run over epochs whose last batch is not full, with documents of many lengths packed into its rows."""
    settings = dict(max_steps=STEPS, per_device_train_batch_size=rows, save_strategy="steps", save_steps=SAVED)
    settings |= dict(weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=3, eval_strategy="steps", eval_steps=10)
    return write_run(folder, **{**settings, "use_cpu": None, "logging_steps": 1, **changes})


def assert_same_run(folder: Path, reference: Path, loss: float = LOSS, weight: float = WEIGHT):
    """Loss curve, held-out figures and the weights of the folder, loaded alone as anyone would."""
    assert losses(folder) == pytest.approx(losses(reference), rel=loss)
    got, expected = GriffinForCausalLM.from_pretrained(folder), GriffinForCausalLM.from_pretrained(reference)
    for name, tensor in expected.state_dict().items():
        error = (got.state_dict()[name] - tensor).abs().max() / tensor.abs().max()
        assert error <= weight, f"{name}: {error:.1e} of the largest value"


def copy_checkpoint(source: Path, target: Path) -> str:
    shutil.copytree(source / f"checkpoint-{SAVED}", target / f"checkpoint-{SAVED}")
    return str(target)


def train_once(folder: Path, runs: list[dict], file: str, *words: str) -> None:
    """One launch of train_program.py with these runs; leaves runs.results and log.txt."""
    (folder / "runs.json").write_text(json.dumps(runs))
    process = launch(str(FILES[file]), *words, str(folder / "runs.json"))
    (folder / "log.txt").write_text(process.stdout)
    assert process.returncode == 0, process.stdout[-6000:]


def results_of(folder: Path) -> dict:
    results = json.loads((folder / "runs.results").read_text())
    return {"folder": folder, "log": (folder / "log.txt").read_text(), **{each["name"]: each for each in results}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """One process, batches of 4 rows: the judge."""

    def make(folder):
        trainer, _ = run([settings_of(folder, 4)])
        data = trainer.train_dataset
        rows = len(data)
        assert rows % 4 == 3 and STEPS > rows / 4  # an epoch ends within the run, with a batch of 3 rows
        labels = {int((row["labels"][1:] != -100).sum()) for row in map(data.__getitem__, range(rows))}
        assert len(labels) > 2  # unequal numbers of labels a row

    return made_once(tmp_path_factory, "alone", make) / "out"


@pytest.fixture(scope="module")
def in_two(alone, tmp_path_factory) -> dict:
    """train.py in two processes by cpu_ddp.yaml: 2 rows each; 1 row each, twice a step; resumed from one process."""

    def make(folder):
        path, from_one = settings_of(folder, 2), copy_checkpoint(alone, folder / "from_one")
        halves = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--save_strategy", "no"]
        runs = [
            {"name": "out", "argv": [path]},
            {"name": "accumulated", "argv": [path, *halves, "--output_dir", str(folder / "accumulated")]},
            {"name": "from_one", "argv": [path, "--resume", "--output_dir", from_one, *OTHER_SPLIT]},
        ]
        train_once(folder, runs, "cpu_ddp", "tests/scripts/train_program.py")

    return results_of(made_once(tmp_path_factory, "ddp", make))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> dict:
    """accelerate's FSDP2 in two processes, by fsdp2.yaml and then by its variant, through the stand-in for GPUs."""

    def make(folder):
        path, variant = settings_of(folder, 2), str(FILES["fsdp2_activation_checkpointing"])
        argv = [path, "--use_cpu", "false", "--output_dir"]
        resumed = [*argv, str(folder / "resumed"), "--resume", f"{folder}/out/checkpoint-{SAVED}"]
        short = ["--max_steps", "3", "--eval_strategy", "no", "--save_strategy", "no"]
        runs = [
            {"name": "out", "argv": [*argv, str(folder / "out")]},
            {"name": "resumed", "argv": resumed},
            {"name": "checkpointed", "argv": [*argv, str(folder / "checkpointed"), *short], "accelerate": variant},
        ]
        words = ["--num_processes", "2", "--mixed_precision", "no", "tests/scripts/train_program.py", "--stand-in"]
        train_once(folder, runs, "fsdp2", *words)

    return results_of(made_once(tmp_path_factory, "fsdp2", make))


def assert_groups(groups: list):
    """Of a real optimizer: what decays, under whatever prefixes the launcher has put into the names."""
    decayed = {name.split(".")[-2] for decay, names in groups for name in names if decay}
    spared = [name for decay, names in groups for name in names if not decay]
    projections = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert decayed == {"linear_x", "linear_y", "linear_out", "conv_1d", *projections}
    assert not any(name.endswith("bias") for decay, names in groups for name in names if decay)
    for part in ("decay.lambda_bias", "recurrence_gate.weight", "input_gate.bias", "final_norm.weight", "embed_tokens"):
        assert any(part in name for name in spared), part


def test_what_hangs_is_ended_with_all_its_workers(tmp_path):
    """A launcher's worker has a session of its own; it must not outlive a test that failed."""
    start = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)"
    code = f"import subprocess, sys; child = {start}; open(sys.argv[1], 'w').write(str(child.pid)); child.wait()"
    with pytest.raises(subprocess.TimeoutExpired):
        run_to_end([sys.executable, "-c", code, str(tmp_path / "pid")], timeout=5)
    worker = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10  # a killed process may take a moment to end
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_every_file_parses_and_says_when_to_take_it():
    kinds = {name: load_config_from_file(str(path)).distributed_type for name, path in FILES.items()}
    assert kinds == {
        "cpu": DistributedType.NO,
        "gpu": DistributedType.NO,
        "cpu_ddp": DistributedType.MULTI_GPU,
        "ddp": DistributedType.MULTI_GPU,
        "fsdp2": DistributedType.FSDP,
        "fsdp2_activation_checkpointing": DistributedType.FSDP,
        "fsdp2_hosts": DistributedType.FSDP,
        "deepspeed_zero3": DistributedType.DEEPSPEED,
    }
    for path in FILES.values():
        header = path.read_text().split("compute_environment")[0]
        assert header.startswith("# ") and re.search(r"\b(run|ran)\b", header, re.I)  # when to take it; what ran it
    plain, hosts = (load_config_from_file(str(FILES[name])) for name in ("fsdp2", "fsdp2_hosts"))
    assert hosts.fsdp_config == plain.fsdp_config and hosts.num_machines == 2 and hosts.num_processes == 16
    assert plain.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False  # Λ would be lost


def test_one_process_on_a_cpu():
    assert say(FILES["cpu"]) == "runs: one process on CPU, float32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_not_replaced_by_the_cpu():
    assert say(FILES["gpu"]).startswith("refused: the launcher's configuration asks for a GPU")


def test_two_processes_of_ddp_where_the_cpu_was_asked_for():
    said = say(FILES["ddp"], "--num_processes", "2", "true")
    assert said == "runs: 2 processes on CPU (DDP), bfloat16 with float32 weights"


def test_fsdp2_does_not_become_ddp():
    said = say(FILES["fsdp2"], "--num_processes", "2", "true")
    assert said.startswith("refused: the launcher asks for FSDP, 2 processes on CPU (DDP), bfloat16")


@pytest.mark.parametrize("kind", ["MULTI_CPU", "MULTI_GPU"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_several_processes_do_not_become_one(kind, tmp_path):
    """MULTI_CPU starts one process; MULTI_GPU two, which without use_cpu do not know of each other."""
    text = FILES["cpu_ddp"].read_text().replace("distributed_type: MULTI_GPU", f"distributed_type: {kind}")
    (tmp_path / "file.yaml").write_text(text)
    said = say(tmp_path / "file.yaml", *(["false"] if kind == "MULTI_GPU" else []))
    assert said.startswith("refused: the launcher asks for 2 processes, 1 would train: on CPUs take")


def test_fsdp2_over_two_hosts():
    """Both on this machine, one process each, through the stand-in for GPUs: they find each other."""
    words = ["--num_processes", "2", "--main_process_port", str(free_port())]
    program = ["tests/scripts/launch_program.py", "--stand-in", "false"]
    with ThreadPoolExecutor(2) as hosts:
        ranks = [["--machine_rank", str(rank)] for rank in range(2)]
        done = list(hosts.map(lambda rank: launch(str(FILES["fsdp2_hosts"]), *words, *rank, *program), ranks))
    for process in done:
        assert "runs: 2 processes on CPU (FSDP2), bfloat16" in process.stdout, process.stdout[-4000:]


def test_deepspeed_zero3(alone, tmp_path):
    """In bfloat16 by autocast, with Λ in float32; the same weights at the start (ZeRO-3 must not lose them)."""
    pytest.importorskip("deepspeed")
    run_file = settings_of(tmp_path, 2, save_steps=SAVED)
    runs = [{"name": "out", "argv": [run_file, "--use_cpu", "false", "--ddp_backend", "gloo"]}]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    words = ["--num_processes", "2", "tests/scripts/train_program.py", str(tmp_path / "runs.json")]
    process = launch(str(FILES["deepspeed_zero3"]), *words, DS_ACCELERATOR="cpu")
    assert process.returncode == 0, process.stdout[-6000:]
    assert "2 processes on CPU (DeepSpeed), bfloat16" in process.stdout
    (result,) = json.loads((tmp_path / "runs.results").read_text())
    assert result["dtypes"] == {"decay": ["torch.float32"], "x": ["torch.bfloat16"]}
    assert losses(tmp_path / "out") == pytest.approx(losses(alone), rel=0.02)  # bfloat16
    assert GriffinForCausalLM.from_pretrained(tmp_path / "out").config.use_cache


def test_two_processes_give_the_numbers_of_one(alone, in_two):
    assert "2 processes on CPU (DDP), float32" in in_two["log"]
    assert_same_run(in_two["folder"] / "out", alone)


def test_accumulation_in_two_processes_gives_the_numbers_of_one(alone, in_two):
    assert_same_run(in_two["folder"] / "accumulated", alone)


def test_what_decays_in_two_processes(in_two):
    assert_groups(in_two["out"]["groups"])


def test_from_one_process_to_two(alone, in_two):
    """The rows come in the same order: the loss curve goes on as if nothing had happened."""
    assert_same_run(in_two["folder"] / "from_one", alone)


def test_from_two_processes_to_one(alone, in_two, tmp_path):
    checkpoint = copy_checkpoint(in_two["folder"] / "out", tmp_path)
    run([settings_of(tmp_path, 4), "--resume", "--output_dir", checkpoint, *OTHER_SPLIT])
    assert_same_run(tmp_path, alone)


def test_fsdp2_gives_the_numbers_of_one(alone, sharded):
    assert "2 processes on CPU (FSDP2), float32" in sharded["log"]
    assert_same_run(sharded["folder"] / "out", alone)
    assert_groups(sharded["out"]["groups"])


def test_fsdp2_resumes_from_its_shards(sharded):
    """Bit for bit: the same two processes add in the same order."""
    assert_same_run(sharded["folder"] / "resumed", sharded["folder"] / "out", loss=0, weight=0)


def test_fsdp2_shards_are_whole_in_one_process(sharded, tmp_path):
    """torch.distributed.checkpoint's shards of two processes, read by one, are the model that two processes saved."""
    folder = sharded["folder"] / "out"
    merge_fsdp_weights(str(folder / f"checkpoint-{SAVED * 2}" / "pytorch_model_fsdp_0"), str(tmp_path))
    merged = load_file(tmp_path / "model.safetensors")
    model = GriffinForCausalLM.from_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in merged.items()} == shapes


def test_fsdp2_with_checkpointed_activations_keeps_lambda_float32(sharded):
    """In bfloat16, under the names that checkpointing gives: what decays, and in what the RG-LRU works."""
    assert "2 processes on CPU (FSDP2), bfloat16" in sharded["log"]
    result = sharded["checkpointed"]
    assert any("_checkpoint_wrapped_module" in name for _, names in result["groups"] for name in names)
    assert_groups(result["groups"])
    assert result["dtypes"] == {"decay": ["torch.float32"], "x": ["torch.bfloat16"]}
    model = GriffinForCausalLM.from_pretrained(sharded["folder"] / "checkpointed")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
