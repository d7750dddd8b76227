"""benchmark_fine_tuning.py: runs on a CPU, counts real tokens of timed steps, and says what it leaves out."""

import json

import benchmark_fine_tuning
import pytest
import torch
from benchmark_fine_tuning import buckets, main, pad, rows_of


WORDS = ["--size", "tiny", "--dtype", "float32", "--rows", "40", "--shortest", "5", "--longest", "40", "--warmup", "2"]


def test_on_a_cpu(tmp_path, capsys):
    output = tmp_path / "fine_tuning"
    ways = ["--ways", "padded", "end to end, recorded", "--seconds", "0.01", "--output", str(output), "--commit", "abc"]
    main([*WORDS, *ways])
    report = json.loads(output.with_suffix(".json").read_text())
    rows = [(row["model"], row["way"]) for row in report["rows"]]
    assert rows == [("Griffin", "padded"), ("Llama", "padded"), ("Griffin", "end to end, recorded")]
    for row in report["rows"]:
        assert row["steps"] >= 1 and 4 * 5 * row["steps"] <= row["tokens"] <= 4 * 40 * row["steps"]
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
    text = output.with_suffix(".md").read_text()
    assert "commit abc" in text and "| Llama | padded |" in text and text in capsys.readouterr().out


def test_without_trl(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_fine_tuning.importlib.util, "find_spec", lambda name: None)
    main([*WORDS, "--ways", "padded, SFTTrainer", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out.md").exists()  # nothing was measured


def test_rows_and_batches():
    rows = rows_of(200, 50, 2000, 64)
    lengths = [len(row["input_ids"]) for row in rows]
    assert 50 <= min(lengths) < 60 and 1800 < max(lengths) <= 2000 and rows == rows_of(200, 50, 2000, 64)
    batch = pad(rows[:3])
    assert batch["attention_mask"].sum(1).tolist() == lengths[:3]
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert buckets(2000, False, 4) == [250, 500, 1000, 2000] and buckets(2000, True, 4)[-1] == 8000
