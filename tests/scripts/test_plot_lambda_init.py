"""plot_lambda_init.py: what is drawn are the distributions of the initialisations and of a checkpoint's layers."""

import math
import runpy
import sys

import plot_lambda_init
import pytest
import torch
from _script_helpers import save_model
from plot_lambda_init import checkpoint_rows, initialisation_rows, main, mamba_row, values

from modeling_griffin import LAMBDA_INITS


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in initialisation_rows(8.0, 0.9, 0.999)}


def test_every_registered_initialisation_is_drawn(rows):
    assert list(rows) == list(LAMBDA_INITS)


def test_quantiles_are_those_of_the_definitions(rows):
    """Medians by hand: a^c at r = 1, a_t = a^(c/2) at r = 0.5, memory 1 / (1 - a_t)."""
    ends = [math.log(1 - bound) for bound in (0.9, 0.999)]
    kept = {
        "uniform": (0.9 + 0.999) / 2,
        "recurrent_gemma": ((0.9**2 + 0.999**2) / 2) ** 4,
        "log_uniform_memory": 1 - math.exp(sum(ends) / 2),
        "constant": math.sqrt(0.9 * 0.999),
    }
    for name, median in kept.items():
        open_gate, start, memory = (data.median().item() for data in values(rows[name]))
        assert open_gate == pytest.approx(median, rel=3e-3)
        assert start == pytest.approx(math.sqrt(median), rel=3e-3)
        assert memory == pytest.approx(1 / (1 - math.sqrt(median)), rel=0.03)
    assert values(rows["hippogriff"])[0].min().item() == pytest.approx(0.9, abs=1e-5)


def test_without_matplotlib_nothing_is_computed(monkeypatch):
    """The missing extra is said before the work."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        runpy.run_path(plot_lambda_init.__file__)


def test_mamba():
    open_gate, start, memory = values(mamba_row())
    assert open_gate is None and math.exp(-1.6) - 1e-6 < start.min() < start.max() < math.exp(-1e-3) + 1e-6
    assert memory.max().item() == pytest.approx(1 / (1 - math.exp(-1e-3)), rel=0.02)


def test_a_checkpoint_adds_a_row_for_each_recurrent_layer(tmp_path, capsys):
    model = save_model(tmp_path / "model", lambda_init="hippogriff")
    rows = checkpoint_rows(str(tmp_path / "model"))
    assert [row.name for row in rows] == ["trained, layer 0", "trained, layer 1"]  # layer 2 is attention
    for row, layer in zip(rows, model.model.layers):
        stored = layer.temporal_block.rg_lru.decay.lambda_bias.detach().double()
        assert torch.allclose(values(row)[0], torch.sigmoid(-stored) ** 8, rtol=1e-5)
        assert torch.allclose(values(row)[2], 1 / (1 - torch.sigmoid(-stored) ** 4), rtol=1e-3)
        assert "began as hippogriff" in row.note
    main(["--checkpoint", str(tmp_path / "model"), "--output", str(tmp_path / "out" / "figure")])
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "out" / "figure.svg").read_text()
    for words in (*LAMBDA_INITS, "Mamba", "trained, layer 1", "median 39"):
        assert words in svg
    assert str(tmp_path) not in svg
    page = (tmp_path / "out" / "figure.md").read_text()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| trained, layer 0 |")]
    kept = torch.sigmoid(-model.model.layers[0].temporal_block.rg_lru.decay.lambda_bias.detach()) ** 8
    ends = " / ".join(f"{end.item():.4f}" for end in (kept.min(), kept.median(), kept.max()))
    assert line in page and line.startswith(f"| trained, layer 0 | {ends} |")


@pytest.mark.parametrize("arguments", [["--bounds", "0.9", "0.8"], ["--c", "0"]])
def test_bad_values(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "allowed are 0 < LOW < HIGH < 1 and c > 0" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path / "file" / "figure")])
    assert "file is a file; allowed is a folder" in capsys.readouterr().err


def test_bad_checkpoints(tmp_path):
    save_model(tmp_path / "attention", layer_types=["sliding_attention"] * 3)
    for name, message in (("attention", "no recurrent layer"), ("nothing", "nothing' does not exist")):
        with pytest.raises(SystemExit, match=message):
            main(["--checkpoint", str(tmp_path / name), "--output", str(tmp_path / "figure")])
