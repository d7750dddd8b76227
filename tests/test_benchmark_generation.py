"""benchmark_generation.py: every part at the smallest size, and nothing timed that is wrong."""

import json

import benchmark_generation
import pytest
import torch
from _script_helpers import MODEL


SMALL = {
    "dtype": torch.float32,
    "decode": [(1, 6), (2, 12)],
    "new": 6,
    "turns": 2,
    "contexts": [8, 40],
    "long": 32,
    "rows": 8,
    "load": ((2, 8), (2, 4)),
}


@pytest.fixture
def words(tmp_path, monkeypatch):
    (tmp_path / "model.json").write_text(json.dumps({**MODEL, "vocab_size": 64, "tie_word_embeddings": False}))
    monkeypatch.setitem(benchmark_generation.SETTINGS, "cpu", SMALL)
    model = ["--device", "cpu", "--threads", "1", "--no-compile", "--model", str(tmp_path / "model.json")]
    return [*model, "--commit", "abc", "--output", str(tmp_path / "out" / "generation")]


def test_every_part(words, tmp_path):
    benchmark_generation.main(words)
    report = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert report.keys() >= benchmark_generation.PARTS.keys() and report["birth"]["commit"] == "abc"
    assert set(report["checks"]) == {"griffin", "recurrentgemma", "llama-mqa"} and report["checks"]["griffin"] < 1e-4
    spread = [row for part in ("decode", "context") for row in report[part]] + report["long"]["tenths"]
    spread += [row[label] for row in report["drafts"] for label in ("plain", "prompt lookup")]
    for row in spread:
        assert 0 < row["10%_ms"] <= row["median_ms"] <= row["90%_ms"]
    sizes = {(row["contestant"], row["context"]): row["cache_bytes"] for row in report["context"]}
    assert sizes["griffin", 40] == sizes["griffin", 8] and sizes["llama-mqa", 40] > sizes["llama-mqa", 8]
    page = (tmp_path / "out" / "generation.md").read_text()
    assert all(heading in page for heading in ("A token", "Against the context", "200 generations", "Drafts"))
    assert (tmp_path / "out" / "generation.png").stat().st_size > 5000


def test_nothing_is_timed_that_is_wrong(words, tmp_path, monkeypatch):
    forward = benchmark_generation.GriffinForCausalLM.forward

    def wrong(self, *arguments, **more):
        output = forward(self, *arguments, **more)
        output.logits = output.logits * (1 if more.get("use_cache") is False else 1.01)
        return output

    monkeypatch.setattr(benchmark_generation.GriffinForCausalLM, "forward", wrong)
    with pytest.raises(SystemExit, match="griffin: logits differ by .*: nothing is timed"):
        benchmark_generation.main([*words, "--parts", "decode"])
    assert not list((tmp_path / "out").iterdir())
