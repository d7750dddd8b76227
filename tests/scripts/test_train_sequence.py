"""train.py with `sequence_parallel_size`: the run of one process, saved, and resumed by another number of them."""

import json
from pathlib import Path

import pytest

from modeling_griffin import GriffinForCausalLM
from tests.ranks import run_program


# Of float32 sums in another order through steps of AdamW, as in test_train_launch.py.
LOSS, WEIGHT = 2e-5, 2e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict]:
    """Each row over two processes, resumed by one; two times two beside two; and one process."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_program("scripts.train_sequence_program", folder, timeout=900)


def assert_same_run(folder: Path, reference: Path) -> None:
    """Losses, held-out figures, tokens counted, gradients' norms and the weights, loaded as anyone would."""
    metrics, expected = (json.loads((each / "metrics.json").read_text()) for each in (folder, reference))
    for kind, names in {"train": ("loss", "grad_norm", "tokens"), "eval": ("eval_loss", "eval_bits_per_byte")}.items():
        assert metrics[kind] and len(metrics[kind]) == len(expected[kind])
        for name in names:
            found = [entry[name] for entry in metrics[kind]]
            assert found == pytest.approx([entry[name] for entry in expected[kind]], rel=LOSS), name
    got, wanted = GriffinForCausalLM.from_pretrained(folder), GriffinForCausalLM.from_pretrained(reference)
    for name, tensor in wanted.state_dict().items():
        error = (got.state_dict()[name] - tensor).abs().max() / tensor.abs().max()
        assert error <= WEIGHT, f"{name}: {error:.1e} of the largest value"


@pytest.mark.parametrize("run, reference", [("two", "alone/out"), ("four", "pair"), ("resumed", "alone/out")])
def test_the_run_of_fewer_processes(runs, run, reference):
    folder, _ = runs
    assert_same_run(folder / run, folder / reference)


def test_a_size_that_does_not_divide(runs):
    assert "sequence_parallel_size = 3: allowed are the divisors of 2" in runs[1]["refused"]


def test_smoothed_labels_are_refused(runs):
    """Their loss is Trainer's, from logits of whole rows."""
    assert "label_smoothing_factor = 0.1: allowed with rows shared over ranks is 0.0" in runs[1]["smoothed"]


def test_stock_trainer(runs):
    """`parallelize_trainer` alone, with accumulated gradients: the run of one process."""
    found, expected = runs[1]["stock"], runs[1]["stock alone"]
    assert found["tokens"] == expected["tokens"] > 0
    for name, count in (("loss", 4), ("grad_norm", 4), ("eval_loss", 2)):
        assert len(expected[name]) == count
        assert found[name] == pytest.approx(expected[name], rel=LOSS), name
    for name, tensor in expected["weights"].items():
        assert (found["weights"][name] - tensor).abs().max() <= WEIGHT * tensor.abs().max(), name
