"""First calls, each in a process of its own: one with no kernels on disk, one with what it left."""

import json
import subprocess
import sys

import pytest
import time_first_call


def test_the_page(tmp_path, capsys):
    output = tmp_path / "first"
    time_first_call.main(["--device", "cpu", "--cases", "tiny:2", "--output", str(output), "--commit", "abc"])
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert [(row["model"], row["rows"], row["kernels"]) for row in rows] == [
        ("tiny", 2, "compiled"),
        ("tiny", 2, "on disk"),
    ]
    assert all(len(row["seconds"]) == time_first_call.CALLS and min(row["seconds"]) > 0 for row in rows)
    page = output.with_suffix(".md").read_text()
    assert "commit abc" in page and "| tiny | 2 | on disk |" in page and page in capsys.readouterr().out


def test_a_process_that_ends_early_is_said():
    command = [sys.executable, "-c", "print('what a library says'); raise SystemExit(3)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        with pytest.raises(RuntimeError, match="ended before it was timed, with exit status 3"):
            time_first_call.answer(process, time_first_call.READY)


@pytest.mark.parametrize("word", ["2b", "2b:0", "3b:1", "2b:x"])
def test_a_case_that_is_none(word, capsys):
    with pytest.raises(SystemExit):
        time_first_call.main(["--cases", word])
    assert f"{word!r}: allowed is SIZE:ROWS" in capsys.readouterr().err
