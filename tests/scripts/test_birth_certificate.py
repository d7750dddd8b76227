"""birth_certificate.py, and that every script can be imported."""

import os
import subprocess
import sys

import pytest
from _script_helpers import ROOT
from benchmarks.birth_certificate import birth_certificate, birth_lines, quantiles


def test_scripts_can_be_imported():
    """In a process of their own: run_shipped_code.py shuts the package out of its process, so it is the last."""
    names = sorted((path.stem for path in (ROOT / "scripts").glob("*.py")), key=lambda name: name == "run_shipped_code")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", f"import {', '.join(names)}"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_commit_is_that_of_the_script(monkeypatch, tmp_path):
    """Wherever the command runs; and one can be given where there is no history, or no git."""
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    expected = done.stdout.strip() if done.returncode == 0 else "unknown"
    assert birth_certificate("cpu", None)["commit"] == expected
    monkeypatch.setenv("PATH", str(tmp_path))
    assert birth_certificate("cpu", None)["commit"] == "unknown"
    birth = birth_certificate("cpu", "abc", ["no-such-package"])
    assert birth["commit"] == "abc" and "torch" in birth["versions"] and "no-such-package" not in birth["versions"]
    (line,) = birth_lines(birth)
    assert birth["date"] in line and "commit abc" in line


def test_the_command_does_not_say_where_things_lay(monkeypatch):
    words = ["scripts/a.py", "--output", "/srv/out/run", "--text=/srv/text", "--rate", "1/2", "--name=x", "b/c"]
    monkeypatch.setattr(sys, "argv", words)
    command = birth_certificate("cpu", "abc")["command"]
    assert command.endswith("scripts/a.py --output run --text=text --rate 1/2 --name=x b/c")


def test_quantiles():
    """Within what was measured, however few."""
    assert quantiles([3.0]) == {"median": 3.0, "10%": 3.0, "90%": 3.0}
    assert quantiles([1.0, 2.0, 3.0]) == pytest.approx({"median": 2.0, "10%": 1.2, "90%": 2.8})
