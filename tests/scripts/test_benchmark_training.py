"""scripts/benchmark_training.py: the whole chain at the smallest size, and what it refuses to time."""

import json

import benchmark_training
import pytest
import torch

from modeling_griffin import rg_lru


def test_the_chain_on_a_cpu(tmp_path, capsys):
    output = tmp_path / "training"
    benchmark_training.main(
        ["--device", "cpu", "--size", "tiny", "--cells", "1x40", "--repeats", "2", "--output", str(output)]
    )
    report = json.loads(output.with_suffix(".json").read_text())
    rows = {row["model"]: row for row in report["rows"]}
    assert {benchmark_training.OWN, "RecurrentGemma, Transformers", "Llama with MQA, Transformers"} <= rows.keys()
    for row in rows.values():
        assert row["steps"] == 2 and row["tokens_per_second"] == pytest.approx(40 / row["seconds"]["median"])
    assert {"command", "commit", "hardware", "versions", "date"} <= report["birth"].keys()
    page = output.with_suffix(".md").read_text()
    assert page in capsys.readouterr().out
    own, peer = (rows[name]["tokens_per_second"] for name in (benchmark_training.OWN, "RecurrentGemma, Transformers"))
    line = next(line for line in page.splitlines() if "| RecurrentGemma" in line)
    assert line.endswith(f" {own / peer:.3g} |")
    assert output.with_suffix(".png").stat().st_size > 5000


def test_the_plot_shows_long_rows_too(tmp_path, monkeypatch):
    """Those under activation checkpointing that ran; memory is in GiB."""
    shown = []
    monkeypatch.setattr("matplotlib.pyplot.close", shown.append)
    row = {"model": "a", "length": 8, "tokens_per_second": 5, "memory": 2**30, "seconds": {"median": 1}}
    long = {"way": benchmark_training.CHECKPOINTING, "batch": 2, "tokens_per_second": 4, "memory": 2**31, "seconds": {}}
    ways = [{**long, "length": 16, "seconds": {"median": 1}}, {**long, "length": 32}, {**row, "way": "other"}]
    report = {"rows": [row], "ways": ways, "device": "cuda", "size": "s", "dtype": "d", "birth": {"hardware": "h"}}
    benchmark_training.plot(report, tmp_path / "plot.png")
    (figure,) = shown
    drawn = [[line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes]
    assert drawn == [[[[8, 5]], [[16, 4]]], [[[8, 1]], [[16, 2]]]]


def test_models_are_of_one_size():
    """Parameters differ by what the layers are, not by depth, width or vocabulary."""
    sizes = [benchmark_training.MODELS[name]("tiny").num_parameters() for name in list(benchmark_training.MODELS)[:3]]
    assert max(sizes) < 1.15 * min(sizes)


@pytest.mark.parametrize("size", benchmark_training.PRESETS)
def test_presets_are_sizes(size):
    """A peer's size is the preset's: on tensors without memory."""
    with torch.device("meta"):
        own, *peers = (benchmark_training.MODELS[name](size) for name in list(benchmark_training.MODELS)[:3])
    assert own.config.final_logit_softcapping == 30.0 and own.config.vocab_size == 256000
    for peer in peers:
        assert abs(peer.num_parameters() / own.num_parameters() - 1) < 0.1
        assert peer.config.head_dim == own.config.head_dim


def test_nothing_is_timed_that_is_wrong(tmp_path, monkeypatch):
    right = rg_lru.rg_lru_scan

    def wrong(*inputs, **options):
        hidden, state = right(*inputs, **options)
        return (hidden if "backend" in options else 1.001 * hidden), state

    monkeypatch.setattr(rg_lru, "rg_lru_scan", wrong)
    with pytest.raises(SystemExit, match="nothing is timed"):
        benchmark_training.main(["--device", "cpu", "--size", "tiny", "--output", str(tmp_path / "training")])
    assert not list(tmp_path.iterdir())


def test_mfu():
    row = {"batch": 2, "length": 100, "parameters": 10}
    speed = benchmark_training._speed([2.0, 2.0], row, peak_flops=1e5)
    assert speed["tokens_per_second"] == 100 and speed["mfu"] == pytest.approx(6 * 10 * 100 / 1e5)
    assert benchmark_training._speed([], row, None)["seconds"] is None


@pytest.mark.parametrize("cell", ["8by2048", "1x0"])
def test_a_cell_that_is_none(cell, capsys):
    with pytest.raises(SystemExit):
        benchmark_training.main(["--cells", cell])
    assert f"{cell!r}: allowed is BATCHxTOKENS" in capsys.readouterr().err


def test_no_repeats(capsys):
    with pytest.raises(SystemExit):
        benchmark_training.main(["--repeats", "0"])
    assert "--repeats 0: allowed are whole numbers from 1" in capsys.readouterr().err


def test_a_device_that_is_not_here(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark_training.main(["--device", "cuda"])
    assert "--device: 'cuda' is not here: allowed is cpu" in capsys.readouterr().err


def test_out_of_memory_leaves_the_others(monkeypatch):
    def step(model, cell, device):
        if model == "big":
            raise torch.OutOfMemoryError("too big")
        return 1.0, 5

    monkeypatch.setattr(benchmark_training, "_step", step)
    arguments = type("Arguments", (), {"repeats": 3, "longest": 60, "device": "cuda"})
    seconds, memory = benchmark_training._take_turns({"small": "small", "big": "big"}, (1, 1), arguments)
    assert seconds == {"small": [1.0, 1.0, 1.0], "big": []} and memory == {"small": 5}


def test_a_slow_model_is_timed_once_after_its_first_step(monkeypatch):
    """The first step compiles: its length says nothing of the model's."""
    times = {"compiled": iter([100.0, 1.0, 1.0, 1.0]), "slow": iter([90.0, 80.0, 70.0, 60.0])}
    monkeypatch.setattr(benchmark_training, "_step", lambda model, cell, device: (next(times[model]), None))
    arguments = type("Arguments", (), {"repeats": 3, "longest": 60, "device": "cpu"})
    seconds, _ = benchmark_training._take_turns({name: name for name in times}, (1, 1), arguments)
    assert seconds == {"compiled": [1.0, 1.0, 1.0], "slow": [80.0]}
