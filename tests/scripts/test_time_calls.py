"""Memory and speed over calls of all kinds, one after another; the script has the page of thousands."""

import json
import os
import subprocess
import sys

import pytest
import time_calls
from _script_helpers import ROOT


# In a process of its own: what other tests leave behind is collected at any time.
PROGRAM = """
import json, torch, time_calls

def leaking(model):
    kept = []

    def call(ids, new):
        kept.append(ids.clone())
        for _ in range(2000 * len(kept)):
            pass

    return {"leaking": call}

torch.set_num_threads(1)
notes = {"all": time_calls.run_calls(120, warm_up=60)}
time_calls.kinds_of_calls = leaking
notes["leaking"] = time_calls.run_calls(40, warm_up=2)
print(json.dumps(notes))
"""


@pytest.fixture(scope="module")
def notes() -> dict:
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_memory_and_speed_stay_flat(notes):
    """Over 2,000 calls it is 1.2 MiB more, as many tensors, and 0.99 times the time; few calls vary more."""
    found = notes["all"]
    assert len(set(found["tensors"])) == 1
    assert found["bytes"][-1] - found["bytes"][0] < 8 * 2**20
    first, last = time_calls.first_and_last(found, 60)
    assert last < 2 * first


def test_what_is_kept_is_found(notes):
    """Of a call that leaves a tensor behind, and takes longer each time."""
    found = notes["leaking"]
    first, last = time_calls.first_and_last(found, 20)
    assert found["tensors"] == [found["tensors"][0] + 20 * half for half in range(3)] and last > 1.3 * first


def test_the_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(time_calls, "LOOKS", 3)
    time_calls.main(["--calls", "24", "--warm_up", "0", "--output", str(tmp_path / "page")])
    page = (tmp_path / "page.md").read_text()
    assert (
        "24 calls behind 0 to warm up" in page
        and "435 modules and 484 parameters" in page
        and page in capsys.readouterr().out
    )
