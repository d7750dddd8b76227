"""scripts/compare_paths.py: the whole chain, small, and that the definitions really are what runs."""

import json

import compare_paths
import pytest
import torch

from modeling_griffin import rg_lru
from modeling_griffin.kernels import dispatch
from modeling_griffin.rg_lru_scan_reference import rg_lru_scan_reference


def test_the_chain_on_a_cpu(tmp_path, capsys):
    sizes = ["--steps", "6", "--rows", "4", "--length", "24", "--width", "32"]
    compare_paths.main(["--device", "cpu", *sizes, "--output", str(tmp_path / "paths")])
    report = json.loads((tmp_path / "paths.json").read_text())
    runs = report["runs"]
    assert all(len(run["losses"]) == 6 and run["losses"][-1] < run["losses"][0] for run in runs.values())
    assert 0 < report["differences"]["definitions"]["mean"] < 0.01 < report["differences"]["fast, another seed"]["mean"]
    assert (tmp_path / "paths.png").stat().st_size > 5000
    assert {"commit", "hardware", "versions", "date"} <= report["birth"].keys()


def test_definitions_take_the_loop_and_no_kernels(monkeypatch):
    x, log_decay = torch.randn(3, 1, 5, 4), -torch.ones(4)
    expected = rg_lru_scan_reference(*x, log_decay, None, None)[0]
    with compare_paths.definitions() as attention:
        assert attention == "eager" and not dispatch.pays(x)
        assert torch.equal(rg_lru.rg_lru_scan(*x, log_decay)[0], expected)
    with compare_paths.fast() as attention:
        assert attention == "sdpa"


def test_differences():
    runs = {
        "fast": {"losses": [3.0, 2.0], "bits_per_byte": 1.0},
        "other": {"losses": [3.5, 1.9], "bits_per_byte": 1.25},
    }
    found = compare_paths.differences(runs)["other"]
    assert found == pytest.approx({"mean": 0.3, "largest": 0.5, "last tenth": 0.1, "bits per byte": 0.25})
