"""lm_eval on local tasks, offline: choices, generation and rolling likelihood, against the model on each row alone."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _script_helpers import make_text, save_model
from evaluate_text import row_losses
from training.report import bits_per_byte


pytestmark = pytest.mark.tools
PROGRAM = Path(__file__).with_name("lm_eval_program.py")
BOS = 256  # of the byte tokenizer, which starts and ends documents with it
QUESTIONS = [
    {"question": make_text(6 + 9 * n, seed=n), "choices": ["yes", "no and no"], "answer": n % 2} for n in range(3)
]
TEXTS = [{"text": make_text(number, seed=number)} for number in (20, 5, 31)]
TASKS = {
    "own_choice": """
task: own_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "own_generation": """
task: own_generation
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 12, do_sample: false, until: ["\\u0000"]}
metric_list: [{metric: exact_match}]
""",
    "own_rolling": """
task: own_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(the model, its folder, the folder of tasks)."""
    place = tmp_path_factory.mktemp("lm_eval")
    (place / "tasks").mkdir()
    for name, task in TASKS.items():
        records = TEXTS if name == "own_rolling" else QUESTIONS
        data = place / f"{name}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (place / "tasks" / f"{name}.yaml").write_text(task.lstrip() + source)
    return save_model(place / "model"), place / "model", place / "tasks"


def evaluate(place, tmp_path, batch_size: int, *package: str) -> dict:
    _, folder, tasks = place
    output = tmp_path / f"{batch_size}{''.join(package)}.json"
    command = [sys.executable, str(PROGRAM), str(folder), str(tasks), str(batch_size), str(output), *package]
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, **environment})
    return json.loads(output.read_text())


@torch.no_grad()
def loglikelihood(model, context: list[int], continuation: list[int]) -> float:
    """Nats of the continuation, of one row without padding."""
    tokens = torch.tensor([context + continuation])
    log_probs = model(tokens[:, :-1]).logits[0].double().log_softmax(-1)
    return log_probs.gather(1, tokens[0, 1:, None])[-len(continuation) :].sum().item()


def test_three_kinds_of_tasks(place, tmp_path):
    """The package's classes and the code beside the weights, rows alone and padded rows of a batch: the same numbers.

    lm_eval pads likelihoods on the right and generation on the left.
    """
    model = place[0]
    runs = [evaluate(place, tmp_path, 3, "package"), evaluate(place, tmp_path, 1)]
    assert runs[0]["code"].startswith("modeling_griffin.") and runs[1]["code"].startswith("transformers_modules.")
    for run in runs:
        for question, found in zip(QUESTIONS, run["samples"]["own_choice"]):
            for choice, (value, _) in zip(question["choices"], found):
                expected = loglikelihood(model, list(question["question"].encode()), list(f" {choice}".encode()))
                assert float(value) == pytest.approx(expected, abs=2e-3)
        rolling = zip(TEXTS, run["samples"]["own_rolling"])
        for record, found in rolling:
            value = found[0] if isinstance(found, list) else found
            expected = loglikelihood(model, [BOS], list(record["text"].encode()))
            assert float(value) == pytest.approx(expected, rel=1e-5)
    assert runs[0]["samples"]["own_generation"] == runs[1]["samples"]["own_generation"]
    assert any(text for found in runs[0]["samples"]["own_generation"] for text in found)


def test_bits_per_byte_are_those_of_evaluate_text(place, tmp_path):
    """The same text by scripts/evaluate_text.py, which also counts the token that ends a document: left out here."""
    model, nats, size = place[0], 0.0, 0
    for record in TEXTS:
        tokens = torch.tensor([BOS, *record["text"].encode()])
        row = {"input_ids": tokens, "position_ids": torch.arange(len(tokens)), "labels": tokens}
        nats, size = nats + row_losses(model, row, chunk=50).double().sum().item(), size + len(tokens) - 1
    found = evaluate(place, tmp_path, 2, "package")["metrics"]["own_rolling"]["bits_per_byte,none"]
    assert found == pytest.approx(bits_per_byte(nats, size), abs=1e-4)
    assert math.isfinite(found)
