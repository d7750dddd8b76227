"""benchmark_scan.py on a CPU: both layers run, and what it prints is what it measured."""

import re

import benchmark_scan


def test_the_chain_on_a_cpu(tmp_path, monkeypatch, capsys):
    """At a quarter of its length; the ratio grows with it, since RecurrentGemma's backward pass is O(T^2)."""
    reports = list(benchmark_scan.benchmark_cpu(length=1024))
    monkeypatch.setattr(benchmark_scan, "benchmark_cpu", lambda: reports)
    benchmark_scan.main(["--device", "cpu", "--output", str(tmp_path / "scan")])
    (report,) = reports
    own, peer = report["own"], report["recurrent_gemma"]
    assert list(own) == [128, 256, 512, 1024, 2048] and list(peer) == [256, 1024]
    assert report["ratio"] == peer[1024] / own[1024] > 5
    printed = capsys.readouterr().out
    assert (tmp_path / "scan.md").read_text().strip() == printed.strip() and (tmp_path / "scan.json").exists()
    rows = re.findall(r"\| (\d+) \| ([\d.]+) \| ([\d.]*) \|", printed)
    assert [int(length) for length, *_ in rows] == list(own)
    assert [f"{own[int(length)] * 1e3:.1f}" for length, *_ in rows] == [ms for _, ms, _ in rows]
    growth = own[2048] / own[128]
    assert f"At T = 1024: {report['ratio']:.0f} times faster. From T = 128 to 2048: {growth:.1f} times" in printed
