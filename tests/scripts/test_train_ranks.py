"""train.py in two processes: they leave together, compare what they have before the first step, and wait in bounds."""

import json
from pathlib import Path

import pytest
from _script_helpers import made_once, run_program, write_run
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict:
    folder = made_once(tmp_path_factory, "rank_faults", run_jobs)
    return {"folder": folder, **json.loads((folder / "results.json").read_text())}


def run_jobs(folder: Path) -> None:
    path = write_run(folder, max_steps=4, save_strategy="steps", save_steps=2)
    lines = (folder / "data.jsonl").read_text().splitlines(keepends=True)
    (folder / "other.jsonl").write_text("".join(lines[:-1]))
    run_program("scripts/rank_faults_program.py", folder, path)


def test_a_complete_run_is_left_together(jobs):
    assert jobs["whole"]["failed"] is None and "2 processes on CPU (DDP), float32" in jobs["whole"]["printed"]
    assert jobs["complete"]["failed"] is None
    assert jobs["complete"]["printed"].count("the run is complete") == 1 and "Error" not in jobs["complete"]["printed"]


def test_a_last_save_that_was_killed_is_made_good(jobs):
    assert jobs["last_save"]["failed"] is None
    killed, ended = (load_file(jobs["folder"] / name / "model.safetensors") for name in ("killed", "ended"))
    assert all((killed[name] == ended[name]).all() for name in ended)
    metrics = [json.loads((jobs["folder"] / name / "metrics.json").read_text()) for name in ("killed", "ended")]
    assert metrics[0]["eval"] == metrics[1]["eval"] and metrics[0]["train"] == metrics[1]["train"]


def test_a_rank_that_is_silent_is_named_after_ddp_timeout(jobs):
    silent = jobs["silent"]
    assert silent["failed"] is not None and silent["seconds"] < 90
    assert "train.py: error (rank 0 of 2): no answer from rank 1 (" in silent["printed"]
    assert "Traceback" not in silent["printed"]


@pytest.mark.parametrize(
    "name, said",
    [
        ("other_seed", "rank 1 has split_seed = 5, rank 0 has 0"),
        ("other_saves", "per_device_eval_batch_size = 3, rank 0 has 8; save_steps = 3"),
        ("other_data", "train_data = '2,"),
    ],
)
def test_ranks_compare_before_the_first_step(jobs, name, said):
    assert jobs[name]["failed"] is not None and said in jobs[name]["printed"]
    assert "tokens/s" not in jobs[name]["printed"]
