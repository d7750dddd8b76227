"""benchmark_distributed.py: runs on two CPU processes, searches depths, and says what is wrong in one line."""

import json
import math
import re
from types import SimpleNamespace

import benchmark_distributed
import pytest
import torch
from _script_helpers import ROOT
from benchmark_distributed import benchmark, check_loss, largest_depth, launch, main, make_config, summarise
from benchmarks.birth_certificate import birth_certificate
from planning.memory_formulas import parameters, sizes_of


TINY = str(ROOT / "configuration" / "model" / "tiny.json")
RUN = {"device": "cpu", "config": TINY, "layers": None, "rows": 2, "length": 32, "warmup": 0, "steps": 2}


def test_two_processes_on_a_cpu(tmp_path, capsys):
    output = tmp_path / "out" / "distributed"
    words = [
        "--device",
        "cpu",
        "--processes",
        "2",
        "--config",
        "tiny",
        "--engines",
        "ddp",
        "ddp_recorded",
        "fsdp2_checkpointing",
    ]
    words += ["--rows", "2", "--length", "32", "--warmup", "1", "--steps", "2", "--output", str(output)]
    main([*words, "--commit", "abc"])
    report = json.loads(output.with_suffix(".json").read_text())
    text = output.with_suffix(".md").read_text()
    engines = ["ddp", "ddp_recorded", "fsdp2_checkpointing"]
    assert [row["engine"] for row in report["rows"]] == engines and not report["out_of_memory"]
    assert report["rows"][0]["loss"] == report["rows"][1]["loss"]  # on a CPU the same steps
    for row in report["rows"]:
        assert row["parameters"] == parameters(sizes_of(make_config(RUN)))  # tied ones once
        assert abs(row["loss"] - math.log(512)) < 0.2  # of random tokens, by small random weights
        assert row["tokens_per_second"] == pytest.approx(2 * 2 * 32 / row["median"])
        assert row["10%"] <= row["median"] <= row["90%"] and row["efficiency"] == 1.0 and row["peak"] is None
        assert f"| {row['engine']} | 2 | {row['tokens_per_second']:,.0f} | 100.0% |" in text
    assert "commit abc" in text and "# Training steps of tiny on several processes" in text
    assert output.with_suffix(".png").stat().st_size > 0
    assert str(output) in capsys.readouterr().out


def test_another_loss_of_recorded_steps_ends_it():
    rows = [{"engine": engine, "processes": 2, "loss": loss} for engine, loss in (("ddp", 3.0), ("ddp_recorded", 3.02))]
    check_loss(rows)
    for wrong in (3.1, math.nan):
        with pytest.raises(SystemExit, match="recorded steps are wrong"):
            check_loss([rows[0], rows[1] | {"loss": wrong}])


def test_efficiency_is_against_the_first_run():
    measured = {"engine": "ddp", "loss": 1.0, "peak": None, "parameters": 1}
    one = summarise(RUN | measured | {"processes": 1, "seconds": [1.0, 2.0, 3.0]}, None)
    four = summarise(RUN | measured | {"processes": 4, "seconds": [4.0]}, one)
    assert (one["tokens_per_second"], four["tokens_per_second"], four["efficiency"]) == (32, 64, 0.5)
    assert (one["10%"], one["90%"]) == (1.2, 2.8) and (four["10%"], four["90%"]) == (4.0, 4.0)


@pytest.mark.parametrize("limit", [0, 2, 3, 5, 12, 36, 38, 100, 640])
@pytest.mark.parametrize("guess", [1, 3, 24, 600])
def test_largest_depth(limit, guess):
    tried = []

    def trains(layers):
        tried.append(layers)
        return layers <= limit

    *_, (layers, failed) = largest_depth(trains, guess)
    assert layers <= limit < failed and layers % 3 == failed % 3 == 0
    assert failed - layers <= max(3, guess // 16)
    assert len(tried) == len(set(tried)) <= 16  # each is a whole run


def test_a_good_guess_takes_few_runs():
    assert len(list(largest_depth(lambda layers: layers <= 610, 600))) == 2


def test_deepest_model(monkeypatch):
    """What is planned for it fills the memory, which decides here; every try is reported."""
    memory = 2e8

    def run(run):
        planned = summarise(run | {"seconds": [1.0], "loss": 1.0, "peak": None, "parameters": 1}, None)["planned"]
        found = {"seconds": [1.0], "loss": 1.0, "peak": planned, "parameters": run["layers"]}
        return run | found if planned <= memory else None

    monkeypatch.setattr(benchmark_distributed, "launch", run)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    *_, report = benchmark(RUN, [2, 4], [], largest=True)
    assert report["rows"] == [] and [row["processes"] for row in report["largest"]] == [2, 4]
    for row in report["largest"]:
        assert 0.85 * memory <= row["peak"] == row["planned"] <= memory
        assert row["layers"] < row["out_of_memory"] <= 1.15 * row["layers"]
    text = benchmark_distributed.text_of({**report, "birth": birth_certificate("cpu", "abc")})
    assert f"| 4 | 2 | {row['layers']} |" in text and f"| {row['out_of_memory']} |" in text


def test_another_depth_keeps_the_pattern():
    deeper = make_config(RUN | {"layers": 7})
    assert (deeper.num_hidden_layers, deeper.layer_types.count("sliding_attention")) == (7, 2)
    hawk = make_config(RUN | {"config": TINY.replace("tiny", "hawk-100m"), "layers": 4})
    assert hawk.layer_types == ["linear_attention"] * 4


@pytest.mark.parametrize("errors, raises", [("torch.OutOfMemoryError: CUDA", False), ("ValueError: other", True)])
def test_only_memory_may_run_out(monkeypatch, errors, raises):
    program = f"import sys; sys.exit({errors!r})"
    real = benchmark_distributed.subprocess.Popen
    monkeypatch.setattr(
        benchmark_distributed.subprocess,
        "Popen",
        lambda command, **kwargs: real([command[0], "-c", program], **kwargs),
    )
    run = RUN | {"engine": "ddp", "processes": 2}
    if raises:
        with pytest.raises(SystemExit, match="ddp on 2 processes failed:\nValueError: other"):
            launch(run)
    else:
        assert launch(run) is None


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config", "griffin-2b"], r"--config griffin-2b: allowed are griffin-100m, .*tiny, or a JSON file"),
        (["--processes", "0"], r"--processes 0: allowed are 1 to \d+ on this machine"),
        (["--steps", "0"], r"--steps 0: allowed are whole numbers from 1"),
        (["--largest"], r"--largest with --device cpu: allowed on GPUs"),
    ],
)
def test_wrong_arguments(capsys, words, message):
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--processes", "1", *words])
    assert re.search(message, capsys.readouterr().err)
