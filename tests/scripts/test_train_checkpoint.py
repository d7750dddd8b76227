"""Checkpoints of train.py: verified before a resume, of the same run; and a last save that was killed is made good."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _script_helpers import ROOT, made_once, write_run
from safetensors.torch import load_file
from train import run
from training import checkpoint as train_checkpoint
from training.checkpoint import MANIFEST, NotSaved, fault_of, find_checkpoint, read_manifest, saving, write_manifest


STEPS = dict(max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run of six steps with checkpoints at 2, 4 and 6, never changed."""
    return made_once(tmp_path_factory, "finished", lambda folder: run([write_run(folder, **STEPS)]))


def copy_of(finished: Path, tmp_path: Path, *without: str) -> tuple[str, Path]:
    """(the run's file, a copy of its output_dir without those entries)."""
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    for name in without:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    return str(finished / "run.yaml"), out


def assert_same_weights(out: Path, expected: Path) -> None:
    got, wanted = load_file(out / "model.safetensors"), load_file(expected / "model.safetensors")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


# What is on the disk


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage, said", [(flip, "other bytes"), (zero, "other bytes"), (cut, "bytes where"), (Path.unlink, "missing")]
)
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "model.safetensors", "rng_state.pth", "trainer_state.json"]
)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_taken(finished, tmp_path, capsys, damage, said, name):
    _, out = copy_of(finished, tmp_path, "checkpoint-6")
    damage(out / "checkpoint-4" / name)
    assert find_checkpoint(True, str(out)) == str(out / "checkpoint-2")
    line = capsys.readouterr().out
    assert re.fullmatch(rf"passed over: checkpoint-4 \({name}.*{said}.*\)\. checkpoint-2 is whole, .*\n", line)
    with pytest.raises(ValueError, match=rf"--resume .*checkpoint-4: {name}.*{said}.*allowed are whole") as error:
        find_checkpoint(str(out / "checkpoint-4"), str(out))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="holds checkpoints of another run: pass --resume"):
        find_checkpoint(None, str(out))


def test_the_manifest_itself_may_be_missing_or_damaged(finished, tmp_path):
    _, out = copy_of(finished, tmp_path)
    assert fault_of(out / "checkpoint-6") is None
    flip(out / "checkpoint-6" / MANIFEST)
    assert fault_of(out / "checkpoint-6") == f"{MANIFEST} is damaged"
    (out / "checkpoint-4" / MANIFEST).unlink()
    assert "the run ended while this was saved" in fault_of(out / "checkpoint-4")
    cut(out / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(
        ValueError, match=r"no complete checkpoint: checkpoint-6 .*; checkpoint-4 .*; checkpoint-2 \(opt"
    ):
        find_checkpoint(True, str(out))
    assert find_checkpoint(None, str(tmp_path / "new")) is None


@pytest.mark.parametrize("content", ["[]", "[1]", "3", "null", '"text"', "{}", "{", ""])
def test_json_of_another_shape_is_a_damaged_manifest(content, tmp_path):
    (tmp_path / MANIFEST).write_text(content)
    assert fault_of(tmp_path) == f"{MANIFEST} is damaged"


def test_the_newest_is_the_one_of_most_steps(tmp_path):
    for step in (4, 12, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        if step < 12:
            write_manifest(tmp_path / f"checkpoint-{step}", only_model=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert find_checkpoint(True, str(tmp_path)).endswith("checkpoint-8")
    write_manifest(tmp_path / "checkpoint-8", only_model=True)
    assert find_checkpoint(True, str(tmp_path)).endswith("checkpoint-4")


def test_resumed_from_the_checkpoint_before_a_damaged_one(finished, tmp_path, capfd):
    """The damaged one is written anew, and the end is that of the unbroken run; a tied head alarms nobody."""
    path, out = copy_of(finished, tmp_path, "checkpoint-6", "model.safetensors", "metrics.json")
    (out / "checkpoint-4" / "optimizer.pt").unlink()
    (out / "checkpoint-4" / "pytorch_model_fsdp_0").mkdir()  # left by whatever wrote it
    run([path, "--output_dir", str(out), "--resume"])
    printed = "".join(capfd.readouterr())
    assert "missing keys" not in printed
    assert_same_weights(out, finished / "out")
    assert fault_of(out / "checkpoint-4") is None and not (out / "checkpoint-4" / "pytorch_model_fsdp_0").exists()


def test_older_checkpoints_go_when_the_new_one_is_whole(tmp_path, monkeypatch):
    seen = []

    def write(folder, **facts):
        seen.append(sorted(path.name for path in folder.parent.glob("checkpoint-*")))
        write_manifest(folder, **facts)

    monkeypatch.setattr("training.trainer.write_manifest", write)
    trainer, _ = run([write_run(tmp_path, **STEPS, save_total_limit=1)])
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "checkpoint-6"]]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]
    assert trainer.args.save_total_limit == 1


# The end of a run


def end_of(metrics: dict) -> dict:
    names = ("train", "eval", "steps", "tokens_seen", "eval_loss", "bits_per_byte")
    return {name: metrics[name] for name in names}


@pytest.mark.parametrize(
    "lost", [["model.safetensors", "metrics.json", "config.json"], ["metrics.json"], ["loss_curve.png"]]
)
def test_a_run_killed_in_its_last_save_is_ended_by_resume(finished, tmp_path, capsys, lost):
    path, out = copy_of(finished, tmp_path, *lost)
    _, metrics = run([path, "--output_dir", str(out), "--resume"])
    assert "is the run's end, the last save is not whole" in capsys.readouterr().out
    expected = json.loads((finished / "out" / "metrics.json").read_text())
    assert end_of(metrics) == end_of(expected)
    assert metrics["tokens_per_second"] > 0  # of the session that trained
    assert_same_weights(out, finished / "out")
    assert all((out / name).is_file() for name in os.listdir(finished / "out") if not name.startswith("checkpoint"))
    with pytest.raises(SystemExit) as stop:
        run([path, "--output_dir", str(out), "--resume"])
    assert stop.value.code == 0 and "the run is complete" in capsys.readouterr().out


def test_the_end_is_evaluated_where_it_was_not(tmp_path):
    path = write_run(tmp_path, **{**STEPS, "eval_strategy": "no"})
    _, expected = run([path])
    for name in ("checkpoint-6/final.json", "model.safetensors", "metrics.json"):
        (tmp_path / "out" / name).unlink()
    _, metrics = run([path, "--resume"])
    assert end_of(metrics) == end_of(expected) and len(metrics["eval"]) == 1


# The same run


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--split_seed", "5"], "split_seed = 0 there, 5 now; a resumed run keeps split_seed"),
        (
            ["--seed", "7", "--max_steps", "8"],
            "max_steps = 6 there, 8 now; seed = 42 there, 7 now; a resumed run keeps seed",
        ),
        (["--sequence_length", "32"], "sequence_length = 64 there, 32 now"),
        (["--lr_scheduler_type", "cosine"], "lr_scheduler_type = 'linear' there, 'cosine' now"),
        (["--ignore_data_skip", "true"], "ignore_data_skip = False there, True now"),  # rows would be read twice
        (["--learning_rate", "0.1"], "learning_rate = 0.01 there, 0.1 now"),
        (["--tokenizer", "bytes"], "tokenizer = None there, 'bytes' now"),
        (["--max_steps", "8"], "add --allow_changed max_steps"),
        (["--gradient_accumulation_steps", "2"], "rows of a step = 2 there, 4 now"),
        (
            ["--train_data", "{folder}/other.jsonl"],
            r"train_data = '.*other.jsonl' makes other rows .* in all\) than '.*data.jsonl'",
        ),
        (
            ["--allow_changed", "max_steps", "--max_steps", "8", "--config_overrides", '{"lambda_init": "constant"}'],
            "lambda_init = ",
        ),
        (["--allow_changed", "seed"], "--allow_changed seed: allowed are max_steps, "),
    ],
)
def test_another_run_is_refused_by_name(finished, tmp_path, changes, message):
    path, out = copy_of(finished, tmp_path, "checkpoint-6")
    lines = (finished / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join([*lines[:3], lines[3].replace("the", "a", 1), *lines[4:]]))
    changes = [word.format(folder=tmp_path) if "{folder}" in word else word for word in changes]
    with pytest.raises(SystemExit, match=message) as stop:
        run([path, "--output_dir", str(out), "--resume", *changes])
    assert "\n" not in str(stop.value)


def test_what_may_change(finished, tmp_path):
    """The texts under another name; more steps and another split of the batch, by name."""
    path, out = copy_of(finished, tmp_path)
    shutil.copy(finished / "data.jsonl", tmp_path / "moved.jsonl")
    split = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--max_steps", "8"]
    allowed = ["--allow_changed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"]
    moved = ["--train_data", str(tmp_path / "moved.jsonl"), "--logging_steps", "2"]
    _, metrics = run([path, "--output_dir", str(out), "--resume", *split, *allowed, *moved])
    assert metrics["steps"] == 8 and read_manifest(out / "checkpoint-8")["settings"]["max_steps"] == 8
    with pytest.raises(SystemExit, match="--allow_changed max_steps is given without --resume"):
        run([path, "--allow_changed", "max_steps"])


# A disk that takes no more


FILL = """
import resource, sys
sys.path[:0] = {paths}
import train
save = train.GriffinTrainer._save_checkpoint
def limited(self, *arguments):
    if self.state.global_step >= 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
    return save(self, *arguments)
train.GriffinTrainer._save_checkpoint = limited
sys.argv = ["train.py", *sys.argv[1:]]
train.main()
"""


@pytest.mark.parametrize("limit", [2_000, 20_000, 100_000])
def test_a_limit_of_the_disk_ends_in_one_line(tmp_path, limit):
    """In a text file, in the weights, in the optimizer's state; --resume then goes on from what was whole before."""
    path = write_run(tmp_path, **STEPS)
    code = FILL.format(paths=[str(ROOT / "scripts"), str(ROOT)], limit=limit)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(
        r"train.py: error: \S*checkpoint-4 cannot be written: .*MiB are free.*continues from checkpoint-2", last
    )
    assert find_checkpoint(True, str(tmp_path / "out")).endswith("checkpoint-2")


def test_only_the_disk_is_called_the_disk(tmp_path):
    for error in (RuntimeError("a shape is wrong"), ConnectionRefusedError(111, "refused"), OSError("said the Hub")):
        with pytest.raises(type(error)), saving(tmp_path):
            raise error
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(NotSaved, match="cannot be written: .*; .* MiB are free"), saving(tmp_path):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            torch.save(torch.zeros(10_000), tmp_path / "x.pt")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_last_save_that_fails_says_from_where_to_go_on(finished, tmp_path):
    _, out = copy_of(finished, tmp_path)
    with pytest.raises(NotSaved, match="out cannot be written: No space left.*; --resume continues from checkpoint-6$"):
        with saving(out):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_checksums_are_those_of_the_files(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    found = train_checkpoint.describe_files(tmp_path, ["a"])
    assert found == {"a": {"size": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}}
