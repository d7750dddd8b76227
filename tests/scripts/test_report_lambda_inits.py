"""report_lambda_inits.py: statistics against scipy's, and words that say what planted figures say."""

import json
import math

import numpy as np
import pytest
from lambda_study.statistics import by_arm_and_seed, compare, holm, interval, metrics, pooled_deviation
from report_lambda_inits import main, with_kept_note
from scipy import stats


def record(arm, seed, loss, measured=True, task="recall", rate=1e-3, status="finished"):
    """A run of two sizes whose losses are `loss` on the trained one and twice that beyond."""
    layer = {"memory": [1.0, 2.0, 3.0, 4.0, 5.0 + seed], "moved": 0.25}
    return {
        "key": f"{task}/{arm}/{rate}/{seed}/{measured}",
        "task": task,
        "arm": arm,
        "seed": seed,
        "measured": measured,
        "learning_rate": rate,
        "steps": 10,
        "status": status,
        "parameters": 1234,
        "seconds": 30.0,
        "settings": {
            "kind": "delayed_recall",
            "model": {"layout": "hawk"},
            "sizes": [64],
            "rows": 4,
            "held_out_rows": 8,
        },
        "curve": [{"step": step, "loss": loss + 1 - step / 10, "accuracy": 0.5} for step in (0, 5, 10)],
        "memory": [{"step": step, "layers": [layer, layer]} for step in (0, 5, 10)],
        "evaluations": [{"size": 64, "loss": loss, "accuracy": 0.5}, {"size": 128, "loss": 2 * loss, "accuracy": 0.25}],
        "device": "cpu",
        "hardware": "abacus",
        "versions": {"torch": "9"},
        "commit": "abc",
        "command": "python x",
        "finished": "2030-01-02T03:04:05+00:00",
    }


def write(folder, records):
    folder.mkdir(exist_ok=True)
    (folder / "runs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder


SEEDS = range(5)
NOISE = np.random.default_rng(0).normal(size=(3, len(SEEDS)))
LOSSES = {"uniform": 1 + 0.1 * NOISE[0], "worse": 1.5 + 0.1 * NOISE[0] + 0.01 * NOISE[1], "same": 1 + 0.1 * NOISE[2]}


@pytest.fixture
def runs():
    return [record(arm, seed, LOSSES[arm][seed]) for seed in SEEDS for arm in LOSSES]


def test_statistics_are_scipys(runs):
    table = compare(by_arm_and_seed(runs, "loss"), "uniform")
    assert [c.arm for c in table] == ["worse", "same"]
    for c in table:
        expected = stats.ttest_rel(LOSSES[c.arm], LOSSES["uniform"])
        low, high = expected.confidence_interval(0.95)
        assert c.difference == pytest.approx(np.mean(LOSSES[c.arm]) - np.mean(LOSSES["uniform"]))
        assert (c.difference - c.half_width, c.difference + c.half_width) == pytest.approx((low, high))
        assert c.p == pytest.approx(expected.pvalue)
        noise = math.sqrt(np.mean([np.var(losses, ddof=1) for losses in LOSSES.values()]))
        assert c.effect == pytest.approx(c.difference / noise)
    assert [c.differs for c in table] == [True, False]
    assert table[0].p_holm == pytest.approx(2 * table[0].p) and table[1].p_holm == pytest.approx(table[1].p)


def test_holm():
    # The example of Holm's procedure with four hypotheses: sorted p times 4, 3, 2, 1, never falling.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, math.nan, 0.9]) == pytest.approx([1.0, math.nan, 1.0], nan_ok=True)
    assert holm([]) == []


def test_only_pairs_of_the_same_seed_are_compared(runs):
    cut_short = [each for each in runs if not (each["arm"] == "worse" and each["seed"] > 2)]
    worse, _ = compare(by_arm_and_seed(cut_short, "loss"), "uniform")
    assert worse.difference == pytest.approx(np.mean((LOSSES["worse"] - LOSSES["uniform"])[:3]))
    assert len(worse.values) == 3


def test_few_seeds():
    assert interval(np.array([0.3])) == (pytest.approx(0.3), math.inf, pytest.approx(math.nan, nan_ok=True))
    assert interval(np.array([0.0, 0.0])) == (0.0, 0.0, 1.0)
    assert math.isnan(pooled_deviation({"uniform": {0: 1.0}}))
    mean, half_width, _ = interval(np.array([1.0, 2.0, 4.0]))
    assert (mean, half_width) == pytest.approx((7 / 3, 4.302653 * np.std([1, 2, 4], ddof=1) / math.sqrt(3)))


def test_metrics(runs):
    figures = metrics(runs[0])
    loss = LOSSES["uniform"][0]
    assert figures["loss"] == pytest.approx(loss) and figures["mean loss"] == pytest.approx(loss + 0.25)  # not step 0
    assert figures["loss beyond"] == figures["loss @ 128"] == pytest.approx(2 * loss)
    assert figures["accuracy @ 64"] == 0.5 and figures["accuracy beyond"] == 0.25


def test_words_say_what_the_figures_say(runs, tmp_path, capsys):
    tuning = [record(arm, 99, 0.0, measured=False, rate=rate) for arm in LOSSES for rate in (1e-3, 1e-2)]
    main([str(write(tmp_path / "sweep", [*tuning, *runs]))])
    assert "sweep_recall.png" in capsys.readouterr().out
    text = (tmp_path / "sweep.md").read_text()
    words = text.split("## In plain words")[1].split("## ")[0]
    difference = np.mean(LOSSES["worse"] - LOSSES["uniform"])
    assert "**No reason found here to leave `uniform`**" in words
    assert f"`worse` was reliably worse than `uniform`: recall, final loss by {difference:+.4f} nats" in words
    assert "No reliable difference from `uniform`: `same`." in words and "does not prove them equal" in words
    assert "its edge for `same` (0.001), `uniform` (0.001), `worse` (0.001)" in text
    assert "Tasks: selective copying, induction heads, language modelling." in text
    assert "TF32" not in text
    assert "`python x`; commit abc; abacus; torch 9; 2030-01-02. 21 runs, 15 of them measured" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| worse | 0.001 | 5 |")]
    deviation = np.std(LOSSES["worse"], ddof=1)
    assert row.split("|")[4].strip() == f"{np.mean(LOSSES['worse']):.4f} ({deviation:.4f})"
    assert "| worse | 3.0 | 3.0 | 1.0 to 7.0 | 0.250 |" in text


def test_the_precision_of_a_gpu_is_said(runs, tmp_path):
    main([str(write(tmp_path / "sweep", [{**run, "device": "cuda"} for run in runs]))])
    assert "products were computed in TF32" in (tmp_path / "sweep.md").read_text()


def test_a_hint_is_called_a_hint(tmp_path):
    """A paired difference whose p is 0.03 alone, 0.06 after the correction over two arms."""
    noise = 0.01 * (NOISE[1] - NOISE[1].mean())
    shift = stats.t.isf(0.03 / 2, len(SEEDS) - 1) * np.std(noise, ddof=1) / math.sqrt(len(SEEDS))
    losses = {**LOSSES, "worse": LOSSES["uniform"] + shift + noise}
    runs = [record(arm, seed, losses[arm][seed]) for seed in SEEDS for arm in losses]
    main([str(write(tmp_path / "sweep", runs))])
    text = (tmp_path / "sweep.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("- `worse`: a hint")]
    assert f"recall, final loss by {shift:+.4f} nats" in line
    assert "p 0.060" in text and "reliably worse" not in text


def test_a_better_arm_is_named(tmp_path):
    runs = [record(arm, seed, LOSSES[arm][seed]) for seed in SEEDS for arm in ("uniform", "worse")]
    main([str(write(tmp_path / "sweep", runs)), "--reference", "worse"])
    text = (tmp_path / "sweep.md").read_text()
    assert "`uniform` was reliably better than `worse`: recall, final loss by -0.5" in text
    assert "No reason found" not in text


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_sweep_that_is_not_finished(runs, tmp_path, seeds):
    """A seed or two, an arm that diverged, a task without measured runs: a page, and no claim from a single pair."""
    some = [each for each in runs if each["seed"] < seeds]
    lost = {**record("lost", 0, math.nan, status="diverged"), "evaluations": []}
    tuning = record("uniform", 9, 1.0, measured=False, task="other")
    main([str(write(tmp_path / "sweep", [*some, lost, tuning]))])
    text = (tmp_path / "sweep.md").read_text()
    assert "## other" not in text and "| lost |" in text
    words = text.split("## How")[0]
    assert "`lost` diverged on recall with seed 0." in words and "`lost` differs most" not in words
    assert "not known" in text
    if seeds == 1:
        assert "reliably worse" not in words and "95% interval not known" in words


def test_a_first_run_that_diverged_hides_no_others(runs, tmp_path):
    """The tables keep the sizes that others have, also where nothing but the trained size was evaluated."""
    lost = {**record("lost", 0, math.nan, status="diverged"), "evaluations": []}
    main([str(write(tmp_path / "sweep", [lost, *runs]))])
    text = (tmp_path / "sweep.md").read_text()
    assert "| accuracy at | 64 | 128 |" in text and "| lost |  |  |" in text
    assert "No reliable difference from `uniform`: `same`." in text  # and not `lost`

    trained_size_only = [{**each, "evaluations": each["evaluations"][:1]} for each in runs]
    main([str(write(tmp_path / "sweep", [lost, *trained_size_only]))])
    text = (tmp_path / "sweep.md").read_text()
    assert "| accuracy at | 64 |" in text and "| same | 0.001 | 5 |" in text


def test_shorter_runs_for_the_learning_rates_are_said(runs, tmp_path):
    tuning = [{**record("uniform", 9, 1.0 + rate, measured=False, rate=rate), "steps": 3} for rate in (0.5, 0.25)]
    main([str(write(tmp_path / "sweep", [*tuning, *runs]))])
    text = (tmp_path / "sweep.md").read_text()
    assert "10 steps (3 where learning rates were chosen); seeds: 5." in text
    assert "| loss after 3 steps at the rate | 0.25 | 0.5 |\n|---|---|---|\n| uniform | 1.2500 | 1.5000 |" in text
    assert "rates that were best after 3 steps are best after 10" in text


def test_a_page_of_a_sweep_that_runs_leaves_its_file_alone(runs, tmp_path):
    folder = write(tmp_path / "sweep", runs)
    with (folder / "runs.jsonl").open("a") as file:
        file.write('{"key": "being wri')
    before = (folder / "runs.jsonl").read_bytes()
    main([str(folder)])
    assert (folder / "runs.jsonl").read_bytes() == before


def test_without_the_reference_it_says_so(tmp_path, capsys):
    folder = write(tmp_path / "sweep", [record("same", 0, 1.0)])
    with pytest.raises(SystemExit):
        main([str(folder)])
    assert "holds no measured run of the reference 'uniform'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nothing")])
    assert "nothing does not exist: allowed are folders of" in capsys.readouterr().err


def test_a_note_above_the_figures_outlives_a_page_that_is_written_anew(tmp_path):
    path, new = tmp_path / "page.md", "# New\n\n`new command`; commit b.\n\nfigures\n"
    assert with_kept_note(path, new) == new
    path.write_text("# Old\n\n`old command`; commit a.\n\nfigures\n")
    assert with_kept_note(path, new) == new
    path.write_text("# Old\n\n**Correction.** Said\nhere.\n\nAnd `here`.\n\n`old command`; commit a.\n")
    kept = "# New\n\n**Correction.** Said\nhere.\n\nAnd `here`.\n\n`new command`; commit b.\n\nfigures\n"
    assert with_kept_note(path, new) == kept
    path.write_text(kept)
    assert with_kept_note(path, new) == kept
