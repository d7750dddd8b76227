"""Evaluates a saved model by lm_eval: python lm_eval_program.py FOLDER TASKS BATCH_SIZE OUTPUT [package].

With `package` this package is imported, and its classes run; without, the code beside the weights.
"""

import json
import sys

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


def main(folder: str, tasks: str, batch_size: str, output: str, package: str = "") -> None:
    if package:
        import modeling_griffin  # noqa: F401 - registers Griffin
    # Else the tokenizer's start of document is scored as well, behind the one that lm_eval puts in front of a text.
    options = {"add_bos_token": False, "max_length": 256, "batch_size": int(batch_size)}
    model = HFLM(pretrained=folder, trust_remote_code=True, device="cpu", **options)
    manager = TaskManager(include_path=tasks, include_defaults=False)
    names = ["own_choice", "own_generation", "own_rolling"]
    found = simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0)
    samples = {name: [sample["filtered_resps"] for sample in found["samples"][name]] for name in names}
    metrics = {name: found["results"][name] for name in names}
    with open(output, "w", encoding="utf-8") as file:
        code = type(model.model).__module__
        json.dump({"code": code, "samples": samples, "metrics": metrics}, file, default=str)


if __name__ == "__main__":
    main(*sys.argv[1:])
