"""A resumed run of train.py is the unbroken one, whatever it logs, evaluates and keeps; SIGTERM; a Hub out of reach."""

import errno
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import train
from _script_helpers import write_run
from matplotlib.figure import Figure
from safetensors.torch import load_file
from train import run
from training.checkpoint import NotSaved, find_checkpoint
from training.interruption import SaveAfterStep
from transformers import PreTrainedTokenizerFast


STEPS = dict(max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
EPOCHS = dict(STEPS, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=8)  # of 6 steps
DROPOUT = dict(config_overrides={"attention_dropout": 0.2})  # the random state counts
BEST = dict(load_best_model_at_end=True, metric_for_best_model="bits_per_byte", greater_is_better=True)  # the first


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoint-*"))


def killed_after(whole: Path, out: Path, step: int) -> Path:
    """What a run that was killed has left: a copy of a whole one without what came later."""
    shutil.copytree(whole, out)
    for path in out.iterdir():
        if path.is_file():
            path.unlink()
        elif int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    for last in out.glob("checkpoint-*/final.json"):
        last.unlink()
    return out


def assert_same_end(out: Path, whole: Path) -> None:
    got, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (out, whole))
    for name in ("train", "eval", "steps", "tokens_seen", "eval_loss", "bits_per_byte"):
        assert got[name] == expected[name], name
    weights, wanted = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({**STEPS, "logging_steps": 4}, (2, 6)),  # a line of the log begins before the checkpoint, and ends behind it
        ({**STEPS, "logging_steps": 4, "logging_first_step": True}, (2,)),
        ({**STEPS, "eval_on_start": True}, (2, 6)),
        ({**EPOCHS, "save_steps": 6, "eval_strategy": "epoch", "logging_strategy": "epoch"}, (6, 12)),
        ({**EPOCHS, "save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"}, (6, 12)),
    ],
    ids=["logging_steps", "logging_first_step", "eval_on_start", "at the end of an epoch", "behind its end"],
)
def test_the_log_and_the_evaluations_are_those_of_the_unbroken_run(tmp_path, settings, steps):
    path = write_run(tmp_path, **settings, **DROPOUT)
    run([path])
    whole = tmp_path / "out"
    for step in steps:
        out = killed_after(whole, tmp_path / f"from_{step}", step)
        run([path, "--output_dir", str(out), "--resume"])
        assert_same_end(out, whole)


def test_the_mean_loss_of_a_resumed_run_is_that_of_its_own_steps(tmp_path):
    path = write_run(tmp_path, **{**STEPS, "logging_steps": 3})
    run([path])
    _, by_step = run([path, "--output_dir", str(tmp_path / "by_step"), "--logging_steps", "1"])
    out = killed_after(tmp_path / "out", tmp_path / "killed", 4)
    trainer, _ = run([path, "--output_dir", str(out), "--resume"])
    mean = next(entry["train_loss"] for entry in reversed(trainer.state.log_history) if "train_loss" in entry)
    assert mean == pytest.approx(sum(entry["loss"] for entry in by_step["train"][4:]) / 2, rel=1e-6)


# The best model


def test_the_newest_checkpoint_stays_beside_the_best(tmp_path, capsys):
    """Stock Trainer deletes it before the model is saved: a kill there, and even --resume of the end, trained again."""
    path = write_run(tmp_path, **STEPS, **BEST, save_total_limit=1)
    trainer, _ = run([path])
    assert checkpoints(tmp_path / "out") == ["checkpoint-2", "checkpoint-6"] and trainer.args.save_total_limit == 1
    best = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    end = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(end[name], best[name]) for name in best)
    with pytest.raises(SystemExit) as stop:
        run([path, "--resume"])
    assert stop.value.code == 0 and "the run is complete" in capsys.readouterr().out


def test_a_moved_run_ends_with_its_best_model(tmp_path, capsys):
    path = write_run(tmp_path, **STEPS, **BEST)
    run([path])
    moved = killed_after(tmp_path / "out", tmp_path / "moved", 6)
    (tmp_path / "out").rename(tmp_path / "whole")
    run([path, "--output_dir", str(moved), "--resume"])
    assert f"the best model so far is {moved}/checkpoint-2" in capsys.readouterr().out
    end, best = (load_file(folder / "model.safetensors") for folder in (moved, moved / "checkpoint-2"))
    assert all(torch.equal(end[name], best[name]) for name in best)


def test_a_best_model_that_is_damaged_is_said_before_the_training(tmp_path):
    path = write_run(tmp_path, **STEPS, **BEST)
    run([path])
    out = killed_after(tmp_path / "out", tmp_path / "killed", 6)
    (out / "checkpoint-2" / "model.safetensors").unlink()
    message = "its best model, checkpoint-2: model.safetensors is missing; load_best_model_at_end = false does without"
    with pytest.raises(ValueError, match=f"no complete checkpoint: checkpoint-6 .{message}.; checkpoint-4 .{message}"):
        find_checkpoint(True, str(out), with_best=True)
    with pytest.raises(SystemExit, match=f"--resume .*checkpoint-6: {message}"):
        run([path, "--output_dir", str(out), "--resume", str(out / "checkpoint-6")])
    _, metrics = run([path, "--output_dir", str(out), "--resume", "--load_best_model_at_end", "false"])
    assert metrics["steps"] == 6


# SIGTERM with enable_jit_checkpoint


@pytest.mark.parametrize("step", [2, 3, 6])
def test_told_to_stop_it_ends_the_step_and_resumes_exactly(tmp_path, monkeypatch, capsys, step):
    """In the middle, between the checkpoints of an epoch's end, and in the last step of an epoch."""
    settings = {**EPOCHS, "save_strategy": "epoch", "eval_strategy": "epoch", "logging_steps": 4, **DROPOUT}
    path = write_run(tmp_path, **settings, enable_jit_checkpoint=True)
    run([path, "--output_dir", str(tmp_path / "whole")])
    training_step = train.GriffinTrainer.training_step

    def told(self, *arguments):
        if self.state.global_step == step - 1:
            callback = next(each for each in self.callback_handler.callbacks if isinstance(each, SaveAfterStep))
            callback.jit_manager.is_checkpoint_requested = True  # what the handler of the signal does
        return training_step(self, *arguments)

    monkeypatch.setattr(train.GriffinTrainer, "training_step", told)
    monkeypatch.setattr(sys, "argv", ["train.py", path])
    with pytest.raises(SystemExit) as stop:
        train.main()
    said = f"stopped by SIGTERM after step {step} of 12; --resume continues from checkpoint-{step}\n"
    assert stop.value.code == 143 and capsys.readouterr().out.endswith(said)
    assert checkpoints(tmp_path / "out") == [f"checkpoint-{step}"]
    assert not (tmp_path / "out" / "model.safetensors").exists()
    monkeypatch.setattr(train.GriffinTrainer, "training_step", training_step)
    run([path, "--resume"])
    assert_same_end(tmp_path / "out", tmp_path / "whole")


def test_told_to_stop_in_the_last_step_it_ends_as_always(tmp_path, monkeypatch):
    path = write_run(
        tmp_path, **{**EPOCHS, "eval_strategy": "epoch", "logging_strategy": "epoch"}, enable_jit_checkpoint=True
    )
    run([path, "--output_dir", str(tmp_path / "whole")])
    training_step = train.GriffinTrainer.training_step

    def told(self, *arguments):
        for each in self.callback_handler.callbacks:
            if isinstance(each, SaveAfterStep) and self.state.global_step == 11:
                each.jit_manager.is_checkpoint_requested = True
        return training_step(self, *arguments)

    monkeypatch.setattr(train.GriffinTrainer, "training_step", told)
    run([path])
    assert_same_end(tmp_path / "out", tmp_path / "whole")


# A save that fails leaves the old files


@pytest.mark.parametrize("name", ["tokenizer.json", "metrics.json", "loss_curve.png"])
def test_a_file_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch, name):
    """Of a run that goes on where a finished one has left its model: the disk is full in the middle of this file."""
    path, out = write_run(tmp_path, **STEPS), tmp_path / "out"
    run([path])
    before = (out / name).read_bytes()

    def torn(target: Path) -> None:
        target.write_bytes(before[:20])
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    write_text, save_pretrained = Path.write_text, PreTrainedTokenizerFast.save_pretrained

    def write_torn(self, *text, **more):
        return torn(self) if self.name.startswith("metrics") else write_text(self, *text, **more)

    def save_torn(self, folder):
        return save_pretrained(self, folder) if "checkpoint-" in str(folder) else torn(Path(folder) / name)

    patches = {
        "tokenizer.json": (PreTrainedTokenizerFast, "save_pretrained", save_torn),
        "metrics.json": (Path, "write_text", write_torn),
        "loss_curve.png": (Figure, "savefig", lambda self, target, **more: torn(Path(target))),
    }
    monkeypatch.setattr(*patches[name])
    with pytest.raises(NotSaved, match="No space left on device; .*--resume continues from checkpoint-8"):
        run([path, "--resume", "--max_steps", "8", "--allow_changed", "max_steps"])
    assert (out / name).read_bytes() == before and not [each.name for each in out.iterdir() if "half" in each.name]
    monkeypatch.undo()
    run([path, "--resume", "--max_steps", "8"])
    assert json.loads((out / "metrics.json").read_text())["steps"] == 8


# The Hub


def test_a_hub_that_cannot_be_reached_is_said_before_the_training(tmp_path, monkeypatch):
    def create_repo(*arguments, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    path = write_run(tmp_path, push_to_hub=True, hub_model_id="me/griffin")
    with pytest.raises(
        SystemExit, match=r"push_to_hub = true: 'me/griffin' cannot be made on the Hub \(no route to "
    ) as stop:
        run([path])
    assert "\n" not in str(stop.value)


def test_a_failed_push_leaves_the_whole_model_and_is_tried_again(tmp_path, monkeypatch):
    """The one push of `hub_strategy = end` has metrics and curve in it, as the folder has."""
    pushes, reachable = [], []

    class Made:
        repo_id = "me/griffin"

    def upload_folder(self, *, folder_path, **options):
        if not reachable:
            raise ConnectionError("no route to host")
        pushes.append({each.name for each in Path(folder_path).iterdir()})

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *arguments, **options: Made())
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    path = write_run(tmp_path, **STEPS, push_to_hub=True, hub_strategy="end")
    with pytest.raises(
        NotSaved, match=r"out holds the model, the Hub did not take it as me/griffin \(no route to host"
    ):
        run([path])
    out = tmp_path / "out"
    assert all((out / name).is_file() for name in ("model.safetensors", "metrics.json", "loss_curve.png", "README.md"))
    reachable.append(True)
    run([path, "--resume"])
    (pushed,) = pushes
    assert {"model.safetensors", "metrics.json", "loss_curve.png", "README.md", "tokenizer.json"} <= pushed
    with pytest.raises(SystemExit) as stop:
        run([path, "--resume"])
    assert stop.value.code == 0 and len(pushes) == 1
