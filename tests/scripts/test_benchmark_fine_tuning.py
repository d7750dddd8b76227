"""benchmark_fine_tuning.py: runs on a CPU, counts real tokens of timed steps, and says what it leaves out."""

import json
from argparse import Namespace

import benchmark_fine_tuning
import pytest
import torch
from benchmark_fine_tuning import Clock, buckets, main, pad, rows_of, text_bytes
from transformers import TrainerControl, TrainerState


WORDS = ["--size", "tiny", "--dtype", "float32", "--rows", "40", "--shortest", "5", "--longest", "40", "--warmup", "4"]


def test_on_a_cpu(tmp_path, capsys):
    output = tmp_path / "fine_tuning"
    ways = ["--ways", "padded", "end to end, recorded", "--steps", "3", "--output", str(output), "--commit", "abc"]
    main([*WORDS, *ways])
    report = json.loads(output.with_suffix(".json").read_text())
    rows = [(row["model"], row["way"]) for row in report["rows"]]
    assert rows == [("Griffin", "padded"), ("Llama", "padded"), ("Griffin", "end to end, recorded")]
    for row in report["rows"]:
        assert row["steps"] == 3 and row["tokens"] == report["rows"][0]["tokens"]  # the same rows for all
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
    text = output.with_suffix(".md").read_text()
    assert "commit abc" in text and "| Llama | padded |" in text and text in capsys.readouterr().out


def test_without_trl(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_fine_tuning.importlib.util, "find_spec", lambda name: None)
    main([*WORDS, "--ways", "padded, SFTTrainer", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out.md").exists()  # nothing was measured


def test_the_trainer_of_trl(tmp_path):
    pytest.importorskip("trl")
    main([*WORDS, "--ways", "padded, SFTTrainer", "padded", "--steps", "1", "--output", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 4 and len({row["tokens"] for row in rows}) == 1


def test_a_line_ends_behind_its_steps_or_its_seconds():
    for most, limit, expected in ((3, 60.0, 3), (100, -1.0, 0)):
        clock, control, state = Clock(2, most, limit), TrainerControl(), TrainerState()
        while not control.should_training_stop:
            state.global_step += 1
            clock.on_step_end(None, state, control)
        assert clock.steps == expected and state.global_step == 2 + expected


def test_rows_and_batches():
    asked = Namespace(rows=200, shortest=50, longest=2000, batch=4)
    rows = rows_of(asked)
    lengths = [len(row["input_ids"]) for row in rows]
    assert lengths[:16] == [250] * 4 + [500] * 4 + [1000] * 4 + [2000] * 4  # each recorded shape comes first
    assert len(rows) == 216 and rows == rows_of(asked)
    assert 50 <= min(lengths[16:]) < 60 and 1800 < max(lengths[16:]) <= 2000
    text = bytes(token for row in rows for token in row["input_ids"])
    assert text == text_bytes()[: len(text)]
    batch = pad(rows[16:19])
    assert batch["attention_mask"].sum(1).tolist() == lengths[16:19]
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert buckets(2000, False, 4) == [250, 500, 1000, 2000] and buckets(2000, True, 4)[-1] == 8000
