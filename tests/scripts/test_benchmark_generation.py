"""The benchmark of generation, on a tiny model: what it writes, and that it times nothing that is wrong."""

import json
from pathlib import Path

import benchmark_generation
import pytest
import torch

from modeling_griffin import GriffinForCausalLM
from modeling_griffin.cache_name import CACHE_NAME


ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "decode": [(1, 8), (2, 5)],
    "new": 6,
    "turns": 2,
    "contexts": [8, 70],
    "long": 30,
    "rows": 3,
    "generations": 7,
    "load": ((2, 6), (2, 5)),
    "rollouts": (2, 2, 4, 3),
}


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    for key, value in SMALL.items():
        monkeypatch.setitem(benchmark_generation.SETTINGS["cpu"], key, value)
    model = str(ROOT / "configuration" / "model" / "tiny.json")
    return ["--device", "cpu", "--model", model, "--no-compile", "--threads", "1", "--output", str(tmp_path / "out")]


def test_every_part(arguments, tmp_path):
    benchmark_generation.main(arguments)
    report = json.loads((tmp_path / "out.json").read_text())
    assert {"command", "commit", "hardware", "versions", "date"} <= set(report["birth"])
    assert {(row["rows"], row["prompt"]) for row in report["decode"]} == {(1, 8), (2, 5)}
    assert {row["contestant"] for row in report["decode"]} == {"griffin", "recurrentgemma", "llama-mqa"}
    assert all(0 < row["10%_ms"] <= row["median_ms"] <= row["90%_ms"] for row in report["decode"])
    assert [row["unwatched_s"] > 0 for row in report["decode"] if row["contestant"] == "griffin"] == [True, True]
    ours = {row["context"]: row["cache_bytes"] for row in report["context"] if row["contestant"] == "griffin"}
    peer = {row["context"]: row["cache_bytes"] for row in report["context"] if row["contestant"] == "llama-mqa"}
    # 2 recurrent layers of 192 channels, 4 taps and a state; keys and values of 64 numbers, 63 slots of them
    assert ours[70] == 2 * 192 * 5 * 4 + 63 * 2 * 64 * 4
    assert peer[70] == 3 * 2 * (70 + SMALL["new"] - 1) * 64 * 4
    assert len(report["long"]["tenths"]) == 10 and report["long"]["tokens"] == 30
    rates = report["serving"]["tokens_per_s"]
    rollouts = {"rollouts, generate_batch", "rollouts, left-padded generate", "rollouts, llama-mqa left-padded"}
    batches = {"generate_batch", "generate_batch, sampled", "generate_batch, 12 rows", "left-padded generate"}
    batches |= {"generate_batch, smaller steps kept"}
    assert set(rates) == batches | rollouts and all(rate > 0 for each in rates.values() for rate in each)
    assert report["serving"]["bound_tokens_per_s"] > 0 and 0 < report["serving"]["steps"] <= 7 * 5
    assert 0 < sum(report["serving"]["host_ms"].values()) <= report["serving"]["wall_ms"]
    assert report["serving"]["host_operations"] and report["serving"]["passes"] >= 7 / 3
    assert [row["tokens_a_pass"] >= 1 for row in report["drafts"]] == [True, True]
    beside = {(row["contestant"], row["step"]) for row in report["offpath"]}
    assert beside == {("griffin", s) for s in ("fused", "forward", "transformers")} | {("llama-mqa", "transformers")}
    assert all(row["ms"] > 0 for row in report["offpath"])
    text = (tmp_path / "out.md").read_text()
    assert all(
        f"## {title}" in text for title in ("A token", "Against the context", "One generation of 30", "7 generations")
    )
    assert (tmp_path / "out.png").stat().st_size > 0


def test_what_was_measured_before_it_ended_is_kept(arguments, tmp_path, monkeypatch):
    """A run on a borrowed GPU may be cut off between two cells."""
    generate = benchmark_generation.generate

    def ends(model, ids, *others, **more):
        if "streamer" in more and ids.shape == (2, 5):
            raise KeyboardInterrupt
        return generate(model, ids, *others, **more)

    monkeypatch.setattr(benchmark_generation, "generate", ends)
    with pytest.raises(KeyboardInterrupt):
        benchmark_generation.main([*arguments, "--parts", "decode"])
    rows = json.loads((tmp_path / "out.json").read_text())["decode"]
    assert {(row["rows"], row["prompt"]) for row in rows} == {(1, 8)}


def test_nothing_is_timed_that_is_wrong(arguments, tmp_path, monkeypatch):
    """A step that forgets its cache finds other logits than a forward pass without one."""
    forward = GriffinForCausalLM.forward

    def forgetful(self, *args, **kwargs):
        return forward(self, *args, **{**kwargs, CACHE_NAME: None, "attention_mask": None})

    monkeypatch.setattr(GriffinForCausalLM, "forward", forgetful)
    with pytest.raises(SystemExit, match="griffin: .* nothing is timed"):
        benchmark_generation.main(arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_token_of_a_batch_is_refused(arguments, monkeypatch):
    generate = GriffinForCausalLM.generate_batch

    def off_by_one(self, *args, **kwargs):
        results = generate(self, *args, **kwargs)
        for result in results:
            result.tokens[-1] = (result.tokens[-1] + 1) % self.config.vocab_size
        return results

    monkeypatch.setattr(GriffinForCausalLM, "generate_batch", off_by_one)
    with pytest.raises(SystemExit, match="generate_batch: a token is .* nothing is timed"):
        benchmark_generation.main([*arguments, "--parts", "serving"])


@pytest.fixture(autouse=True)
def threads():
    """The script sets the number of threads for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
