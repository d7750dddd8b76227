"""The notebooks of examples/ run from the first cell to the last on a CPU, and do what they say."""

import json

import matplotlib
import pytest
from _docs import LINK, ROOT


NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def cells_of(path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def run(path, folder, monkeypatch) -> dict:
    """The names that the notebook leaves, run in an empty folder; plots are drawn, not shown."""
    monkeypatch.chdir(folder)
    matplotlib.use("Agg")
    namespace = {"__name__": "__main__"}
    for number, source in enumerate(cells_of(path, "code"), start=1):
        exec(compile(source, f"{path.name}, cell {number}", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_format(path):
    """Format 4.5 with outputs of one run in order; links from the text lead somewhere."""
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any(cell["outputs"] for cell in code)
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
    for text in cells_of(path, "markdown"):
        for target in LINK.findall(text):
            assert (path.parent / target.partition("#")[0]).exists(), f"{path.name}: {target} is not there"


def test_fine_tuning_with_lora(tmp_path, monkeypatch):
    """The adapter learns, and the merged folder has what it learnt."""
    names = run(ROOT / "examples" / "fine_tune_with_lora.ipynb", tmp_path, monkeypatch)
    assert names["after"] < names["before"] - 0.1
    merged = names["held_out_loss"](names["merged"], names["source"])
    assert abs(merged - names["after"]) < 1e-4
    assert (tmp_path / "build" / "merged" / "README.md").is_file()


def test_which_lambda(tmp_path, monkeypatch):
    """All arms learn, and no two are one arm by another name."""
    names = run(ROOT / "examples" / "which_lambda.ipynb", tmp_path, monkeypatch)
    losses = [loss for row in names["losses"].values() for loss in row]
    assert len(names["losses"]) == 3 and len(set(losses)) == 6
    assert max(losses) < 3.5  # 5.5 nats is a byte's before training
