"""lm_eval on local tasks, offline: choices, generation and rolling likelihood, against the model on each row alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _script_helpers import make_text, save_model
from evaluate_text import row_losses
from training.report import bits_per_byte
from transformers import AutoTokenizer


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


@pytest.fixture(scope="module")
def runs(place) -> list[dict]:
    """What lm_eval found: padded rows by the package's classes, rows alone by the code beside the weights."""
    return [evaluate(place, 3, "package"), evaluate(place, 1)]


def evaluate(place, batch_size: int, *package: str) -> dict:
    _, folder, tasks = place
    output = folder.parent / f"{batch_size}.json"
    command = [sys.executable, str(PROGRAM), str(folder), str(tasks), str(batch_size), str(output), *package]
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder.parent / "home")}
    subprocess.run(command, check=True, cwd=folder.parent, env={**os.environ, **environment})
    return json.loads(output.read_text())


@torch.no_grad()
def loglikelihood(model, context: list[int], continuation: list[int]) -> float:
    """Nats of the continuation, of one row without padding."""
    tokens = torch.tensor([context + continuation])
    log_probs = model(tokens[:, :-1]).logits[0].double().log_softmax(-1)
    return log_probs.gather(1, tokens[0, 1:, None])[-len(continuation) :].sum().item()


def test_which_code_ran(runs):
    assert runs[0]["code"].startswith("modeling_griffin.") and runs[1]["code"].startswith("transformers_modules.")


def test_choices(place, runs):
    """lm_eval pads likelihoods on the right."""
    tokenizer = AutoTokenizer.from_pretrained(place[1])
    for run in runs:
        for question, found in zip(QUESTIONS, run["samples"]["own_choice"]):
            context = tokenizer(question["question"], add_special_tokens=False).input_ids
            for choice, (value, _) in zip(question["choices"], found):
                whole = tokenizer(f"{question['question']} {choice}", add_special_tokens=False).input_ids
                expected = loglikelihood(place[0], context, whole[len(context) :])
                assert value == pytest.approx(expected, rel=1e-5)


def test_generation(place, runs):
    """lm_eval pads generation on the left, and decodes the new tokens."""
    tokenizer = AutoTokenizer.from_pretrained(place[1])
    for run in runs:
        for question, (found,) in zip(QUESTIONS, run["samples"]["own_generation"]):
            prompt = tokenizer(question["question"], add_special_tokens=False, return_tensors="pt").input_ids
            tokens = place[0].generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
            assert found == tokenizer.decode(tokens, skip_special_tokens=True) != ""


def test_rolling_likelihood_and_bits_per_byte(place, runs):
    """The same text by scripts/evaluate_text.py, which also counts the token that ends a document: left out here."""
    nats, size = 0.0, 0
    for number, record in enumerate(TEXTS):
        tokens = torch.tensor([BOS, *record["text"].encode()])
        row = {"input_ids": tokens, "position_ids": torch.arange(len(tokens)), "labels": tokens}
        losses = row_losses(place[0], row, chunk=50).double()
        for run in runs:
            assert run["samples"]["own_rolling"][number][0] == pytest.approx(-losses.sum().item(), rel=1e-5)
        nats, size = nats + losses.sum().item(), size + len(losses)
    for run in runs:
        assert run["metrics"]["own_rolling"]["bits_per_byte,none"] == pytest.approx(bits_per_byte(nats, size), abs=1e-4)
