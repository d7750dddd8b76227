"""recall_by_distance.py: its questions are what it says, long rows are read exactly, and a run leaves its page."""

import json

import pytest
import recall_by_distance
import torch
from lambda_study.run import make_config, make_model
from lambda_study.synthetic_tasks import VOCABULARY
from recall_by_distance import ARMS, accuracy, distances, main, questions, shared_by_arms


@pytest.mark.parametrize("distance", [4, 64, 1000])
def test_questions(distance):
    tokens, answers = questions(distance, 32)
    assert tokens.shape == (32, distance + 18)
    for row, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        first, last = [place for place, token in enumerate(row) if token == 15]
        assert last == len(row) - 1 and last - (first + 1) == distance and row[first + 1] == answer


def test_distances_double():
    assert distances(4) == [4] and distances(1024) == distances(1500) == [2**k for k in range(2, 11)]


class Perfect:
    """Finds the needle by looking, for the first `right` rows."""

    def __init__(self, right: int):
        self.right = right

    def prefill(self, tokens, chunk_size):
        needle = tokens.gather(1, (tokens == 15).int().argmax(1, keepdim=True) + 1)[:, 0]
        needle[self.right :] = 15
        self.logits = torch.nn.functional.one_hot(needle, VOCABULARY).float()
        return self


def test_accuracy_counts_right_answers():
    assert accuracy(Perfect(32), 64, 32, 8) == 1.0 and accuracy(Perfect(8), 64, 32, 8) == 0.25


@pytest.mark.parametrize("arm", ["griffin", "hawk"])
def test_long_rows_are_read_exactly(arm):
    model = make_model(
        make_config(shared_by_arms({"width": 64, "layers": 5, "window": 64}), ARMS[arm], VOCABULARY), 0
    ).eval()
    tokens, _ = questions(300, 2)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits[:, -1]
        in_chunks = model.prefill(tokens, chunk_size=90).logits
    torch.testing.assert_close(in_chunks, whole, rtol=1e-4, atol=1e-5)


SMALL = {"width": 32, "layers": 3, "window": 8}


def test_a_small_model_remembers_beyond_its_window(tmp_path):
    """Trained here: one attention of eight tokens and two recurrent layers recall at four times that distance."""
    words = ["--device", "cpu", "--steps", "300", "--learning_rate", "5e-3", "--seeds", "0", "--arms", "griffin"]
    words += ["--trained", "32", "--longest", "32", "--output", str(tmp_path / "recall")]
    words += [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    (run,) = main(words)["runs"]
    assert min(run["accuracy"].values()) > 0.9, run["accuracy"]


@pytest.mark.parametrize("arm, hears", [("attention", False), ("hawk", True)])
def test_what_reaches_the_question(monkeypatch, arm, hears):
    """Three windows of attention end in front of the needle, whatever is trained; a state does not."""
    config = make_config(shared_by_arms(SMALL), ARMS[arm], VOCABULARY)
    model = make_model(config, 0).eval()
    tokens, _ = questions(32, 2)
    place = (tokens == 15).int().argmax(1, keepdim=True) + 1
    other = tokens.scatter(1, place, (tokens.gather(1, place) + 1) % 15)
    first, second = (model.prefill(each).logits for each in (tokens, other))
    assert torch.equal(first, second) != hears


def test_a_run(tmp_path, capsys):
    words = ["--device", "cpu", "--steps", "3", "--rows", "4", "--seeds", "0", "1", "--arms", "hawk", "attention"]
    words += ["--trained", "8", "--longest", "32", "--held_out_rows", "8", "--output", str(tmp_path / "out" / "recall")]
    report = main([*words, "--commit", "abc"])
    assert json.loads((tmp_path / "out" / "recall.json").read_text())["run"] == report["run"]
    assert [(run["arm"], run["seed"]) for run in report["runs"]] == [
        ("hawk", 0), ("attention", 0), ("hawk", 1), ("attention", 1)
    ]  # fmt: skip
    page = (tmp_path / "out" / "recall.md").read_text()
    assert page in capsys.readouterr().out and "commit abc" in page and "chance is 6.7%" in page
    assert [line.split("|")[1].strip() for line in page.splitlines() if "(not trained)" in line] == [
        "16 (not trained)", "32 (not trained)"
    ]  # fmt: skip
    assert (tmp_path / "out" / "recall.png").stat().st_size > 0


def test_wrong_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--longest", "3"])
    assert "--longest 3: allowed are whole numbers from 4" in capsys.readouterr().err
    (tmp_path / "file").touch()
    for words, message in (
        (["--device", "foo"], "'foo' is not here: allowed is cpu"),
        (["--width", "30"], "--width 30 --layers 5 --window 64: num_attention_heads = 4"),
        (["--layers", "0"], "num_hidden_layers = 0: allowed are whole numbers from 1"),
        (["--window", "0"], "attention_window_size = 0"),
        (["--output", str(tmp_path / "file" / "x")], "file is a file; allowed is a folder"),
    ):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_titles():
    assert recall_by_distance.TITLES.keys() == ARMS.keys()
