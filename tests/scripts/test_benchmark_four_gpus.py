"""benchmark_four_gpus.py: its commands are ones that the scripts take; a part that fails leaves the others to run."""

import sys

import benchmark_four_gpus
import benchmark_sequence
import command_line
import pytest
import torch
from benchmark_four_gpus import Part, main, parts, run


def test_rows_are_taken(monkeypatch, tmp_path):
    """Every row of a GPU's programme is a multiple of its processes, and every word an argument of the script."""
    monkeypatch.setattr(benchmark_four_gpus, "short_device_name", lambda device: "h200")
    monkeypatch.setattr(command_line, "device", str)
    rows = [command for part in parts("cuda", tmp_path, "abc") for command in part.commands if "torch" in command[2]]
    assert [row[row.index("--length") + 1] for row in rows[:2]] == ["1048576", "1048576"] and len(rows) > 3
    for row in rows:
        monkeypatch.setenv("WORLD_SIZE", row[row.index("--nproc_per_node") + 1])
        script = next(i for i, word in enumerate(row) if word.endswith("benchmark_sequence.py"))
        arguments = benchmark_sequence.read_arguments(row[script + 1 :])
        assert arguments.output.parent == tmp_path / "sequence" and arguments.commit == "abc"


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_first_that_ends_well(tmp_path):
    mark = tmp_path / "mark"
    write = python(f"open({str(mark)!r}, 'a').write('once')")
    assert run(Part("longest", 60, [python("raise SystemExit(3)"), write, write]), 60) == "done"
    assert mark.read_text() == "once"
    assert run(Part("fails", 60, [python("raise SystemExit(3)")]), 60) == "exit code 3"
    assert run(Part("hangs", 60, [python("import time; time.sleep(600)")]), 1) == "stopped after 1 s"


def test_others_run_and_the_end_says_which_failed(monkeypatch, capsys):
    programme = [Part("bad", 60, [python("raise SystemExit(3)")]), Part("good", 60, [python("print('here')")])]
    monkeypatch.setattr(benchmark_four_gpus, "parts", lambda *arguments: programme)
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu"])
    assert ended.value.code == 1
    assert "bad: exit code 3" in (said := capsys.readouterr().out) and "good: done" in said
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--seconds", "1"])
    assert "good: not begun, no time left" in capsys.readouterr().out


def test_too_few_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(command_line, "device", str)
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "2 GPUs: allowed are hosts with 4 or more" in capsys.readouterr().err
