"""The benchmark of vLLM, with a stand-in for its engine: what is timed, what is judged, what a failure leaves."""

import json
import subprocess
from pathlib import Path

import benchmark_vllm
import pytest
import torch

from modeling_griffin import GenerationRequest


SMALL = {"size": "tiny", "rows": [1, 3], "prompt": 6, "new": 4}


@pytest.fixture
def engine(monkeypatch):
    """Takes the place of the child process; `engine.answers` are a return code and what makes the tokens, per call."""

    class Engine:
        answers: list = []
        jobs: list = []
        environments: list = []

        def run(self, command, env, stdout, stderr, timeout):
            job = json.loads(Path(command[-1]).read_text())
            self.jobs.append(job)
            self.environments.append(env)
            code, tokens = self.answers.pop(0)
            if code is None:
                raise subprocess.TimeoutExpired(command, timeout)
            if code:
                stdout.write("Traceback\nvllm.SomeError: no such kernel\ngoodbye\n")
                stdout.flush()
            else:
                rows = [
                    {"rows": n, "seconds": [2.0] * job["turns"], "tokens": [tokens(p) for p in job["prompts"][:n]]}
                    for n in job["rows"]
                ]
                facts = {"start_s": 1.0, "backends": ["A"], "runner": "V2", "mode": "NONE", "graphs": "NONE"}
                Path(command[-1]).with_suffix(".out.json").write_text(json.dumps({**facts, "rows": rows}))
            return subprocess.CompletedProcess(command, code)

    fake = Engine()
    fake.jobs, fake.environments = [], []
    monkeypatch.setattr(benchmark_vllm.subprocess, "run", fake.run)
    for key, value in SMALL.items():
        monkeypatch.setitem(benchmark_vllm.SETTINGS["cpu"], key, value)
    monkeypatch.setitem(benchmark_vllm.SETTINGS["cpu"], "remedies", list(benchmark_vllm.REMEDIES))
    return fake


def greedy(prompt):
    model = benchmark_vllm.make_model("tiny", {"device": "cpu", "dtype": torch.float32})
    request = GenerationRequest(prompt, max_new_tokens=SMALL["new"], eos_token_id=())
    return model.generate_batch([request])[0].tokens


def run(tmp_path, *words):
    output = tmp_path / "page"
    benchmark_vllm.main(["--device", "cpu", "--turns", "2", "--commit", "c", "--output", str(output), *words])
    return json.loads(output.with_suffix(".json").read_text()), output.with_suffix(".md").read_text()


def test_a_remedy_is_kept_for_the_next_way(engine, tmp_path):
    engine.answers = [(1, None), (0, greedy), (0, greedy)]
    report, page = run(tmp_path, "--ways", "recorded", "eager")
    helped = "recorded, Triton attention"
    assert list(report["ways"]) == ["generate_batch", "recorded", helped, "eager, Triton attention"]
    assert report["ways"]["recorded"]["failed"] == "vllm.SomeError: no such kernel"
    assert [row["rows"] for row in report["ways"][helped]["rows"]] == [1, 3]
    assert all(row["shortfall"] < 1e-6 for way in report["ways"].values() for row in way["rows"])
    assert f"| vLLM, {helped} | 3 | 6 | 2.000, 2.000 |" in page  # 3 requests of 4 tokens in 2 s
    assert "recorded failed: vllm.SomeError" in page and (tmp_path / "page_recorded.log").exists()
    assert [job["engine"].get("attention_backend") for job in engine.jobs] == [None, "TRITON_ATTN", "TRITON_ATTN"]
    assert engine.jobs[2]["engine"]["enforce_eager"] and engine.jobs[2]["engine"]["max_model_len"] == 10


def test_wrong_tokens_are_not_timed(engine, tmp_path, monkeypatch):
    monkeypatch.setitem(benchmark_vllm.SETTINGS["cpu"], "remedies", [""])
    engine.answers = [(0, lambda prompt: [token ^ 1 for token in greedy(prompt)]), (None, None)]
    report, page = run(tmp_path, "--ways", "eager", "recorded")
    assert report["ways"]["eager"]["rows"] == [] and "below the argmax" in report["ways"]["eager"]["failed"]
    assert report["ways"]["recorded"]["failed"].startswith("took longer than")
    assert "| vLLM, eager |" not in page


def test_without_time(engine, tmp_path):
    report, _ = run(tmp_path, "--total", "1")
    assert report["ways"]["eager"] == {"failed": "not begun: no time was left"} and not engine.jobs
