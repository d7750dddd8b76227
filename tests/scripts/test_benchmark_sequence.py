"""scripts/benchmark_sequence.py runs, and what it says of what is sent is what a row owes."""

import json
import sys

from _launch_helpers import launch_environment
from _script_helpers import ROOT, run_to_end
from benchmark_training import griffin
from plan_memory import sent_for_rows
from planning.memory_formulas import sizes_of


def test_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["scripts/benchmark_sequence.py", "--device", "cpu", "--size", "tiny", "--length", "128"]
    command += ["--repeats", "1", "--piece", "24", "--output", str(tmp_path / "page"), "--commit", "abc"]
    done = run_to_end(command, 240, env=launch_environment(CUDA_VISIBLE_DEVICES=""), cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:]
    page, report = (tmp_path / "page.md").read_text(), json.loads((tmp_path / "page.json").read_text())
    assert "One sequence over 2 processes" in page and "commit abc" in page
    assert report["shared"]["length"] == 128 and report["alone"]["length"] == 64
    # 32 channels and 1 head of 16: a recurrent layer sends 3 inputs and 2 states a channel, an attention layer 15 keys
    # and values; again when activations are made anew. On the way back the right rank's gradients go left, and each
    # recurrent layer has one gathered gradient. The loss is one number.
    inputs, states, keys, float32 = 3 * 32, 2 * 32, 2 * 15 * 16, 4
    right = float32 * (2 * (2 * inputs + keys) + 2 * 2 * states + 2 * 32 + 1)
    assert report["sent"]["bytes"] == right == sent_for_rows(sizes_of(griffin("tiny").config), 1, 2, float32)
    assert report["sent"]["largest"] == float32 * keys
    assert report["sent"]["calls"] == 2 * (2 * 2 + 1) + 2 * 2 + 1 + 1
