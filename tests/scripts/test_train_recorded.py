"""train.py with `record_steps`: the run without it, resumed bit for bit; refused where weights are sharded.

On a CPU a "graph" is the same functions called again: tests/training/test_record.py.
"""

import shutil
from types import SimpleNamespace

import pytest
import torch
from _script_helpers import write_run
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from train import run
from training.arguments import read_arguments
from training.recording import record_steps

from modeling_griffin.training.record import RecordedTrainingStep, TrainingRecorder


@pytest.fixture
def recordings(monkeypatch):
    """Shapes in the order in which they were recorded."""
    seen, record = [], RecordedTrainingStep._record

    def counted(step, model):
        seen.append(tuple(step.batch.input_ids.shape))
        record(step, model)

    monkeypatch.setattr(TrainingRecorder, "can_record_on_a_cpu", True)
    monkeypatch.setattr(RecordedTrainingStep, "_record", counted)
    return seen


def assert_same_weights(found, expected):
    found, expected = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert found.keys() == expected.keys() and len(expected) > 30
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_same_run_and_resumed_bit_for_bit(tmp_path, recordings):
    """With accumulation, clipping, dropout, evaluation in between and last batches that are not full."""
    settings = dict(max_steps=6, gradient_accumulation_steps=2, max_grad_norm=0.05, save_strategy="steps", save_steps=2)
    settings |= dict(eval_strategy="steps", eval_steps=3, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=2)
    settings |= dict(config_overrides={"attention_dropout": 0.2}, per_device_train_batch_size=4)
    path = write_run(tmp_path, **settings)
    plain, recorded, resumed = tmp_path / "plain", tmp_path / "recorded", tmp_path / "resumed"
    trainer, expected = run([path, "--output_dir", str(plain)])
    assert recordings == [] and trainer.state.epoch >= 1  # its last batch is not full
    _, metrics = run([path, "--record_steps", "--output_dir", str(recorded)])
    short = len(trainer.train_dataset) % 4
    assert short and sorted(recordings) == [(short, 64), (4, 64)]
    assert metrics["train"] == expected["train"] and metrics["eval"] == expected["eval"]
    assert_same_weights(recorded, plain)

    shutil.copytree(recorded / "checkpoint-2", resumed / "checkpoint-2")
    _, metrics = run([path, "--record_steps", "--output_dir", str(resumed), "--resume"])
    assert metrics["train"] == expected["train"] and len(recordings) == 4
    assert_same_weights(resumed, plain)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, recordings):
    path = write_run(tmp_path, learning_rate=1e30, max_steps=4)
    with pytest.raises(FloatingPointError, match="not finite"):
        run([path, "--record_steps"])
    assert recordings


@pytest.mark.parametrize("engine", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_weights_are_refused(engine):
    trainer = type("", (), {"accelerator": type("", (), {"distributed_type": engine})})
    with pytest.raises(
        ValueError, match="record_steps = true under (FSDP2|DeepSpeed), .*: allowed are one GPU and DDP"
    ):
        record_steps(trainer, 64)


def test_a_compiled_model_is_refused():
    alone = SimpleNamespace(distributed_type=DistributedType.NO)
    trainer = SimpleNamespace(accelerator=alone, args=SimpleNamespace(torch_compile=True))
    with pytest.raises(ValueError, match="record_steps = true with torch_compile = true: allowed is one of them"):
        record_steps(trainer, 16)


def test_rows_that_processes_share_are_refused(tmp_path):
    path = write_run(tmp_path, record_steps=True, sequence_parallel_size=2)
    with pytest.raises(ValueError, match="record_steps = true with sequence_parallel_size = 2: allowed is 1"):
        read_arguments([path])
