"""The annotated tree of docs/architecture.md, made from the files: `python tests/_tree.py` writes it anew.

A file's note is what the file says of itself: the first sentence of a module's docstring, the first heading of a page.
What has neither is annotated here, and so are folders.
"""

import ast
import json
import re
import subprocess
from pathlib import Path

from _docs import ROOT


PAGE = ROOT / "docs" / "architecture.md"
BLOCK = re.compile(r"(?<=^## The tree\n\n```\n).*?(?=^```$)", flags=re.M | re.S)
WIDTH = 118
FOLDERS = {  # in this order; True: with all files in it
    "docs/": ("one page a task", True),
    "docs/designs/": ("what was tried while designing, and what it brought", True),
    "examples/": ("notebooks that run on a CPU", True),
    "modeling_griffin/": ("the package; its flat files, but for the first, are the model and ship to the Hub", True),
    "modeling_griffin/conversion/": ("from RecurrentGemma and back", True),
    "modeling_griffin/decode/": ("tokens over fixed buffers", True),
    "modeling_griffin/decode/kernels/": ("the Triton kernels of a step", True),
    "modeling_griffin/decode/speculative/": ("drafts by prompt lookup and by an assistant", True),
    "modeling_griffin/export/": ("torch.export and ONNX: a Griffin as a function of tokens and state", True),
    "modeling_griffin/interpretability/": ("what the recurrence computes inside, as tensors", True),
    "modeling_griffin/kernels/": ("training speed on a GPU", True),
    "modeling_griffin/kernels/device/": ("which GPU runs what, and by which tiles", True),
    "modeling_griffin/parallel/": ("several GPUs", True),
    "modeling_griffin/saving/": ("folders that are complete, and their cards", True),
    "modeling_griffin/serving/": ("many requests at once; states as objects", True),
    "modeling_griffin/serving/vllm/": ("the plugin for vLLM", True),
    "modeling_griffin/training/": ("recorded training steps", True),
    "configuration/": ("data: models, training runs, launchers, LoRA by TRL, and tables of them", False),
    "scripts/": ("thin verbs with a main(), and what they import", True),
    "scripts/training/": ("what train.py imports", True),
    "scripts/benchmarks/": ("what the benchmarks share", True),
    "scripts/lambda_study/": ("the comparison of Λ initialisations", True),
    "scripts/text_corpus/": ("a training text out of public packages", True),
    "scripts/planning/": ("formulas of memory and communication", True),
    "scripts/publishing/": ("which files are pushed", True),
    "scripts/portability/": ("compiling for GPUs that are not there", True),
    "scripts/help/": ("what `griffin VERB --help` prints", False),
    "tests/": ("the same folders as what they test", False),
    "results/": ("an index, and one folder a study with a page a measured run", False),
}
NOTES = {
    "README.md": "what it is, why, install, two commands, quick start, map of the documentation",
    "LICENSE": "Apache 2.0",
    "NOTICE": "whose numerics are followed",
    "CHANGELOG.md": "what changed for users, and which figures were withdrawn",
    "CONTRIBUTING.md": "how to add an initialisation, a GPU, a kernel, a study",
    "CITATION.cff": "how to cite",
    "SECURITY.md": "how to report a fault, and what is promised",
    "Makefile": "demo, test, test-common, test-gpu, lint: each makes the environment it needs",
    "pyproject.toml": "metadata, dependencies, extras, linter, pytest markers",
    "model_card.md": "the template of the card that goes to the Hub",
    "architecture.md": "the rules, and this tree",
    "distributed.md": "one process or many: DDP, FSDP2, tensor parallelism",
    "evaluation.md": "bits per byte by position; lm_eval",
    "fine_tuning.md": "Trainer, PEFT, TRL",
    "hub.md": "saving, sharing, the card, what is proved",
    "lambda.md": "the initialisations of Λ, and which one to take",
    "long_context.md": "training on long rows, reading long texts",
    "performance.md": "every measured speed, beside peers",
    "pretraining.md": "from text to a model",
    "recurrent_gemma.md": "conversion, agreement, what differs",
    "py.typed": "tells type checkers that the annotations are there",
}


def files() -> list[str]:
    """Tracked files and those that will be, from the root; hidden and empty `__init__.py` stay out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    seen = {name for name in listed if not name.startswith(".") and (ROOT / name).is_file()}
    return sorted(name for name in seen if not name.endswith("__init__.py") or (ROOT / name).stat().st_size)


def note_of(path: Path) -> str:
    """What the file is, in a clause."""
    if path.name in NOTES:
        return NOTES[path.name]
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    elif path.suffix == ".ipynb":
        text = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"][0].lstrip("# ")
    else:
        text = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    sentence = re.split(r"(?<=[.;?])(?<!et al\.)\s", " ".join(text.split()), maxsplit=1)[0].rstrip(".:;")
    if not sentence:
        raise ValueError(f"{path} does not say what it is: a docstring, a heading, or a line of NOTES in {__file__}")
    return sentence


def lines_of(folder: str, names: list[str]) -> list[str]:
    """The folder's files, then its folders with theirs. `folder`: "" or "name/"."""
    depth = folder.count("/")
    inside = [name for name in names if name.startswith(folder)]
    here = [name[len(folder) :] for name in inside if "/" not in name[len(folder) :]]
    here.sort(key=lambda name: (name != "__init__.py", name))
    lines = [line_of("  " * depth + name, note_of(ROOT / folder / name)) for name in here]
    below = {folder + name[len(folder) :].split("/")[0] + "/" for name in inside if "/" in name[len(folder) :]}
    unknown = below - FOLDERS.keys()
    if unknown:
        raise ValueError(f"{sorted(unknown)}: folders without a line in FOLDERS of {__file__}")
    for name in (name for name in FOLDERS if name in below):
        note, in_full = FOLDERS[name]
        lines.append(line_of("  " * depth + name[len(folder) :], note))
        lines += lines_of(name, names) if in_full else []
    return lines


def line_of(name: str, note: str) -> str:
    line = f"{name:38} {note}"
    return line if len(line) <= WIDTH else line[: WIDTH - 4].rsplit(" ", 1)[0].rstrip(",;:") + " ..."


def tree() -> str:
    return "\n".join(lines_of("", files())) + "\n"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda _: tree(), text), encoding="utf-8")
